"""x Wᵀ from the kernels' layout: `product` chooses a kernel by rows, sizes and GPU, `weight` gives the matrix."""

from __future__ import annotations

import functools
import logging

import torch
from torch import Tensor

from .choice import Choice, Gpu, range_of
from .dense import dense
from .layout import Arranged, Layout
from .registry import run
from .rule import FEW_ROWS, by_rule, takes_many
from .table import shipped
from .tuned import tuned
from .waves import TOGETHER, first_rows
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


def parts(layout: Layout, rows: int, dtype: torch.dtype, device: torch.device) -> list[tuple[int, Choice]]:
    """Numbers of rows that have a launch each, with its kernel: two where the last tile would be nearly empty."""
    whole = _whole(layout, rows, dtype, device)
    if rows <= TOGETHER or whole.kernel == "dense":  # that would make the weight anew for each
        return [(rows, whole)]
    last = (rows - 1) % TOGETHER + 1
    first = _first(layout, rows - last + _rounded(last), dtype, device)
    if first >= rows:
        return [(rows, whole)]
    return [(number, _whole(layout, number, dtype, device)) for number in (first, rows - first)]


def _whole(layout: Layout, rows: int, dtype: torch.dtype, device: torch.device) -> Choice:
    """The kernel for all of the rows in one launch."""
    return choose(layout, _rounded(rows), dtype, device)


@functools.cache
def _first(layout: Layout, rows: int, dtype: torch.dtype, device: torch.device) -> int:
    gpu = Gpu.of(device)
    return first_rows(layout, rows, gpu) if takes_many(layout, dtype, gpu) else rows


def _rounded(rows: int) -> int:
    """The largest number of rows that surely has the same choice: not every number is asked for by itself."""
    return range_of(rows) if rows <= FEW_ROWS else -(-rows // FEW_ROWS) * FEW_ROWS


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
    if rows.data_ptr() % 16:  # which `many_rows` does not take
        launches = [(len(rows), _whole(layout, len(rows), x.dtype, x.device))]
    else:
        launches = parts(layout, len(rows), x.dtype, x.device)
    numbers = [number for number, _ in launches]
    with torch.cuda.device(x.device):
        bias = None if bias is None else bias.contiguous()
        workspace = workspace_of(x.device)
        results = out.view(-1, layout.n_out).split(numbers)
        for (_, choice), some, result in zip(launches, rows.split(numbers), results, strict=True):
            run(choice, some, layout, arranged, bias, result, workspace)
    return out


def weight(layout: Layout, arranged: Arranged, dtype: torch.dtype, order: Tensor | None = None) -> Tensor:
    """The weight, [out, in] in `dtype`, every number rounded once; channels are those of x."""
    with torch.cuda.device(arranged.words.device):
        made = dense(layout, arranged, dtype)
    if order is None:
        return made
    return torch.empty_like(made).index_copy_(1, order, made)
