"""Finds out which positions count, with a few samples of one batch: `observe_positions`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from gptq_plugin.calibration.batches import fields_of
from gptq_plugin.calibration.collect import Batch
from gptq_plugin.calibration.few_samples import few_samples, paddings
from gptq_plugin.calibration.mask_calls import Key, MaskCalls, watch_calls
from gptq_plugin.calibration.observation import Observation
from gptq_plugin.calibration.sequences import TARGETS, arguments_of, masks_among
from gptq_plugin.calibration.verdicts import FAILED, Findings, judge
from gptq_plugin.device.modules import modules_of
from gptq_plugin.errors import brief
from gptq_plugin.walk.batch_thread import Forward, Waiting
from gptq_plugin.walk.kept_state import KeptState


class Noticed:
    """The masks in the calls of one forward, which tell if there is anything to observe.

    Args:
        model: The model.
        batch: The batch that runs.
    """

    def __init__(self, model: nn.Module, batch: Batch) -> None:
        # Layers of experts that are apart are called by code of this package, with rows alone.
        modules = modules_of(model).items()
        self._modules = {name: one for name, one in modules if not getattr(type(one), "keeps_nothing", False)}
        self._calls = MaskCalls(masks_of(batch.data))

    def during(self, forward: Forward) -> Forward:
        """The forward of the batch, which notices masks while it runs."""

        def run() -> Any:
            with watch_calls(self._modules, self._calls.visit):
                return forward()

        return run

    def keys(self) -> dict[Key, bool]:
        """The masks, and whether their sense is documented."""
        return {key: sequence.is_documented for key, sequence in self._calls.sequences.items()}

    def hides(self) -> bool:
        """True if a position of this batch is hidden, or a second sequence has to be told from the first."""
        return any(key[1] == TARGETS or not bool(one.kept.all()) for key, one in self._calls.sequences.items())


@dataclass(frozen=True)
class Watched:
    """A model whose positions are observed, and how its batches run.

    Attributes:
        model: The model.
        layers: Its layers to quantize by name.
        blocks: Blocks of experts by name.
        run: Runs the data of a batch through the model, as run(number of a variant, data).
        waiting: As for `lockstep.walk`; called with the number of a variant.
        state: As for `lockstep.walk`.
        whole: See `Observation`.
    """

    model: nn.Module
    layers: Mapping[str, nn.Module]
    blocks: Mapping[str, nn.Module]
    run: Callable[[int, Any], Any]
    waiting: Waiting | None = None
    state: KeptState | None = None
    whole: bool = True


def observe_positions(watched: Watched, batches: Sequence[Batch], noticed: Noticed) -> Findings:
    """Observes a few samples of the batch that has most masks with padding.

    Args:
        watched: The model.
        batches: This rank's.
        noticed: Of a forward of one of them.
    """
    counts, keys = [paddings(batch) for batch in batches], noticed.keys()
    if not keys or not (noticed.hides() or max(counts)):
        return Findings()
    batch = batches[counts.index(max(counts))]
    few = few_samples(batch, targets=any(mask == TARGETS for _, mask in keys))
    failure = ""
    for data in (few, batch.data) if few is not None else (batch.data,):
        try:
            return _observed(watched, keys, data)
        except Exception as error:  # noqa: BLE001 - of a forward that takes no fewer samples, or no other values
            failure = f"{FAILED}, {type(error).__name__}: {brief(error)}"
    return Findings(masks=dict.fromkeys(keys, failure))


def _observed(watched: Watched, keys: Mapping[Key, bool], data: Any) -> Findings:
    """Observes by what embeddings return and, if that changes nothing anywhere, by ids."""
    findings = Findings()
    for ids in (False, True):
        seen = Observation(
            watched.model, watched.layers, watched.blocks, keys, masks_of(data), ids=ids, whole=watched.whole
        )
        seen.run(lambda number: watched.run(number, data), watched.waiting, watched.state)
        findings = judge(seen)
        if seen.responds():
            break
    return findings


def masks_of(data: Any) -> dict[str, Tensor]:
    """The masks among a batch's fields."""
    return masks_among(arguments_of(fields_of(data) or {}))
