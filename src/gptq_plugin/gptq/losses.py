"""Output errors of a rounded matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from gptq_plugin.config import QuantizeConfig
from gptq_plugin.gptq import tensor_cores
from gptq_plugin.gptq.grid import QuantizedWeight, nearest_errors
from gptq_plugin.kernels import row_passes, step_passes

_STRIP = 1024  # columns per product of a loss
_SCALE = 2.0**12  # in `tensor_cores`, of numbers below 1


def output_error(error: Tensor, hessian: Tensor) -> Tensor:
    """e H eᵀ for every row e = w − q of [..., out, in]: the mean over tokens of the squared output error, [..., out].

    Computes half of the product, since H, [..., in, in], is symmetric. 16-bit errors are summed in float32; float32
    ones of one matrix are multiplied on a GPU in float16: each term is off by at most 2^-10, to either side.
    """
    if error.dtype == torch.float32 and error.dim() == 2 and tensor_cores.usable(error):
        return _narrow_output_error(error, hessian)
    loss = torch.zeros(error.shape[:-1], dtype=torch.promote_types(error.dtype, torch.float32), device=error.device)
    for start in range(0, error.shape[-1], _STRIP):
        here = error[..., start : start + _STRIP]
        rows = hessian[..., start : start + _STRIP, :]
        row_passes(here).add_row_products_(loss, here @ rows[..., start : start + _STRIP], here)
        if start:
            row_passes(here).add_row_products_(loss, here @ rows[..., :start], error[..., :start], 2)
    return loss.clamp_(min=0)


def _narrow_output_error(error: Tensor, hessian: Tensor) -> Tensor:
    unit, of_hessian = tensor_cores.unit_above(error, 1), tensor_cores.unit_above(hessian.diagonal())
    columns = error.mT / unit
    narrow, loss = tensor_cores.narrowed(columns, _SCALE), torch.zeros_like(unit)
    for start in range(0, len(columns), _STRIP):
        stop = min(start + _STRIP, len(columns))
        rows = tensor_cores.narrowed(hessian[:stop, start:stop], _SCALE / of_hessian)
        product = tensor_cores.product(rows, narrow[start:stop])
        product[start:] /= 2
        loss += product.mul_(columns[:stop]).sum(0)
    return loss.clamp_(min=0).mul_(unit.square()).mul_(of_hessian * (2 * _SCALE**-2))


def rounding_loss(blocks: Tensor, hessian: Tensor, config: QuantizeConfig) -> Tensor:
    """`output_error` of round-to-nearest for rows in blocks [B, rows, in], [B·rows]: the report's baseline; nothing
    depends on it.

    On a GPU float32 weights are multiplied in bfloat16: each term is off by at most 2^-9, to either side, so the sum
    over thousands of rows and columns stays within 0.1 %.
    """
    dtype = torch.bfloat16 if tensor_cores.usable(blocks) else blocks.dtype
    hessian = hessian.to(dtype)
    return torch.cat([output_error(nearest_errors(w, config, dtype), hessian) for w in blocks]).to(blocks.dtype)


def output_power(blocks: Tensor, hessian: Tensor) -> Tensor:
    """w H wᵀ for rows in blocks [B, rows, in], [B·rows]: the mean over tokens of the squared output, by which the
    report makes losses relative; in bfloat16 as in `rounding_loss`."""
    dtype = torch.bfloat16 if tensor_cores.usable(blocks) else blocks.dtype
    hessian = hessian.to(dtype)
    return torch.cat([output_error(w, hessian) for w in blocks.to(dtype)]).to(blocks.dtype)


def solution_loss(blocks: Tensor, hessian: Tensor, rounded: QuantizedWeight) -> Tensor:
    """`output_error` of a quantized weight, for rows in blocks [B, rows, in], [B·rows]."""
    grids = rounded.scales.to(blocks.dtype), rounded.zeros.to(blocks.dtype), rounded.g_idx.long()
    losses, natural = [], torch.arange(blocks.shape[2], device=blocks.device)
    for number, block in enumerate(blocks):
        some = slice(number * len(block), (number + 1) * len(block))
        scales, zeros = (of_all[:, some].contiguous() for of_all in grids[:2])
        codes, weight = rounded.codes[some].mT.contiguous(), block.mT.contiguous()
        errors = step_passes(block).rounding_errors(weight, codes, scales, zeros, grids[2], natural)
        losses.append(output_error(errors.mT, hessian))
    return torch.cat(losses)


def beside(weights: Tensor, hessians: Tensor, config: QuantizeConfig) -> tuple[Tensor, Tensor]:
    """`rounding_loss` and `output_power` for weights [B, rows, in] with a Hessian each, [B, rows]."""
    dtype = torch.bfloat16 if tensor_cores.usable(weights) else weights.dtype
    hessians = hessians.to(dtype)
    errors = nearest_errors(weights.flatten(0, 1), config, dtype).view_as(weights)
    found = (output_error(one, hessians).to(weights.dtype) for one in (errors, weights.to(dtype)))
    rtn_loss, power = found
    return rtn_loss, power
