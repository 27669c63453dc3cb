"""The solver: one weight matrix and its Hessian in, integers and scales out. Tensors only.

For a row w of a Linear and inputs x the rounding q minimises (w − q) H (w − q)ᵀ with H the mean of x xᵀ.
With λ added to the diagonal and the columns permuted into the order they are visited, factor H = A·D·Aᵀ
(A unit upper triangular). Then for every row, with e = w − q the error so far,

    t_j = w_j + Σ_{k<j} e_k·A_kj,    q_j = Round(t_j),    loss = Σ_j D_j·(t_j − q_j)²

which is GPTQ (Frantar et al., arXiv:2210.17323, algorithm 1) written as Babai's nearest plane (Chen et al.,
arXiv:2507.18553). It differs from the original implementation in three ways: A comes from one Cholesky
factorisation of the flipped H instead of a factor of its inverse (a quarter of the flops, and more accurate
in float32); errors are taken against the original weight, so nothing accumulates in it; and scales are
rounded to the checkpoint's float16 before the codes are chosen, so the codes fit the scales that are stored.

The loss is exact and rows are independent, so alternatives can be compared row by row: each row is solved with
grids that cover several parts of its groups' range (`clip_ratios`) and keeps the best. Unlike the search for
scales that nearest rounding likes best, it judges a grid by the error after compensation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gptq_plugin.config import QuantizeConfig
from gptq_plugin.kernels import reference
from gptq_plugin.precision import full_precision

BLOCK = 128  # columns solved before their errors reach the rest through one matrix product
SCALE_DTYPE = torch.float16  # what a checkpoint stores


@dataclass(frozen=True)
class QuantizedWeight:
    """A quantized matrix: W[o, i] ≈ scales[g, o]·(codes[o, i] − zeros[g, o]) with g = g_idx[i].

    Attributes:
        codes: uint8 [out, in], columns in the layer's own order.
        scales: float16 [G, out].
        zeros: uint8 [G, out], true zeros (not v1's zeros minus one).
        g_idx: int32 [in], the group of every input channel.
        bits: Width of a code.
        group_size: As configured: channels a group, or -1.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor
    g_idx: Tensor
    bits: int
    group_size: int

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The matrix the codes stand for, [out, in]; the product is taken in float32 (or `dtype` if wider)."""
        wide = torch.promote_types(dtype, torch.float32)
        group = self.g_idx.long()
        offset = self.codes.to(wide) - self.zeros.to(wide)[group].T
        return (offset * self.scales.to(wide)[group].T).to(dtype)

    def rows(self, start: int, stop: int) -> QuantizedWeight:
        """The output rows start..stop, as a matrix of its own."""
        return replace(
            self,
            codes=self.codes[start:stop],
            scales=self.scales[:, start:stop].contiguous(),
            zeros=self.zeros[:, start:stop].contiguous(),
        )

    def take(self, rows: Tensor) -> QuantizedWeight:
        """The output rows with these numbers, int64 [n], as a matrix of its own."""
        return replace(self, codes=self.codes[rows], scales=self.scales[:, rows], zeros=self.zeros[:, rows])


@dataclass(frozen=True)
class Solution:
    """What the solver found, and how far from the request it had to go.

    Attributes:
        weight: The quantized matrix.
        loss: [out], mean over tokens of the squared output error of each row, without damping.
        rtn_loss: [out], the same for round-to-nearest on the same kind of grid.
        method: "gptq", or "rtn" where the Hessian could not be used.
        damp_percent: The damping that was used.
        deviations: A sentence for everything that differs from what was asked.
    """

    weight: QuantizedWeight
    loss: Tensor
    rtn_loss: Tensor
    method: str
    damp_percent: float
    deviations: tuple[str, ...] = ()


def solve(weight: Tensor, hessian: Tensor, config: QuantizeConfig) -> Solution:
    """GPTQ for one matrix, or for several that read the same input, stacked along their rows.

    Args:
        weight: [out, in], any floating dtype, finite.
        hessian: [in, in], the mean over tokens of x xᵀ, float32 or float64, finite, on weight's device.
            Its dtype is the precision of the whole solve.
        config: bits, group_size, sym, desc_act, static_groups, damping and checkpoint_format are read.

    Raises:
        ValueError: The weight or the Hessian is not finite, or a scale exceeds float16.
    """
    with full_precision(weight.device):
        return _solve(weight, hessian, config)


def _solve(weight: Tensor, hessian: Tensor, config: QuantizeConfig) -> Solution:
    if not torch.isfinite(weight).all():
        raise ValueError("the weight holds NaN or infinity")
    if not torch.isfinite(hessian).all():
        raise ValueError("the Hessian holds NaN or infinity")
    weight = weight.detach().to(hessian.dtype)
    nearest = round_to_nearest(weight, config)
    rtn_loss = output_error(weight, nearest, hessian)
    order = _visiting_order(hessian, config)
    factor, damp_percent, deviations = _factorize(hessian[order][:, order], config)
    if factor is None:
        return Solution(nearest, rtn_loss, rtn_loss, "rtn", damp_percent, deviations)
    quantized, loss = _best_rows(weight, hessian, factor, order, config)
    return Solution(quantized, loss, rtn_loss, "gptq", damp_percent, deviations)


@torch.no_grad()
def round_to_nearest(weight: Tensor, config: QuantizeConfig) -> QuantizedWeight:
    """Every weight of [out, in] to the nearest point of its contiguous group's grid, without a Hessian."""
    out_features, in_features = weight.shape
    size = _group_width(in_features, config)
    wide = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
    scales, zeros = _grid(wide.reshape(out_features, -1, size), config)  # [out, G]
    codes = _round(wide.reshape(out_features, -1, size), scales[..., None], zeros[..., None], config.bits)
    g_idx = torch.arange(in_features, device=weight.device, dtype=torch.int32) // size
    return _assemble(codes.reshape(out_features, in_features), scales.T, zeros.T, g_idx, config)


def output_error(weight: Tensor, quantized: QuantizedWeight, hessian: Tensor) -> Tensor:
    """(w − q) H (w − q)ᵀ for every row: [out], the mean over tokens of the squared output error."""
    error = weight.to(hessian.dtype) - quantized.dequantize(hessian.dtype)
    return ((error @ hessian) * error).sum(dim=1)


def _group_width(in_features: int, config: QuantizeConfig) -> int:
    return in_features if config.group_size == -1 else config.group_size


def _visiting_order(hessian: Tensor, config: QuantizeConfig) -> Tensor:
    if config.desc_act or config.static_groups:
        return torch.argsort(hessian.diagonal(), descending=True, stable=True)
    return torch.arange(hessian.shape[0], device=hessian.device)


def _grid(values: Tensor, config: QuantizeConfig) -> tuple[Tensor, Tensor]:
    """Scales (rounded to float16, in values' dtype) and zeros of the groups along the last dimension."""
    top = 2**config.bits - 1
    if config.sym:
        scales = 2 * values.abs().amax(-1) / top
        zeros = torch.full_like(scales, 2 ** (config.bits - 1))
    else:
        low, high = values.amin(-1).clamp(max=0), values.amax(-1).clamp(min=0)
        if config.checkpoint_format == "gptq":
            # v1 stores z − 1, and clients disagree about z = 0: widen the grid until z is at least 1.
            low = torch.minimum(low, -high / (top - 1))
        scales = (high - low) / top
        zeros = torch.round(-low / torch.where(scales > 0, scales, 1)).clamp(0, top)
    scales = torch.where(scales > 0, scales, 1)  # a group of zeros: any scale will do
    largest = torch.finfo(SCALE_DTYPE).max
    if (scales > largest).any():
        raise ValueError(f"a weight needs a scale of {scales.max().item():.3g}, above float16's {largest:.0f}")
    scales = scales.clamp(min=2.0**-24)  # float16's smallest positive number, so that no scale rounds to zero
    return scales.to(SCALE_DTYPE).to(values.dtype), zeros


def _round(values: Tensor, scales: Tensor, zeros: Tensor, bits: int) -> Tensor:
    return torch.round(values / scales + zeros).clamp_(0, 2**bits - 1)


def _factorize(hessian: Tensor, config: QuantizeConfig) -> tuple[Tensor | None, float, tuple[str, ...]]:
    """A of H + λI = A·D·Aᵀ, the damping used, and what had to be done to get it; None where nothing helped."""
    diagonal = hessian.diagonal()
    dead = diagonal <= 0
    if dead.all():
        return None, config.damp_percent, ("no calibration input reached this layer: round-to-nearest",)
    mean = diagonal[~dead].mean()
    deviations: list[str] = []
    for dtype, damp_percent in _attempts(hessian.dtype, config):
        damped = hessian.to(dtype, copy=True)
        # A dead input has no loss; a plain diagonal entry keeps the factor regular and rounds it to nearest.
        damped.diagonal().add_(torch.where(dead, mean, damp_percent * mean).to(dtype))
        lower, info = torch.linalg.cholesky_ex(damped.flip(0, 1))
        if info.item() == 0 and torch.isfinite(lower).all():
            upper = lower.flip(0, 1)
            if dtype != hessian.dtype:
                deviations.append("Hessian factored in float64 after float32 failed")
            if damp_percent != config.damp_percent:
                deviations.append(f"damp_percent raised from {config.damp_percent:g} to {damp_percent:g}")
            factor = (upper / upper.diagonal()).to(hessian.dtype).contiguous()  # LAPACK's is column-major
            return factor, damp_percent, tuple(deviations)
    return None, damp_percent, (f"no Cholesky factor up to damp_percent {damp_percent:g}: round-to-nearest",)


def _attempts(dtype: torch.dtype, config: QuantizeConfig) -> Iterator[tuple[torch.dtype, float]]:
    """What was asked; the same in float64; then float64 with ever more damping."""
    yield dtype, config.damp_percent
    if dtype != torch.float64:
        yield torch.float64, config.damp_percent
    step = config.damp_auto_increment
    while step > 0 and config.damp_percent + step < 1:
        yield torch.float64, config.damp_percent + step
        step *= 10


def _blocks(in_features: int, config: QuantizeConfig) -> Iterator[tuple[int, int]]:
    """Ranges of columns of at most BLOCK; where scales wait for their group, none crosses a group's start."""
    span = in_features if config.static_groups else _group_width(in_features, config)
    for begin in range(0, in_features, span):
        for start in range(begin, begin + span, BLOCK):
            yield start, min(start + BLOCK, begin + span)


def _best_rows(
    weight: Tensor, hessian: Tensor, factor: Tensor, order: Tensor, config: QuantizeConfig
) -> tuple[QuantizedWeight, Tensor]:
    """Solves every row once for each of `clip_ratios` and keeps the solution with the least output error.

    Rows do not know each other, so all alternatives are one solve of a taller matrix, and the choice is exact.
    """
    rows, ratios = weight.shape[0], config.clip_ratios
    span = torch.tensor(ratios, dtype=weight.dtype, device=weight.device).repeat_interleave(rows)
    stacked = weight.repeat(len(ratios), 1)
    quantized = _visit_columns(stacked, factor, order, span, config)
    loss = output_error(stacked, quantized, hessian).reshape(len(ratios), rows)
    least, which = loss.min(dim=0)
    return quantized.take(which * rows + torch.arange(rows, device=weight.device)), least


def _visit_columns(
    weight: Tensor, factor: Tensor, order: Tensor, span: Tensor, config: QuantizeConfig
) -> QuantizedWeight:
    """The recursion at the top of this file. Everything is kept as [in, out], so that a column is contiguous.

    `span` [out] is the part of a group's range that a row's grid covers.
    """
    out_features, in_features = weight.shape
    size = _group_width(in_features, config)
    groups = in_features // size
    w = weight.T[order].contiguous()
    error = torch.zeros_like(w)
    codes = torch.empty(in_features, out_features, dtype=torch.uint8, device=w.device)
    scales = torch.empty(groups, out_features, dtype=w.dtype, device=w.device)
    zeros = torch.empty_like(scales)
    if config.static_groups:
        s, z = _grid(weight.reshape(out_features, groups, size) * span[:, None, None], config)
        scales.copy_(s.T)
        zeros.copy_(z.T)
        group_of = order // size
    else:
        group_of = torch.arange(in_features, device=w.device) // size
    solve_block = _block_solver(w)
    for start, stop in _blocks(in_features, config):
        if not config.static_groups and start % size == 0:
            moved = w[start : start + size] + _compensation(factor, error, start, start + size)
            scales[start // size], zeros[start // size] = _grid(moved.T * span[:, None], config)
        target = torch.addmm(w[start:stop], factor[:start, start:stop].T, error[:start])
        grid = group_of[start:stop]
        codes[start:stop], error[start:stop] = solve_block(
            target, w[start:stop], factor[start:stop, start:stop], scales[grid], zeros[grid], config.bits
        )
    natural = torch.empty_like(codes)
    natural[order] = codes
    g_idx = torch.empty(in_features, dtype=torch.int32, device=w.device)
    g_idx[order] = group_of.int()
    return _assemble(natural.T, scales, zeros, g_idx, config)


def _block_solver(weight: Tensor) -> Callable[..., tuple[Tensor, Tensor]]:
    if weight.is_cuda and weight.dtype == torch.float32:
        from gptq_plugin.kernels import solve as triton_solve  # imported here: needs Triton

        return triton_solve.solve_block
    return reference.solve_block


def _compensation(factor: Tensor, error: Tensor, start: int, stop: int) -> Tensor:
    """How far the best float weights of the columns start..stop have moved, given the errors before them.

    It is the recursion without rounding: d_j = Σ_{k<start} e_k·A_kj − Σ_{start≤k<j} d_k·A_kj. [stop−start, out].
    """
    pushed = factor[:start, start:stop].T @ error[:start]
    inner = factor[start:stop, start:stop].T
    return torch.linalg.solve_triangular(inner, pushed, upper=False, unitriangular=True)


def _assemble(codes: Tensor, scales: Tensor, zeros: Tensor, g_idx: Tensor, config: QuantizeConfig) -> QuantizedWeight:
    return QuantizedWeight(
        codes=codes.to(torch.uint8).contiguous(),
        scales=scales.to(SCALE_DTYPE).contiguous(),
        zeros=zeros.to(torch.uint8).contiguous(),
        g_idx=g_idx,
        bits=config.bits,
        group_size=config.group_size,
    )
