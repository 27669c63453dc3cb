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
    """Where `solve_block`, `clipping_errors` and `permuted` are for tensors like x: in Triton for float32 on a GPU."""
    if x.is_cuda and x.dtype == torch.float32:
        from . import solve  # imported here: needs Triton

        return solve
    return reference
