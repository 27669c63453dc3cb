"""PyTorch's 8-bit product on a CPU (oneDNN's), for a layer that it takes and rows of float32: `Int8`.

Codes less their zeros are signed bytes. A row of x, in units of its largest number, is whole numbers of 31 bits, and
these are four unsigned bytes each: four rows of bytes. A group's sums of products of bytes are exact. The kernel
multiplies them by the group's scales and adds them to those of other groups, in float32.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from gptq_plugin.layers.kernel_layout import Packed
from gptq_plugin.layers.table_rows import GroupedCodes

_BYTES = 4  # of a number
_MIDDLE = 128  # of an unsigned byte, and the kernel's zero of x
_TO_MIDDLE = -0x7F7F7F80  # 0x80808080 as int32: turns a whole number's bytes into unsigned ones around the middle
_WHOLE = 2**30  # what a row's largest number becomes
_GROUPS = range(64, 2**16 + 1)  # with shorter groups calls take too long, longer ones' sums may exceed 31 bits
_FEWEST = 2**19  # weights of a layer for which the calls are not too long
_SUMS = 2**18  # outputs at a time, whose sums, one for each byte of x, are read and written for every group


@dataclass(frozen=True)
class Int8:
    """A layer as a matrix of bytes for every group: W = byte * scale.

    Attributes:
        weights: For each group int8 [out, group_size], in the kernel's own order.
        scales: float32 [G, out].
        zeros: int64 [out], all 0: the kernel asks for them.
        group_size: Channels per group.
        order: int64 [in], the channels of x in the groups' order; None if they are.
    """

    weights: tuple[Tensor, ...]
    scales: Tensor
    zeros: Tensor
    group_size: int
    order: Tensor | None

    @classmethod
    def repack(cls, packed: Packed, bits: int, group_size: int) -> Int8 | None:
        """Repacks a layer; None if this machine has no instructions for products of bytes (AVX-512 VNNI), groups differ
        in size, they or the layer are too small, or a code less its zero is no byte.

        Args:
            packed: Its tensors, on a CPU.
            bits: Width of a code.
            group_size: Channels per group.

        Raises:
            ValueError: A channel's group does not exist.
        """
        n_in, n_out = len(packed.g_idx), packed.qweight.shape[1]
        if group_size not in _GROUPS or len(packed.scales) * group_size != n_in or n_in * n_out < _FEWEST:
            return None
        if not is_served():
            return None
        of = GroupedCodes.of(packed, bits)
        if of.starts != tuple(range(0, n_in + 1, group_size)):
            return None
        levels = of.codes.view(-1, group_size, n_out).short() - of.zeros[:, None]
        if int(levels.min()) < -128 or int(levels.max()) > 127:
            return None
        prepack = torch.ops.onednn.qlinear_prepack
        weights = tuple(prepack(level.t().contiguous(), None) for level in levels.to(torch.int8))
        return cls(weights, of.scales, torch.zeros(n_out, dtype=torch.int64, device="cpu"), group_size, of.order)

    def matmul(self, x: Tensor) -> Tensor | None:
        """x Wᵀ in x's dtype, with float32 sums of groups, or None if x has an infinite number or NaN.

        W is exact. A row of x is rounded to multiples of 2^-30 of its largest number: numbers above 2^-6 of that keep
        all the digits of float32.

        Args:
            x: float32 or float16 [rows, in], at least one row.
        """
        wide = x.float() if self.order is None else x.float().index_select(1, self.order)
        largest = wide.abs().amax(1, keepdim=True)
        if not bool(largest.isfinite().all()):
            return None
        largest.clamp_(min=torch.finfo(torch.float32).tiny)
        rows = min(128, max(16, _SUMS // len(self.zeros)))
        parts = [self._product(*some) for some in zip(wide.split(rows), largest.split(rows), strict=True)]
        return (parts[0] if len(parts) == 1 else torch.cat(parts)).to(x.dtype)

    def _product(self, x: Tensor, largest: Tensor) -> Tensor:
        """The product of some rows, float32 [rows, in], with numbers up to `largest` [rows, 1]."""
        whole = (x / largest).mul_(_WHOLE).round_().int().add_(_TO_MIDDLE)  # modulo 2^32
        bytes_of = torch.stack([(whole >> (8 * place)).to(torch.uint8) for place in range(_BYTES)])
        groups = bytes_of.view(-1, len(self.weights), self.group_size).transpose(0, 1).contiguous()
        sums = torch.zeros(groups.shape[1], len(self.zeros), dtype=torch.float32, device="cpu")
        for group, weight, scale in zip(groups.unbind(), self.weights, self.scales.unbind(), strict=True):
            sums = _multiply_add(group, weight, scale, self.zeros, sums)
        y, *others = sums.view(_BYTES, len(x), -1)
        y.mul_(1 / _WHOLE)
        for place, other in enumerate(others, 1):
            y.add_(other, alpha=256**place / _WHOLE)
        return y.mul_(largest)


def is_served() -> bool:
    """Whether PyTorch has oneDNN here and the CPU instructions for products of bytes, and oneDNN uses them."""
    return torch.backends.mkldnn.is_available() and torch.cpu._is_vnni_supported() and _is_exact()


@functools.cache
def _is_exact() -> bool:
    """Whether oneDNN's sums of products of bytes have all their bits. Those of older instructions, to which
    ONEDNN_MAX_CPU_ISA restricts it, stop at 16 bits.
    """
    x = torch.full((4, 64), 255, dtype=torch.uint8, device="cpu")
    weight = torch.ops.onednn.qlinear_prepack(torch.full((16, 64), 127, dtype=torch.int8, device="cpu"), None)
    ones = torch.ones(16, dtype=torch.float32, device="cpu")
    zeros = torch.zeros(16, dtype=torch.int64, device="cpu")
    y = _multiply_add(x, weight, ones, zeros, torch.zeros(4, 16, dtype=torch.float32, device="cpu"))
    return bool((y == 64 * 127 * (255 - _MIDDLE)).all())


def _multiply_add(x: Tensor, weight: Tensor, scales: Tensor, zeros: Tensor, sums: Tensor) -> Tensor:
    """The sums, with (x - 128) Wᵀ * scales added to them in place."""
    return torch.ops.onednn.qlinear_pointwise.binary(  # type: ignore[no-any-return]
        x, 1.0, _MIDDLE, weight, scales, zeros, sums, None,
        1.0, 0, torch.float32, 1.0, 0, "sum", 1.0, "none", [], "",
    )  # fmt: skip
