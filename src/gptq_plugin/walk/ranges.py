"""The largest inputs and outputs of layers in calibration, for clients that compute in float16, which ends at 65504."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gptq_plugin import distributed
from gptq_plugin.device.precision import FLOAT16
from gptq_plugin.walk.float_walk import serves_float

_MARGIN = 2  # other samples reach further than calibration's: values nearer than this to `FLOAT16` are reported


class Ranges:
    """Tracks the largest absolute input and output of each layer, on the device until `over_ranks`.

    Every position counts, also positions that enter no Hessian: a client computes them all, and the largest values are
    often at the first one. NaN does not count: rows of padding may hold it, and in other rows it is refused elsewhere.
    """

    def __init__(self) -> None:
        self._inputs: dict[str, Tensor] = {}
        self._outputs: dict[str, Tensor] = {}

    def read(self, names: Iterable[str], x: Tensor) -> None:
        """Includes x, an input of these layers."""
        _include(self._inputs, names, x)

    @contextlib.contextmanager
    def watching(self, layers: Mapping[str, nn.Module]) -> Iterator[None]:
        """Includes the outputs of the layers while batches run."""

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

    def over_ranks(self, names: Iterable[str], device: torch.device) -> dict[str, tuple[float, float]]:
        """By layer, its largest input and output over all ranks; NaN if none was seen. Collective.

        Args:
            names: The layers, the same on every rank.
            device: Device on which the ranks compare them.
        """
        names, unseen = list(names), torch.tensor(-1.0, device=device)
        found = [seen.get(name, unseen).float() for name in names for seen in (self._inputs, self._outputs)]
        largest = torch.stack(found).nan_to_num(nan=-1, posinf=math.inf)
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


def _include(seen: dict[str, Tensor], names: Iterable[str], x: Any) -> None:
    if not isinstance(x, Tensor) or not x.numel():
        return
    low, high = x.detach().aminmax()  # reads x once, without a copy
    largest = torch.maximum(-low, high)
    for name in names:
        seen[name] = torch.fmax(seen[name], largest) if name in seen else largest
