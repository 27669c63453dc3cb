"""float32 products at float32's accuracy on a GPU's tensor cores, which multiply 16-bit numbers.

A float32 number, brought into float16's range by a power of two, is the sum of two float16 numbers up to 2^-22 of it
(or 2^-25 of the range's unit, where that is more). Of the four products of two such sums the one of the low parts,
2^-22 of the whole, is left out; the other three are one product with the parts behind each other along the inner
dimension (the scheme of Ootomo and Yokota, arXiv:2203.03341). That is twice as fast as the same with TF32's numbers,
and six times as fast as the float32 units.

Tensor cores cut off what they add up instead of rounding it, so the error grows with the inner dimension: 1e-5 of the
result at 4096 (measured; float32 units: 1e-6). Products here are at most 1024 deep and are added up in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gptq_plugin.kernels import solver_passes

LARGEST = 2.0**15  # what x · scale may be at most: below float16's 65504


def serves(x: Tensor) -> bool:
    """Whether products of tensors like x are worth splitting: float32 on a GPU."""
    return x.is_cuda and x.dtype == torch.float32


def left(x: Tensor, scale: float) -> Tensor:
    """[B, m, k] as the left operand of `add_product`, float16 [B, m, 3k]."""
    return solver_passes(x).split(x, scale, "lhh", 2)


def right(x: Tensor, scale: float) -> Tensor:
    """[B, k, n] as the right operand of `add_product`, float16 [B, 3k, n]."""
    return solver_passes(x).split(x, scale, "hlh", 1)


def halves(x: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """[B, k, n]: xᵀ as the left operand and x as the right one; they share memory."""
    k = x.shape[1]
    parts = solver_passes(x).split(x, scale, "hlhh", 1)
    return parts[:, k:].mT, parts[:, : 3 * k]


def add_product(out: Tensor, a: Tensor, b: Tensor, alpha: float) -> None:
    """out += alpha · a @ b for batches of matrices, out float32 [B, m, n]; alpha takes back the operands' scales."""
    if out.is_cuda:
        torch.baddbmm(out, a, b, out_dtype=torch.float32, alpha=alpha, out=out)  # type: ignore[call-overload]
    else:
        torch.baddbmm(out, a.float(), b.float(), alpha=alpha, out=out)
