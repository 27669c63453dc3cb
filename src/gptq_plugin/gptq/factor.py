"""H + Λ = A·D·Aᵀ: the factorization of a Hessian that GPTQ's recursion uses.

One Cholesky factorization, in place, without an inverse. Positions are visited from the last, n − 1, to the first, so
that A is the lower Cholesky factor of the permuted Hessian.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from gptq_plugin.config import QuantizeConfig
from gptq_plugin.gptq import tensor_cores
from gptq_plugin.kernels import solver_passes

_PANEL = 1024  # columns per call of the library's factorization
WIDE = 4 * _PANEL  # columns; a matrix with more is factored in panels, many narrow steps
_PANEL_OF_MANY = 512  # for several matrices, which the library factors together at a small part of a GPU's rate
_INVERTED = 128  # columns of a panel per inverted triangle
_SCALE = 2.0**12  # in `tensor_cores`, of the factor of a matrix with a diagonal of at most 4


@dataclass(frozen=True)
class Factor:
    """The factors of B damped Hessians.

    Attributes:
        order: int64 [B, n], the input channel at each position; position n − 1 is visited first.
        rows: [B, n, n], unit upper triangular; rows[j, k] = A_kj, the share of the error at k that is pushed to j.
        gain: D [B, n]; the damped loss of a row's rounding error e is Σ_j gain_j·((rows @ e)_j)².
        damping: Λ [B, n], added to the diagonal.
    """

    order: Tensor
    rows: Tensor
    gain: Tensor
    damping: Tensor


def factorize(
    hessians: Tensor, config: QuantizeConfig, dtype: torch.dtype, damp_percent: float | Tensor
) -> tuple[Factor, Tensor]:
    """Factors damped Hessians without synchronizing with the device.

    Inputs that were always zero get the mean diagonal entry as damping: the factor stays regular, and their weights are
    rounded to nearest.

    Args:
        hessians: [B, n, n], symmetric.
        config: desc_act and static_groups, which set the order of columns, are read.
        dtype: The precision to factor in; the result has the Hessians' dtype.
        damp_percent: Share of the mean of the nonzero diagonal that is added to the diagonal; [B, 1] for one each.

    Returns:
        The factors, and bool [B]: False where a factorization failed or, on a GPU, has an entry too large for
        `tensor_cores`; that factor must not be used.
    """
    batch, n, _ = hessians.shape
    diagonal = hessians.diagonal(dim1=1, dim2=2)
    dead = diagonal <= 0
    mean = diagonal.masked_fill(dead, 0).sum(1, keepdim=True) / (~dead).sum(1, keepdim=True)
    damping = torch.where(dead, mean, damp_percent * mean)
    if config.desc_act or config.static_groups:
        order = torch.argsort(diagonal, descending=True, stable=True).flip(1)
    else:
        order = torch.arange(n - 1, -1, -1, device=hessians.device).expand(batch, n)
    # A power of four scales the largest entry to about 1; it and its root, in the factor, are exact.
    unit = torch.ldexp(torch.ones_like(mean), -2 * (torch.frexp(diagonal.amax(1, keepdim=True)).exponent // 2))
    damping = damping.gather(1, order)
    permuted = solver_passes(hessians).permute(hessians, order, unit.squeeze(1)).to(dtype)
    permuted.diagonal(dim1=1, dim2=2).add_((damping * unit).to(dtype))
    failed = _cholesky(permuted)
    scale = permuted.diagonal(dim1=1, dim2=2).clone()
    permuted /= scale[:, :, None]
    factor = Factor(order, permuted.to(hessians.dtype), (scale.square() / unit).to(hessians.dtype), damping)
    good = ~failed & torch.isfinite(factor.gain).all(1)
    if tensor_cores.usable(hessians):
        low, high = factor.rows.flatten(1).aminmax(dim=1)
        good &= (low >= -tensor_cores.LARGEST) & (high <= tensor_cores.LARGEST)
    return factor, good


def _cholesky(matrices: Tensor) -> Tensor:
    """Overwrites symmetric matrices [B, n, n] with their transposed, upper triangular Cholesky factors.

    Returns:
        bool [B], True where that failed and the factor is garbage.
    """
    batch, n, _ = matrices.shape
    if tensor_cores.usable(matrices) and batch > 1 and n >= 2 * _PANEL_OF_MANY:
        return _blocked_cholesky(matrices, _PANEL_OF_MANY)
    if tensor_cores.usable(matrices) and n > WIDE:
        return _blocked_cholesky(matrices, _PANEL)
    return _library_cholesky(matrices)


def _blocked_cholesky(matrices: Tensor, panel: int) -> Tensor:
    """`_cholesky` of large float32 matrices with a diagonal of at most 4, its large products on tensor cores.

    A library computes them on the float32 units and spends half of its time on narrow panels.

    Args:
        matrices: As for `_cholesky`.
        panel: Columns per call of the library; a multiple of `_INVERTED`, or less.
    """
    n = matrices.shape[1]
    failed = torch.zeros(len(matrices), dtype=torch.bool, device=matrices.device)
    for start in range(0, n, panel):
        stop = min(start + panel, n)
        corner = matrices[:, start:stop, start:stop].contiguous()
        failed |= _library_cholesky(corner)
        matrices[:, start:stop, start:stop] = corner
        matrices[:, stop:, start:stop] = 0
        side = matrices[:, start:stop, stop:]
        _substitute(corner, side)
        below, beside = tensor_cores.gram_operands(side, _SCALE)
        for row in range(stop, n, 2 * panel):  # upper triangle only
            strip, first = matrices[:, row : row + 2 * panel, row:], row - stop
            left, right = below[:, first : first + 2 * panel], beside[:, :, first:]
            tensor_cores.add_product(strip, left, right, alpha=-(_SCALE**-2))
    return failed


def _substitute(corner: Tensor, side: Tensor) -> None:
    """Overwrites side [B, k, m] with corner⁻ᵀ · side, for an upper triangular corner [B, k, k].

    Multiplies by inverses of small triangles on the diagonal: a library's forward substitution goes row by row and
    takes three times as long. At this size an inverse is as accurate as the substitution (MAGMA does the same).
    """
    width = min(_INVERTED, corner.shape[1])
    starts = range(0, corner.shape[1], width)
    triangles = torch.stack([corner[:, i : i + width, i : i + width].mT for i in starts], 1)
    unit = torch.eye(width, dtype=corner.dtype, device=corner.device)  # a copy would synchronize
    inverses = torch.linalg.solve_triangular(triangles, unit, upper=False)
    for number, start in enumerate(starts):
        here = side[:, start : start + width]
        if start:
            before = corner[:, :start, start : start + width].mT
            torch.baddbmm(here, before, side[:, :start], alpha=-1, out=here)
        here.copy_(inverses[:, number] @ here)


def _library_cholesky(matrices: Tensor) -> Tensor:
    lower = matrices.mT  # column-major, as LAPACK needs it to work in place
    failed = torch.empty(len(matrices), dtype=torch.int32, device=matrices.device)
    torch.linalg.cholesky_ex(lower, out=(lower, failed))
    return failed != 0


def attempts(dtype: torch.dtype, config: QuantizeConfig) -> Iterator[tuple[torch.dtype, float]]:
    """Yields the (dtype, damp_percent) to try: as configured, that in float64, then float64 with ever more damping."""
    yield dtype, config.damp_percent
    if dtype != torch.float64:
        yield torch.float64, config.damp_percent
    step = config.damp_auto_increment
    while step > 0 and config.damp_percent + step < 1:
        yield torch.float64, config.damp_percent + step
        step *= 10
