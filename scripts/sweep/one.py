"""Examines one type: builds, walks, quantizes, exports, reloads and compares it."""

from __future__ import annotations

import re
import tempfile
import time
import traceback
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from building import build
from inputs import batches_for
from maker import Batch
from running import difference, equal, outputs, walk

from gptq_plugin import QuantizeConfig, QuantizeModule, load_quantized
from gptq_plugin.errors import CalibrationError, TargetError
from gptq_plugin.report.report import QuantizeReport

Result = dict[str, Any]
SHORT = {  # part of a reason: its name in the table
    "32-bit words": "too narrow for 32-bit words",
    "tied to": "tied to another's weight",
    "never called": "never called",
    "reads its weight": "read by the model itself",
}
ROUNDING = 1e-5  # the alignment of tensors in memory affects the order of some sums


class Differs(Exception):
    """Outputs differ from the expected ones."""


def examine(mapping: str, kind: str) -> Result:
    """Examines a type: `stage` of the result is "ok", or the stage that failed, with the `error`."""
    started = time.perf_counter()
    result: Result = {"mapping": mapping, "type": kind, "stage": "ok", "error": "", "notes": []}
    try:
        with torch.random.fork_rng():
            _examine(mapping, kind, result)
    except Exception as error:  # noqa: BLE001 - a row of the table, not the end of the sweep
        result["error"] = f"{type(error).__name__}: {error}"
        result["trace"] = "".join(traceback.format_exception(error))[-6000:]
    result["seconds"] = round(time.perf_counter() - started, 1)
    return result


def _examine(mapping: str, kind: str, result: Result) -> None:
    result["stage"] = "not built"
    model = build(mapping, kind)
    result["class"] = type(model).__name__
    result["stage"] = "no inputs"
    result["inputs"], batches = batches_for(model)
    result["stage"] = "targets"
    config = QuantizeConfig(group_size=32, nsamples=10**6)
    try:
        targets, skipped = QuantizeModule(config).check(model)
    except TargetError as error:
        if "lm_head=false" not in str(error):
            raise
        config = replace(config, lm_head=True)
        targets, skipped = QuantizeModule(config).check(model)
        _note(result, "its only linear layer is the output head, which was quantized on request")
    tower = [s.name for s in skipped if s.reason.startswith("outside the language model")]
    names = [*(target.name for target in targets), *(skip.name for skip in skipped)]
    rule = rule_for(tower, [name for name in names if name not in tower])
    report = _quantized(model, batches, config, result, "")
    result |= figures(report)
    if tower and result["inputs"] != "text":
        asked = replace(config, dynamic={rule: {"bits": 4}})
        report = _quantized(build(mapping, kind), batches, asked, result, "towers: ")
        result["with_towers"] = sum(m.method != "float" for m in report.modules)
        if result["with_towers"] == result["quantized"]:
            _note(result, "the towers were not called")
    result["stage"] = "ok"


def _quantized(model: Any, batches: list[Batch], config: QuantizeConfig, result: Result, which: str) -> QuantizeReport:
    """Quantizes and verifies the model; records the progress in `result`."""
    result["stage"] = f"{which}plain forward"
    plain = outputs(model, batches)
    if not all(torch.isfinite(t).any() for t in plain):
        raise ValueError("the outputs are not finite")
    random = not equal(plain, outputs(model, batches, seed=1))
    if random:
        _note(result, "draws random numbers: batches walked one by one")
    result["stage"] = f"{which}walk"
    walked = [t for some in ([[b] for b in batches] if random else [batches]) for t in walk(model, some, config)]
    if not equal(walked, plain):
        raise Differs(f"the walk's outputs differ by {difference(walked, plain):.1g} of the largest")
    result["stage"] = f"{which}quantize"
    quantizer = QuantizeModule(config)
    report, batches = _enough(quantizer, model, batches, result)
    result["stage"] = f"{which}export"
    in_memory = outputs(model, batches)
    with tempfile.TemporaryDirectory() as folder:
        out = quantizer.export(model, Path(folder) / "out")
        result["stage"] = f"{which}load"
        loaded = load_quantized(out)
        result["stage"] = f"{which}compare"
        reloaded = outputs(loaded, batches)
    if not equal(reloaded, in_memory):
        said = f"the reloaded outputs differ by {difference(reloaded, in_memory):.1g} of the largest"
        if difference(reloaded, in_memory) > ROUNDING:
            raise Differs(said)
        _note(result, said)
    if equal(in_memory, plain):
        raise Differs("the quantized model computes what the float one does")
    return report


def _enough(
    quantizer: QuantizeModule, model: Any, batches: list[Batch], result: Result
) -> tuple[QuantizeReport, list[Batch]]:
    """Quantizes; if that needs more samples, again with as many as the narrowest layer has inputs."""
    try:
        return quantizer.quantize(model, batches), batches
    except CalibrationError as error:
        if "too short" not in str(error):
            raise
    least = min(target.weight.shape[1] for target in quantizer.check(model)[0])
    _note(result, "with more samples")
    _, batches = batches_for(model, (least // 2, least - least // 2))
    return quantizer.quantize(model, batches), batches


def figures(report: QuantizeReport) -> Result:
    """The table's figures of quantized and float parts."""
    done = [m for m in report.modules if m.method != "float"]
    left = [m for m in report.modules if m.method == "float"]
    assert report.coverage is not None
    total = report.coverage.quantized + sum(one.bytes for one in report.coverage.floats)
    told = {m.name for m in left}
    other = [one for one in report.coverage.floats if one.name.rpartition(".")[0] not in told]
    odd: dict[str, float] = defaultdict(float)
    for one in other:
        if len(one.shape) > 1 and one.reason not in ("embeddings", "convolutions"):
            odd[one.reason] += one.bytes / total
    return {
        "quantized": len(done),
        "float": dict(Counter(_short(m.reason) for m in left)),
        "odd": {reason: share for reason, share in odd.items() if share >= 0.005},
        "float_names": {m.name: m.reason for m in left},
        "float_share": 1 - 4 * sum(m.shape[0] * m.shape[1] for m in done) / total,
        "deviations": [d for d in report.deviations if "nsamples" not in d],
    }


def rule_for(names: Iterable[str], others: list[str]) -> str:
    """A regular expression for `dynamic` that matches exactly these layers, from the shortest sufficient prefixes."""
    starts: dict[str, None] = {}
    for name in names:
        parts = name.split(".")
        beginnings = (".".join(parts[: n + 1]) for n in range(len(parts)))
        starts[next(b for b in beginnings if not any(f"{other}.".startswith(f"{b}.") for other in others))] = None
    return f"({'|'.join(map(re.escape, starts))})(\\.|$)"


def _short(reason: str) -> str:
    for part, short in SHORT.items():
        if part in reason:
            return short
    return reason.partition(" (")[0]


def _note(result: Result, what: str) -> None:
    if what not in result["notes"]:
        result["notes"].append(what)
