"""A quantized model on one device, ready to be trained: `Student`.

Tested by tests/finish/test_finish_model.py: with what is trained.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gptq_plugin.errors import TargetError
from gptq_plugin.finish.frozen_codes import FrozenCodes
from gptq_plugin.finish.latent_codes import LatentCodes
from gptq_plugin.finish.norms import find_norms
from gptq_plugin.finish.options import Rates
from gptq_plugin.layers.qlinear import QuantLinear
from gptq_plugin.layers.swap import swap_modules
from gptq_plugin.memory.resident import resident_on


@dataclass(frozen=True)
class Outcome:
    """What a student has learned, on the CPU and by name, as the model has it.

    Attributes:
        scales: Of its quantized layers, as `QuantLinear` has them.
        codes: The same, where they were trained: `qweight`.
        norms: The parameters of norms.
    """

    scales: dict[str, Tensor]
    codes: dict[str, Tensor]
    norms: dict[str, Tensor]

    @torch.no_grad()
    def give(self, model: nn.Module) -> Callable[[], None]:
        """Puts everything into the model; returns what puts the earlier tensors back."""
        layers: dict[str, Any] = {name: model.get_submodule(name) for name in self.scales}
        old = {name: (layer.scales, layer.qweight) for name, layer in layers.items()}
        old_norms = {name: model.get_parameter(name).detach().clone() for name in self.norms}
        for name, layer in layers.items():  # not in place: a tensor may be that of a file
            layer.scales = self.scales[name].to(layer.device)
            if name in self.codes:
                layer.qweight = self.codes[name].to(layer.device)
        _write(model, self.norms)

        def undo() -> None:
            for name, layer in layers.items():
                layer.scales, layer.qweight = old[name]
            _write(model, old_norms)

        return undo


class Student:
    """The parameters that a finish trains: log-ratios of scales, latents of codes, and masters of norms in float32.

    Args:
        layers: By name, in the model.
        norms: By name, where the model has them now.

    Attributes:
        layers: As given.
        masters: Of the norms, in their order.
    """

    def __init__(self, layers: Mapping[str, FrozenCodes], norms: Mapping[str, nn.Parameter]) -> None:
        self.layers, self._norms = layers, norms
        self.masters = [nn.Parameter(norm.detach().float().clone()) for norm in norms.values()]

    @classmethod
    @contextlib.contextmanager
    def of(cls, model: nn.Module, device: torch.device, *, norms: bool, codes: bool = False) -> Iterator[Student]:
        """Puts layers that can be trained in the place of the model's quantized ones for the length of a with block.

        Afterwards the model is as it was: what was learned is in `outcome`.

        Args:
            model: The model, or a part of it.
            device: Where to train.
            norms: Train those too.
            codes: Train those too.

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
        kind = LatentCodes if codes else FrozenCodes
        layers = {name: kind(layer, device) for name, layer in quantized.items()}
        flags = {parameter: parameter.requires_grad for parameter in model.parameters()}
        grads = {parameter: parameter.grad for parameter in flags}
        swap_modules(model, layers)
        try:
            with resident_on(model, device):
                trained = find_norms(model) if norms else {}
                for parameter in model.parameters():
                    parameter.requires_grad_(False)
                student = cls(layers, trained)
                for parameter in (*student.own, *trained.values()):
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

    @property
    def ratios(self) -> list[nn.Parameter]:
        """Of scales."""
        return [layer.log_ratio for layer in self.layers.values()]

    @property
    def latent(self) -> dict[str, nn.Parameter]:
        """Of codes, by layer; none if these are frozen."""
        return {name: layer.latent for name, layer in self.latent_layers.items()}

    @property
    def own(self) -> list[nn.Parameter]:
        """What is trained in the layers."""
        return [*self.ratios, *self.latent.values()]

    @property
    def leaves(self) -> list[nn.Parameter]:
        """Those in the model that gradients are of: `parameters`, but for norms in place of their masters."""
        return [*self.own, *self._norms.values()]

    @property
    def parameters(self) -> list[nn.Parameter]:
        """All that is trained."""
        return [*self.own, *self.masters]

    def with_rates(self, rates: Callable[[int], Rates]) -> list[tuple[list[nn.Parameter], float]]:
        """All that is trained, with the rates of a layer's width; norms with those of the fewest bits."""
        found: list[tuple[list[nn.Parameter], float]] = []
        widths = sorted({layer.bits for layer in self.layers.values()})
        for bits in widths:
            names = [name for name, layer in self.layers.items() if layer.bits == bits]
            found.append(([self.layers[name].log_ratio for name in names], rates(bits).scales))
            found.append(([self.latent[name] for name in names if name in self.latent_layers], rates(bits).codes))
        return [*found, (self.masters, rates(widths[0]).norms)]

    def gradients_of(self, loss: Tensor) -> list[Tensor | None]:
        """The gradients of a loss, of `leaves`; None of those that it does not depend on."""
        return list(torch.autograd.grad(loss, self.leaves, allow_unused=True))

    @torch.no_grad()
    def add(self, gradients: Sequence[Tensor | None]) -> None:
        """Adds gradients of `leaves` to those of `parameters`, which have some: those of norms to their masters'."""
        given = {one: part for one, part in zip(self.parameters, gradients, strict=True) if part is not None}
        if given:
            totals: list[Any] = [parameter.grad for parameter in given]
            torch._foreach_add_(totals, [part.float() for part in given.values()])

    @torch.no_grad()
    def show(self) -> None:
        """Puts the masters' values, rounded, into the model."""
        if self.masters:
            torch._foreach_copy_([*self._norms.values()], [*self.masters])

    def values(self) -> list[Tensor]:
        """A copy of everything that is trained."""
        return [parameter.detach().clone() for parameter in self.parameters]

    @torch.no_grad()
    def set_values(self, values: list[Tensor]) -> None:
        """The inverse of `values`."""
        for parameter, value in zip(self.parameters, values, strict=True):
            parameter.copy_(value)
        self.show()

    @torch.no_grad()
    def outcome(self, prefix: str = "") -> Outcome:
        """What was learned.

        Args:
            prefix: The name of the trained part in the model, with a dot behind it.
        """
        return Outcome(
            {prefix + name: layer.rounded_scales().cpu() for name, layer in self.layers.items()},
            {prefix + name: layer.packed_codes().cpu() for name, layer in self.latent_layers.items()},
            {prefix + name: norm.detach().cpu().clone() for name, norm in self._norms.items()},
        )

    def wanted(self, prefix: str = "") -> dict[str, Tensor]:
        """The weights that codes are rounded from, by name and on the CPU: what another student would begin at."""
        return {prefix + name: layer.wanted().cpu() for name, layer in self.latent_layers.items()}

    @property
    def latent_layers(self) -> dict[str, LatentCodes]:
        return {name: layer for name, layer in self.layers.items() if isinstance(layer, LatentCodes)}


@torch.no_grad()
def _write(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    for name, value in values.items():
        model.get_parameter(name).copy_(value)
