"""Cycles of quantize, export, reload, check and convert, of many architectures, with random options.

Reloaded and converted models compute the bits of the one in memory; `check` finds no fault; what is global (dtypes,
modes, random generators, logging, warnings, environment, paths) is as before; cycles that repeat leave no threads, open
files, temporary files or memory.
"""

from __future__ import annotations

import functools
import gc
import itertools
import logging
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import numpy
import torch
from campaigns.campaign import Campaign, Case, Wrong, own_error

from gptq_plugin import QuantizeConfig, QuantizeModule, load_quantized
from gptq_plugin.check.lint import lint
from gptq_plugin.config import CHECKPOINT_FORMATS
from gptq_plugin.errors import ExportError
from gptq_plugin.export.convert import convert

sys.path.append(str(Path(__file__).parents[1] / "sweep"))

from building import build
from inputs import batches_for
from running import equal, outputs

CAUSAL = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "phi3", "gpt2", "opt", "bloom", "falcon", "gpt_neox",
          "stablelm", "starcoder2", "olmo2", "cohere", "mixtral", "qwen3_moe", "granite", "mamba2", "gptj")  # fmt: skip
OTHERS = (("seq2seq-lm", "t5"), ("seq2seq-lm", "bart"), ("masked-lm", "bert"), ("masked-lm", "roberta"),
          ("image-classification", "vit"), ("ctc", "wav2vec2"), ("image-text-to-text", "llava"),
          ("speech-seq2seq", "whisper"))  # fmt: skip
ARCHITECTURES = [*(("causal-lm", kind) for kind in CAUSAL), *OTHERS]
_CACHE = functools._lru_cache_wrapper
CYCLES = 6  # of a case, the first of which imports and caches
GROWTH = (
    24 << 20
)  # bytes that the later cycles may add, less the one that adds most: a module that it was first to need


def _given(seed: int, count: int) -> Iterator[tuple[tuple[str, str], Random]]:
    """The architectures in turn, in an order of the seed's."""
    order = list(ARCHITECTURES)
    Random(seed).shuffle(order)
    return ((order[number % len(order)], Random(f"{seed}-{number}")) for number in range(count))


def _prepare(folder: Path) -> None:
    torch.set_num_threads(1)
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def _attack(case: Case, given: tuple[tuple[str, str], Random]) -> None:
    (mapping, kind), rng = given
    tempfile.tempdir = str(case.folder / "temporary")
    Path(tempfile.tempdir).mkdir()
    _, batches = batches_for(build(mapping, kind))
    held: list[dict[str, Any]] = []
    told: list[str] = []
    for number in range(CYCLES):
        options = _options(rng)
        told.append(f"cycle {number} {options}")
        case.is_of(f"{kind}: {'; '.join(told)}")
        case.attempt("cycle", lambda: _cycle(case.folder / "work", mapping, kind, batches, options, rng), own_error)  # noqa: B023
        held.append(_held(Path(tempfile.tempdir)))
    case.attempt("leaks", lambda: _check_leaks(held), own_error)


def _options(rng: Random) -> dict[str, Any]:
    """Of a configuration, valid for most models."""
    options: dict[str, Any] = {
        "bits": rng.choice([2, 3, 4, 4, 8]),
        "group_size": rng.choice([16, 32, 32, 64, -1]),
        "sym": rng.random() < 0.6,
        "batch_size": rng.choice([1, 2, 8]),
        "nsamples": 10**6,
        "checkpoint_format": rng.choice(CHECKPOINT_FORMATS),
    }
    desc_act = rng.random() < 0.3
    options |= {"desc_act": desc_act, "static_groups": not desc_act or rng.random() < 0.5}
    if rng.random() < 0.3:
        options["clip_ratios"] = rng.choice([[1.0], [1.0, 0.9], [1.0, 0.8, 0.6]])
    if rng.random() < 0.2:
        options["lm_head"] = True
    if rng.random() < 0.2:
        options["token_weighting"] = "all"
    if rng.random() < 0.3:
        rules: list[dict[str, Any]] = [
            {r"-:.*\.0\..*(q|query).*": {}},
            {r"+:.*(v_proj|value).*": {"bits": 8}},
            {r"+:.*(down|fc2|wo).*": {"group_size": 16}, r"+:.*\.1\..*": {"bits": 4}},
        ]
        options["dynamic"] = rng.choice(rules)
    return options


def _cycle(work: Path, mapping: str, kind: str, batches: list[Any], options: dict[str, Any], rng: Random) -> None:
    config = QuantizeConfig(**options)
    model = _in_dtype(build(mapping, kind), rng.choice([torch.float32, torch.float32, torch.bfloat16]))
    batches = [{name: _as(value, model.dtype) for name, value in batch.items()} for batch in batches]
    quantizer = QuantizeModule(
        config,
        offload_weights=rng.choice([None, None, True]),
        offload_activations=rng.choice([None, None, True]),
        exact_sums=rng.choice([None, True, False]),
    )
    at_once = rng.random() < 0.5
    before: dict[str, Any] | None = _global_state()
    try:
        quantizer.quantize(model, batches, export_dir=work / "out" if at_once else None)
        if not at_once:
            quantizer.export(model, work / "out")
        loaded = load_quantized(work / "out")
        found = lint(work / "out")
        other = rng.choice([name for name in CHECKPOINT_FORMATS if name != options["checkpoint_format"]])
        others = {other: _converted(work, other)}
        if rng.random() < 0.3:
            model.save_pretrained(work / "saved")
            others["saved by transformers"] = load_quantized(work / "saved")
        _compare(before, _global_state())
        before = None
        in_memory = outputs(model, batches)
        if not equal(outputs(loaded, batches), in_memory):
            raise Wrong("the reloaded model computes something else")
        for how, one in others.items():
            if one is not None and not equal(outputs(one, batches), in_memory):
                raise Wrong(f"as {how} it computes something else")
        if found.errors:
            raise Wrong(f"check finds {found.errors[:3]}")
    except Exception:
        if before is not None:
            _compare(before, _global_state())
        raise
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _in_dtype(model: Any, dtype: torch.dtype) -> Any:
    """The model as it would be loaded in a dtype: what no checkpoint holds (rotary frequencies) stays float32."""
    with torch.no_grad():
        for tensor in model.state_dict(keep_vars=True).values():
            if tensor.is_floating_point():
                tensor.data = tensor.data.to(dtype)
    return model


def _as(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def _converted(work: Path, checkpoint_format: str) -> Any:
    """The model in another format; None if the format cannot hold it."""
    try:
        return load_quantized(convert(work / "out", work / "converted", checkpoint_format))
    except ExportError:
        return None


def _global_state() -> dict[str, Any]:
    backends = torch.backends
    return {
        "default dtype": torch.get_default_dtype(),
        "default device": torch.get_default_device(),
        "random numbers of torch": torch.get_rng_state().numpy().tobytes(),
        "random numbers of Python": hash(random.getstate()),
        "random numbers of numpy": numpy.random.get_state()[1].tobytes(),  # type: ignore[union-attr,call-overload,index]
        "modes": (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")),
        "determinism": (torch.are_deterministic_algorithms_enabled(), torch.get_float32_matmul_precision()),
        "cudnn": (backends.cudnn.benchmark, backends.cudnn.deterministic, backends.cudnn.allow_tf32),
        "threads of PyTorch": (torch.get_num_threads(), torch.get_num_interop_threads()),
        "environment": dict(os.environ),
        "paths": list(sys.path),
        "working directory": os.getcwd(),
        "warnings": list(map(str, warnings.filters)),
        "logging": _logging(),
        "signals": [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)],
        "hooks": (sys.excepthook, threading.excepthook, sys.gettrace(), sys.getprofile(), sys.getrecursionlimit()),
        "streams": (sys.stdout, sys.stderr),
        "collector": (gc.isenabled(), gc.get_threshold()),
    }


def _logging() -> dict[str, Any]:
    names = ["", "gptq_plugin", "transformers", "torch", "py.warnings"]
    loggers = [logging.getLogger(name) for name in names]
    return {
        one.name: (one.level, list(one.handlers), list(one.filters), one.propagate, one.disabled) for one in loggers
    }


def _compare(before: dict[str, Any], after: dict[str, Any]) -> None:
    changed = {what: (before[what], after[what]) for what in before if before[what] != after[what]}
    if changed:
        raise Wrong(f"global state has changed: {str(changed)[:1000]}")


def _held(temporary: Path) -> dict[str, Any]:
    """What the process holds between two cycles."""
    gc.collect()
    objects = gc.get_objects()
    # Caches of limited size have an entry for each width and dtype that was met; endless ones would be leaks.
    values = [value for one in objects if type(one) is _CACHE for value in gc.get_referents(one)]
    cached = {id(part) for value in values for part in _tensors_of(value)}
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return {
        "threads": sorted(thread.name for thread in threading.enumerate()),
        "open files": sorted(_link(file) for file in Path("/proc/self/fd").iterdir()),
        "temporary files": sorted(file.name for file in temporary.rglob("*")),
        "tensors": sum(1 for one in objects if isinstance(one, torch.Tensor) and id(one) not in cached),
        "memory": pages * os.sysconf("SC_PAGE_SIZE"),
    }


def _tensors_of(value: Any) -> Iterable[Any]:
    """What a cache keeps: the value, and what a module of it holds."""
    return [value, *value.buffers(), *value.parameters()] if isinstance(value, torch.nn.Module) else [value]


def _link(file: Path) -> str:
    try:
        return os.readlink(file)
    except OSError:
        return ""


def _check_leaks(held: list[dict[str, Any]]) -> None:
    second, last = held[1], held[-1]
    for what in ("threads", "open files", "temporary files", "tensors"):
        if _number(last[what]) - _number(second[what]) >= len(held) - 2:  # not what one option made, and keeps
            raise Wrong(f"{what} have grown: {[_number(one[what]) for one in held]}, {str(last[what])[:500]}")
    steps = [after["memory"] - before["memory"] for before, after in itertools.pairwise(held[1:])]
    if sum(steps) - max(steps) > GROWTH:
        raise Wrong(f"memory has grown: {[one['memory'] >> 20 for one in held]} MiB")


def _number(held: Any) -> int:
    return held if isinstance(held, int) else len(held)


CAMPAIGN = Campaign(
    about=f"{CYCLES} cycles a case of quantize, export, reload, check and convert, {len(ARCHITECTURES)} architectures",
    cases=2 * len(ARCHITECTURES),
    few=1,
    given=_given,
    attack=_attack,
    prepare=_prepare,
    seconds=90,
    memory=None,
)
