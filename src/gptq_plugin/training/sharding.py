"""How parameters are sharded, and how to gather them one at a time: `Sharding`.

FSDP2 (https://arxiv.org/abs/2411.00284) and tensor parallelism leave DTensors in the module, FSDP 1 wraps modules and
keeps their parameters flat, DeepSpeed empties parameters and keeps parts beside them.

Tested by tests/lightning/test_sharding.py: with the strategies that shard so.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor

from gptq_plugin.memory.slots import Slot


class Sharding:
    """DTensors of `fully_shard` and `parallelize_module`. Other tensors are whole on every rank.

    Args:
        root: The module that is trained, or its wrapper.
    """

    def __init__(self, root: nn.Module) -> None:
        self.root = root

    @contextlib.contextmanager
    def resharded(self, module: nn.Module, device: torch.device) -> Iterator[None]:
        """Outermost context: every module holds its shards, on the training device.

        Args:
            module: The module that is trained, not its wrapper.
            device: Of training.
        """
        for part in self.root.modules():
            if isinstance(part, FSDPModule):
                part.reshard()  # the last forward leaves some modules with whole parameters
        yield

    def gather(self, slots: list[Slot]) -> Iterator[tuple[str, Tensor]]:
        """Yields the whole tensor of every slot with its name, in the same order on all ranks.

        A tensor is valid until the next one is read. Gathering is collective, so every rank must read to the end, even
        after its own error.
        """
        for slot in slots:
            yield slot.name, _gathered(slot.tensor)


class FlatParameters(Sharding):
    """Parameters of FullyShardedDataParallel: one flat parameter a wrapped module, whose own parameters are views."""

    @contextlib.contextmanager
    def resharded(self, module: nn.Module, device: torch.device) -> Iterator[None]:
        yield  # every forward ends so

    def gather(self, slots: list[Slot]) -> Iterator[tuple[str, Tensor]]:
        left = {slot.name: slot for slot in slots}
        for unit in FullyShardedDataParallel.fsdp_modules(self.root):
            nested = {m for u in FullyShardedDataParallel.fsdp_modules(unit) if u is not unit for m in u.modules()}
            own = set(unit.modules()) - nested
            with FullyShardedDataParallel.summon_full_params(unit, recurse=False, writeback=False):
                for slot in [slot for slot in left.values() if slot.module in own]:
                    yield slot.name, slot.tensor.detach()
                    del left[slot.name]
        yield from super().gather(list(left.values()))


class Partitions(Sharding):
    """Parameters of DeepSpeed: under ZeRO-3 each is empty except while it is gathered; else it is always whole."""

    @contextlib.contextmanager
    def resharded(self, module: nn.Module, device: torch.device) -> Iterator[None]:
        origin: Any = module.device
        module.to(device)  # Lightning has moved all but the partitions to the CPU
        try:
            yield
        finally:
            module.to(origin)

    def gather(self, slots: list[Slot]) -> Iterator[tuple[str, Tensor]]:
        import deepspeed

        for slot in slots:
            with deepspeed.zero.GatheredParameters([slot.tensor]):
                yield slot.name, slot.tensor.detach()


@torch.no_grad()
def _gathered(tensor: Tensor) -> Tensor:
    """The full tensor of a DTensor, for which every rank has to ask; any other tensor unchanged."""
    full: Any = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.detach()
    return full  # type: ignore[no-any-return]
