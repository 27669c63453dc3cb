"""A layer's codes as tables of PyTorch's quantized embeddings, whose operators read them fast on a CPU: `CodeTable`.

An embedding bag sums rows of codes with a weight for each row: with a group's channels as the rows, their inputs as the
weights and outputs as columns, it is a group's part of the product, in float32. Unpacked, the rows are a weight.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from gptq_plugin.kernels.reference import unpack
from gptq_plugin.layers.kernel_layout import Packed
from gptq_plugin.layers.packing import unpack_zeros

_WIDTH = 512  # outputs of a table: a row of codes is a few cache lines
_PART = 128  # rows that are added one after the other
_TILE = 2**19  # weights that are dequantized at a time

# An embedding bag reads every code anew for each row of x, on one thread; dequantizing them takes as long as this many
# rows, on all threads (scripts/bench_qlinear.py --device cpu measures both).
_ROWS_OF_A_THREAD = 6


@dataclass(frozen=True)
class CodeTable:
    """A layer as tables of at most 512 outputs: W = (code - middle) * scale + offset, exact in float32.

    Attributes:
        bits: Of a code in the tables: 2, 4 or 8.
        rows: uint8 [tables, in, bytes], codes and then the row's own scale, 1, and offset, -2^(bits - 1).
        scales: float32 [tables, parts, width].
        offsets: The same, or None if all are 0.
        order: int64 [in], the channels of x in the rows' order; None if they are.
        starts: Where each part of the rows starts, a group or 128 rows of one; and the number of rows.
        n_out: Outputs; the last table may have more.
    """

    bits: int
    rows: Tensor
    scales: Tensor
    offsets: Tensor | None
    order: Tensor | None
    starts: tuple[int, ...]
    n_out: int

    @classmethod
    def of(cls, packed: Packed, bits: int) -> CodeTable:
        """Makes the tables of any layer that has channels and outputs.

        Args:
            packed: Its tensors, on a CPU.
            bits: Width of a code.

        Raises:
            ValueError: A channel's group does not exist.
        """
        n_in, n_out = len(packed.g_idx), packed.qweight.shape[1]
        group, order = packed.g_idx.long().sort(stable=True)
        if group[0] < 0 or group[-1] >= len(packed.scales):
            raise ValueError(
                f"g_idx must be in [0, {len(packed.scales)}), it has {int(group[0])} to {int(group[-1])}: "
                "load the layer's tensors from one checkpoint"
            )
        starts = (0, *torch.bincount(group, minlength=len(packed.scales)).cumsum(0).tolist())
        natural = torch.equal(group, packed.g_idx)
        codes = unpack(packed.qweight, bits, n_in)
        codes = codes if natural else codes[order]
        stored = 4 if bits == 3 else bits
        zeros = _center(codes, unpack_zeros(packed.qzeros, bits, n_out).short(), starts, stored)
        scales = packed.scales.float()
        offsets = (2 ** (stored - 1) - zeros) * scales
        # Parts of groups, for sums of many small sums: a long one would lose digits.
        ends = enumerate(itertools.pairwise(starts))
        parts = [(start, number) for number, (begin, end) in ends for start in range(begin, end, _PART)]
        part_starts, of = (*(start for start, _ in parts), n_in), [number for _, number in parts]
        tables = -(-n_out // _WIDTH)
        width = -(-n_out // (8 * tables)) * 8

        def cut(values: Tensor) -> Tensor:
            padded = pad(values, (0, tables * width - n_out))
            return padded.view(len(values), tables, width).transpose(0, 1).contiguous()

        return cls(
            bits=stored,
            rows=_table_rows(cut(codes), stored),
            scales=cut(scales[of]),
            offsets=cut(offsets[of]) if offsets.any() else None,
            order=None if natural else order,
            starts=part_starts,
            n_out=n_out,
        )

    def matmul(self, x: Tensor) -> Tensor:
        """x Wᵀ, with float32 sums.

        W is exact for float32 and float16; for bfloat16 it is rounded to that dtype where there are many rows.

        Args:
            x: float32, float16 or bfloat16 [rows, in], at least one row.
        """
        if self.order is not None:
            x = x.index_select(1, self.order)
        if len(x) * torch.get_num_threads() <= _ROWS_OF_A_THREAD:
            wide = x.float()
            return torch.stack([self._row(row) for row in wide]).to(x.dtype)
        dtype = torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float32
        rows = x.to(dtype)
        y = torch.empty(len(x), self.n_out, dtype=x.dtype, device="cpu")
        width = self.scales.shape[2]
        with torch.autocast("cpu", enabled=False):  # it would take float32 for float16
            for number, panel in enumerate(self._panels(dtype)):
                columns = y[:, number * width : (number + 1) * width]
                columns.copy_((rows @ panel)[:, : columns.shape[1]])
        return y

    def _row(self, x: Tensor) -> Tensor:
        """The product of one row, float32 [in]."""
        tables, n_in, _ = self.rows.shape
        bags = _operator(self.bits, "rowwise_offsets")
        index = torch.arange(tables * n_in, dtype=torch.int32, device="cpu")
        first = torch.tensor(self.starts[:-1], dtype=torch.int32, device="cpu")
        starts = (first + index[::n_in, None]).flatten()
        sums = bags(self.rows.flatten(0, 1), index, starts, False, 0, False, x.repeat(tables)).view_as(self.scales)
        sums *= self.scales
        if self.offsets is not None:
            inputs = torch.segment_reduce(x, "sum", offsets=torch.tensor(self.starts, device="cpu"))
            sums.addcmul_(self.offsets, inputs[:, None])
        return sums.sum(1).flatten()[: self.n_out]

    def _panels(self, dtype: torch.dtype) -> Iterator[Tensor]:
        """Yields every table's weights, [in, width], in the same memory."""
        tables, n_in, _ = self.rows.shape
        width = self.scales.shape[2]
        unpack_rows = _operator(self.bits, "unpack")
        panel = torch.empty(n_in, width, dtype=dtype, device="cpu")
        spans = list(_spans(self.starts, max(1, _TILE // width)))
        for table in range(tables):
            for start, stop, parts in spans:
                shape = (parts.stop - parts.start, -1, width)
                tile = unpack_rows(self.rows[table, start:stop]).view(shape)
                scales = self.scales[table, parts, None]
                into = panel[start:stop].view(shape)
                out = into if dtype == torch.float32 else tile
                if self.offsets is None:
                    torch.mul(tile, scales, out=out)
                else:
                    torch.addcmul(self.offsets[table, parts, None], tile, scales, out=out)
                if out is tile:
                    into.copy_(tile)
            yield panel


def _operator(bits: int, name: str) -> Any:
    return getattr(torch.ops.quantized, f"embedding_bag_{'byte' if bits == 8 else f'{bits}bit'}_{name}")


def _center(codes: Tensor, zeros: Tensor, starts: Sequence[int], bits: int) -> Tensor:
    """Moves codes so that the zero is the middle, in groups where they fit: their products then need no offset, and
    what is 0 in all of a group stays 0.

    Args:
        codes: uint8 [in, out], changed in place.
        zeros: int16 [G, out].
        starts: Where each group starts.
        bits: Width of a code then.

    Returns:
        The zeros of the moved codes.
    """
    middle, top = 2 ** (bits - 1), 2**bits - 1
    shifts = middle - zeros
    for number in shifts.any(1).nonzero().flatten().tolist():
        part = codes[starts[number] : starts[number + 1]]
        if len(part):
            low, high = torch.aminmax(part, dim=0)
            shift = shifts[number]
            shift[(low.short() + shift < 0) | (high.short() + shift > top)] = 0
            part += shift.to(torch.uint8)  # modulo 256
    return zeros + shifts


def _table_rows(codes: Tensor, bits: int) -> Tensor:
    """Rows of a quantized embedding, uint8 [..., bytes], from codes, uint8 [..., width]."""
    own = torch.tensor([1, -(2.0 ** (bits - 1))], dtype=torch.float32 if bits == 8 else torch.float16, device="cpu")
    own = own.view(torch.uint8)
    codes = codes.unflatten(-1, (-1, 8 // bits))
    rows = torch.empty(*codes.shape[:-2], codes.shape[-2] + len(own), dtype=torch.uint8, device="cpu")
    words = rows[..., : codes.shape[-2]]
    words.copy_(codes[..., 0])
    for place in range(1, 8 // bits):
        words |= codes[..., place] << (place * bits)
    rows[..., codes.shape[-2] :] = own
    return rows


def _spans(starts: Sequence[int], most: int) -> Iterator[tuple[int, int, slice]]:
    """Joins parts of one size to at most so many rows: (start, stop, parts)."""
    part, last = 0, len(starts) - 1
    while part < last:
        size, end = starts[part + 1] - starts[part], part + 1
        while end < last and starts[end + 1] - starts[end] == size and starts[end + 1] - starts[part] <= most:
            end += 1
        yield starts[part], starts[end], slice(part, end)
        part = end
