"""How large the inputs and outputs of layers get in calibration: what a client computes in float16 ends at 65504."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gptq_plugin import distributed
from gptq_plugin.device.precision import FLOAT16

_MARGIN = 2  # calibration samples are not all there is: nearer than this to `FLOAT16` is said


class Ranges:
    """The largest absolute input and output of each layer, on the device until they are asked for.

    Every position counts, those too that enter no Hessian: a client computes them all, and the largest values often
    stand at the first one. NaN does not count: rows of padding alone may hold it, and all others are refused elsewhere.
    """

    def __init__(self) -> None:
        self._inputs: dict[str, Tensor] = {}
        self._outputs: dict[str, Tensor] = {}

    def read(self, names: Iterable[str], x: Tensor) -> None:
        """These layers read x."""
        _include(self._inputs, names, x)

    @contextlib.contextmanager
    def watching(self, layers: Mapping[str, nn.Module]) -> Iterator[None]:
        """While batches run: takes note of what the layers return."""

        def hook(name: str) -> Any:
            return lambda module, args, output: _include(self._outputs, [name], output)

        handles = [module.register_forward_hook(hook(name)) for name, module in layers.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def over_ranks(self, names: Iterable[str], device: torch.device) -> dict[str, tuple[float, float]]:
        """Of each layer its largest input and output over all ranks; NaN where none was seen.

        Args:
            names: The layers, the same on every rank.
            device: Where the ranks put them together.
        """
        names, unseen = list(names), torch.tensor(-1.0, device=device)
        found = [seen.get(name, unseen).float() for name in names for seen in (self._inputs, self._outputs)]
        largest = torch.stack(found).nan_to_num(nan=-1, posinf=math.inf)
        distributed.maximum_(largest)
        values = [value if value >= 0 else math.nan for value in largest.tolist()]
        return dict(zip(names, zip(values[::2], values[1::2], strict=True), strict=True))


def near_float16(largest_input: float, largest_output: float) -> str | None:
    """A sentence where float16 hardly holds what a layer reads or returns, or does not."""
    what = {"inputs": largest_input, "outputs": largest_output}
    large = [f"{name} reach {largest:.4g}" for name, largest in what.items() if largest > FLOAT16 / _MARGIN]
    if not large:
        return None
    return f"its {' and its '.join(large)} in calibration, and float16 ends at {FLOAT16:.0f}: have it run in bfloat16"


def _include(seen: dict[str, Tensor], names: Iterable[str], x: Any) -> None:
    if not isinstance(x, Tensor) or not x.numel():
        return
    low, high = x.detach().aminmax()  # reads x once, without a copy
    largest = torch.maximum(-low, high)
    for name in names:
        seen[name] = torch.fmax(seen[name], largest) if name in seen else largest
