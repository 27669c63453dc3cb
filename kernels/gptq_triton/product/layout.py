"""The layout in which the product's kernels read a weight, in plain PyTorch: `Layout`, `arrange`, `restore`.

The inputs of a weight are cut into blocks, a block into planes of 64 channels (32 if a group has 32,
and of 3 bits, so that a step is no longer than of 2)::

    words   int16 [blocks, N, lanes]       plane j of word i of block b is input (b * planes + j) * lanes + i
    high    int16 [blocks / 2, N, lanes]   3 bits only: the codes' third bits, two blocks to a word
    scales  int32 [steps, pairs, N]        float16 scales of two groups that follow each other, the earlier one low
    zeros   int32 [steps, pairs, N]        their zeros likewise, as integers; None if all are 2^(bits - 1)

A word has a code of each plane, so that a tile of words times one shift and mask is a tile of codes that the tensor
cores take as it lies: nothing moves between threads. Two scales lie in one int32 since smaller loads cannot be
asynchronous. A group holds 32, 64 or 128 channels here; longer ones are repeated. A step is the least number of blocks
with an even number of groups and at least 256 channels. Inputs are padded to a step and outputs to 64, with scales of
zero.

Tested by tests/kernels/test_products.py: with the kernels that read it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

OUTPUTS = 64  # what outputs are padded to: the largest tile's
_STEP = 256  # least channels in a step


@dataclass(frozen=True)
class Layout:
    """Sizes of a weight in the kernels' layout.

    Attributes:
        bits: Width of a code: 2, 3, 4 or 8.
        group: Channels that share a scale here: 32, 64 or 128.
        n_in: Input channels.
        n_out: Outputs.
        group_size: Channels that share a scale in the standard layout; at least n_in if all do.
        symmetric: Every zero is 2^(bits - 1).
    """

    bits: int
    group: int
    n_in: int
    n_out: int
    group_size: int
    symmetric: bool

    @classmethod
    def of(cls, bits: int, group_size: int, n_in: int, n_out: int, symmetric: bool) -> Layout | None:
        """The layout of a weight; None for a group size that is no multiple of 32 and does not span all channels."""
        fitting = (size for size in (128, 64, 32) if group_size % size == 0 or group_size >= n_in)
        group = next(fitting, None)
        return None if group is None or not n_in or not n_out else cls(bits, group, n_in, n_out, group_size, symmetric)

    @property
    def lanes(self) -> int:
        return min(self.group, 32 if self.bits == 3 else 64)

    @property
    def planes(self) -> int:
        return 16 // (2 if self.bits == 3 else self.bits)

    @property
    def blocks_a_step(self) -> int:
        return 2 if self.bits == 3 else max(1, _STEP // (self.planes * self.lanes))

    @property
    def step(self) -> int:
        """Channels in a step."""
        return self.blocks_a_step * self.planes * self.lanes

    @property
    def steps(self) -> int:
        return -(-self.n_in // self.step)

    @property
    def outputs(self) -> int:
        """Outputs with padding."""
        return -(-self.n_out // OUTPUTS) * OUTPUTS

    @property
    def groups(self) -> int:
        """Groups in the standard layout."""
        return -(-self.n_in // self.group_size)


class Arranged(NamedTuple):
    """A weight's tensors in the kernels' layout; see the module's docstring.

    They may be those of some outputs, out of tensors of more.
    """

    words: Tensor
    high: Tensor | None
    scales: Tensor
    zeros: Tensor | None

    @property
    def stride(self) -> int:
        """Outputs, with padding, of the tensors that they lie in."""
        return self.words.stride(0) // self.words.stride(1)

    def contiguous(self) -> Arranged:
        """The same in tensors of their own: itself, or a copy."""
        if self.stride == self.words.shape[1]:
            return self
        copies = (None if t is None else t.clone(memory_format=torch.contiguous_format) for t in self)
        return Arranged(*copies)  # type: ignore[arg-type]


def arrange(layout: Layout, codes: Tensor, scales: Tensor, zeros: Tensor) -> Arranged:
    """Arranges a weight.

    Args:
        layout: Its sizes.
        codes: uint8 [in, out], channels of a group next to each other.
        scales: float16 [G, out].
        zeros: uint8 [G, out]; not read if the layout is symmetric.
    """
    channels = layout.steps * layout.step
    padded = codes.new_zeros(channels, layout.outputs)
    padded[: layout.n_in, : layout.n_out] = codes
    planes = padded.view(-1, layout.planes, layout.lanes, layout.outputs)
    bits = 2 if layout.bits == 3 else layout.bits
    words = _or_planes([(planes[:, j] & (2**bits - 1), bits * j) for j in range(layout.planes)])
    high = None
    if layout.bits == 3:
        pairs = planes.view(-1, 2, layout.planes, layout.lanes, layout.outputs)
        high = _or_planes([(pairs[:, e, j] >> 2, high_bit(e, j)) for e in range(2) for j in range(layout.planes)])
    return Arranged(
        words, high, _pairs(layout, scales.view(torch.int16)), None if layout.symmetric else _pairs(layout, zeros)
    )


def restore(layout: Layout, arranged: Arranged) -> tuple[Tensor, Tensor, Tensor]:
    """The inverse of `arrange`: codes, scales and zeros."""
    bits = 2 if layout.bits == 3 else layout.bits
    planes = [arranged.words >> (bits * j) & (2**bits - 1) for j in range(layout.planes)]
    codes = torch.stack([plane.to(torch.uint8) for plane in planes], 1)  # [blocks, planes, out, lanes]
    if arranged.high is not None:
        bit = [[arranged.high >> high_bit(e, j) & 1 for j in range(layout.planes)] for e in range(2)]
        high = torch.stack([torch.stack(of_one, 1) for of_one in bit], 1).to(torch.uint8)
        codes |= high.view_as(codes) << 2
    codes = codes.transpose(2, 3).reshape(-1, layout.outputs)[: layout.n_in, : layout.n_out].contiguous()
    scales = _of_pairs(layout, arranged.scales).view(torch.float16)
    if arranged.zeros is None:
        return codes, scales, torch.full_like(scales, 2 ** (layout.bits - 1), dtype=torch.uint8)
    return codes, scales, _of_pairs(layout, arranged.zeros).to(torch.uint8)


def high_bit(block: int, plane: int) -> int:
    """Where a word of `high` holds the third bit of a code: shifted by one distance for (nearly) all planes of half a
    block, the bits of planes 0 to 3 come to lie at 2, 4, 6 and 8, next to the two other bits of their codes."""
    half, place = 2 * block + plane // 4, 2 * (plane % 4)
    return (2 + place, 1 + place, 9 + place, 8 + place if place else 0)[half]


def _or_planes(planes: list[tuple[Tensor, int]]) -> Tensor:
    """Words [blocks, out, lanes] of planes uint8 [blocks, lanes, out], each shifted to its place."""
    words: Tensor | None = None
    for plane, shift in planes:
        moved = plane.to(torch.int16) << shift
        words = moved if words is None else words.bitwise_or_(moved)
    assert words is not None
    return words.transpose(1, 2).contiguous()


def _pairs(layout: Layout, values: Tensor) -> Tensor:
    """int32 [steps, pairs, out] of 16-bit values [G, out], each group repeated until it has `layout.group` channels."""
    first = torch.arange(0, layout.n_in, layout.group, device=values.device) // layout.group_size
    repeated = torch.zeros(
        layout.steps * layout.step // layout.group, layout.outputs, dtype=torch.int16, device=values.device
    )
    repeated[: len(first), : layout.n_out] = values[first].to(torch.int16)
    pairs = repeated.view(layout.steps, -1, 2, layout.outputs).transpose(2, 3).contiguous()
    return pairs.view(torch.int32).squeeze(-1)


def _of_pairs(layout: Layout, pairs: Tensor) -> Tensor:
    """The inverse of `_pairs`: int16 [G, out]."""
    repeated = pairs.unsqueeze(-1).view(torch.int16).transpose(2, 3).reshape(-1, layout.outputs)
    every = max(1, min(layout.group_size, layout.n_in) // layout.group)
    return repeated[::every][: layout.groups, : layout.n_out].contiguous()
