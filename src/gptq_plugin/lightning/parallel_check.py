"""Checks that the unsharded module reproduces its tensor-parallel outputs: `ParallelOutputs`.

Besides `parallelize_module`, a `configure_model` may change modules by hand: numbers of heads become those of one rank.
With whole weights such a module fails, or computes something else. The check finds that before training.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves

from gptq_plugin import distributed
from gptq_plugin.errors import TargetError, brief

_TOLERANCE = 0.1  # of the outputs' norm: in bfloat16, another order of addition alone makes some hundredths
_REMEDY = (
    "configure_model has changed more than parallelize_module and fully_shard do, such as the number of heads of an "
    "attention module, and that is not undone. Let the forward find such sizes from its tensors (view(..., -1, "
    "head_dim)), or train without the callback and run gptq-quantize ckpt=... on what was saved"
)


class ParallelOutputs:
    """Outputs of the sharded module for one batch, the same on all ranks. Every rank makes one.

    Args:
        run: Runs a batch through the module.
        batch: This rank's batch; rank 0's is used on all. If rank 0 has None, nothing is compared.
    """

    def __init__(self, run: Callable[[Any], Any], batch: Any) -> None:
        self._run = run
        self._batch = distributed.object_from_first(batch)
        self._sharded = self._outputs()

    def check(self) -> None:
        """Runs the batch through the module, which must be whole by now, and compares.

        Raises:
            TargetError: The module fails, or its outputs differ.
        """
        try:
            whole = self._outputs()
        except Exception as error:
            raise TargetError(
                f"the module runs in parallel, and not with whole weights ({brief(error)}): {_REMEDY}"
            ) from error
        for expected, found in zip(self._sharded, whole, strict=False):
            if expected.shape == found.shape and (found - expected).norm() > _TOLERANCE * expected.norm():
                difference = float((found - expected).norm() / expected.norm())
                raise TargetError(
                    f"with whole weights the module's outputs differ by {difference:.0%} from those it gives in "
                    f"parallel: {_REMEDY}"
                )

    @torch.no_grad()
    def _outputs(self) -> list[Tensor]:
        if self._batch is None:
            return []
        leaves = [leaf for leaf in tree_leaves(self._run(self._batch)) if isinstance(leaf, Tensor)]
        whole: list[Any] = [leaf.full_tensor() if isinstance(leaf, DTensor) else leaf for leaf in leaves]
        return [tensor.float().cpu() for tensor in whole if tensor.is_floating_point()]


def may_differ(trainer: pl.Trainer, pl_module: nn.Module, module: nn.Module) -> bool:
    """Returns whether the strategy runs modules in parallel, and `module` may be run now.

    FSDP2 takes the first module that runs for the outermost, so a module inside another FSDP2 module must not.
    """
    mesh = getattr(trainer.strategy, "_device_mesh", None)
    in_parallel = mesh is not None and mesh["tensor_parallel"].size() > 1
    around = [m for m in pl_module.modules() if m is not module and any(part is module for part in m.modules())]
    return in_parallel and not any(isinstance(m, FSDPModule) for m in around)
