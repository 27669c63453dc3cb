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
    ones are multiplied on a GPU in float16: each term is off by at most 2^-10, to either side.
    """
    if error.dtype == torch.float32 and tensor_cores.usable(error):
        return _narrow_output_error(error, hessian)
    loss = torch.zeros(error.shape[:-1], dtype=torch.promote_types(error.dtype, torch.float32), device=error.device)
    for start in range(0, error.shape[-1], _STRIP):
        here = error[..., start : start + _STRIP]
        rows = hessian[..., start : start + _STRIP, :]
        row_passes(here).add_row_products_(loss, here @ rows[..., start : start + _STRIP], here)
        if start:
            row_passes(here).add_row_products_(loss, here @ rows[..., :start], error[..., :start], 2.0)
    return loss.clamp_(min=0)


def _narrow_output_error(error: Tensor, hessian: Tensor) -> Tensor:
    unit = tensor_cores.unit_above(error, -1)
    of_hessian = tensor_cores.unit_above(hessian.diagonal(dim1=-2, dim2=-1), -1)
    columns, factor = error.mT / unit[..., None, :], (_SCALE / of_hessian)[..., None, None]
    narrow, loss = tensor_cores.narrowed(columns, _SCALE), torch.zeros_like(unit)
    for start in range(0, columns.shape[-2], _STRIP):
        stop = min(start + _STRIP, columns.shape[-2])
        rows = tensor_cores.narrowed(hessian[..., :stop, start:stop], factor)
        product = tensor_cores.product(rows, narrow[..., start:stop, :])
        product[..., start:, :] /= 2
        loss += product.mul_(columns[..., :stop, :]).sum(-2)
    return loss.clamp_(min=0).mul_(unit.square()).mul_(of_hessian[..., None] * (2 * _SCALE**-2))


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
    losses = []
    for number, block in enumerate(blocks):
        some = slice(number * len(block), (number + 1) * len(block))
        grids = rounded.scales[None, :, some], rounded.zeros[None, :, some], rounded.g_idx[None]
        losses.append(each_loss(block[None], hessian[None], rounded.codes[None, some].mT, *grids)[0])
    return torch.cat(losses)


def each_loss(weights: Tensor, hessians: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor, g_idx: Tensor) -> Tensor:
    """`output_error` of quantized weights [B, rows, in], [B, rows].

    Args:
        weights: As above.
        hessians: [B, in, in].
        codes: [B, in, rows].
        scales, zeros: [B, G, rows].
        g_idx: [B, in].
    """
    natural = torch.arange(weights.shape[2], device=weights.device).expand(len(weights), -1)
    values = weights.mT.contiguous(), codes.contiguous(), *(of.to(weights.dtype).contiguous() for of in (scales, zeros))
    errors = step_passes(weights).rounding_errors(*values, g_idx.long().contiguous(), natural.contiguous())
    return output_error(errors.mT, hessians)


def beside(weights: Tensor, hessians: Tensor, config: QuantizeConfig) -> tuple[Tensor, Tensor]:
    """`rounding_loss` and `output_power` for weights [B, rows, in] with a Hessian each, [B, rows]."""
    dtype = torch.bfloat16 if tensor_cores.usable(weights) else weights.dtype
    hessians = hessians.to(dtype)
    errors = nearest_errors(weights.flatten(0, 1), config, dtype).view_as(weights)
    found = (output_error(one, hessians).to(weights.dtype) for one in (errors, weights.to(dtype)))
    rtn_loss, power = found
    return rtn_loss, power
