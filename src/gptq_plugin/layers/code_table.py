"""A layer's codes as tables of PyTorch's quantized embeddings, for few rows of x: `CodeTable`.

An embedding bag sums rows of codes with a weight for each row: with a group's channels as the rows, their inputs as the
weights and outputs as columns, it is a group's part of the product, in float32.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from gptq_plugin.layers.kernel_layout import Packed
from gptq_plugin.layers.table_rows import GroupedCodes, operator, own_dtype, table_rows

_WIDTH = 512  # outputs of a table: a row of codes is a few cache lines
_PART = 128  # rows that are added one after the other


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
        of = GroupedCodes.of(packed, bits)
        n_in, n_out = of.codes.shape
        offsets = (2 ** (of.bits - 1) - of.zeros) * of.scales
        # Parts of groups, for sums of many small sums: a long one would lose digits.
        ends = enumerate(itertools.pairwise(of.starts))
        parts = [(start, number) for number, (begin, end) in ends for start in range(begin, end, _PART)]
        part_starts, groups = (*(start for start, _ in parts), n_in), [number for _, number in parts]
        tables = -(-n_out // _WIDTH)
        width = -(-n_out // (8 * tables)) * 8

        def cut(values: Tensor) -> Tensor:
            padded = pad(values, (0, tables * width - n_out))
            return padded.view(len(values), tables, width).transpose(0, 1).contiguous()

        own = torch.tensor([1, -(2.0 ** (of.bits - 1))], dtype=own_dtype(of.bits), device="cpu")
        return cls(
            bits=of.bits,
            rows=table_rows(cut(of.codes), own, of.bits),
            scales=cut(of.scales[groups]),
            offsets=cut(offsets[groups]) if offsets.any() else None,
            order=of.order,
            starts=part_starts,
            n_out=n_out,
        )

    def matmul(self, x: Tensor) -> Tensor:
        """x Wᵀ, one row after the other, with float32 sums. W is exact.

        Args:
            x: float32, float16 or bfloat16 [rows, in], at least one row.
        """
        wide = x.float() if self.order is None else x.float().index_select(1, self.order)
        return torch.stack([self._row(row) for row in wide]).to(x.dtype)

    def _row(self, x: Tensor) -> Tensor:
        """The product of one row, float32 [in]."""
        bags = operator(self.bits, "rowwise_offsets")
        inputs = x.repeat(len(self.rows))
        sums = bags(self.rows.flatten(0, 1), *self._bags, False, 0, False, inputs).view_as(self.scales)
        sums *= self.scales
        if self.offsets is not None:
            inputs = torch.segment_reduce(x, "sum", offsets=torch.tensor(self.starts, device="cpu"))
            sums.addcmul_(self.offsets, inputs[:, None])
        return sums.sum(1).flatten()[: self.n_out]

    @functools.cached_property
    def _bags(self) -> tuple[Tensor, Tensor]:
        """Every row of all tables, and where each bag of them starts; int32."""
        tables, n_in, _ = self.rows.shape
        index = torch.arange(tables * n_in, dtype=torch.int32, device="cpu")
        first = torch.tensor(self.starts[:-1], dtype=torch.int32, device="cpu")
        return index, (first + index[::n_in, None]).flatten()
