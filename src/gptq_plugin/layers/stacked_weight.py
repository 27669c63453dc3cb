"""The weights of several layers with the same inputs as one: `StackedWeight`, and what has them to a layer: `Group`.

Tested by tests/layers/test_siblings.py: through the layers that have it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from gptq_plugin.kernels.product.layout import Arranged
from gptq_plugin.layers.kernel_layout import ArrangedWeight


@dataclass(frozen=True)
class StackedWeight:
    """Weights whose outputs follow each other, each with its padding.

    Attributes:
        weight: All outputs.
        starts: The first output of every layer.
        widths: Number of outputs of every layer.
        parts: Its tensors, which are views of `weight`'s.
    """

    weight: ArrangedWeight
    starts: tuple[int, ...]
    widths: tuple[int, ...]
    parts: tuple[Arranged, ...]

    @classmethod
    def of(cls, weights: Sequence[ArrangedWeight]) -> StackedWeight:
        """Copies the weights into one; they must not differ (`difference`)."""
        ends = torch.tensor([weight.layout.outputs for weight in weights], device="cpu").cumsum(0).tolist()
        starts, widths = (0, *ends[:-1]), tuple(weight.layout.n_out for weight in weights)
        words, scales, zeros = zip(*(weight.tensors for weight in weights), strict=True)
        tensors = Arranged(torch.cat(words, 1), torch.cat(scales, 2), _joined(zeros, 2))
        parts = []
        for start, weight in zip(starts, weights, strict=True):
            size = weight.layout.outputs
            dims = zip(tensors, (1, 2, 2), strict=True)
            cut = [None if t is None else t.narrow(dim, start, size) for t, dim in dims]
            parts.append(Arranged(*cut))  # type: ignore[arg-type]
        layout = replace(weights[0].layout, n_out=starts[-1] + widths[-1])
        return cls(ArrangedWeight(layout, tensors, weights[0].order), starts, widths, tuple(parts))


def joined_bias(
    biases: Sequence[Tensor | None], starts: Sequence[int], widths: Sequence[int], device: torch.device
) -> Tensor | None:
    """Layers' biases in the places of their outputs, zero elsewhere; None if none has one.

    Args:
        biases: [width] of every layer, or None.
        starts, widths: See `StackedWeight`.
        device: The layers'.
    """
    if all(bias is None for bias in biases):
        return None
    pieces = []
    for bias, start, end, width in zip(biases, starts, (*starts[1:], starts[-1] + widths[-1]), widths, strict=True):
        if bias is None:
            pieces.append(torch.zeros(end - start, dtype=torch.float16, device=device))
        else:
            pieces.append(nn.functional.pad(bias, (0, end - start - width)) if end - start > width else bias)
    return torch.cat(pieces)


class Group(Protocol):
    """Layers whose weights are stacked, as one of them sees it; see `siblings.Siblings`."""

    def join(self, layer: Any) -> None: ...

    def present(self) -> Any: ...

    def stacked(self) -> StackedWeight | None: ...

    def part(self, layer: Any, input: Tensor, x: Tensor) -> Tensor | None: ...

    def traced(self, layer: Any, input: Tensor, dtype: torch.dtype) -> Tensor | None: ...

    def separate(self) -> None: ...


def difference(first: ArrangedWeight, other: ArrangedWeight) -> str | None:
    """Why two weights cannot be stacked; None if they can. Waits for the GPU."""
    one, two = first.layout, other.layout
    for name, told in (("n_in", "input channels"), ("bits", "bits"), ("group_size", "channels a group")):
        if getattr(one, name) != getattr(two, name):
            return f"{getattr(two, name)} {told}, not {getattr(one, name)}"
    if one.symmetric != two.symmetric:
        return "no zero-points" if two.symmetric else "zero-points"
    if first.tensors.words.device != other.tensors.words.device:
        return "another device"
    orders = (first.order, other.order)
    if (orders[0] is None) != (orders[1] is None) or (orders[0] is not None and not torch.equal(*orders)):  # type: ignore[arg-type]
        return "another order of channels (g_idx)"
    return None


def _joined(tensors: Sequence[Tensor | None], dim: int) -> Tensor | None:
    return None if tensors[0] is None else torch.cat(tensors, dim)  # type: ignore[arg-type]
