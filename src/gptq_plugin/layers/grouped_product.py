"""Rows sorted by expert times each expert's matrix, in PyTorch's kernel for all: `grouped_product`.

Tested by tests/model/test_experts_call.py: through calls of experts, on a GPU.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from gptq_plugin.kernels import segment_sums

_ALIGNED = 16  # bytes, to which the kernel needs rows aligned
_CAPABILITY = (8, 0)


def has_grouped_product(x: Tensor, outputs: int) -> bool:
    """True if PyTorch has a kernel for rows like x, [rows, in], and so many outputs of an expert."""
    if not x.is_cuda or x.dtype != torch.bfloat16 or not hasattr(functional, "grouped_mm"):
        return False
    aligned = all(width * x.element_size() % _ALIGNED == 0 for width in (x.shape[1], outputs))
    return aligned and torch.cuda.get_device_capability(x.device) >= _CAPABILITY


def grouped_product(x: Tensor, ends: Tensor, weights: Tensor) -> Tensor:
    """The products, [rows, out]; 0 for rows of no expert.

    Args:
        x: bfloat16 [rows, in].
        ends: Where the experts' rows end, int32 [experts].
        weights: bfloat16 [experts, out, in].
    """
    y: Tensor = functional.grouped_mm(x, weights.mT, offs=ends)  # type: ignore[attr-defined]
    return segment_sums(y).zero_behind_(y, ends)  # type: ignore[no-any-return]
