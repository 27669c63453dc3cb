"""x Wᵀ from the kernels' layout: `product` chooses a kernel by rows, sizes and GPU, `weight` gives the matrix."""

from __future__ import annotations

import functools
import logging

import torch
from torch import Tensor

from .choice import Choice, Gpu
from .dense import dense
from .layout import Arranged, Layout
from .registry import run
from .rule import FEW_ROWS, by_rule
from .table import shipped
from .tuned import tuned
from .workspace import workspace_of

log = logging.getLogger(__name__)


@functools.cache
def choose(layout: Layout, rows: int, dtype: torch.dtype, device: torch.device) -> Choice:
    """The kernel for so many rows; the log tells once which kernels there are, and why."""
    gpu = Gpu.of(device)
    choice, reason = _decided(layout, rows, dtype, gpu)
    log.debug("%s rows of %s by %s: %s (%s)", rows, dtype, layout, choice, reason)
    _tell(choice, reason, gpu.name)
    return choice


def described(layout: Layout, dtype: torch.dtype, device: torch.device) -> str:
    """The kernels for one row and for many, in words."""
    gpu = Gpu.of(device)
    few, many = (_decided(layout, rows, dtype, gpu)[0] for rows in (1, 2048))
    return f"1 row: {few}; 2048: {many}"


def _decided(layout: Layout, rows: int, dtype: torch.dtype, gpu: Gpu) -> tuple[Choice, str]:
    """The choice, and where it is from."""
    for table, reason in ((tuned(gpu), "measured here"), (shipped(gpu), "the package's table")):
        choice = None if table is None else table.find(layout, rows, dtype, gpu)
        if choice is not None:
            return choice, reason
    return by_rule(layout, rows, dtype, gpu), "rule"


@functools.cache
def _tell(choice: Choice, reason: str, gpu: str) -> None:
    log.info("quantized layers on %s multiply by %s (%s)", gpu, choice, reason)


def check(x: Tensor, layout: Layout, arranged: Arranged, bias: Tensor | None) -> None:
    """Raises ValueError for an input that `product` does not take."""
    if x.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise ValueError(f"the Triton kernels compute in float16, bfloat16 or float32, not {x.dtype}: cast x")
    if x.dim() == 0 or x.shape[-1] != layout.n_in:
        raise ValueError(f"x must end in {layout.n_in} input channels, got shape {list(x.shape)}")
    if bias is not None and list(bias.shape) != [layout.n_out]:
        raise ValueError(f"bias must have shape [{layout.n_out}], got {list(bias.shape)}")
    for name, tensor in (("x", x), ("bias", bias)):
        if tensor is not None and tensor.device != arranged.words.device:
            raise ValueError(f"{name} is on {tensor.device}, the weights on {arranged.words.device}: move one of them")


def product(x: Tensor, layout: Layout, arranged: Arranged, bias: Tensor | None, order: Tensor | None = None) -> Tensor:
    """x Wᵀ + bias, accumulated in float32. Nothing waits for the GPU; may be captured in a CUDA graph.

    Args:
        x: float16, bfloat16 or float32 [..., in].
        layout, arranged: The weight.
        bias: [out], any floating dtype, or None.
        order: int64 [in], the channels of x in the weight's order; None if they are.

    Returns:
        [..., out] in x's dtype, contiguous.
    """
    out = x.new_empty(*x.shape[:-1], layout.n_out)
    if not out.numel():
        return out
    rows = x.reshape(-1, layout.n_in)
    rows = rows.contiguous() if order is None else rows.index_select(1, order)
    number = len(rows)
    choice = choose(layout, number if number <= FEW_ROWS else -(-number // FEW_ROWS) * FEW_ROWS, x.dtype, x.device)
    with torch.cuda.device(x.device):
        bias = None if bias is None else bias.contiguous()
        run(choice, rows, layout, arranged, bias, out.view(number, layout.n_out), workspace_of(x.device))
    return out


def weight(layout: Layout, arranged: Arranged, dtype: torch.dtype, order: Tensor | None = None) -> Tensor:
    """The weight, [out, in] in `dtype`, every number rounded once; channels are those of x."""
    with torch.cuda.device(arranged.words.device):
        made = dense(layout, arranged, dtype)
    if order is None:
        return made
    return torch.empty_like(made).index_copy_(1, order, made)
