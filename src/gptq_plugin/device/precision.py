"""Arithmetic in the precision that was asked for, whatever the caller has switched on around it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

FLOAT16 = torch.finfo(torch.float16).max  # 65504


@contextlib.contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Without autocast, and with float32 products in float32 (no TF32) for the length of the block.

    A Hessian summed, or a factor applied, at the 10 bits of TF32 would cost accuracy in silence; a trainer
    asks for it with ``torch.set_float32_matmul_precision("high")``.
    """
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)
