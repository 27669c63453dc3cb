"""The Trainer's model where accelerate shards it, by FSDP 1, FSDP 2 or DeepSpeed: whole, for the length of a block."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch._dynamo.eval_frame import OptimizedModule
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from transformers import TrainingArguments

from gptq_plugin.errors import TargetError
from gptq_plugin.finish.options import Finish
from gptq_plugin.model.adapters import has_adapters
from gptq_plugin.training.consolidated import Consolidated
from gptq_plugin.training.preflight import refuse_with_shards
from gptq_plugin.training.sharding import FlatParameters, Partitions, Sharding
from gptq_plugin.training.unsharded import refuse_unknown_sharding, unsharded, unwrapped

_ADVICE = "Train without the callback, call trainer.save_model(DIR), and run gptq-quantize model.name_or_path=DIR"


@dataclass(frozen=True)
class Whole:
    """The Trainer's model inside `whole`.

    Attributes:
        module: The model, without wrappers.
        files: Holds its weights, if accelerate had sharded them; else None.
        device: Where forwards run, if the weights come to it in parts; None where the module is.
    """

    module: nn.Module
    files: Consolidated | None = None
    device: torch.device | None = None


def sharding_of(model: nn.Module) -> Sharding | None:
    """Returns how accelerate shards a model that it has prepared for training; None where every rank holds all of it.

    Raises:
        NotImplementedError: The parameters are sharded in another way.
    """
    from accelerate.state import AcceleratorState

    state = AcceleratorState()
    kind = state.distributed_type.value
    parallel = getattr(state, "parallelism_config", None)
    others = [name for name in ("tp", "cp", "sp") if getattr(parallel, f"{name}_enabled", False)]
    if kind in ("FSDP", "DEEPSPEED") and not others and not isinstance(model, OptimizedModule):
        if kind == "DEEPSPEED":
            return Partitions(model)
        return FlatParameters(model) if isinstance(model, FullyShardedDataParallel) else Sharding(model)
    sharded = any(isinstance(parameter, DTensor) for parameter in model.parameters())
    if kind in ("FSDP", "DEEPSPEED", "MEGATRON_LM") or sharded:
        what = ", ".join([kind, *others]) + (" compiled" if isinstance(model, OptimizedModule) else "")
        raise NotImplementedError(
            f"GPTQTrainerCallback undoes the sharding of accelerate's FSDP and DeepSpeed alone, and here it is of "
            f"another kind ({what}). {_ADVICE}"
        )
    return None


def refuse_for_shards(model: nn.Module, swap: bool | None, export_dir: Path | None, finish: Finish) -> None:
    """Refuses what cannot be done with a sharded model; one that is whole passes.

    Args:
        model: The Trainer's, prepared for training.
        swap, export_dir, finish: The callback's options.

    Raises:
        ValueError: An option needs the whole model.
        TargetError: It has PEFT adapters, or was sharded in a way that cannot be undone.
        NotImplementedError: As for `sharding_of`.
    """
    if sharding_of(model) is None:
        return
    sharder = "accelerate's sharding"
    refuse_with_shards(sharder, swap, export_dir, finish, "gptq-quantize model.name_or_path=DIR", "DDP")
    if has_adapters(model):
        raise TargetError(
            f"PEFT adapters are not merged under {sharder}: train without the callback, save the adapter, and run "
            "gptq-quantize model.name_or_path=BASE adapter=DIR; or train with DDP"
        )
    refuse_unknown_sharding(unwrapped(model))


@contextlib.contextmanager
def whole(model: nn.Module, args: TrainingArguments, export_dir: Path | None) -> Iterator[Whole]:
    """The model without its sharding; one that is not sharded stays as it is. Every rank calls it.

    Args:
        model: The Trainer's, prepared for training.
        args: The Trainer's.
        export_dir: The weights are put together beside it.
    """
    sharding = sharding_of(model)
    if sharding is None:
        yield Whole(model)
        return
    from accelerate.state import AcceleratorState

    assert export_dir is not None  # `refuse_for_shards` has checked it
    state, module = AcceleratorState(), unwrapped(model)
    node = state.process_index - state.local_process_index  # the node's first rank
    place = {"device": args.device, "node": node, "local_rank": state.local_process_index}
    with unsharded(module, sharding, export_dir, **place) as files, _run_by_wrapper(model, module), _loads_whole():
        yield Whole(module, files, args.device)
    del files
    gc.collect()  # cycles of what ran in the block keep its files mapped, and with them their room on the disk


@contextlib.contextmanager
def back_on(trained: Whole, device: torch.device) -> Iterator[None]:
    """Moves the model to the device after the block, unless it is sharded."""
    try:
        yield
    finally:
        if trained.files is None:
            trained.module.to(device)


@contextlib.contextmanager
def _run_by_wrapper(model: nn.Module, module: nn.Module) -> Iterator[None]:
    """Has the wrapper call the module and do nothing else, and `generate` the module's own: for `trainer.evaluate`."""
    own = {name: vars(model).pop(name) for name in ("forward", "generate") if _is_replaced(model, module, name)}
    if model is not module:
        vars(model)["forward"] = module
    try:
        yield
    finally:
        if model is not module:
            del vars(model)["forward"]
        vars(model).update(own)


def _is_replaced(model: nn.Module, module: nn.Module, name: str) -> bool:
    """Returns whether the instance has such a method that sharding gave it: the Trainer registers `generate` with FSDP
    2. A forward without wrapper is accelerate's, for autocast, and stays."""
    return name in vars(model) and (name == "generate" or model is not module)


@contextlib.contextmanager
def _loads_whole() -> Iterator[None]:
    """Keeps `from_pretrained` from sharding what it loads: rank 0 alone loads the export to verify it, and ZeRO-3 would
    have it wait for the others."""
    from transformers.integrations import deepspeed

    config = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = config
