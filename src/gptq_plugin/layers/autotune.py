"""Measures which kernels are fastest for a model's quantized layers: `autotune`."""

from __future__ import annotations

import logging
import os
from collections import defaultdict
from importlib.util import find_spec

import torch
from torch import nn

from gptq_plugin.kernels.product.layout import Layout
from gptq_plugin.layers.kernel_layout import is_served
from gptq_plugin.layers.qlinear import QuantLinear
from gptq_plugin.layers.stored_weight import arrange_layers

log = logging.getLogger(__name__)

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def autotune(model: nn.Module, *, always: bool = False, folder: str | os.PathLike[str] | None = None) -> None:
    """Finds the fastest kernels for quantized layers on GPUs of a kind for which the package has no table of them.

    Every size of layer with a megabyte of codes or more is measured for ten ranges of rows, at most a dozen choices
    each, for a second on average; a file keeps what was found, and later calls read it. The log (INFO) tells what was
    chosen, and how long it took. Until then, and where it is never called, a rule chooses. Other choices add in another
    order: outputs may differ in their last bits from those before.

    `load_quantized` calls it. Call it between runs, not in them: it waits for the GPU, and takes memory meanwhile
    (twice the GPU's L2 cache, and two float copies of the largest layer; what does not fit in half of the free memory
    is not measured). While a CUDA graph is captured, or a compiler traces, it does nothing but warn.

    Args:
        model: Any module; its layers on GPUs are taken into the kernels' layout.
        always: On GPUs with a table too, for sizes that are not in it.
        folder: Where the file is; None is the folder ``gptq_plugin`` in Triton's cache (``~/.triton/cache``). A file
            that cannot be read or written is warned of, and otherwise harmless. Processes may share it.
    """
    arrange_layers(model)
    wanted: dict[torch.device, dict[tuple[Layout, torch.dtype], None]] = defaultdict(dict)
    for module in model.modules():
        if isinstance(module, QuantLinear) and is_served(module.device):
            arranged, dtype = module.arranged(), module.weight.dtype
            if arranged is not None and dtype in _DTYPES:
                wanted[module.device][arranged.layout, dtype] = None
                stacked = None if module.siblings is None else module.siblings.stacked()
                if stacked is not None:
                    wanted[module.device][stacked.weight.layout, dtype] = None
    if wanted and find_spec("triton") is None:
        log.warning("kernels are not measured without Triton, which products of quantized layers on a GPU need")
        return
    for device, products in wanted.items():
        from gptq_plugin.kernels.product import autotune  # imported here: needs Triton

        autotune.autotune(products, device, always=always, folder=folder)
