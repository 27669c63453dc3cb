"""PyTorch's 4-bit product on a CPU, for a layer that it takes: `Int4`.

Tested by tests/layers/test_qlinear.py: through the layer that has it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gptq_plugin.layers.kernel_layout import Packed
from gptq_plugin.layers.packing import unpack_weight, unpack_zeros

# torch.ops.aten._weight_int4pack_mm_for_cpu: the group sizes it takes, and the most rows at which it is faster than
# dequantizing (its time grows with every row; scripts/bench_qlinear.py measures both).
_GROUPS = (256, 128, 64, 32)
MOST_ROWS = 128


@dataclass(frozen=True)
class Int4:
    """A layer repacked for `_weight_int4pack_mm_for_cpu`: W = (q - 8) * scale + zero in bfloat16."""

    weight: Tensor  # uint8 [out, in / 2], in the kernel's own order
    scales_and_zeros: Tensor  # bfloat16 [in / group_size, out, 2]
    group_size: int

    @classmethod
    def repack(cls, packed: Packed, bits: int, group_size: int | None) -> Int4 | None:
        """Repacks a layer; None if the kernel does not take its width, order, size or device.

        Args:
            packed: Its tensors.
            bits: Width of a code.
            group_size: Channels per group; None unless g_idx[i] is i // group_size.
        """
        n_in, n_out = len(packed.g_idx), packed.qweight.shape[1]
        if packed.qweight.device.type != "cpu" or bits != 4 or group_size is None:
            return None
        if n_out % 16 or n_in % group_size:
            return None
        # A longer group becomes several of the kernel's with the same scale.
        finer = next((g for g in _GROUPS if group_size % g == 0), None)
        if finer is None:
            return None
        codes = unpack_weight(packed.qweight, 4, n_in).int()
        scales = packed.scales.float()
        zeros = (8 - unpack_zeros(packed.qzeros, 4, n_out).float()) * scales
        pairs = torch.stack([scales, zeros], dim=-1).repeat_interleave(group_size // finer, dim=0)
        weight = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
        return cls(weight, pairs.bfloat16().contiguous(), finer)

    def matmul(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x Wᵀ + bias.

        Args:
            x: bfloat16 [..., in].
            bias: [out], or None.
        """
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        y: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(
            rows, self.weight, self.group_size, self.scales_and_zeros
        )
        if bias is not None:
            y += bias.to(y.dtype)
        return y.view(*x.shape[:-1], y.shape[1])
