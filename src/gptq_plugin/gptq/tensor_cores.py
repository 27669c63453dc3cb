"""float32 products at float32's accuracy on a GPU's tensor cores, which multiply 16-bit numbers.

A float32 number, scaled into float16's range by a power of two, is the sum of two float16 numbers up to a relative
2^-22 (or an absolute 2^-25, if that is more). Of the four products of two such sums, that of the low parts, 2^-22 of
the whole, is left out; the other three are one product with the parts concatenated along the inner dimension (Ootomo
and Yokota, arXiv:2203.03341). This is twice as fast as the same scheme in TF32 and six times as fast as the float32
units.

`accurate_product` scales operands of any range itself. Where less accuracy will do, `product` multiplies the high parts
alone, in a third of the time.

Tensor cores truncate their sums instead of rounding them, so the error grows with the inner dimension: 1e-5 of the
result at 4096 (measured; float32 units: 1e-6). Products here are at most 1024 deep and are summed in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gptq_plugin.kernels import solver_passes

LARGEST = 2.0**15  # bound of |x · scale|, below float16's 65504
_DEPTH = 1024  # of a product that is summed by tensor cores alone


def usable(x: Tensor) -> bool:
    """True if the scheme applies to tensors like x: float32 on a GPU."""
    return x.is_cuda and x.dtype == torch.float32


def unit_above(x: Tensor, dim: int | None = None) -> Tensor:
    """A power of two, above every |x| along a dimension, or of all; within 2^±100."""
    most = torch.linalg.vector_norm(x, torch.inf, dim)
    return torch.ldexp(torch.ones_like(most), torch.frexp(most).exponent.clamp(-100, 100))


def narrowed(x: Tensor, scale: float | Tensor) -> Tensor:
    """x · scale in float16, as an operand of `product`; scale is a number, or a tensor of such for parts of x."""
    return torch.mul(x, scale, out=torch.empty(x.shape, dtype=torch.float16, device=x.device))


def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b for 16-bit operands [m, k] and [k, n], or B of each, in float32; for where rounding does not matter."""
    if a.is_cuda:
        multiply = torch.mm if a.dim() == 2 else torch.bmm
        return multiply(a, b, out_dtype=torch.float32)  # type: ignore[call-overload, no-any-return]
    return a.float() @ b.float()


def accurate_product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, [B, m, k] and [B, k, n], up to 1e-6 or so of the largest numbers in a's row and b's column.

    Other operands than float32 on a GPU are multiplied in their dtype.
    """
    if not usable(a):
        return a @ b
    of_rows, of_columns = unit_above(a, 2)[:, :, None], unit_above(b, 1)[:, None]
    out = torch.zeros(*a.shape[:2], b.shape[2], dtype=torch.float32, device=a.device)
    for start in range(0, a.shape[2], _DEPTH):
        some = slice(start, start + _DEPTH)
        left, right = a[:, :, some] / of_rows, b[:, some] / of_columns
        add_product(out, _operand(left, "lhh", 2), _operand(right, "hlh", 1), alpha=LARGEST**-2)
    return out.mul_(of_rows).mul_(of_columns)


def _operand(x: Tensor, pieces: str, dim: int) -> Tensor:
    """The parts of x, |x| up to 1, along a dimension; with contiguous columns if x has these."""
    if x.mT.is_contiguous():
        return solver_passes(x).split_to_float16(x.mT, LARGEST, pieces, 3 - dim).mT
    return solver_passes(x).split_to_float16(x.contiguous(), LARGEST, pieces, dim)


def left_operand(x: Tensor, scale: float) -> Tensor:
    """Makes x [B, m, k] the left operand of `add_product`, float16 [B, m, 3k]."""
    return solver_passes(x).split_to_float16(x, scale, "lhh", 2)


def right_operand(x: Tensor, scale: float) -> Tensor:
    """Makes x [B, k, n] the right operand of `add_product`, float16 [B, 3k, n]."""
    return solver_passes(x).split_to_float16(x, scale, "hlh", 1)


def gram_operands(x: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Makes xᵀ the left operand and x [B, k, n] the right one; they share memory."""
    k = x.shape[1]
    parts = solver_passes(x).split_to_float16(x, scale, "hlhh", 1)
    return parts[:, k:].mT, parts[:, : 3 * k]


def add_product(out: Tensor, a: Tensor, b: Tensor, alpha: float) -> None:
    """out += alpha · a @ b, out float32 [B, m, n]; alpha also undoes the operands' scales."""
    if out.is_cuda:
        torch.baddbmm(out, a, b, out_dtype=torch.float32, alpha=alpha, out=out)  # type: ignore[call-overload]
    else:
        torch.baddbmm(out, a.float(), b.float(), alpha=alpha, out=out)
