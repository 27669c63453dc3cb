"""A layer's weights as rows of a table of PyTorch's quantized embeddings, for many rows of x: `WeightTable`.

A row holds an output's codes of a group or a part of one, with the group's scale as the row's own, so that the operator
that unpacks rows gives weights.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, pad

from gptq_plugin.layers.kernel_layout import Packed
from gptq_plugin.layers.table_rows import GroupedCodes, operator, own_dtype, table_rows

_LENGTHS = (256, 128, 64, 32, 16, 8)  # of a row, in codes
_TILE = 2**20  # weights unpacked at a time: a call has its own time, and for more float32 the memory is often fresh
_OUTPUTS = 64  # a tile has a multiple of so many: oneDNN multiplies blocks of them
_TILES = 4  # multiplied at a time with many rows of x, all of which are read again for the next
_MANY_ROWS = 512


@dataclass(frozen=True)
class WeightTable:
    """A layer as a table: W = code * own scale + own offset + offset, exact in float32.

    Attributes:
        bits: Of a code in the table: 2, 4 or 8.
        rows: uint8 [out, parts, bytes].
        length: Codes of a row.
        offsets: float32 [out, parts], or None if all are 0.
        channels: int64 [parts * length], the channel of x of every code, or the number of channels where a group fills
            no row; None if they are x's.
        n_in: Channels of x.
    """

    bits: int
    rows: Tensor
    length: int
    offsets: Tensor | None
    channels: Tensor | None
    n_in: int

    @classmethod
    def of(cls, packed: Packed, bits: int) -> WeightTable:
        """Makes the table of any layer that has channels and outputs.

        Args:
            packed: Its tensors, on a CPU.
            bits: Width of a code.

        Raises:
            ValueError: A channel's group does not exist.
        """
        of = GroupedCodes.of(packed, bits)
        n_in = len(of.codes)
        length = _length(of.starts, of.bits)
        ends = enumerate(itertools.pairwise(of.starts))
        parts = [(at, end, group) for group, (begin, end) in ends for at in range(begin, end, length)]
        groups = [group for _, _, group in parts]
        place = torch.tensor([at for at, _, _ in parts], device="cpu")[:, None] + torch.arange(length, device="cpu")
        place[place >= torch.tensor([end for _, end, _ in parts], device="cpu")[:, None]] = n_in
        place = place.flatten()
        order = torch.arange(n_in, device="cpu") if of.order is None else of.order
        natural = of.order is None and len(place) == n_in
        codes = of.codes if len(place) == n_in else pad(of.codes, (0, 0, 0, 1), value=2 ** (of.bits - 1))[place]
        zeros, scales = (values.float().t()[:, groups].contiguous() for values in (of.zeros, of.scales))
        own, offsets = _own(zeros, scales, of.bits)
        return cls(
            bits=of.bits,
            rows=table_rows(codes.t().reshape(-1, len(parts), length), own, of.bits),
            length=length,
            offsets=offsets,
            channels=None if natural else pad(order, (0, 1), value=n_in)[place],
            n_in=n_in,
        )

    def matmul(self, x: Tensor) -> Tensor:
        """x Wᵀ, with float32 sums. W is exact for float32 and float16, and rounded once for bfloat16.

        Args:
            x: float32, float16 or bfloat16 [rows, in].
        """
        dtype = torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float32
        rows = x.to(dtype)
        if self.channels is not None:
            rows = pad(rows, (0, 1)).index_select(1, self.channels)
        with torch.autocast("cpu", enabled=False):  # it would take float32 for float16
            parts = [linear(rows, weights) for weights in self.weights(dtype, _TILES if len(x) >= _MANY_ROWS else 1)]
        return (parts[0] if len(parts) == 1 else torch.cat(parts, 1)).to(x.dtype)

    def weights(self, dtype: torch.dtype, tiles: int) -> Iterator[Tensor]:
        """Yields the weights of some outputs after the other, [outputs, parts * length] in `dtype`: so many tiles at a
        time, if more than one in the same memory.
        """
        if tiles == 1:
            for tile in self._tiles:
                yield self._unpack(*tile).to(dtype)
            return
        panel = torch.empty(tiles * len(self._tiles[0][0]) * self.length, dtype=dtype, device="cpu")
        for start in range(0, len(self._tiles), tiles):
            end = 0
            for tile in self._tiles[start : start + tiles]:
                unpacked = self._unpack(*tile)
                begin, end = end, end + unpacked.numel()
                panel[begin:end].view_as(unpacked).copy_(unpacked)
            yield panel[:end].view(-1, unpacked.shape[1])

    def _unpack(self, rows: Tensor, offsets: Tensor | None) -> Tensor:
        """The weights of a tile, float32 [outputs, parts * length]."""
        unpacked: Tensor = self._operator(rows)
        if offsets is not None:
            unpacked += offsets
        return unpacked.view(-1, self.rows.shape[1] * self.length)

    @functools.cached_property
    def _tiles(self) -> tuple[tuple[Tensor, Tensor | None], ...]:
        """Rows of some outputs after the other, uint8 [outputs * parts, bytes], and their offsets [outputs * parts, 1];
        views, since making them takes as long as a small product.
        """
        parts = self.rows.shape[1]
        number = max(1, _TILE // (parts * self.length) // _OUTPUTS) * _OUTPUTS * parts
        rows = self.rows.flatten(0, 1).split(number)
        offsets = (None,) * len(rows) if self.offsets is None else self.offsets.view(-1, 1).split(number)
        return tuple(zip(rows, offsets, strict=True))

    @functools.cached_property
    def _operator(self) -> Any:
        return operator(self.bits, "unpack").default


def _length(starts: Sequence[int], bits: int) -> int:
    """The number of codes in a row with which a table is smallest."""
    sizes = [end - begin for begin, end in itertools.pairwise(starts)]
    own = 2 * own_dtype(bits).itemsize
    return min(_LENGTHS, key=lambda length: sum(-(-size // length) for size in sizes) * (length * bits // 8 + own))


def _own(zeros: Tensor, scales: Tensor, bits: int) -> tuple[Tensor, Tensor | None]:
    """(scale and offset of every row, offsets beside them or None), so that nothing is rounded.

    Args:
        zeros, scales: float32 [out, parts].
        bits: Width of a code.
    """
    kind = own_dtype(bits)
    middle = zeros if kind == torch.float32 else torch.full_like(zeros, 2.0 ** (bits - 1))
    if not bool((scales.abs() * middle <= torch.finfo(kind).max).all()):
        middle = torch.zeros_like(zeros)
    offsets = (middle - zeros) * scales
    return torch.stack([scales, -middle * scales], -1).to(kind), offsets if offsets.any() else None
