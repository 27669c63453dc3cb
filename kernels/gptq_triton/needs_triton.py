"""Imports Triton for the kernels, or raises an ImportError with the remedy."""

from __future__ import annotations

try:
    import triton
    import triton.language as tl
    from triton.language.extra import libdevice
except ImportError as error:
    raise ImportError(
        "quantizing, and running quantized layers, on a GPU needs Triton, which is not installed: `pip install triton` "
        "(Linux), or move the model to the CPU"
    ) from error

__all__ = ["libdevice", "tl", "triton"]
