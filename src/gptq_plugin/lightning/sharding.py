"""How a Lightning strategy shards parameters."""

from __future__ import annotations

import lightning.pytorch as pl

from gptq_plugin.lightning.roots import in_any_root
from gptq_plugin.training.sharding import FlatParameters, Partitions, Sharding

_KINDS: dict[str, type[Sharding]] = {
    "ModelParallelStrategy": Sharding,
    "FSDPStrategy": FlatParameters,
    "DeepSpeedStrategy": Partitions,
}


def is_sharded(trainer: pl.Trainer) -> bool:
    """Returns whether the trainer's strategy shards parameters."""
    return any(isinstance(trainer.strategy, in_any_root(f"strategies.{name}")) for name in _KINDS)


def sharding_of(trainer: pl.Trainer) -> Sharding:
    """Returns how a trainer shards, if `is_sharded`, once its strategy has set up the module."""
    kinds = (kind for name, kind in _KINDS.items() if isinstance(trainer.strategy, in_any_root(f"strategies.{name}")))
    assert trainer.strategy.model is not None
    return next(kinds)(trainer.strategy.model)
