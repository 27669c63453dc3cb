"""The layout in which the product's kernels read a weight, in plain PyTorch: `Layout`, `arrange`, `restore`.

The inputs of a weight are cut into blocks, a block into planes of 64 channels (32 if a group has 32, and of 3
bits, so that a step is no longer than of 2)::

    words   int16 [blocks, N, lanes]       plane j of word i of block b is input (b * planes + j) * lanes + i
    scales  int32 [steps, pairs, N]        float16 scales of two groups that follow each other, the earlier one low
    zeros   int32 [steps, pairs, N]        their zeros likewise, as integers; None if all are 2^(bits - 1)

A word has a code of each plane, so that a tile of words times one shift and mask is a tile of codes that the tensor
cores take as it lies: nothing moves between threads. Of 3 bits a block has three tiles of words, [3 blocks, N, lanes],
and 16 planes. Each half of them has a tile of its own, with five codes to a word, and a byte of the third tile's words,
with two codes; what is left of both, the byte's two upper bits and the word's highest, makes the half's last code.
Two scales lie in one int32 since smaller loads cannot be asynchronous. A group holds 32, 64 or 128 channels here;
longer ones are repeated. A step is the least number of blocks with an even number of groups and at least 256 channels;
where it has 512, of 2 and 3 bits, a kernel may take half of a block's planes at a time. Inputs are padded to a step and
outputs to 64, with scales of zero.

Tested by tests/kernels/test_products.py: with the kernels that read it.
"""

from __future__ import annotations

import functools
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
        return 16 if self.bits == 3 else 16 // self.bits

    @property
    def words_a_block(self) -> int:
        """Words in whose bits the codes of all planes lie."""
        return 3 if self.bits == 3 else 1

    @property
    def blocks_a_step(self) -> int:
        return max(1, _STEP // (self.planes * self.lanes))

    @property
    def step(self) -> int:
        """Channels in a step."""
        return self.blocks_a_step * self.planes * self.lanes

    @property
    def halves(self) -> bool:
        """A step can be taken by halves, which have 256 channels and whole pairs of groups."""
        return self.blocks_a_step == 1 and self.step == 2 * _STEP

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
    planes = planes.transpose(2, 3)
    words = torch.stack([_word(layout, planes, i) for i in range(layout.words_a_block)], 1).flatten(0, 1)
    return Arranged(
        words, _pairs(layout, scales.view(torch.int16)), None if layout.symmetric else _pairs(layout, zeros)
    )


def restore(layout: Layout, arranged: Arranged) -> tuple[Tensor, Tensor, Tensor]:
    """The inverse of `arrange`: codes, scales and zeros."""
    words = arranged.words.unflatten(0, (-1, layout.words_a_block))
    codes = torch.stack([_codes(layout, words, j) for j in range(layout.planes)], 1)  # [blocks, planes, out, lanes]
    codes = codes.transpose(2, 3).reshape(-1, layout.outputs)[: layout.n_in, : layout.n_out].contiguous()
    scales = _of_pairs(layout, arranged.scales).view(torch.float16)
    if arranged.zeros is None:
        return codes, scales, torch.full_like(scales, 2 ** (layout.bits - 1), dtype=torch.uint8)
    return codes, scales, _of_pairs(layout, arranged.zeros).to(torch.uint8)


def pieces(bits: int, plane: int) -> list[tuple[int, int, int, int]]:
    """Where the bits of a plane's codes lie: (word, place in it, place in the code, how many)."""
    if bits != 3:
        return [(0, bits * plane, 0, bits)]
    half, own = divmod(plane, 8)
    if own < 5:
        return [(half, 3 * own, 0, 3)]
    return [(2, 8 * half + 3 * (own - 5), 0, 3)] if own < 7 else [(2, 8 * half + 6, 0, 2), (half, 15, 2, 1)]


def _word(layout: Layout, planes: Tensor, word: int) -> Tensor:
    """One of a block's words, int16 [blocks, out, lanes], of planes uint8 [blocks, planes, out, lanes]."""
    made = torch.zeros_like(planes[:, 0], dtype=torch.int16)
    for plane in range(layout.planes):
        for of_word, place, low, number in pieces(layout.bits, plane):
            if of_word == word:
                made |= (planes[:, plane] >> low & ((1 << number) - 1)).to(torch.int16) << place
    return made


def _codes(layout: Layout, words: Tensor, plane: int) -> Tensor:
    """The inverse: a plane, uint8 [blocks, out, lanes], of words int16 [blocks, words, out, lanes]."""
    parts = [
        (words[:, word] >> place & ((1 << number) - 1)) << low
        for word, place, low, number in pieces(layout.bits, plane)
    ]
    return functools.reduce(torch.bitwise_or, parts).to(torch.uint8)


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
