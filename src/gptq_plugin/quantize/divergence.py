"""How far the distributions that a model predicts move when a few of its weights change: `Divergence`.

Tested by tests/quantize/test_sensitivity.py: with the layers of models.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gptq_plugin import distributed
from gptq_plugin.allocation.budget import output_embedding
from gptq_plugin.calibration.positions import Positions
from gptq_plugin.errors import CalibrationError, TargetError
from gptq_plugin.model.hf_models import transformers_models
from gptq_plugin.model.structure import Structure
from gptq_plugin.quantize.batch_runs import BatchRuns

_KEPT_BYTES = 2**30  # of the float model's logits, over all batches and ranks
_PIECE = 2**24  # logits that are compared at a time
_SAME = 1e-3  # nats by which two runs of the float model may differ: sums on a GPU may be in any order


class Divergence:
    """Measures the mean over positions of KL(float || now), in nats, on the batches of all ranks.

    The logits of the positions that count are kept, of at most 1 GiB in all: of longer batches evenly spaced ones.

    Args:
        runs: This rank's batches, in their context; the groups have been found.
        positions: Which positions count.
        structure: Of the model.
        numbers: Of each of this rank's batches, its place among those of all ranks.
        batches: Number of batches on all ranks.

    Raises:
        CalibrationError: No position counts, logits are not finite, or two runs of the float model differ.
        TargetError: The forward does not compute logits.
    """

    def __init__(
        self, runs: BatchRuns, positions: Positions, structure: Structure, numbers: Sequence[int], batches: int
    ) -> None:
        self._runs, self._positions = runs, positions
        self._head = output_embedding(structure)
        self._name = next(name for name, module in structure.model.named_modules() if module is self._head)
        self._whole = _owner(structure.model, self._head)
        self._numbers = numbers
        self._kept_bytes = _KEPT_BYTES // batches
        self._floats = [self._logits(batch).cpu() for batch in range(len(numbers))]
        counts = distributed.gather_objects([len(one) for one in self._floats])
        self.tokens = sum(map(sum, counts))
        if not self.tokens:
            raise CalibrationError(
                f"single layers are measured by logits (target_bits, on_fail='escalate'), and no position of the "
                f"calibration batches counts where {self._name} computes them. Give samples with tokens that count, "
                "and a forward that computes the logits"
            )
        again = self.measure()
        if not again <= _SAME:
            raise CalibrationError(
                f"two runs of the float model on the same batches differ by {again:.3g} nats, so that what "
                "single layers do cannot be measured (target_bits, on_fail='escalate'). Make the forward repeatable in "
                "evaluation mode"
            )

    def measure(self) -> float:
        """Runs the batches with the weights as they are now. Every rank calls it, and gets the same value.

        Raises:
            CalibrationError: A logit is not finite.
        """
        sums = {}
        for batch, number in enumerate(self._numbers):
            logits = self._logits(batch)
            kept = self._floats[batch]
            pieces = max(1, _PIECE // max(1, logits.shape[-1]))
            sums[number] = math.fsum(
                _divergence(theirs.to(ours.device), ours)
                for theirs, ours in zip(kept.split(pieces), logits.split(pieces), strict=True)
            )
        of_all: dict[int, float] = {}
        for of_rank in distributed.gather_objects(sums):
            of_all |= of_rank
        return math.fsum(of_all.values()) / self.tokens  # rounded once, in whatever order

    def _logits(self, batch: int) -> Tensor:
        """A batch's logits of positions that count, [positions, vocabulary]."""
        found: list[Tensor] = []
        with self._recording(batch, found), torch.random.fork_rng(_devices(self._runs.device)):
            torch.manual_seed(0)
            self._runs.run_alone(self._runs.forward(batch), batch, looks=False)
        if not found:
            raise TargetError(
                f"single layers are measured by logits (target_bits, on_fail='escalate'), and the forward of "
                f"calibration batch {batch} does not compute any with {self._name}: define a forward (or a "
                "calibration_step) that calls the model for its logits"
            )
        logits = torch.cat(found)
        if not torch.isfinite(logits).all():
            raise CalibrationError(
                f"the logits of calibration batch {batch} (rank {distributed.rank()}) hold NaN or infinity: look for "
                "broken samples, or run the model in a wider dtype"
            )
        return logits

    @contextlib.contextmanager
    def _recording(self, batch: int, found: list[Tensor]) -> Iterator[None]:
        """Takes in logits: the model's, which may scale or cap those of its output embedding, else the latter's."""
        masks: list[Tensor | None] = []

        def at_head(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if not args or not isinstance(output, Tensor):
                return
            mask = self._positions.rows(batch, self._name, args[0]).mask
            masks.append(mask)
            found.append(self._counted(output, mask))

        def at_end(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
            logits = getattr(output, "logits", None)
            if len(masks) == 1 and isinstance(logits, Tensor):
                mask = masks[0]
                if mask is None or logits.shape[:-1].numel() == len(mask):
                    found[-1] = self._counted(logits, mask)
            masks.clear()

        hooks = [self._head.register_forward_hook(at_head)]
        if self._whole is not None:
            hooks.append(self._whole.register_forward_hook(at_end))
        try:
            with self._positions.watching():
                yield
        finally:
            for hook in hooks:
                hook.remove()

    def _counted(self, logits: Tensor, mask: Tensor | None) -> Tensor:
        """The rows that count, or evenly spaced ones of them; a copy, since the model may change its own."""
        rows = logits.detach().reshape(-1, logits.shape[-1])
        places = torch.arange(len(rows), device=rows.device) if mask is None else mask.nonzero()[:, 0].to(rows.device)
        most = max(1, self._kept_bytes // max(1, rows.shape[-1] * rows.element_size()))
        return rows[places[:: max(1, -(-len(places) // most))]]


def _owner(model: nn.Module, head: nn.Module) -> nn.Module | None:
    """The transformers model whose output embedding that is."""
    for _, whole in transformers_models(model):
        with contextlib.suppress(NotImplementedError, AttributeError):
            if whole.get_output_embeddings() is head:  # type: ignore[operator]
                return whole
    return None


def _divergence(theirs: Tensor, ours: Tensor) -> float:
    """The sum over rows of KL(theirs || ours), of logits."""
    theirs, ours = (logits.float().log_softmax(-1) for logits in (theirs, ours))
    return float((theirs.exp() * (theirs - ours)).sum(-1, dtype=torch.float64).sum())


def _devices(device: torch.device) -> list[torch.device]:
    return [device] if device.type == "cuda" else []
