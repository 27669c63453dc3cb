"""Checks that the model computes with quantized layers in its tree what it computes with float ones of their weights.

Whatever the swap loses shows here: a weight that is read past the layer, a reference to a layer beside the tree, an
attribute or a class that the model asks for, a hook that no longer fits. So that nothing else shows, the layers
multiply for this as the float ones do (`_StandIn`): on most machines both runs give the same bits.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gptq_plugin.errors import TargetError, brief, some
from gptq_plugin.export.verify_outputs import Sample, difference, floats, tolerance
from gptq_plugin.layers.qlinear import QuantLinear
from gptq_plugin.layers.swap import swap_modules
from gptq_plugin.model.targets import Target

_NOT_COMPARED = "the quantized layers were not compared with the float ones in the model"


@dataclass(frozen=True)
class Trace:
    """What one run of a sample computed.

    Attributes:
        sample: The sample.
        calls: The layers' names, call by call.
        sums: The sum and the sum of magnitudes of every call's input, [calls, 2].
        outputs: The model's, as far as the run returned them.
    """

    sample: Sample
    calls: Sequence[str]
    sums: Tensor
    outputs: Sequence[Tensor]

    @classmethod
    def of(cls, sample: Sample, calls: _Calls, outputs: Sequence[Tensor]) -> Trace:
        return cls(sample, calls.names, calls.sums(), outputs)

    def first_difference(self, other: Trace) -> str | None:
        """Where two runs part, in words; None if they do not."""
        missing = [name for name in dict.fromkeys(other.calls) if name not in self.calls]
        if missing:
            return f"{some(missing)} are not called (by a reference beside the tree of modules?)"
        for number, (name, theirs) in enumerate(zip(self.calls, other.calls, strict=False)):
            if name != theirs:
                return f"{name} is called where it was {theirs}"
            if not _same_sums(self.sums[number], other.sums[number]):
                return f"the input of {name} differs"
        if len(self.calls) != len(other.calls):
            return f"layers are called {len(self.calls)} times instead of {len(other.calls)}"
        if [t.shape for t in self.outputs] != [t.shape for t in other.outputs]:
            return "the shapes of the outputs differ"
        pairs = [(a, b, difference(a, b)) for a, b in zip(self.outputs, other.outputs, strict=True)]
        share = max((apart for a, b, apart in pairs if apart > tolerance(a, b)), default=0.0)
        return f"an output differs by {share:.3g} of the largest" if share else None


Alone = Callable[[Callable[[], None]], None]


def check_swap(
    model: nn.Module,
    targets: Sequence[Target],
    sample: Sample,
    alone: Alone = lambda forward: forward(),
    here: Alone = lambda forward: forward(),
) -> list[str]:
    """Runs a sample with the float layers as they are now, and again with what has the place of quantized ones.

    Args:
        model: Holds the float layers; the same afterwards.
        targets: The layers that are to be replaced, or are already quantized.
        sample: Its whole batch runs if it does not run by itself.
        alone: Runs a forward as a calibration batch runs, each from the same state of the model.
        here: The same on the thread of the caller, which the batches did not run on.

    Returns:
        A sentence if nothing could be compared: two runs of the model differ by themselves, or none can be made.

    Raises:
        TargetError: The model computes something else, or fails, or computed something else for the caller than in
            the batches. The message names the place.
    """
    for size in sample.sizes():
        try:
            expected = _trace_float(model, targets, size, alone)
            for_caller = _trace_float(model, targets, size, here)
            break
        except Exception as error:  # noqa: BLE001 - the user's forward, with a batch cut to one sample
            cause = f"{type(error).__name__}: {brief(error)}"
            failure = f"{_NOT_COMPARED}: a calibration batch does not run again ({cause})"
    else:
        return [failure]
    where = expected.first_difference(for_caller)
    again = ((here, for_caller), (alone, expected))  # in the other order: it may take turns by itself
    if where is not None and all(
        _trace_float(model, targets, size, run).first_difference(trace) is None for run, trace in again
    ):
        raise TargetError(
            f"in the thread of a calibration batch the model computes something else than in yours: {where}. What it "
            "reads is kept for each thread, in a threading.local or a mode of PyTorch's that was entered around this "
            "call. Keep it in a contextvars.ContextVar, or set it in the forward of a batch (`forward`, "
            "`calibration_step`)"
        )
    try:
        found = _trace_swapped(model, targets, size, alone)
        where = found.first_difference(expected)
        if where is None:
            return []
        if _trace_swapped(model, targets, size, alone).first_difference(found) is not None:
            return [f"{_NOT_COMPARED}: two runs of the model gave different outputs"]
    except Exception as error:
        raise TargetError(
            "the model does not run with quantized layers in place of float ones "
            f"({type(error).__name__}: {brief(error)}). Leave the layer that it uses by more than a call out with "
            "modules_to_not_convert"
        ) from error
    raise TargetError(
        "with quantized layers in place of float ones of the same weights, the model computes something else: "
        f"{where}. Leave the layer that it uses by more than a call out with modules_to_not_convert"
    )


class _Calls:
    """Calls of layers in their order.

    Attributes:
        names: The layers'.
    """

    def __init__(self) -> None:
        self.names: list[str] = []
        self._sums: list[Tensor] = []

    def add(self, name: str, x: Tensor) -> None:
        """Takes in a call with this input."""
        exact = torch.promote_types(x.dtype, torch.float32)
        self.names.append(name)
        self._sums += [x.detach().sum(dtype=exact), torch.linalg.vector_norm(x.detach(), 1, dtype=exact)]

    def sums(self) -> Tensor:
        """The sum and the sum of magnitudes of every input, [calls, 2]. Waits for the device."""
        return torch.stack(self._sums).cpu().reshape(-1, 2) if self._sums else torch.zeros(0, 2, device="cpu")


def _trace_float(model: nn.Module, targets: Sequence[Target], sample: Sample, alone: Alone) -> Trace:
    calls = _Calls()
    with contextlib.ExitStack() as hooks:
        for target in targets:

            def record(
                module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], name: str = target.name
            ) -> None:
                calls.add(name, args[0] if args else next(iter(kwargs.values())))

            hooks.callback(target.module.register_forward_pre_hook(record, with_kwargs=True).remove)
        outputs = _run(model, sample, alone)
    return Trace.of(sample, calls, outputs)


def _trace_swapped(model: nn.Module, targets: Sequence[Target], sample: Sample, alone: Alone) -> Trace:
    calls = _Calls()
    stand_ins = _stand_ins(targets, calls)
    with _in_place(model, stand_ins, {one.name: one.module for one in targets}):
        outputs = _run(model, sample, alone)
    return Trace.of(sample, calls, outputs)


class _StandIn(QuantLinear):
    """A quantized layer without values that multiplies as the float layer does, by the weight that this has now.

    Args:
        target: The float layer.
        calls: Gets the layer's name, and the sums of the input, at every call.
    """

    def __init__(self, target: Target, calls: _Calls) -> None:
        in_features, out_features, bits, group_size, bias, dtype = _arguments(target)
        super().__init__(in_features, out_features, bits, group_size, bias=bias, dtype=dtype, device="meta")
        self._target, self._calls = target, calls

    def copy_for(self, target: Target) -> _StandIn:
        """The stand-in of a layer with the same arguments; the constructor takes longer than the layer's forward."""
        other, own = _StandIn.__new__(_StandIn), vars(self)
        vars(other).update({key: one.copy() if isinstance(one, (dict, set)) else one for key, one in own.items()})
        other._target = target
        return other

    @property
    def weight(self) -> Tensor:
        return super().weight.new_full((), torch.nan, device=self._target.parameter.device).expand(super().weight.shape)

    def forward(self, input: Tensor) -> Tensor:
        self._calls.add(self._target.name, input)
        return self._target.product(input)


def _arguments(target: Target) -> tuple[Any, ...]:
    """Those of QuantLinear that differ between layers."""
    out_features, in_features = target.shape
    config, bias = target.config, target.bias is not None
    return in_features, out_features, config.bits, config.group_size, bias, target.parameter.dtype


def _stand_ins(targets: Sequence[Target], calls: _Calls) -> dict[str, _StandIn]:
    made: dict[tuple[Any, ...], _StandIn] = {}
    found = {}
    for one in targets:
        arguments = _arguments(one)
        found[one.name] = made[arguments].copy_for(one) if arguments in made else _StandIn(one, calls)
        made.setdefault(arguments, found[one.name])
    return found


@contextlib.contextmanager
def _in_place(model: nn.Module, inside: Mapping[str, nn.Module], outside: Mapping[str, nn.Module]) -> Iterator[None]:
    try:
        swap_modules(model, inside)
        yield
    finally:
        swap_modules(model, outside)


def _run(model: nn.Module, sample: Sample, alone: Alone) -> list[Tensor]:
    """The floating-point tensors of the sample's outputs. Random numbers are the same in every run."""
    outputs: list[Tensor] = []
    devices = [sample.device] if sample.device.type == "cuda" else []
    with torch.no_grad(), torch.random.fork_rng(devices):
        torch.manual_seed(0)
        alone(lambda: outputs.extend(floats(sample.forward(model, sample.batch))))
    return outputs


def _same_sums(mine: Tensor, theirs: Tensor) -> bool:
    """Compares sums, which rounding moves by little of the sum of magnitudes; NaN is equal to NaN."""
    if torch.equal(mine, theirs):
        return True
    (a, size), (b, other_size) = mine.tolist(), theirs.tolist()
    if not torch.isfinite(mine).all():
        return bool(torch.equal(mine.isfinite(), theirs.isfinite()))
    return max(abs(a - b), abs(size - other_size)) <= 5e-3 * other_size + 1e-30
