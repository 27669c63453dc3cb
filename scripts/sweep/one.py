"""Everything the sweep does with one type: build, walk, quantize, export, reload, compare."""

from __future__ import annotations

import contextlib
import math
import tempfile
import time
import traceback
from collections import Counter, defaultdict
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from inputs import TRIED, Batch, batches_for
from overrides import BY_MAPPING
from tiny import config_class, tiny
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.models.auto import modeling_auto

from gptq_plugin import QuantizeConfig, QuantizeModule, load_quantized, lockstep
from gptq_plugin.errors import CalibrationError
from gptq_plugin.forward import evaluating
from gptq_plugin.targets import find_targets, is_linear

MAPPINGS = {
    "causal-lm": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "seq2seq-lm": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "image-text-to-text": "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
    "masked-lm": "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "image-classification": "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",
    "speech-seq2seq": "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES",
    "ctc": "MODEL_FOR_CTC_MAPPING_NAMES",
}
LARGEST = 20_000_000  # parameters; more is not tiny
Result = dict[str, Any]


def rows() -> list[tuple[str, str]]:
    """All (mapping, type)."""
    return [(mapping, kind) for mapping, name in MAPPINGS.items() for kind in getattr(modeling_auto, name)]


def examine(mapping: str, kind: str) -> Result:
    """What became of a type: `stage` is "ok", or where it ended, with the `error`."""
    started = time.perf_counter()
    result: Result = {"mapping": mapping, "type": kind, "stage": "ok", "error": "", "notes": []}
    try:
        with torch.random.fork_rng():
            _examine(mapping, kind, result)
    except Exception as error:  # noqa: BLE001 - a row of the table, not the end of the sweep
        result["error"] = f"{type(error).__name__}: {error}"
        result["where"] = _where(error)
        result["trace"] = "".join(traceback.format_exception(error))[-6000:]
    result["seconds"] = round(time.perf_counter() - started, 1)
    return result


def _examine(mapping: str, kind: str, result: Result) -> None:
    result["stage"] = "not built"
    model = build(mapping, kind)
    result["class"] = type(model).__name__
    result["parameters"] = sum(p.numel() for p in model.parameters())
    with contextlib.suppress(Exception):
        result["fused"] = fused(model)
        result["bytes"] = bytes_by_kind(model)
    result["stage"] = "no inputs"
    result["inputs"], batches = batches_for(model)
    result["tried"] = list(TRIED)
    result["shapes"] = {k: list(v.shape) for k, v in batches[0].items() if isinstance(v, Tensor)}
    result["stage"] = "plain forward"
    plain, again = (outputs(model, batches) for _ in range(2))
    result["repeatable"] = equal(plain, again)
    if not all(torch.isfinite(t).any() for t in plain):
        raise ValueError("the outputs are not finite")
    result["stage"] = "targets"
    config = fitting(model, QuantizeConfig(group_size=-1, nsamples=10**6))
    result["group_size"] = config.group_size
    result["stage"] = "walk"
    walked = walk(model, batches, config)
    result["walk"] = "identical" if equal(walked, plain) else f"differs by {difference(walked, plain):.1g}"
    if not result["repeatable"]:
        result["walk"] += " (a plain forward differs from itself)"
    result["stage"] = "quantize"
    weights = dict(model.named_parameters())
    total = sum(p.numel() * p.element_size() for p in weights.values())
    quantizer = QuantizeModule(config)
    try:
        report = quantizer.quantize(model, batches)
    except CalibrationError as error:
        if "too short" not in str(error):
            raise
        least = min(t.weight.shape[1] for t in find_targets(model, config)[0])
        result["notes"].append("one row a sample: as many samples as the narrowest layer has inputs")
        _, batches = batches_for(model, (least // 2, least - least // 2))
        report = quantizer.quantize(model, batches)
    done = [m for m in report.modules if m.method != "float"]
    result["quantized"] = len(done)
    result["float"] = dict(Counter(_short(m.reason) for m in report.modules if m.method == "float"))
    result["float_names"] = {m.name: m.reason for m in report.modules if m.method == "float"}
    quantized = {f"{m.name}.weight" for m in done}
    result["float_share"] = sum(p.numel() * p.element_size() for n, p in weights.items() if n not in quantized) / total
    said = [d for m in done for d in m.deviations if "calibration tokens for" not in d and "damp" not in d]
    result["deviations"] = [d for d in report.deviations if "nsamples" not in d] + sorted(set(said))
    result["stage"] = "export"
    quantized_outputs = outputs(model, batches)
    with tempfile.TemporaryDirectory() as folder:
        out = quantizer.export(model, Path(folder) / "out")
        result["stage"] = "load"
        again_model = load_quantized(out)
        result["stage"] = "compare"
        loaded = outputs(again_model, batches)
    result["difference"] = difference(loaded, quantized_outputs)
    if result["difference"] > 1e-5 and result["repeatable"]:
        raise ValueError(f"logits differ by {result['difference']:.2g} of the largest")
    result["stage"] = "walk" if not result["walk"].startswith("identical") and result["repeatable"] else "ok"


# --- the model ----------------------------------------------------------------------------------------------


def build(mapping: str, kind: str) -> Any:
    """The mapping's (first) class of that type, tiny, with weights of which none is constant."""
    names = getattr(modeling_auto, MAPPINGS[mapping])[kind]
    architecture = getattr(transformers, names if isinstance(names, str) else names[0])
    more = {"num_labels": 32} if mapping == "image-classification" else BY_MAPPING.get((mapping, kind), {})
    config = _part(tiny(config_class(kind), **more), architecture.config_class)
    with contextlib.suppress(Exception), torch.device("meta"):
        count = sum(p.numel() for p in architecture(config).parameters())
        if count > LARGEST:
            raise MemoryError(count)
    config = _part(tiny(config_class(kind), **more), architecture.config_class)
    torch.manual_seed(0)
    model = architecture(config).eval()
    count = sum(p.numel() for p in model.parameters())
    if count > LARGEST:
        raise ValueError(f"{count / 1e6:.0f} million parameters, not tiny")
    with torch.no_grad():
        for p in model.parameters():
            if not torch.isfinite(p).all() or (p.numel() > 1 and p.min() == p.max()):
                p.copy_((torch.nan_to_num(p, 0, 0, 0) + 0.02 * torch.randn_like(p)).to(p.dtype))
    return model.float()


def _part(config: PreTrainedConfig, kind: type[PreTrainedConfig]) -> PreTrainedConfig:
    """The configuration, or the part of it that a class of a part is built from."""
    parts = [config]
    for part in parts:
        if type(part) is kind:
            return part
        parts += [v for v in vars(part).values() if isinstance(v, PreTrainedConfig)]
    return config


def fitting(model: nn.Module, config: QuantizeConfig) -> QuantizeConfig:
    """With the largest group size, up to 32, that divides the inputs of all layers."""
    targets, _ = find_targets(model, config)
    size = math.gcd(*(target.weight.shape[1] for target in targets), 32)
    return QuantizeConfig(**{**config.to_dict(), "group_size": size})


# --- running it ---------------------------------------------------------------------------------------------


def outputs(model: nn.Module, batches: list[Batch]) -> list[Tensor]:
    with torch.no_grad(), evaluating(model):
        return [t.clone() for batch in batches for t in floats(model(**batch))]


def walk(model: nn.Module, batches: list[Batch], config: QuantizeConfig) -> list[Tensor]:
    """The outputs of batches that stop at every target, where nothing happens."""
    modules = {target.name: target.module for target in find_targets(model, config)[0]}
    found: dict[int, list[Tensor]] = {}

    def run(number: int) -> None:
        found[number] = [t.clone() for t in floats(model(**batches[number]))]

    forwards = [partial(run, number) for number in range(len(batches))]
    with evaluating(model):
        groups = lockstep.plan(modules, forwards[0])
        found.clear()
        for _ in lockstep.walk(groups, modules, forwards, lambda group, number, x: None):
            pass
    return [t for number in sorted(found) for t in found[number]]


def floats(output: Any) -> Iterator[Tensor]:
    """The floating-point tensors of an output, not those of caches."""
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output
        return
    parts = output.values() if isinstance(output, dict) else output if isinstance(output, (list, tuple)) else ()
    for part in parts:
        yield from floats(part)


def equal(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(
        a.shape == b.shape and torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(one, other)
    )


def difference(one: list[Tensor], other: list[Tensor]) -> float:
    """Largest difference over the largest value."""
    if [t.shape for t in one] != [t.shape for t in other]:
        return math.inf
    shares = [0.0]
    for a, b in zip(one, other):
        a, b = a.double(), b.double()
        finite = b.isfinite()
        if not torch.equal(finite, a.isfinite()):
            return math.inf
        if finite.any():
            shares.append(float((a[finite] - b[finite]).abs().max() / b[finite].abs().max().clamp(min=1e-30)))
    return max(shares)


# --- what it holds ------------------------------------------------------------------------------------------


def fused(model: nn.Module) -> list[dict[str, Any]]:
    """Modules that are no convolution and hold parameters of three or more dimensions, one of each kind."""
    total = sum(p.numel() * p.element_size() for p in model.parameters())
    kinds: dict[tuple[Any, ...], dict[str, Any]] = {}
    for name, module in model.named_modules():
        own = {k: p for k, p in module._parameters.items() if p is not None and p.dim() > 2}
        if not own or isinstance(module, nn.modules.conv._ConvNd):
            continue
        everything = {k: list(p.shape) for k, p in module._parameters.items() if p is not None}
        entry = kinds.setdefault(
            (type(module).__name__, repr(everything)),
            {"class": type(module).__name__, "first": name, "count": 0, "parameters": everything, "share": 0.0},
        )
        entry["count"] += 1
        entry["share"] += sum(p.numel() * p.element_size() for p in own.values()) / total
    return list(kinds.values())


def bytes_by_kind(model: nn.Module) -> dict[str, float]:
    """Shares of the parameters' bytes: in linear layers, embeddings, convolutions, vectors, and others by class."""
    total, seen = sum(p.numel() * p.element_size() for p in model.parameters()), set()
    shares: dict[str, float] = defaultdict(float)
    for module in model.modules():
        for key, p in module._parameters.items():
            if p is None or id(p) in seen:
                continue
            seen.add(id(p))
            if is_linear(module):
                label = "linear"
            elif isinstance(module, nn.Embedding):
                label = "embedding"
            elif isinstance(module, nn.modules.conv._ConvNd):
                label = "convolution"
            else:
                label = "vectors" if p.dim() < 2 else f"{type(module).__name__}.{key} {list(p.shape)}"
            shares[label] += p.numel() * p.element_size() / total
    return {k: round(v, 4) for k, v in sorted(shares.items(), key=lambda item: -item[1])}


def _short(reason: str) -> str:
    for part in ("output embedding", "never called", "tied", "32-bit words", "parametrization", "not floating"):
        if part in reason:
            return part
    return reason


def _where(error: BaseException) -> str:
    """The innermost line of ours, and that of the error."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [f for f in frames if "/gptq_plugin/" in f.filename]
    name = [f"{f.filename.rpartition('/')[2]}:{f.lineno} {f.name}" for f in (ours[-1:] + frames[-1:])]
    return " <- ".join(dict.fromkeys(name))
