"""Finds NaN and infinity: `all_finite`, `any_nan`. Both read a tensor once and make no copy of it."""

from __future__ import annotations

import torch
from torch import Tensor


def all_finite(tensor: Tensor) -> bool:
    """True if a tensor of any dtype holds neither NaN nor infinity."""
    if not tensor.numel() or not (tensor.is_floating_point() or tensor.is_complex()):
        return True
    return bool(_extremes(tensor).isfinite().all())


def any_nan(tensor: Tensor) -> bool:
    """True if a tensor of any dtype holds NaN."""
    if not tensor.numel() or not (tensor.is_floating_point() or tensor.is_complex()):
        return False
    return bool(_extremes(tensor).isnan().any())


def _extremes(tensor: Tensor) -> Tensor:
    """The least and the largest value, both NaN if any is."""
    tensor = tensor.detach()
    tensor = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    if tensor.itemsize == 1:  # float8 has no order on most devices
        tensor = tensor.float()
    return torch.stack(tensor.aminmax())
