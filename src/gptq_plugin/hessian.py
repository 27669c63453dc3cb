"""Hessian: the running sum of x xᵀ over calibration tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from gptq_plugin.precision import full_precision


class Hessian:
    """Sum of x xᵀ and the number of tokens in it. Sums of several ranks add up.

    Args:
        in_features: Width of the layer's input.
        device: Where the sum lives; inputs must be there too.
        dtype: Precision of the sum, float32 or float64.

    Attributes:
        sum: [in, in], Σ x xᵀ.
        tokens: int64 [], rows counted so far; a tensor, so that it is reduced over ranks like `sum`.
    """

    def __init__(self, in_features: int, device: torch.device | str, dtype: torch.dtype = torch.float32):
        self.sum = torch.zeros(in_features, in_features, dtype=dtype, device=device)
        self.tokens = torch.zeros((), dtype=torch.int64, device=device)

    def add(self, x: Tensor) -> None:
        """Counts every row of x, [tokens, in]; the product is taken in the sum's precision."""
        # The caller may stand inside the model's own autocast.
        with full_precision(x.device):
            rows = x.detach().to(self.sum.dtype)
            self.sum.addmm_(rows.T, rows)
            self.tokens += rows.shape[0]

    def mean(self) -> Tensor:
        """Mean over tokens of x xᵀ, [in, in]; zeros when nothing was counted."""
        return self.sum / self.tokens.clamp(min=1)
