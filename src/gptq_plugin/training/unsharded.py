"""Temporarily undoes the sharding of a module: `unsharded`.

No module is copied or rebuilt, so references to them stay valid. Meanwhile their parameters and buffers are whole,
mapped from files, and what sharding added is gone: the hooks that gather and redistribute, FSDP2's classes, wrappers.

Tested by tests/lightning/test_unsharded.py: and by tests/hf/test_sharded.py, in two processes.
"""

from __future__ import annotations

import contextlib
import inspect
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from gptq_plugin import distributed
from gptq_plugin.errors import TargetError
from gptq_plugin.memory.slots import Slot, all_slots, like
from gptq_plugin.model.hf_models import transformers_models
from gptq_plugin.training.consolidated import Consolidated, consolidated
from gptq_plugin.training.sharding import Sharding

_WRAPPERS = ("_fsdp_wrapped_module", "_checkpoint_wrapped_module")
_LIBRARIES = ("torch.distributed.", "transformers.distributed.", "deepspeed.")
_HOOKS = (
    "_forward_pre_hooks",
    "_forward_hooks",
    "_backward_pre_hooks",
    "_backward_hooks",
    "_state_dict_pre_hooks",
    "_state_dict_hooks",
    "_load_state_dict_pre_hooks",
)


@contextlib.contextmanager
def unsharded(
    module: nn.Module, sharding: Sharding, beside: Path, *, device: torch.device, node: int, local_rank: int
) -> Iterator[Consolidated]:
    """Inside the block the module is whole and without its sharding; afterwards as before.

    In a process group every rank calls it. All ranks of a node get the same weights in the same memory. Forwards in
    the block are not collective: each rank may run any number of them.

    Args:
        module: The module that is trained, not its wrapper.
        sharding: Of the module.
        beside: Sibling of the temporary folder that holds the weights meanwhile.
        device: Of training.
        node: Number of this rank's node.
        local_rank: Number of this rank in it.

    Raises:
        TargetError: The module was sharded in a way that cannot be undone.
        ExportError: This rank cannot write or read the folder.
        RankError: Another rank failed.
    """
    refuse_unknown_sharding(module)
    with sharding.resharded(module, device):
        slots = list(all_slots(module))
        first = {id(slot.tensor): slot for slot in reversed(slots)}  # tied ones under their first name
        unique = [slot for slot in slots if first[id(slot.tensor)] is slot]
        if len(set(distributed.gather_objects(_digest(unique)))) > 1:
            raise TargetError(
                f"the ranks have built {type(module).__name__} with different parameters: configure_model must do "
                "the same on all of them"
            )
        tensors = sharding.gather(unique)
        with consolidated(tensors, beside, node=node, local_rank=local_rank) as files:
            new = {slot: like(slot.tensor, files.tensors[slot.name]) for slot in unique}
            with _holding({slot: new[first[id(slot.tensor)]] for slot in slots}), _stripped(module):
                yield files


def refuse_unknown_sharding(root: nn.Module) -> None:
    """Raises TargetError for modules that were changed in a way `unsharded` cannot undo."""
    for name, module in root.named_modules():
        name = name or type(module).__name__
        if any("_flat_param" in key for key in module._parameters):
            raise TargetError(
                f"{name} has one flat parameter, which cannot be divided into those of its layers: use "
                "FSDPStrategy(use_orig_params=True), the default"
            )
        if "forward" in module.__dict__ and _original(module.__dict__["forward"]) is None:
            raise TargetError(
                f"{name} was sharded by a library that has replaced its forward "
                f"({module.__dict__['forward'].__module__}). Use fully_shard or parallelize_module, or train without "
                "the callback and run gptq-quantize ckpt=... on what was saved"
            )
    for name, model in transformers_models(root):
        _refuse_undone_tie(name or type(model).__name__, model)


def _refuse_undone_tie(name: str, model: Any) -> None:
    configs = (model.config, model.config.get_text_config())
    ties = any(getattr(config, "tie_word_embeddings", False) for config in configs)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if ties and embedding is not None and head is not None and head.weight is not embedding.weight:
        raise TargetError(
            f"{name} has tie_word_embeddings=true, and sharding gave its two embeddings separate parameters, which are "
            "trained apart: build the model with tie_word_embeddings=False, or tie them again "
            "(head.weight = embedding.weight) after parallelize_module"
        )


def _digest(slots: list[Slot]) -> str:
    return sha256("\n".join(f"{slot.name} {slot.tensor.dtype}" for slot in slots).encode()).hexdigest()


@contextlib.contextmanager
def _holding(tensors: Mapping[Slot, Tensor]) -> Iterator[None]:
    """Puts these parameters and buffers into their modules; restores the others afterwards."""
    before = [(slot, slot.tensor) for slot in tensors]
    # DeepSpeed's dictionary gathers a parameter when it is read.
    dictionaries = {slot.module: slot.module._parameters for slot in tensors}
    try:
        for module, dictionary in dictionaries.items():
            module.__dict__["_parameters"] = dict(dictionary.items())
        for slot, tensor in tensors.items():
            slot.put(tensor)
        yield
    finally:
        for slot, tensor in before:
            slot.put(tensor)
        for module, dictionary in dictionaries.items():
            module.__dict__["_parameters"] = dictionary


@contextlib.contextmanager
def _stripped(root: nn.Module) -> Iterator[None]:
    """Takes away the hooks, classes and wrappers that sharding gave the modules; restores them afterwards."""
    modules = list(root.modules())
    before = [(module, type(module), {kind: module.__dict__[kind] for kind in _HOOKS}) for module in modules]
    forwards = {m: m.__dict__["forward"] for m in modules if _is_of_library(m.__dict__.get("forward"))}
    wrapped = [
        (parent, name, child)
        for parent in modules
        for name, child in parent.named_children()
        if unwrapped(child) is not child
    ]
    try:
        for module, kind, hooks in before:
            if isinstance(module, FSDPModule):
                object.__setattr__(module, "__class__", kind.__mro__[kind.__mro__.index(FSDPModule) + 1])
            for name, registered in hooks.items():
                own = ((number, hook) for number, hook in registered.items() if not _is_of_library(hook))
                module.__dict__[name] = OrderedDict(own)
        for module, forward in forwards.items():
            module.__dict__["forward"] = _original(forward)
        for parent, name, child in wrapped:
            setattr(parent, name, unwrapped(child))
        yield
    finally:
        for parent, name, child in wrapped:
            setattr(parent, name, child)
        for module, forward in forwards.items():
            module.__dict__["forward"] = forward
        for module, kind, hooks in before:
            object.__setattr__(module, "__class__", kind)
            module.__dict__.update(hooks)


def unwrapped(module: nn.Module) -> nn.Module:
    """The module inside the wrappers of FSDP 1 and of activation checkpointing; else the module itself."""
    inner = next((module._modules[name] for name in _WRAPPERS if name in module._modules), None)
    return module if inner is None else unwrapped(inner)


def _original(forward: Any) -> Any:
    """The forward that transformers' tensor parallelism wrapped; None if it cannot be found."""
    while _is_of_library(forward):
        forward = inspect.getclosurevars(forward).nonlocals.get("original_forward")
    return forward


def _is_of_library(function: Any) -> bool:
    """Returns whether a hook or a replaced forward belongs to a library that shards."""
    while isinstance(function, partial):
        function = function.func
    return str(getattr(function, "__module__", None)).startswith(_LIBRARIES)
