"""The largest inputs and outputs of layers in calibration, for clients that compute in float16, which ends at 65504."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gptq_plugin import distributed
from gptq_plugin.device.precision import FLOAT16
from gptq_plugin.kernels import row_passes
from gptq_plugin.walk.float_walk import serves_float

Layers = tuple[tuple[str, ...], ...]  # names of each expert's layers
_OfLayers = dict[tuple[str, ...], Tensor]  # [1], by layers with one input or output; -1 where none was seen
_OfExperts = dict[Layers, Tensor]  # [layers of one expert, experts], likewise
_MARGIN = 2  # other samples reach further than calibration's: values nearer than this to `FLOAT16` are reported


class Ranges:
    """Tracks the largest absolute input and output of each layer, on the device until `over_ranks`.

    Every position counts, also positions that enter no Hessian: a client computes them all, and the largest values are
    often at the first one. Rows with NaN do not: those of padding may hold it, and in others it is refused elsewhere.
    """

    def __init__(self) -> None:
        self._inputs: _OfLayers = {}
        self._outputs: _OfLayers = {}
        self._of_experts: tuple[_OfExperts, _OfExperts] = ({}, {})  # inputs and outputs

    def read(self, names: Iterable[str], x: Tensor) -> None:
        """Includes x, an input of these layers."""
        _include(self._inputs, names, x)

    def read_experts(self, layers: Layers, x: Tensor, ends: Tensor) -> None:
        """Includes x, [rows, in], an input of experts whose rows end there, int32 [experts].

        Args:
            layers: Names of each expert's layers, alike for all.
            x: As above.
            ends: As above.
        """
        _include_experts(self._of_experts[0], layers, [x] * len(layers[0]), ends)

    @contextlib.contextmanager
    def watching(self, layers: Mapping[str, nn.Module]) -> Iterator[None]:
        """Includes the outputs of the layers while batches run, called one by one."""

        def hook(name: str) -> Any:
            def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
                if not serves_float():  # a client runs the quantized model
                    _include(self._outputs, [name], output)

            return after

        handles = [module.register_forward_hook(hook(name)) for name, module in layers.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextlib.contextmanager
    def watching_experts(self, calls: Sequence[tuple[nn.Module, Layers]], widths: Mapping[str, int]) -> Iterator[None]:
        """Includes the outputs of experts while batches run.

        Args:
            calls: Modules called with the rows of all experts and where they end, and the names of each one's layers,
                whose outputs are concatenated.
            widths: Number of outputs, by layer.
        """

        def hook(layers: Layers) -> Any:
            sizes = [widths[name] for name in layers[0]]

            def after(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
                if not serves_float():
                    _include_experts(self._of_experts[1], layers, output.split(sizes, -1), args[1])

            return after

        with contextlib.ExitStack() as stack:
            for module, layers in calls:
                stack.callback(module.register_forward_hook(hook(layers)).remove)
            yield

    def over_ranks(self, names: Iterable[str], device: torch.device) -> dict[str, tuple[float, float]]:
        """By layer, its largest input and output over all ranks; NaN if none was seen. Collective.

        Args:
            names: The layers, the same on every rank.
            device: Device on which the ranks compare them.
        """
        names, unseen = list(names), torch.tensor(-1.0, dtype=torch.float32, device=device)
        both = (self._inputs, self._outputs), self._of_experts
        of_all = [_by_layer(of_layers) | _by_expert(of_experts) for of_layers, of_experts in zip(*both, strict=True)]
        found = [seen.get(name, unseen) for name in names for seen in of_all]
        largest = torch.stack(found)
        distributed.maximum_(largest)
        values = [value if value >= 0 else math.nan for value in largest.tolist()]
        return dict(zip(names, zip(values[::2], values[1::2], strict=True), strict=True))


def near_float16(largest_input: float, largest_output: float) -> str | None:
    """A sentence if the inputs or outputs of a layer come near the largest float16 or exceed it; else None."""
    what = {"inputs": largest_input, "outputs": largest_output}
    large = [f"{name} reach {largest:.4g}" for name, largest in what.items() if largest > FLOAT16 / _MARGIN]
    if not large:
        return None
    return f"its {' and its '.join(large)} in calibration, and float16 ends at {FLOAT16:.0f}: run it in bfloat16"


def _include_experts(seen: _OfExperts, layers: Layers, parts: Sequence[Tensor], ends: Tensor) -> None:
    """Includes a part, [rows, width], for each of an expert's layers."""
    if layers not in seen:
        seen[layers] = torch.full((len(parts), len(layers)), -1.0, dtype=torch.float32, device=ends.device)
    for number, part in enumerate(parts):
        if number and part is parts[0]:
            seen[layers][number] = seen[layers][0]
        else:
            row_passes(part).include_largest_(seen[layers][number], part.detach(), ends)


def _by_expert(seen: _OfExperts) -> dict[str, Tensor]:
    return {
        name: value
        for layers, of_all in seen.items()
        for number, values in enumerate(of_all.unbind())
        for name, value in zip((own[number] for own in layers), values.unbind(), strict=True)
    }


def _by_layer(seen: _OfLayers) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for names, largest in seen.items():
        for name in names:
            found[name] = torch.maximum(found[name], largest[0]) if name in found else largest[0]
    return found


def _include(seen: _OfLayers, names: Iterable[str], x: Any) -> None:
    if not isinstance(x, Tensor) or not x.numel():
        return
    names, rows = tuple(names), x.detach().reshape(-1, x.shape[-1] if x.dim() else 1)
    if names not in seen:
        seen[names] = torch.full((1,), -1.0, dtype=torch.float32, device=x.device)  # a forward may set a default
    row_passes(rows).include_largest_(seen[names], rows)
