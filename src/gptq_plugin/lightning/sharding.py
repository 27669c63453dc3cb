"""How Lightning's sharding strategies keep parameters, and how each is had whole, one after the other: `Sharding`.

ModelParallelStrategy leaves DTensors in the module (FSDP2, https://arxiv.org/abs/2411.00284, and tensor parallelism),
FSDPStrategy wraps modules and keeps their parameters flat, DeepSpeed empties parameters and keeps parts beside them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor

from gptq_plugin.lightning.roots import in_any_root


@dataclass(frozen=True)
class Slot:
    """Where a parameter or buffer is.

    Attributes:
        name: Dotted, in the sharded module; the same on every rank.
        module: What holds it.
        key: Its name there.
    """

    name: str
    module: nn.Module
    key: str

    @property
    def tensor(self) -> Tensor:
        """What this rank has of it."""
        parameter = self.module._parameters.get(self.key)
        tensor = self.module._buffers[self.key] if parameter is None else parameter
        assert tensor is not None
        return tensor


class Sharding:
    """DTensors, of `fully_shard` and `parallelize_module`; tensors that are none are whole on every rank.

    Args:
        root: What the strategy trains: the LightningModule, or what it wrapped around it.
    """

    def __init__(self, root: nn.Module) -> None:
        self.root = root

    @contextlib.contextmanager
    def whole_on(self, pl_module: pl.LightningModule, device: torch.device) -> Iterator[None]:
        """Around everything else: every module holds its own parts, where training had them.

        Args:
            pl_module: The module.
            device: Of training.
        """
        for module in self.root.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # the last forward leaves some modules with whole parameters
        yield

    def whole(self, slots: list[Slot]) -> Iterator[tuple[str, Tensor]]:
        """Every tensor by its slot's name, one at a time, in the same order on all ranks. Every rank has to read on to
        the end, whatever happens to it: the others wait for its part.

        A tensor is good until the next one is asked for.
        """
        for slot in slots:
            yield slot.name, _whole(slot.tensor)


class _FlatParameters(Sharding):
    """FullyShardedDataParallel's: one flat parameter a wrapped module, in which the module's own are views."""

    @contextlib.contextmanager
    def whole_on(self, pl_module: pl.LightningModule, device: torch.device) -> Iterator[None]:
        yield  # at the end of every forward they are

    def whole(self, slots: list[Slot]) -> Iterator[tuple[str, Tensor]]:
        left = {slot.name: slot for slot in slots}
        for unit in FullyShardedDataParallel.fsdp_modules(self.root):
            nested = {m for u in FullyShardedDataParallel.fsdp_modules(unit) if u is not unit for m in u.modules()}
            own = set(unit.modules()) - nested
            with FullyShardedDataParallel.summon_full_params(unit, recurse=False, writeback=False):
                for slot in [slot for slot in left.values() if slot.module in own]:
                    yield slot.name, slot.tensor.detach()
                    del left[slot.name]
        yield from super().whole(list(left.values()))


class _Partitions(Sharding):
    """DeepSpeed's: with ZeRO-3 each parameter is empty but for the time it is gathered; else it is whole anyway."""

    @contextlib.contextmanager
    def whole_on(self, pl_module: pl.LightningModule, device: torch.device) -> Iterator[None]:
        origin = pl_module.device
        pl_module.to(device)  # Lightning has moved what is no part of a parameter to the CPU
        try:
            yield
        finally:
            pl_module.to(origin)

    def whole(self, slots: list[Slot]) -> Iterator[tuple[str, Tensor]]:
        import deepspeed

        for slot in slots:
            with deepspeed.zero.GatheredParameters([slot.tensor]):
                yield slot.name, slot.tensor.detach()


_KINDS: dict[str, type[Sharding]] = {
    "ModelParallelStrategy": Sharding,
    "FSDPStrategy": _FlatParameters,
    "DeepSpeedStrategy": _Partitions,
}


def is_sharded(trainer: pl.Trainer) -> bool:
    """Whether the trainer's strategy keeps parameters in parts."""
    return any(isinstance(trainer.strategy, in_any_root(f"strategies.{name}")) for name in _KINDS)


def sharding_of(trainer: pl.Trainer) -> Sharding:
    """How the strategy of a trainer that `shards` does it, once it has set its module up."""
    kinds = (kind for name, kind in _KINDS.items() if isinstance(trainer.strategy, in_any_root(f"strategies.{name}")))
    assert trainer.strategy.model is not None
    return next(kinds)(trainer.strategy.model)


@torch.no_grad()
def _whole(tensor: Tensor) -> Tensor:
    """A DTensor's full tensor, for which every rank has to ask; any other as it is."""
    full: Any = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.detach()
    return full  # type: ignore[no-any-return]
