"""The kernels, imported as `gptq_plugin.kernels`: a leaf that needs torch, and Triton only on a GPU.

Every operation has a readable definition in plain PyTorch in `reference`, which is also its CPU path and the
oracle of its tests. The Triton modules are imported where they are called, so that this package imports on
machines that have no Triton.
"""

from __future__ import annotations
