"""Recognizes linear layers by what they compute, x·Wᵀ + b, whatever their class."""

from __future__ import annotations

import functools
import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from gptq_plugin.device.surroundings import same_random_numbers


def is_linear(module: nn.Module) -> bool:
    """Returns whether the module computes x·Wᵀ + b: Linear, a subclass that computes the same, or Conv1D."""
    kind: Any = type(module)
    # If transformers is not imported, no module is its Conv1D.
    pytorch_utils = sys.modules.get("transformers.pytorch_utils")
    conv1d = getattr(pytorch_utils, "Conv1D", None)
    if conv1d is not None and kind is conv1d:
        return True
    return isinstance(module, nn.Linear) and (kind.forward is nn.Linear.forward or _computes_linear(kind))


def linear_shape(module: nn.Module) -> tuple[int, int]:
    """(out_features, in_features) of a Linear or of Conv1D, which stores its weight as [in, out]."""
    weight: Tensor = module.weight  # type: ignore[assignment]
    rows, columns = weight.shape
    return (rows, columns) if isinstance(module, nn.Linear) else (columns, rows)


@functools.cache
def _computes_linear(kind: type[nn.Module]) -> bool:
    """Returns whether a subclass with another forward computes what Linear does in evaluation mode, by running a small
    instance that has a Linear's parameters and nothing else."""
    layer = kind.__new__(kind)
    with torch.no_grad(), same_random_numbers():  # initializing draws some
        nn.Linear.__init__(layer, 5, 3, device="cpu", dtype=torch.float64)  # type: ignore[arg-type]
        layer.eval()  # noise in training, such as DropConnect's, is none of what is quantized
        x = torch.linspace(-1, 1, 40, dtype=torch.float64, device="cpu").reshape(2, 4, 5)
        wanted = functional.linear(x, layer.weight, layer.bias)  # type: ignore[arg-type]
        try:
            return bool(torch.allclose(layer(x), wanted))
        except Exception:  # noqa: BLE001 - it needs other attributes
            return False
