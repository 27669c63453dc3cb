"""Full precision, whatever TF32 or autocast the caller has switched on."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

FLOAT16 = torch.finfo(torch.float16).max  # 65504


@contextlib.contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Disables gradients, autocast and TF32 inside the block: float32 products are computed in float32.

    The 10 mantissa bits of TF32 would cost a Hessian or a factor accuracy without notice; trainers switch it on with
    ``torch.set_float32_matmul_precision("high")``.

    Args:
        device: Where the block computes.
    """
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)
