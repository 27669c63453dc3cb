"""PyTorch's 4-bit product on a CPU, for a layer that it takes: `Int4`.

Tested by tests/layers/test_qlinear.py: through the layer that has it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from gptq_plugin.kernels.reference import unpack
from gptq_plugin.layers.kernel_layout import Packed
from gptq_plugin.layers.packing import unpack_zeros

# torch.ops.aten._weight_int4pack_mm_for_cpu: the group sizes it takes, and the most rows at which it is faster than
# unpacking weights (its time grows with every row; scripts/bench_qlinear.py measures both). It is fast in bfloat16
# only: for float32 and float16 it has no vector code on x86, and takes 50 times as long.
_GROUPS = (256, 128, 64, 32)
_OUTPUTS = 16  # a multiple of these
MOST_ROWS = 32


@dataclass(frozen=True)
class Int4:
    """A layer repacked for `_weight_int4pack_mm_for_cpu`: W = (q - 8) * scale + zero in bfloat16."""

    weight: Tensor  # uint8 [out, in / 2], in the kernel's own order
    scales_and_zeros: Tensor  # bfloat16 [in / group_size, out, 2]
    group_size: int
    order: Tensor | None  # int64 [in], the channels of x in the weight's order; None if they are
    n_out: int

    @classmethod
    def repack(cls, packed: Packed, bits: int, group_size: int) -> Int4 | None:
        """Repacks a layer; None if the kernel does not take its width or groups.

        Args:
            packed: Its tensors, on a CPU.
            bits: Width of a code.
            group_size: Channels per group.
        """
        n_in, n_out = len(packed.g_idx), packed.qweight.shape[1]
        # A longer group becomes several of the kernel's with the same scale.
        finer = next((g for g in _GROUPS if group_size % g == 0), None)
        if bits != 4 or finer is None or len(packed.scales) * group_size != n_in:
            return None
        sort, order = packed.g_idx.sort(stable=True)
        if not torch.equal(sort, torch.arange(n_in, dtype=sort.dtype, device="cpu") // group_size):
            return None  # groups of other sizes
        codes = unpack(packed.qweight, 4, n_in)
        natural = torch.equal(sort, packed.g_idx)
        codes = codes if natural else codes[order]
        scales = packed.scales.float()
        zeros = (8 - unpack_zeros(packed.qzeros, 4, n_out).float()) * scales
        missing = -n_out % _OUTPUTS
        pairs = pad(torch.stack([scales, zeros], dim=-1), (0, 0, 0, missing)).repeat_interleave(group_size // finer, 0)
        weight = torch.ops.aten._convert_weight_to_int4pack_for_cpu(
            pad(codes.t().int(), (0, 0, 0, missing)).contiguous(), 1
        )
        return cls(weight, pairs.bfloat16().contiguous(), finer, None if natural else order, n_out)

    def matmul(self, x: Tensor) -> Tensor:
        """x Wᵀ.

        Args:
            x: bfloat16 [rows, in].
        """
        x = x.contiguous() if self.order is None else x.index_select(1, self.order)
        y: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(x, self.weight, self.group_size, self.scales_and_zeros)
        return y if y.shape[1] == self.n_out else y[:, : self.n_out].contiguous()
