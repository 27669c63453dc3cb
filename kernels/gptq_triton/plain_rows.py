"""Passes over rows that read them once on a GPU, in plain PyTorch: the definition.

Tested by tests/kernels/test_rows.py: with the Triton kernels.
"""

from __future__ import annotations

import torch
from torch import Tensor


def include_largest_(largest: Tensor, x: Tensor, ends: Tensor | None = None) -> None:
    """Raises each segment's largest magnitude to that of its rows; rows with NaN do not count.

    Args:
        largest: float32 [segments], -1 where nothing was included.
        x: [rows, width]; rows behind the last end are left out.
        ends: Where segments end, int32 [segments]; None for one segment of all rows.
    """
    if not x.numel():
        return
    low, high = x.aminmax(dim=1)
    of_rows = torch.maximum(-low, high).float().nan_to_num(nan=-1.0, posinf=torch.inf)
    if ends is None:
        torch.maximum(largest, of_rows.amax(), out=largest)
        return
    segment = torch.searchsorted(ends, torch.arange(len(x), device=x.device, dtype=ends.dtype), right=True)
    of_all = torch.nn.functional.pad(largest, (0, 1)).scatter_reduce_(0, segment, of_rows, "amax")
    largest.copy_(of_all[:-1])


def add_row_products_(totals: Tensor, x: Tensor, y: Tensor, factor: float = 1.0) -> None:
    """Adds factor · Σ_c x_rc·y_rc to each row's total.

    Args:
        totals: float32 or wider, [..., rows].
        x, y: [..., rows, width].
        factor: As above.
    """
    totals += factor * (x * y).sum(-1, dtype=totals.dtype)


def silu_gated(both: Tensor) -> Tensor:
    """silu(gate) · up, [rows, width], rounded after each step.

    Args:
        both: [rows, 2·width], the gate's values and those of up behind them.
    """
    gate, up = both.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up
