"""A module that its strategy shards, as if nobody had sharded it: `unsharded`.

Nothing is copied or built anew. The modules stay who they are, so whatever refers to them keeps working. For a while
their parameters and buffers are whole, mapped from files, and what sharding put around them is away: the hooks that
gather and redistribute, FSDP2's classes, and wrappers.
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

import lightning.pytorch as pl
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from gptq_plugin import distributed
from gptq_plugin.errors import TargetError
from gptq_plugin.lightning.consolidated import Consolidated, consolidated
from gptq_plugin.lightning.sharding import Slot, sharding_of
from gptq_plugin.model.hf_models import transformers_models

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
def unsharded(trainer: pl.Trainer, pl_module: pl.LightningModule, beside: Path) -> Iterator[Consolidated]:
    """The module whole and without its sharding for the length of a with block; afterwards as it was.

    In a process group every rank calls it, and ends with the same weights in the same memory as all ranks of its node.
    Forwards in the block are no collectives: each rank may run as many as it likes.

    Args:
        trainer: Of a strategy that shards, which has set the module up.
        pl_module: Its module.
        beside: Where the weights lie meanwhile: in a temporary folder beside this one.

    Raises:
        TargetError: The module was sharded in a way that cannot be taken back.
        ExportError: The weights cannot be written or read there.
    """
    refuse_unknown_sharding(pl_module)
    strategy: Any = trainer.strategy
    sharding = sharding_of(trainer)
    with sharding.whole_on(pl_module, strategy.root_device):
        slots = list(_slots(pl_module))
        first = {id(slot.tensor): slot for slot in reversed(slots)}  # tied ones under their first name
        unique = [slot for slot in slots if first[id(slot.tensor)] is slot]
        if len(set(distributed.gather_objects(_digest(unique)))) > 1:
            raise TargetError(
                f"the ranks have built {type(pl_module).__name__} with different parameters: configure_model must do "
                "the same on all of them"
            )
        tensors = sharding.whole(unique)
        with consolidated(tensors, beside, node=strategy.node_rank, local_rank=strategy.local_rank) as files:
            new = {slot: _like(slot.tensor, files.tensors[slot.name]) for slot in unique}
            with _pointed({slot: new[first[id(slot.tensor)]] for slot in slots}), _bare(pl_module):
                yield files


def refuse_unknown_sharding(pl_module: nn.Module) -> None:
    """Raises TargetError for modules that were changed in ways `unsharded` does not undo."""
    for name, module in pl_module.named_modules():
        name = name or type(module).__name__
        if any("_flat_param" in key for key in module._parameters):
            raise TargetError(
                f"{name} has but a flat parameter, of which nobody can tell the layers' own: "
                "FSDPStrategy(use_orig_params=True), the default, keeps them"
            )
        if "forward" in module.__dict__ and _original(module.__dict__["forward"]) is None:
            raise TargetError(
                f"{name} was sharded by a library that has put a forward of its own in the place of the module's "
                f"({module.__dict__['forward'].__module__}). Use fully_shard or parallelize_module, or train without "
                "the callback and run gptq-quantize ckpt=... on what was saved"
            )
    for name, model in transformers_models(pl_module):
        _refuse_undone_tie(name or type(model).__name__, model)


def _refuse_undone_tie(name: str, model: Any) -> None:
    configs = (model.config, model.config.get_text_config())
    ties = any(getattr(config, "tie_word_embeddings", False) for config in configs)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if ties and embedding is not None and head is not None and head.weight is not embedding.weight:
        raise TargetError(
            f"{name} has tie_word_embeddings=true, and sharding it gave its two embeddings a parameter each, which are "
            "trained apart: build the model with tie_word_embeddings=False, or tie them again "
            "(head.weight = embedding.weight) after parallelize_module"
        )


def _slots(root: nn.Module) -> Iterator[Slot]:
    for name, module in root.named_modules():
        for tensors in (module._parameters, module._buffers):
            for key, tensor in tensors.items():
                if tensor is not None:
                    yield Slot(f"{name}.{key}".lstrip("."), module, key)


def _digest(slots: list[Slot]) -> str:
    said = "\n".join(f"{slot.name} {slot.tensor.dtype}" for slot in slots)
    return sha256(said.encode()).hexdigest()


def _like(original: Tensor, whole: Tensor) -> Tensor:
    return nn.Parameter(whole, requires_grad=False) if isinstance(original, nn.Parameter) else whole


@contextlib.contextmanager
def _pointed(tensors: Mapping[Slot, Tensor]) -> Iterator[None]:
    """Modules with other parameters and buffers."""
    before = [(slot, slot.tensor) for slot in tensors]
    # DeepSpeed's dictionary gathers what it is asked for.
    dictionaries = {slot.module: slot.module._parameters for slot in tensors}
    try:
        for module, dictionary in dictionaries.items():
            module.__dict__["_parameters"] = dict(dictionary.items())
        for slot, tensor in tensors.items():
            setattr(slot.module, slot.key, tensor)  # recurrent layers keep a list of their own
        yield
    finally:
        for slot, tensor in before:
            setattr(slot.module, slot.key, tensor)
        for module, dictionary in dictionaries.items():
            module.__dict__["_parameters"] = dictionary


@contextlib.contextmanager
def _bare(root: nn.Module) -> Iterator[None]:
    """Modules without the hooks, classes and wrappers that sharding gave them."""
    modules = list(root.modules())
    before = [(module, type(module), {kind: module.__dict__[kind] for kind in _HOOKS}) for module in modules]
    forwards = {m: m.__dict__["forward"] for m in modules if _is_of_library(m.__dict__.get("forward"))}
    wrapped = [
        (parent, name, child)
        for parent in modules
        for name, child in parent.named_children()
        if _unwrapped(child) is not child
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
            setattr(parent, name, _unwrapped(child))
        yield
    finally:
        for parent, name, child in wrapped:
            setattr(parent, name, child)
        for module, forward in forwards.items():
            module.__dict__["forward"] = forward
        for module, kind, hooks in before:
            object.__setattr__(module, "__class__", kind)
            module.__dict__.update(hooks)


def _unwrapped(module: nn.Module) -> nn.Module:
    inner = next((module._modules[name] for name in _WRAPPERS if name in module._modules), None)
    return module if inner is None else _unwrapped(inner)


def _original(forward: Any) -> Any:
    """The forward that transformers' tensor parallelism put its own around; None where it cannot be told."""
    while _is_of_library(forward):
        forward = inspect.getclosurevars(forward).nonlocals.get("original_forward")
    return forward


def _is_of_library(function: Any) -> bool:
    """Whether a hook, or what stands in the place of a forward, is of a library that shards."""
    while isinstance(function, partial):
        function = function.func
    return str(getattr(function, "__module__", None)).startswith(_LIBRARIES)
