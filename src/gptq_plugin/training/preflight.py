"""What a training run cannot end in, said before it begins by either callback; nothing here imports a trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from gptq_plugin.clients.client import Client
from gptq_plugin.errors import TargetError
from gptq_plugin.layers.qlinear import QuantLinear
from gptq_plugin.model.adapters import has_adapters
from gptq_plugin.model.hf_models import check_savable
from gptq_plugin.quantize.module import QuantizeModule


def check_arguments(quantizer: Any, export_dir: Any, swap: bool | None) -> None:
    """Raises for arguments of a callback's constructor that are no quantizer, or would leave nothing behind."""
    if not isinstance(quantizer, QuantizeModule):
        raise TypeError(f"quantizer must be a QuantizeModule, got {type(quantizer).__name__}")
    if export_dir is None and swap is False:
        raise ValueError("with swap=False and no export_dir nothing of the quantization would remain")


def leaves_quantized(module: nn.Module, swap: bool | None) -> bool:
    """Whether the module is left quantized: None leaves it so unless it has PEFT adapters."""
    return not has_adapters(module) if swap is None else swap


def refuse_quantized(module: nn.Module, source: str) -> None:
    """Raises TargetError for a module that was quantized already: it has nothing to train.

    Args:
        module: To be trained.
        source: Where float weights are, or what loads them.
    """
    if any(isinstance(layer, QuantLinear) for layer in module.modules()):
        raise TargetError(
            f"{type(module).__name__} is quantized, and quantized weights cannot be trained: build the module "
            f"anew, or load a float checkpoint into a new one ({source})"
        )


def refuse_export(quantizer: QuantizeModule, module: nn.Module, export_dir: Path | None, target: Client | None) -> None:
    """Raises ExportError where the quantized module could not be saved, or its client would not take it."""
    quantizer.check_target(module, target)
    if export_dir is not None:
        check_savable(module)


def refuse_offload(quantizer: QuantizeModule, device: torch.device) -> None:
    """Raises ValueError where weights are to be streamed to the device that training has them on."""
    if quantizer.offload_weights and device.type == "cuda":
        raise ValueError(
            "offload_weights=True streams a model from the CPU, and training has it on the GPU: leave the option "
            "out, or save a checkpoint and run gptq-quantize on it"
        )


def refuse_adapters(
    module: nn.Module, swap: bool | None, export_dir: Path | None, *, holder: nn.Module | None = None
) -> None:
    """Raises TargetError for what cannot be done with a module that has PEFT adapters, which is quantized on a copy.

    Args:
        module: To be quantized.
        swap, export_dir: The callback's.
        holder: What runs the module, where the copy has to stand in its place.
    """
    if not has_adapters(module):
        return
    if swap:
        raise TargetError(
            "swap=True leaves the module quantized, and PEFT adapters stay as they are: leave swap out, and load the "
            "export with load_quantized"
        )
    if export_dir is None:
        raise TargetError("a module with PEFT adapters is quantized on a copy: give an export_dir for it")
    if module is holder:
        raise TargetError(
            f"{type(holder).__name__} itself carries PEFT adapters, and a copy cannot stand in its place: hold the "
            "model in an attribute"
        )
