"""A quantized weight in the layout of the GPU's kernels, from a checkpoint's tensors and back: `ArrangedWeight`.

Tested by tests/layers/test_stored_weight.py: through the layer that has it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from gptq_plugin.kernels.product.layout import Arranged, Layout, arrange, restore
from gptq_plugin.kernels.reference import unpack
from gptq_plugin.layers.packing import pack, pack_zeros, unpack_zeros

_OLDEST = (8, 0)  # compute capability: asynchronous copies, bfloat16


class Packed(NamedTuple):
    """The tensors of a checkpoint; see `QuantLinear`."""

    qweight: Tensor
    qzeros: Tensor
    scales: Tensor
    g_idx: Tensor


@dataclass(frozen=True)
class ArrangedWeight:
    """A weight as `kernels.product` reads it.

    Attributes:
        layout: Its sizes.
        tensors: Words, scales and zeros.
        order: int64 [in], the channels of x in the weight's order; None if they are.
    """

    layout: Layout
    tensors: Arranged
    order: Tensor | None

    @classmethod
    def of(cls, packed: Packed, bits: int, group_size: int) -> ArrangedWeight | None:
        """Arranges a weight; waits for the GPU.

        Args:
            packed: On a GPU.
            bits: Width of a code.
            group_size: Channels that share a scale, or -1 for all.

        Returns:
            None if the kernels do not take it, or `packed` could not be made from it again, bit for bit: groups that
            are no multiple of 32 channels or not all of one size, bits behind the last code, an old GPU.
        """
        n_in, n_out = len(packed.g_idx), packed.qweight.shape[1]
        size = n_in if group_size == -1 else min(group_size, n_in)
        if not is_served(packed.qweight.device) or packed.scales.shape[0] != -(-n_in // max(1, size)):
            return None
        sort, natural = packed.g_idx.sort(stable=True)
        if not torch.equal(sort, torch.arange(n_in, dtype=sort.dtype, device=sort.device) // size):
            return None
        order = None if torch.equal(sort, packed.g_idx) else natural
        zeros = unpack_zeros(packed.qzeros, bits, n_out)
        symmetric = bool((zeros == 2 ** (bits - 1)).all())
        layout = Layout.of(bits, size, n_in, n_out, symmetric)
        if layout is None:
            return None
        codes = unpack(packed.qweight, bits, n_in)
        arranged = cls(layout, arrange(layout, codes if order is None else codes[order], packed.scales, zeros), order)
        if (n_in * bits % 32 or n_out * bits % 32) and not arranged._gives(packed):
            return None
        return arranged

    def packed(self, g_idx: Tensor) -> Packed:
        """The tensors it was made from.

        Args:
            g_idx: The same.
        """
        codes, scales, zeros = restore(self.layout, self.tensors)
        if self.order is not None:
            codes = torch.empty_like(codes).index_copy_(0, self.order, codes)
        return Packed(pack(codes, self.layout.bits), pack_zeros(zeros, self.layout.bits), scales, g_idx)

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x Wᵀ + bias; see `kernels.product.products.product`.

        Raises:
            ValueError: The kernels do not take x or the bias.
        """
        from gptq_plugin.kernels.product import products  # imported here: needs Triton

        products.check(x, self.layout, self.tensors, bias)
        return products.product(x, self.layout, self.tensors, bias, self.order)

    def _gives(self, packed: Packed) -> bool:
        return all(map(torch.equal, self.packed(packed.g_idx), packed))


def is_served(device: torch.device) -> bool:
    """True for GPUs that the kernels are written for."""
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) >= _OLDEST
