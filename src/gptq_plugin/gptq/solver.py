"""The solver: from a weight matrix and its Hessian to codes and scales. Tensors only.

For a row w of a Linear with inputs x, the rounding q minimises (w − q) H (w − q)ᵀ, with H the mean of x xᵀ. Add Λ to
the diagonal, permute the columns into the order they are visited, and factor H + Λ = A·D·Aᵀ (A unit triangular,
`factor.py`). Then for every row, with e = w − q the error so far,

    t_j = w_j + Σ_{k before j} e_k·A_kj,    q_j = Round(t_j),    loss = Σ_j D_j·(t_j − q_j)² − Σ_j Λ_j·e_j²

which is GPTQ (Frantar et al., arXiv:2210.17323, algorithm 1) written as Babai's nearest plane (Chen et al.,
arXiv:2507.18553). It differs from the original implementation in three ways: A comes from one Cholesky factorization
of the reversed H instead of a factor of its inverse (a quarter of the flops, and more accurate in float32); errors are
taken against the original weight, so that rounding errors do not accumulate in it; and scales are rounded to the
checkpoint's float16 before the codes are chosen, so that codes match the stored scales.

The loss is exact and rows are independent, so alternatives are compared row by row: a row's grids may cover only a part
of its groups' range (`clip_ratios`). A forecast picks the most promising alternatives of a row; these are solved, and
the best solution is kept. Unlike a search for the scales with the least nearest-rounding error, the forecast weighs
each column by its share of the loss (D_j) and expects its target to be moved by earlier errors: if they are uniform
within a step s, by s·√(Σ_k A_kj²/12). `recursion` does that, and `improve` what the method "best" does beyond it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import islice

import torch
from torch import Tensor

from gptq_plugin.config import QuantizeConfig
from gptq_plugin.device.precision import full_precision
from gptq_plugin.device.streams import AsyncRead, on_side_stream
from gptq_plugin.gptq.asymmetric import asymmetric_target
from gptq_plugin.gptq.factor import Factor, attempts, factorize
from gptq_plugin.gptq.grid import SCALE_DTYPE, QuantizedWeight, explain_bad_scale, round_to_nearest
from gptq_plugin.gptq.improve import Improvement, improves
from gptq_plugin.gptq.losses import output_power, rounding_loss, solution_loss
from gptq_plugin.gptq.recursion import Recursion
from gptq_plugin.gptq.row_blocks import divided


@dataclass(frozen=True)
class Solution:
    """A solved weight, and how the solve deviated from the request.

    Attributes:
        weight: The quantized matrix.
        loss: [out], mean over tokens of the squared output error of each row, (W − Ŵ) x̂, without damping.
        rtn_loss: [out], the same for round-to-nearest on the unclipped grid.
        output_power: [out], mean over tokens of the squared output of the float weight.
        method: "gptq", or "rtn" if the Hessian was unusable.
        damp_percent: The damping used.
        deviations: A sentence for each difference from the request.
    """

    weight: QuantizedWeight
    loss: Tensor
    rtn_loss: Tensor
    output_power: Tensor
    method: str
    damp_percent: float
    deviations: tuple[str, ...]

    def first(self, rows: int) -> Solution:
        """The solution of the first rows alone."""
        if rows == len(self.loss):
            return self
        return replace(
            self,
            weight=self.weight.rows(0, rows),
            loss=self.loss[:rows],
            rtn_loss=self.rtn_loss[:rows],
            output_power=self.output_power[:rows],
        )


def solve(
    weight: Tensor, hessian: Tensor, config: QuantizeConfig, drift: Tensor | None = None, *, in_blocks: bool = True
) -> Solution:
    """Solves one matrix, or several that read the same input, stacked along their rows.

    Args:
        weight: [out, in], any floating dtype, finite.
        hessian: [in, in], the mean over tokens of x xᵀ, symmetric, float32 or float64, finite, on weight's device.
            Its dtype is the solve's precision.
        in_blocks: Solve the rows in blocks, as ranks that share them do; see `row_blocks`.
        config: bits, group_size, sym, desc_act, static_groups, damping, checkpoint_format, and the method's fields are
            read.
        drift: C [in, in], the mean over tokens of (x − x̂) x̂ᵀ, or W·C [out, in] if that is fewer rows, in the
            Hessian's dtype, for `asymmetric_target`; None rounds the weight itself.

    Raises:
        ValueError: The weight, the Hessian or the drift is not finite, or a scale exceeds float16.
    """
    if drift is not None and len(drift) < drift.shape[1]:
        drift = divided(drift) if in_blocks else drift[None]
    return solve_blocks(divided(weight) if in_blocks else weight[None], hessian, config, drift).first(len(weight))


def solve_blocks(blocks: Tensor, hessian: Tensor, config: QuantizeConfig, drift: Tensor | None = None) -> Solution:
    """`solve` for rows in blocks of one size, each with the same result whatever other blocks are beside it.

    Args:
        blocks: [B, rows, in].
        hessian: As for `solve`.
        config: As for `solve`.
        drift: C [in, in], or W·C of the blocks, [B, rows, in].

    Returns:
        The solution of all B·rows rows.
    """
    with full_precision(blocks.device):
        blocks = blocks.detach().to(hessian.dtype).contiguous()  # Conv1D's and some experts' are transposed
        with on_side_stream(blocks.device) as join:
            beside = _beside(blocks, hessian, config)
        factor, good = factorize(hessian[None], config, hessian.dtype, config.damp_percent)
        rounded = begun(blocks, hessian, factor, config, drift)
        finite = torch.isfinite(hessian.diagonal()).all()
        if drift is not None:
            finite &= torch.isfinite(drift).all()

        def read() -> AsyncRead:
            return AsyncRead(torch.stack([good[0], finite, rounded.fits]))

        # Read the verdict after queueing all work, so that the wait is as short as it can be.
        verdict = read() if config.static_groups else None
        rounded.visit()
        join()
        solution = _solution(rounded, blocks, hessian, beside, config.damp_percent, ())
        # Without static groups, grids are fitted along with the columns.
        is_good, is_finite, has_scales = (verdict or read()).get()
        if not is_finite:
            raise ValueError("the Hessian holds NaN or infinity")
        if not is_good:
            return _solve_with_fallbacks(blocks, hessian, config, drift)
        if not has_scales:
            raise ValueError(explain_bad_scale(blocks))
        return solution


def _solve_with_fallbacks(blocks: Tensor, hessian: Tensor, config: QuantizeConfig, drift: Tensor | None) -> Solution:
    """Solves after the requested factorization failed: in float64, with more damping, at last by round-to-nearest."""
    for dtype, damp_percent in islice(attempts(hessian.dtype, config), 1, None):
        factor, good = factorize(hessian[None], config, dtype, damp_percent)
        if good.item():
            deviations = ["Hessian factored in float64 after float32 failed"] if dtype != hessian.dtype else []
            if damp_percent != config.damp_percent:
                deviations.append(f"damp_percent raised from {config.damp_percent:g} to {damp_percent:g}")
            rounded = begun(blocks, hessian, factor, config, drift)
            rounded.visit()
            if not rounded.fits.item():
                raise ValueError(explain_bad_scale(blocks))
            beside = _beside(blocks, hessian, config)
            return _solution(rounded, blocks, hessian, beside, damp_percent, tuple(deviations))
    if not torch.isfinite(hessian).all():
        raise ValueError("the Hessian holds NaN or infinity")
    if (hessian.diagonal() > 0).any():
        *_, (_, damp_percent) = attempts(hessian.dtype, config)
        why = f"no Cholesky factor up to damp_percent {damp_percent:g}"
    else:
        damp_percent, why = config.damp_percent, "no calibration input reached this layer"
    nearest = round_to_nearest(blocks.flatten(0, 1), config)
    loss = solution_loss(blocks, hessian, nearest)
    power = output_power(blocks, hessian)
    return Solution(nearest, loss, loss, power, "rtn", damp_percent, (f"{why}: round-to-nearest",))


def _beside(blocks: Tensor, hessian: Tensor, config: QuantizeConfig) -> tuple[Tensor, Tensor]:
    """What the report compares a loss with, and nothing depends on: round-to-nearest's, and the output's power."""
    return rounding_loss(blocks, hessian, config), output_power(blocks, hessian)


def begun(
    blocks: Tensor, hessian: Tensor, factor: Factor, config: QuantizeConfig, drift: Tensor | None = None
) -> Recursion | Improvement:
    """The solution of blocks [B, rows, in] that `visit` of it makes, with `solve`'s other arguments."""
    if drift is not None and config.asymmetric_alpha:
        blocks = asymmetric_target(blocks, drift, factor, config.asymmetric_alpha)
    if improves(config):
        return Improvement(blocks, hessian, factor, config)
    return Recursion(blocks, factor, config)


def _solution(
    rounded: Recursion | Improvement,
    blocks: Tensor,
    hessian: Tensor,
    beside: tuple[Tensor, Tensor],
    damp_percent: float,
    deviations: tuple[str, ...],
) -> Solution:
    config, (rtn_loss, power) = rounded.config, beside
    exact = isinstance(rounded, Recursion) and rounded.targets is blocks
    codes, scales, zeros = (torch.cat(list(of), 1) for of in (rounded.codes, rounded.scales, rounded.zeros))
    weight = QuantizedWeight(
        codes=codes.T,
        scales=scales.to(SCALE_DTYPE),
        zeros=zeros.to(torch.uint8),
        g_idx=rounded.g_idx(),
        bits=config.bits,
        group_size=config.group_size,
    )
    return Solution(
        weight=weight,
        loss=rounded.loss.flatten().clamp(min=0) if exact else solution_loss(blocks, hessian, weight),
        rtn_loss=rtn_loss,
        output_power=power,
        method="gptq",
        damp_percent=damp_percent,
        deviations=deviations,
    )
