"""Verifies that an export computes the model's outputs: it is loaded again, and both run a calibration sample.

`verify_files` compares the tensors; this compares what loading makes of them: architecture, tied weights, formats.
"""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from gptq_plugin.calibration.batches import fields_of, sample_count
from gptq_plugin.calibration.forward import evaluating
from gptq_plugin.checkpoint.load import load_as, load_quantized
from gptq_plugin.device.memory import trimmed
from gptq_plugin.device.modules import modules_of
from gptq_plugin.errors import CheckpointError, ExportError, some
from gptq_plugin.export.unsaved import other_buffers
from gptq_plugin.layers.hooks import share_hooks
from gptq_plugin.layers.qlinear import QuantLinear
from gptq_plugin.memory.streamed_to import streamed_to
from gptq_plugin.model.hf_models import has_own_code, is_transformers
from gptq_plugin.walk.layer_inputs import is_dense

log = logging.getLogger(__name__)

LENGTH = 64  # tokens of a sample that are run
_PIECE = 2**24  # numbers that are compared at a time
# Largest difference over the largest output: the same kernels add in the same order, but a float32 part of a 16-bit
# model is loaded in 16 bits, and a GPU's order of addition may vary.
_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3}
_TOLERANCE_16_BITS = 5e-2


@dataclass(frozen=True)
class Sample:
    """An input to run through a model.

    Attributes:
        batch: A calibration batch.
        forward: Called as forward(model, batch).
        device: Where it computes.
        whole: The batch that it was cut from.
    """

    batch: Any
    forward: Callable[[nn.Module, Any], Any]
    device: torch.device
    whole: Any = None

    @classmethod
    def of(cls, batch: Any, forward: Callable[[nn.Module, Any], Any], device: torch.device) -> Sample:
        """Cuts a batch to its first sample and `LENGTH` tokens; keeps it whole if its samples are not recognized."""
        return cls(_first(batch), forward, device, batch)

    def sizes(self) -> Iterator[Sample]:
        """The sample, and if it was cut the whole batch, for models that do not run a part of one."""
        yield self
        if self.whole is not None and self.whole is not self.batch:
            yield replace(self, batch=self.whole, whole=None)


def same_outputs(model: nn.Module, directory: Path, sample: Sample | None) -> list[str]:
    """Loads the export in `directory` and compares its outputs with the model's.

    Args:
        model: The quantized model; not changed.
        directory: Its export.
        sample: The input. Without one, or if its forward does not call the model as a whole, a transformers model runs
            its `dummy_inputs`. The log tells if nothing could be compared.

    Returns:
        Sentences, which the log has too, on what differs within what is tolerated: see `unsaved.other_buffers`.

    Raises:
        ExportError: The export does not load, or computes something else.
    """
    with torch.no_grad(), evaluating(model):
        told = _same_outputs(model, directory, sample)
    for sentence in told:
        log.warning("%s", sentence)
    return told


def _same_outputs(model: nn.Module, directory: Path, sample: Sample | None) -> list[str]:
    called = _called(model, sample) if sample is not None else None
    if called is None and is_transformers(model):
        called = _dummies(model)
    if called is None:
        log.warning("the export was not run: no calibration sample went through the model as a whole")
        return []
    (args, kwargs), device, outputs = called

    def run() -> list[Tensor]:
        with _on(model, device):
            return floats(model(*args, **kwargs))

    expected = run() if outputs is None else outputs
    if not expected:
        log.warning("the export was not compared with the model: its outputs hold no floating-point tensors")
        return []
    try:
        again = _reload(model, directory)
    except CheckpointError as error:
        raise ExportError(f"the export does not load: {error}") from error
    if again is None:
        return []
    with streamed_to(again, device), _releasing(again):
        found = floats(again(*args, **kwargs))
    if _differ(found, expected):
        expected = run()  # the sample's forward may have had a hook or an adapter of its own
    if _differ(found, expected) and _differ(run(), expected):
        log.warning("the export was not compared with the model: two runs of the model gave different outputs")
        return []
    replaced = "forward" in vars(model)  # as accelerate does, to run the model under autocast
    share = _compare(found, expected, _TOLERANCE_16_BITS if replaced else 0.0, _causes(model))
    return other_buffers(model, again, share)


def _differ(some: list[Tensor], others: list[Tensor]) -> bool:
    if [t.shape for t in some] != [t.shape for t in others]:
        return True
    return any(difference(a, b) > tolerance(a, b) for a, b in zip(some, others, strict=True))


def _causes(model: nn.Module) -> str:
    """What may make a model compute something else than its class and configuration, for an error."""
    hooked = [name for name, module in model.named_modules() if module._forward_hooks or module._forward_pre_hooks]
    again = modules_of(model, once=False).keys() - modules_of(model).keys() if is_transformers(model) else set()
    if not hooked and again:
        return (
            f"{some(sorted(again))} occur in other places too, and what occurs in several has one place in the cache: "
            "set use_cache=False in model.config, or put a copy.deepcopy into each place, with its own layer_idx"
        )
    if not hooked:
        return "was one of them changed by hand?"
    return f"no checkpoint holds the hooks on {some(hooked)}; remove them for the export, or quantize without one"


def _compare(found: list[Tensor], expected: list[Tensor], least: float, causes: str) -> float:
    """The largest difference of an output, which is tolerated; an ExportError for one that is not."""
    if [t.shape for t in found] != [t.shape for t in expected]:
        raise ExportError(
            f"the export computes something else than the model: outputs of {[list(t.shape) for t in found]}, the "
            f"model's are {[list(t.shape) for t in expected]}"
        )
    shares = [difference(theirs, ours) for theirs, ours in zip(found, expected, strict=True)]
    for share, theirs, ours in zip(shares, found, expected, strict=True):
        if share > max(least, tolerance(theirs, ours)):
            raise ExportError(
                f"the export computes something else than the model: an output differs by {share:.3g} of the largest. "
                f"The model in memory differs from its class and configuration ({causes})"
            )
    return max(shares)


def tolerance(*tensors: Tensor) -> float:
    return max(_TOLERANCE.get(tensor.dtype, _TOLERANCE_16_BITS) for tensor in tensors)


def difference(one: Tensor, other: Tensor) -> float:
    """Largest difference over the largest value; infinite unless both are finite in the same places. Computed where
    `one` is, in pieces."""
    if not other.numel():
        return 0.0
    worst = []
    for a, b in zip(one.flatten().split(_PIECE), other.to(one.device).flatten().split(_PIECE), strict=True):
        a, b, finite = a.double(), b.double(), b.isfinite()
        apart = torch.where(finite, a - b, 0).abs().amax()
        alike = (finite == a.isfinite()).all()
        worst.append(torch.stack([torch.where(alike, apart, torch.inf), torch.where(finite, b, 0).abs().amax()]))
    apart, largest = torch.stack(worst).amax(0).tolist()
    return apart / max(largest, 1e-30)


Arguments = tuple[tuple[Any, ...], dict[str, Any]]


_Called = tuple[Arguments, torch.device, list[Tensor] | None]


def _called(model: nn.Module, sample: Sample) -> _Called | None:
    """The arguments of the first call of the model as a whole, and what it returned unless the sample's forward made it
    under autocast; None without such a call."""
    seen: list[Arguments] = []
    outputs: list[list[Tensor] | None] = []

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not seen:
            seen.append(tree_map(_cloned, (args, kwargs)))  # the forward may modify them

    def after(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not outputs:
            outputs.append(None if torch.is_autocast_enabled(one.device.type) else [t.clone() for t in floats(output)])

    for one in sample.sizes():
        seen.clear()
        outputs.clear()
        handles = model.register_forward_pre_hook(before, with_kwargs=True), model.register_forward_hook(after)
        try:
            with _on(model, one.device):
                one.forward(model, one.batch)
            return (seen[0], one.device, outputs[0]) if seen else None
        except Exception as error:  # noqa: BLE001 - the user's forward, with a batch cut to one sample
            log.info("a calibration sample does not go through the model (%s)", error)
        finally:
            for handle in handles:
                handle.remove()
    return None


def _dummies(model: Any) -> _Called | None:
    device = next(model.parameters()).device
    try:
        inputs = {name: value.to(device) for name, value in model.dummy_inputs.items()}
        model(**inputs)
    except Exception as error:  # noqa: BLE001 - whatever a model does with inputs that are not for it
        log.info("the model does not run transformers' dummy inputs (%s)", error)
        return None
    return ((), inputs), device, None


def _reload(model: nn.Module, directory: Path) -> nn.Module | None:
    if not is_transformers(model):
        try:
            return load_quantized(directory, model=_skeleton(model))  # type: ignore[no-any-return]
        except (TypeError, RuntimeError, NotImplementedError) as error:
            log.warning("the export was not run: %s cannot be copied (%s)", type(model).__name__, error)
            return None
    with _without_progress_bar():
        # The code that came with the weights is imported already: a copy's import would stay in transformers' cache.
        own = has_own_code(model)
        again = load_as(directory, type(model), type(model.config)) if own else load_quantized(directory)
    attention = getattr(model.config, "_attn_implementation", None)
    with contextlib.suppress(Exception):  # another implementation only adds in another order
        again.set_attn_implementation(attention)
    return again  # type: ignore[no-any-return]


@contextlib.contextmanager
def _without_progress_bar() -> Iterator[None]:
    """Hides transformers' progress bar during this internal load."""
    from transformers.utils import logging as transformers_logging

    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def _skeleton(model: nn.Module) -> nn.Module:
    """Copies a plain module with empty Linears in place of its quantized layers, for `load_quantized` to fill."""
    memo: dict[int, Any] = {}
    for layer in model.modules():
        if isinstance(layer, QuantLinear):
            bias = layer.bias is not None
            memo[id(layer)] = nn.Linear(layer.in_features, layer.out_features, bias, device="meta")
            share_hooks(layer, memo[id(layer)])
    return copy.deepcopy(model, memo)


@contextlib.contextmanager
def _on(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Inside the block the model runs on the device, streamed there part by part if it is elsewhere."""
    parameter = next((t for t in (*model.parameters(), *model.buffers())), None)
    if parameter is None or parameter.device == device:
        with trimmed(model), _releasing(model):
            yield
    else:
        with streamed_to(model, device):
            yield


@contextlib.contextmanager
def _releasing(model: nn.Module) -> Iterator[None]:
    """Inside the block layers on a CPU keep nothing of their calls, so that the model needs no room for that of all."""
    layers = [m for m in model.modules() if isinstance(m, QuantLinear) and m.qweight.device.type == "cpu"]
    hooks = [layer.register_forward_hook(lambda layer, *_: layer.release()) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _first(batch: Any) -> Any:
    parts, samples = fields_of(batch), sample_count(batch)
    ids = batch if isinstance(batch, Tensor) and not batch.is_floating_point() else (parts or {}).get("input_ids")
    length = ids.shape[1] if isinstance(ids, Tensor) and ids.dim() == 2 else None

    def cut(value: Any) -> Any:
        if not is_dense(value) or not value.dim() or value.shape[0] != samples:
            return value
        value = value[:1]
        return value[:, :LENGTH] if length is not None and value.dim() > 1 and value.shape[1] == length else value

    if isinstance(batch, Tensor):
        return cut(batch)
    if type(batch) is dict or type(batch) in (list, tuple):
        return tree_map(cut, batch)
    return batch


def floats(output: Any) -> list[Tensor]:
    """The floating-point tensors of an output, in order, without those kept for later calls (caches)."""
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    parts = output.values() if isinstance(output, Mapping) else output if isinstance(output, (list, tuple)) else ()
    return [tensor for part in parts for tensor in floats(part)]


def _cloned(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value
