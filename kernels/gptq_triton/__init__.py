"""Kernels, imported as `gptq_plugin.kernels`. Needs torch, and Triton on a GPU only.

`reference`, `plain_solve`, `plain_sums`, `plain_segments`, `plain_rows`, `plain_steps` and `plain_latents` define all
operations in plain PyTorch; they are also the CPU path and the oracle of the tests. Triton modules are imported where
they are called, so that the package imports without Triton.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from . import plain_latents, plain_rows, plain_segments, plain_solve, plain_steps, plain_sums, reference


def solver_loops(x: Tensor) -> ModuleType:
    """The module with `solve_span` for tensors like x: Triton's for float32 on a GPU, else `plain_solve`."""
    if _by_triton(x):
        from . import solve  # imported here: needs Triton

        return solve
    return plain_solve


def solver_passes(x: Tensor) -> ModuleType:
    """The module with `permute`, `split_to_float16`, `clipping_errors` and `nearest_errors`, chosen likewise."""
    if _by_triton(x):
        from . import passes  # imported here: needs Triton

        return passes
    return reference


def exact_sums(x: Tensor) -> ModuleType:
    """The module with `add_product`, chosen likewise for a float32 product."""
    if _by_triton(x):
        from . import sums  # imported here: needs Triton

        return sums
    return plain_sums


def segment_sums(x: Tensor) -> ModuleType:
    """The module with `add_products`, `add_cross_products`, `add_exact_products`, `add_exact_cross_products`, `squares`
    and `zero_behind_` for rows x: Triton's for 16 bits on a GPU, else `plain_segments`."""
    if x.is_cuda and x.dtype in (torch.float16, torch.bfloat16):
        from . import segments  # imported here: needs Triton

        return segments
    return plain_segments


def mirror_passes(x: Tensor) -> ModuleType:
    """The module with `symmetric_` for tensors like x: Triton's for float32 on a GPU, else `plain_segments`."""
    if _by_triton(x):
        from . import segments  # imported here: needs Triton

        return segments
    return plain_segments


def row_passes(x: Tensor) -> ModuleType:
    """The module with `include_largest_`, `add_row_products_` and `silu_gated` for rows x: Triton's for 16 bits or
    float32 on a GPU, in rows that are contiguous, else `plain_rows`."""
    if x.is_cuda and x.dtype in (torch.float16, torch.bfloat16, torch.float32) and x.stride(-1) == 1:
        from . import rows  # imported here: needs Triton

        return rows
    return plain_rows


def step_passes(x: Tensor) -> ModuleType:
    """The module with `rounding_errors`, `grid_errors`, `grouped_hessian` and `scale_equations`, chosen likewise."""
    if _by_triton(x):
        from . import steps  # imported here: needs Triton

        return steps
    return plain_steps


def latent_passes(x: Tensor, groups: Tensor | None) -> ModuleType:
    """The module with `weight_of` and `gradients` for codes x: Triton's on a GPU where groups are in order, else
    `plain_latents`."""
    if x.is_cuda and groups is None:
        from . import latents  # imported here: needs Triton

        return latents
    return plain_latents


def _by_triton(x: Tensor) -> bool:
    return x.is_cuda and x.dtype == torch.float32
