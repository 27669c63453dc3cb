"""The product of a quantized layer on a CPU, and the choice of how: `CpuProduct`.

Tested by tests/layers/test_qlinear.py: through the layer that has it.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from gptq_plugin.kernels import reference
from gptq_plugin.layers.code_table import CodeTable
from gptq_plugin.layers.int4_cpu import MOST_ROWS, Int4
from gptq_plugin.layers.int8_cpu import Int8
from gptq_plugin.layers.kernel_layout import Packed
from gptq_plugin.layers.weight_table import WeightTable

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# An embedding bag reads every code anew for each row of x, on one thread. As many rows as these take it as long as the
# 8-bit product or unpacking weights take all threads, and one row never takes longer (scripts/bench_qlinear.py --device
# cpu measures them).
_ROWS_BEFORE_INT8 = 3
_MOST_ROWS_OF_INT8 = 128  # with more a float layer, or unpacked weights, may be faster: CPUs differ
_ROWS_BEFORE_WEIGHTS = 8


class CpuProduct:
    """A layer that multiplies on a CPU. Each way repacks the codes when it first serves, and keeps them beside the
    layer's own: half a byte a weight of 4 bits for PyTorch's 4-bit kernel or a table, a byte for its 8-bit product.

    Args:
        packed: The layer's tensors, which must not change.
        bits: Width of a code.
        group_size: Channels that share a scale.

    Raises:
        ValueError: A tensor has the wrong dtype, shape or device; the message names it.
    """

    def __init__(self, packed: Packed, bits: int, group_size: int) -> None:
        reference.check_weight(*packed, bits)
        self._packed, self._bits, self._group_size = packed, bits, group_size

    @functools.cached_property
    def int4(self) -> Int4 | None:
        """For PyTorch's 4-bit kernel; None if that does not take the layer."""
        return Int4.repack(self._packed, self._bits, self._group_size)

    @functools.cached_property
    def int8(self) -> Int8 | None:
        """For PyTorch's 8-bit product; None if that does not take the layer."""
        return Int8.repack(self._packed, self._bits, self._group_size)

    @functools.cached_property
    def codes(self) -> CodeTable:
        """As tables for few rows."""
        return CodeTable.of(self._packed, self._bits)

    @functools.cached_property
    def weights(self) -> WeightTable:
        """As a table for many rows."""
        return WeightTable.of(self._packed, self._bits)

    def matmul(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x Wᵀ + bias in x's dtype.

        Args:
            x: Any floating dtype, [..., in].
            bias: [out], rounded to x's dtype, or None.

        Raises:
            ValueError: x or the bias has the wrong dtype, shape or device; the message names it.
        """
        reference.check_input(x, self._packed.qweight, self._packed.g_idx, bias)
        if not x.numel() or not self._packed.qweight.shape[1] or x.dtype not in _DTYPES:
            return reference.matmul(x, *self._packed, self._bits, bias)
        rows = x.reshape(-1, x.shape[-1])
        if x.dtype == torch.bfloat16 and len(rows) <= MOST_ROWS and self.int4 is not None:
            y = self.int4.matmul(rows)
        elif any(tensor.is_inference() for tensor in self._packed):
            return reference.matmul(x, *self._packed, self._bits, bias)  # nobody counts what is written to these
        else:
            y = self._exact(rows)
        if bias is not None:
            y += bias.to(y.dtype)
        return y.view(*x.shape[:-1], y.shape[1])

    def _exact(self, rows: Tensor) -> Tensor:
        """The product with weights that are not rounded, but for bfloat16 once.

        Args:
            rows: One of `_DTYPES`, [rows, in], at least one row.
        """
        one, readings = len(rows) == 1, len(rows) * torch.get_num_threads()
        some = not one and readings > _ROWS_BEFORE_INT8 and len(rows) <= _MOST_ROWS_OF_INT8
        if some and rows.dtype != torch.bfloat16 and self.int8 is not None:
            y = self.int8.matmul(rows)
            if y is not None:
                return y
        return self.codes.matmul(rows) if one or readings <= _ROWS_BEFORE_WEIGHTS else self.weights.matmul(rows)
