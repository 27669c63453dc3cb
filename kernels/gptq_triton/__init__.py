"""The kernels, imported as `gptq_plugin.kernels`: a leaf that needs torch, and Triton only on a GPU.

Every operation has a readable definition in plain PyTorch in `reference`, which is also its CPU path and the
oracle of its tests. The Triton modules are imported where they are called, so that this package imports on
machines that have no Triton.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from . import reference


def solver_loops(x: Tensor) -> ModuleType:
    """Where `solve_span` is for tensors like x: in Triton for float32 on a GPU."""
    if x.is_cuda and x.dtype == torch.float32:
        from . import solve  # imported here: needs Triton

        return solve
    return reference


def solver_passes(x: Tensor) -> ModuleType:
    """Where `permuted`, `split`, `clipping_errors` and `nearest_errors` are for tensors like x, likewise."""
    if x.is_cuda and x.dtype == torch.float32:
        from . import passes  # imported here: needs Triton

        return passes
    return reference
