"""How a pass runs, apart from what it quantizes: `PassOptions`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gptq_plugin import distributed
from gptq_plugin.cache.files import KeptFiles
from gptq_plugin.calibration.batches import to_device
from gptq_plugin.calibration.failed_forward import failures_explained
from gptq_plugin.calibration.forward import CallsModels, call
from gptq_plugin.calibration.lookups import lookups_explained
from gptq_plugin.calibration.tokenizer import as_tokenizer
from gptq_plugin.config import QuantizeConfig
from gptq_plugin.device.named import device_named
from gptq_plugin.memory.finished_layers import LayerStore
from gptq_plugin.options import fields
from gptq_plugin.quantize.kept_on_ranks import KeptOnRanks
from gptq_plugin.quantize.resume_folder import resumable

ModelForward = Callable[[nn.Module, Any], Any]
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class PassOptions:
    """Options of one pass. `QuantizeModule.quantize` documents those that users give.

    Attributes:
        forward, nsamples, device, device_memory, progress: See `QuantizeModule.quantize`.
        tokenizer: The same, loaded if its folder or hub id is given.
        exports: The tokenizer is to be saved with an export.
        layers_in: Where finished layers go as they come, such as an `Export`, or a `SharedLayers`, which holds those of
            a model on the CPU for all ranks of a node; None keeps them in memory.
        offload_weights, offload_activations, exact_sums, cache_dir, cache_gb, resume: See `QuantizeModule`.
        export_dir: Where the result will be exported; with `resume`, solved layers wait beside it.
        most_samples: In a forward, of those that were given one by one; None is no limit.
    """

    forward: ModelForward | None = None
    tokenizer: Any = None
    nsamples: int | None = None
    device: torch.device | str | None = None
    device_memory: int | None = None
    progress: Progress | None = None
    layers_in: LayerStore | None = None
    offload_weights: bool | None = None
    offload_activations: bool | None = None
    exact_sums: bool | None = None
    exports: bool = False
    cache_dir: str | Path | None = None
    cache_gb: float = 50.0
    resume: bool = False
    export_dir: str | Path | None = None
    most_samples: int | None = None

    def __post_init__(self) -> None:
        fields.optional(fields.FUNCTION, "calls the model").check("forward", self.forward)
        fields.optional(fields.integer(1), "the configuration's").check("nsamples", self.nsamples)
        fields.optional(fields.integer(1, 2**63 - 1), "all that is free").check("device_memory", self.device_memory)
        fields.optional(fields.function_of(3), "nothing is called").check("progress", self.progress)
        object.__setattr__(self, "tokenizer", as_tokenizer(self.tokenizer, saved=self.exports))
        _ = self.where  # a device that is not there is refused before any work

    @property
    def where(self) -> torch.device | None:
        """The device to compute on, with its number; None is where the model is."""
        return None if self.device is None else device_named(self.device)

    @property
    def keeps(self) -> bool:
        """True if passes keep something for others."""
        return self.cache_dir is not None or self.resume

    def kept(self) -> KeptOnRanks | None:
        """What passes keep for others; None if they keep nothing.

        Raises:
            ValueError: A broken-off run is to be resumed, and there is no `export_dir` to know it by.
        """
        if self.cache_dir is not None:
            return KeptOnRanks(KeptFiles(Path(self.cache_dir), int(self.cache_gb * 1e9)), "cache_dir")
        return KeptOnRanks(resumable(self.export_dir), "resume") if self.resume else None

    def sums_exactly(self, device: torch.device) -> bool:
        """True if sums on the device must not depend on the number of ranks."""
        return self.exact_sums if self.exact_sums is not None else device.type != "cuda" or distributed.active()

    def joins(self, device: torch.device, config: QuantizeConfig) -> bool:
        """True if batches may run together: nobody asked for their size, or for the same bytes elsewhere or again."""
        if config.batch_size is not None or config.token_weighting == "gradients" or device.type != "cuda":
            return False
        return not (self.sums_exactly(device) or distributed.active() or self.keeps)

    def runner(self, *, every_logit: bool, explains: bool = False) -> ModelForward:
        """Runs a batch on `where`, through `forward` or the model.

        Args:
            every_logit: See `calibration.forward.call`.
            explains: An error of the forward is explained by its batch: see `failures_explained`.
        """
        if explains:
            run_batch = self.runner(every_logit=every_logit)
            by_user = self.forward is not None and not isinstance(self.forward, CallsModels)

            def run_explained(model: nn.Module, batch: Any) -> Any:
                with failures_explained(model, batch, by_user=by_user):
                    return run_batch(model, batch)

            return run_explained
        where = self.where

        def run(model: nn.Module, batch: Any) -> Any:
            with lookups_explained(model):
                if self.forward is None:
                    return call(model, batch, every_logit=every_logit, device=where)
                return self.forward(model, to_device(batch, where))  # a copy, of which a user may pop labels

        return run
