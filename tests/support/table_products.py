"""What the products of tables of embeddings have to be."""

from __future__ import annotations

from typing import Any

import torch
from random_weights import Weight
from torch import Tensor


def formula(weight: Weight) -> Tensor:
    """The weights, float64 [out, in]."""
    group = weight.g_idx.long()
    return (weight.codes.double() - weight.zeros.double()[group].t()) * weight.scales.double()[group].t()


def check_products(table: Any, w: Tensor, rows: int, of_bfloat16: float) -> None:
    """Compares a table's products of random rows with those of its weights.

    Args:
        table: With a `matmul`.
        w: float64 [out, in].
        rows: Of x.
        of_bfloat16: The relative error that products in bfloat16 may have.
    """
    x = torch.randn(rows, w.shape[1])
    expected = x.double() @ w.t()
    error = (table.matmul(x).double() - expected).abs()
    assert bool((error <= 1e-6 * (x.double().abs() @ w.abs().t() + expected.abs().max())).all())
    for dtype, most in ((torch.float16, 6e-4), (torch.bfloat16, of_bfloat16)):
        narrow = x.to(dtype)
        y = table.matmul(narrow)
        expected = narrow.double() @ w.t()
        assert y.dtype == dtype and float((y.double() - expected).norm()) <= most * float(expected.norm())
