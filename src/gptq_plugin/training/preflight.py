"""Pre-flight checks of both callbacks: refuse before training what could not be quantized after it."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from gptq_plugin import distributed
from gptq_plugin.clients.client import Client
from gptq_plugin.errors import TargetError
from gptq_plugin.export.planned_room import refuse_without_room
from gptq_plugin.finish.options import Finish
from gptq_plugin.layers.qlinear import QuantLinear
from gptq_plugin.model.adapters import has_adapters
from gptq_plugin.model.as_configured import refuse_other_than_configured
from gptq_plugin.model.hf_models import check_savable
from gptq_plugin.quantize.module import QuantizeModule
from gptq_plugin.quantize.prepare import budgeted


def leaves_quantized(module: nn.Module, swap: bool | None) -> bool:
    """Returns whether the module stays quantized: as `swap` asks; by default, unless it has PEFT adapters."""
    return not has_adapters(module) if swap is None else swap


def refuse_quantized(module: nn.Module, source: str) -> None:
    """Raises TargetError if the module has quantized layers, which cannot be trained, nor quantized again.

    Args:
        module: To be trained.
        source: Path of the float weights, or the name of a method that loads them.
    """
    if any(isinstance(layer, QuantLinear) for layer in module.modules()):
        if has_adapters(module):
            raise TargetError(
                f"the base of {type(module).__name__} is quantized already: train its adapters without the callback, "
                "save them, and serve them beside the export that the base was loaded from"
            )
        raise TargetError(
            f"{type(module).__name__} is quantized, and quantized weights cannot be trained: build the module "
            f"anew, or load a float checkpoint into a new one ({source})"
        )


def refuse_export(quantizer: QuantizeModule, module: nn.Module, export_dir: Path | None, target: Client | None) -> None:
    """Raises ExportError if the quantized module could not be saved, or its client would refuse it, or if rank 0, which
    writes it, has no room for it."""
    quantizer.check_target(module, target)
    if export_dir is not None:
        check_savable(module)
        refuse_other_than_configured(module)
        if distributed.rank() == 0:
            with budgeted(module, quantizer.config, target) as plan:
                refuse_without_room(plan, export_dir)


def refuse_offload(quantizer: QuantizeModule, device: torch.device) -> None:
    """Raises ValueError if weights are to be streamed to the GPU on which training has them."""
    if quantizer.offload_weights and device.type == "cuda":
        raise ValueError(
            "offload_weights=True streams a model from the CPU, and training has it on the GPU: leave the option "
            "out, or save a checkpoint and run gptq-quantize on it"
        )


def refuse_adapters(
    module: nn.Module, swap: bool | None, export_dir: Path | None, *, holder: nn.Module | None = None
) -> None:
    """Raises TargetError for options that a module with PEFT adapters, which is quantized on a copy, cannot have.

    Args:
        module: To be quantized.
        swap, export_dir: The callback's options.
        holder: The module that runs it, if the copy has to stand in for it there.
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


def refuse_with_shards(
    sharder: str, swap: bool | None, export_dir: Path | None, finish: Finish, command: str, whole: str
) -> None:
    """Raises ValueError for options that need a whole module, where training shards it.

    Args:
        sharder: What shards it, for the message.
        swap, export_dir, finish: The callback's options.
        command: Quantizes what training saved, for the message.
        whole: Has training keep the module whole, for the message.
    """
    if swap:
        raise ValueError(
            f"swap=True leaves the module quantized, and {sharder} keeps it in parts: leave swap out, and load the "
            "export with load_quantized"
        )
    if export_dir is None:
        raise ValueError(f"under {sharder} the module keeps its float weights: give an export_dir")
    if finish.kind != "none":
        raise ValueError(
            f"finish={finish.kind!r} trains whole layers on every rank, and {sharder} keeps them in parts: leave the "
            f"finish out and run {command} finish={finish.kind} on the checkpoint, or train with {whole}"
        )
