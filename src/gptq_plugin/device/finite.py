"""Finds NaN and infinity: `all_finite`, `any_nan`, `not_finite_in`. A tensor is read once and not copied.

Some tensors have no values: `has_values`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor


def has_values(tensor: Tensor) -> bool:
    """False on the meta device, and for tensors that were made inside PyTorch's FakeTensorMode."""
    return not (tensor.is_meta or isinstance(tensor, FakeTensor))


def all_finite(tensor: Tensor) -> bool:
    """True if a tensor of any dtype holds neither NaN nor infinity."""
    least, largest = _extremes(tensor)
    return bool(least.isfinite() & largest.isfinite())


def any_nan(tensor: Tensor) -> bool:
    """True if a tensor of any dtype holds NaN."""
    least, largest = _extremes(tensor)
    return bool(least.isnan() | largest.isnan())


def not_finite_in(model: nn.Module) -> list[str]:
    """Names of parameters with NaN or infinity, and of buffers with NaN: masks hold infinity."""
    found = [name for name, value in model.named_parameters() if has_values(value) and not all_finite(value)]
    return found + [name for name, value in model.named_buffers() if has_values(value) and any_nan(value)]


def _extremes(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """The least and the largest value, both NaN if any is; zeros of a tensor that holds no floats."""
    tensor = tensor.detach()
    if not tensor.numel() or not (tensor.is_floating_point() or tensor.is_complex()):
        zero = torch.zeros((), device="cpu")
        return zero, zero
    tensor = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    if tensor.itemsize == 1:  # float8 has no order on most devices
        tensor = tensor.float()
    return tensor.aminmax()
