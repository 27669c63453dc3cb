"""GPUs as the choice of a kernel sees them; none is needed."""

from __future__ import annotations

from gptq_plugin.kernels.product.choice import Gpu

H100 = Gpu("NVIDIA H100 80GB HBM3", 132, True, 232448, 50 << 20)
H200 = Gpu("NVIDIA H200", 132, True, 232448, 50 << 20)
A100 = Gpu("NVIDIA A100-SXM4-80GB", 108, False, 166912, 40 << 20)
L4 = Gpu("NVIDIA L4", 58, False, 101376, 48 << 20)
GPUS = (H100, H200, A100, L4)
