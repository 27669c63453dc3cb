"""A quantized model with the codes frozen, on one device, ready to be trained: `Student`.

Tested by tests/finish/test_finish_model.py: with what is trained.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gptq_plugin.errors import TargetError
from gptq_plugin.finish.frozen_codes import FrozenCodes
from gptq_plugin.finish.norms import find_norms
from gptq_plugin.layers.qlinear import QuantLinear
from gptq_plugin.layers.swap import swap_modules
from gptq_plugin.memory.resident import resident_on


class Student:
    """The parameters that a finish trains: log-ratios of scales, and masters of norms in float32.

    Args:
        layers: By name, in the model.
        norms: By name, where the model has them now.

    Attributes:
        ratios: Of the scales.
        masters: Of the norms, in the same order as `norms`.
    """

    def __init__(self, layers: Mapping[str, FrozenCodes], norms: Mapping[str, nn.Parameter]) -> None:
        self._layers, self._norms = layers, norms
        self.ratios = [layer.log_ratio for layer in layers.values()]
        self.masters = [nn.Parameter(norm.detach().float().clone()) for norm in norms.values()]

    @classmethod
    @contextlib.contextmanager
    def of(cls, model: nn.Module, device: torch.device, *, norms: bool) -> Iterator[Student]:
        """Puts frozen codes in the place of the model's quantized layers for the length of a with block.

        Afterwards the model is as it was: what was learned is in `outcome`.

        Raises:
            TargetError: The model has no quantized layer, or parameters made in inference mode.
        """
        quantized = {name: module for name, module in model.named_modules() if isinstance(module, QuantLinear)}
        if not quantized:
            raise TargetError(f"{type(model).__name__} has no quantized layers to finish: quantize it before")
        if any(parameter.is_inference() for parameter in model.parameters()):
            raise TargetError(
                "a finish runs backward, and the model has parameters made in torch.inference_mode: load it outside of "
                "that"
            )
        layers = {name: FrozenCodes(layer, device) for name, layer in quantized.items()}
        flags = {parameter: parameter.requires_grad for parameter in model.parameters()}
        grads = {parameter: parameter.grad for parameter in flags}
        swap_modules(model, layers)
        try:
            with resident_on(model, device):
                trained = find_norms(model) if norms else {}
                for parameter in model.parameters():
                    parameter.requires_grad_(False)
                student = cls(layers, trained)
                for parameter in (*student.ratios, *trained.values()):
                    parameter.requires_grad_(True)
                before = [norm.detach().clone() for norm in trained.values()]
                try:
                    yield student
                finally:
                    with torch.no_grad():
                        for norm, value in zip(trained.values(), before, strict=True):
                            norm.copy_(value)
        finally:
            swap_modules(model, quantized)
            for parameter, flag in flags.items():
                parameter.requires_grad_(flag)
                parameter.grad = grads[parameter]

    @contextlib.contextmanager
    def taking_gradients(self) -> Iterator[None]:
        """Adds the gradients of a backward inside the block, or none of them if it raises. Those of norms, which are in
        the model's dtype, go to their masters."""
        before = [ratio.grad for ratio in self.ratios]
        parts: list[Tensor | None] = []
        try:
            for ratio in self.ratios:
                ratio.grad = None
            yield
            parts = [one.grad for one in (*self.ratios, *self._norms.values())]
        finally:
            sums = [*before, *(master.grad for master in self.masters)]
            for number, parameter in enumerate((*self.ratios, *self.masters)):
                part = parts[number] if parts else None
                parameter.grad = _added(sums[number], part)
            for norm in self._norms.values():
                norm.grad = None

    @torch.no_grad()
    def show(self) -> None:
        """Puts the masters' values, rounded, into the model."""
        for norm, master in zip(self._norms.values(), self.masters, strict=True):
            norm.copy_(master)

    def values(self) -> list[Tensor]:
        """A copy of everything that is trained."""
        return [parameter.detach().clone() for parameter in (*self.ratios, *self.masters)]

    @torch.no_grad()
    def set_values(self, values: list[Tensor]) -> None:
        """The inverse of `values`."""
        for parameter, value in zip((*self.ratios, *self.masters), values, strict=True):
            parameter.copy_(value)
        self.show()

    @torch.no_grad()
    def outcome(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The scales as `QuantLinear` has them, and the norms' values, both by name and on the CPU."""
        scales = {name: layer.rounded_scales().cpu() for name, layer in self._layers.items()}
        return scales, {name: norm.detach().cpu().clone() for name, norm in self._norms.items()}


def _added(total: Tensor | None, part: Tensor | None) -> Tensor | None:
    if part is None:
        return total
    return part.float() if total is None else total.add_(part)


@contextlib.contextmanager
def checkpointed(model: nn.Module) -> Iterator[None]:
    """Runs blocks so that only their inputs are kept for the backward, inside the block: the members of lists that hold
    trained layers, the outermost."""
    wrapped: list[tuple[nn.Module, Any]] = []
    try:
        for block in _blocks(model):
            wrapped.append((block, vars(block).get("forward")))
            block.forward = _rerun(block.forward)
        yield
    finally:
        for block, own in wrapped:
            if own is None:
                del block.forward
            else:
                block.forward = own


def _rerun(forward: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    return run


def _blocks(model: nn.Module) -> Iterator[nn.Module]:
    for child in model.children():
        members = list(child) if isinstance(child, nn.ModuleList) else []
        holds = [any(isinstance(part, FrozenCodes) for part in member.modules()) for member in members]
        if len(members) > 1 and all(holds):
            yield from members
        else:
            yield from _blocks(child)
