"""What both kinds of tables are made of: a layer's codes in the order of their groups, and rows of PyTorch's quantized
embeddings, whose operators read them fast on a CPU.

Tested by tests/layers/test_weight_table.py: through the tables.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gptq_plugin.kernels.reference import unpack
from gptq_plugin.layers.kernel_layout import Packed
from gptq_plugin.layers.packing import unpack_zeros


@dataclass(frozen=True)
class GroupedCodes:
    """A layer's codes, channels of a group next to each other: W = (code - zero) * scale.

    Attributes:
        bits: Of a code in a table: 2, 4 or 8.
        codes: uint8 [in, out], moved so that the zero is the middle of their range where they fit.
        zeros: int16 [G, out].
        scales: float32 [G, out].
        order: int64 [in], the channels of x in the codes' order; None if they are.
        starts: Where each group starts; and the number of channels.
    """

    bits: int
    codes: Tensor
    zeros: Tensor
    scales: Tensor
    order: Tensor | None
    starts: tuple[int, ...]

    @classmethod
    def of(cls, packed: Packed, bits: int) -> GroupedCodes:
        """Unpacks any layer that has channels and outputs.

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
        return cls(stored, codes, zeros, packed.scales.float(), None if natural else order, starts)


def operator(bits: int, name: str) -> Any:
    """An operator of PyTorch for tables of a width."""
    return getattr(torch.ops.quantized, f"embedding_bag_{'byte' if bits == 8 else f'{bits}bit'}_{name}")


def own_dtype(bits: int) -> torch.dtype:
    """The dtype of a row's own scale and offset."""
    return torch.float32 if bits == 8 else torch.float16


def table_rows(codes: Tensor, own: Tensor, bits: int) -> Tensor:
    """Rows of a quantized embedding, uint8 [..., bytes].

    Args:
        codes: uint8 [..., width].
        own: [..., 2] of `own_dtype`, each row's scale and offset; leading dimensions may be missing.
        bits: Width of a code: 2, 4 or 8.
    """
    own = own.view(torch.uint8)
    codes = codes.unflatten(-1, (-1, 8 // bits))
    width = codes.shape[-2]
    rows = torch.empty(*codes.shape[:-2], width + own.shape[-1], dtype=torch.uint8, device="cpu")
    words = rows[..., :width]
    words.copy_(codes[..., 0])
    for place in range(1, 8 // bits):
        words |= codes[..., place] << (place * bits)
    rows[..., width:] = own
    return rows


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
