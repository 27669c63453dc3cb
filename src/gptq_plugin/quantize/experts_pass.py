"""Experts that are called at once, from their evidence to quantized layers: `ExpertsPass`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from gptq_plugin.device.memory import with_room
from gptq_plugin.device.streams import Stopwatch
from gptq_plugin.layers.packed_together import dequantize, packed_layers
from gptq_plugin.layers.qlinear import QuantLinear
from gptq_plugin.memory.finished_layers import FinishedLayers
from gptq_plugin.model.experts_at_once import by_expert
from gptq_plugin.model.plan import Plan
from gptq_plugin.model.targets import Target
from gptq_plugin.quantize import kept_pass
from gptq_plugin.quantize.batch_runs import BatchRuns
from gptq_plugin.quantize.data_checks import Samples, check_enough
from gptq_plugin.quantize.evidence import Observations
from gptq_plugin.quantize.kept_pass import KeptPass
from gptq_plugin.quantize.outcome import Outcome
from gptq_plugin.quantize.solve_experts import Chunk, solve_experts
from gptq_plugin.walk.expert_hessians import Evidence
from gptq_plugin.walk.lockstep import Stop


class ExpertsPass:
    """Quantizes the experts of a group together.

    Args:
        plan: All layers.
        runs: Where they run.
        observations: Their evidence.
        outcome: Gets the solutions.
        finished: Gets the layers.
        kept: Gets the stops of experts that are quantized by themselves.
        quantize: Quantizes the layers of such a stop.
        memory: As for `solve_experts`.
    """

    def __init__(
        self,
        plan: Plan,
        runs: BatchRuns,
        observations: Observations,
        outcome: Outcome,
        finished: FinishedLayers,
        kept: KeptPass,
        quantize: Callable[[kept_pass.Stop, list[Target], Stop], None],
        memory: int = 0,
    ) -> None:
        self._plan = plan
        self._targets = {target.name: target for target in plan.targets}
        self._runs, self._observations, self._outcome = runs, observations, outcome
        self._finished = finished
        self._kept, self._quantize_stop, self._memory = kept, quantize, memory

    def quantize(self, stop: Stop, samples: Samples) -> None:
        """Quantizes a group.

        Args:
            stop: At the group.
            samples: Of all ranks.

        Raises:
            CalibrationError: It is the first group, and no expert has enough tokens.
        """
        is_first = not self._outcome.solved
        experts = [[self._targets[name] for name in own] for own in by_expert(stop.group, self._runs.at_once)]
        self._quantize(stop, experts)
        if is_first:
            tokens = max(self._outcome.solved[name].tokens for name in stop.group.names)
            check_enough(tokens, samples.count, self._plan)

    def _quantize(self, stop: Stop, experts: Sequence[list[Target]]) -> None:
        first, shapes = experts[0], [[one.shape for one in layers] for layers in experts]
        configs = [[one.config for one in layers] for layers in experts]
        found = self._observations.of_experts(stop.group)
        are_alike = all(one == configs[0] for one in configs) and all(one == shapes[0] for one in shapes)
        if not are_alike or len({repr(one.config) for one in first}) > 1:
            for layers in experts:
                [evidence] = found.take(1).each()
                if layers:  # not all of them stay float
                    self._quantize_one(layers, evidence, stop)
            return
        shape = (sum(one.shape[0] for one in first), first[0].shape[1])
        stopwatch = Stopwatch(self._runs.device)

        def weights(expert: int) -> list[Tensor]:
            return [self._runs.weights.present(one) for one in experts[expert]]

        room, memory = self._runs.make_room, self._memory
        chunks = solve_experts(weights, found, len(experts), shape, first[0].config, room, memory)
        # All in one tensor, of which a product of all experts takes no copy.
        values = with_room(partial(_empty, experts, shape, self._runs.device), self._runs.make_room)
        failed: list[tuple[list[Target], Evidence]] = []
        for chunk in _one_ahead(chunks):  # the device solves while the host takes
            failed += self._take(chunk, experts, values, stopwatch)
        stopwatch.stop()
        for layers, evidence in failed:
            self._quantize_one(layers, evidence, stop)

    def _quantize_one(self, layers: list[Target], evidence: Evidence, stop: Stop) -> None:
        names = tuple(target.name for target in layers)
        self._quantize_stop(self._kept.stop(names, lambda: evidence), layers, stop)

    def _take(
        self, chunk: Chunk, every: Sequence[list[Target]], values: Tensor, stopwatch: Stopwatch
    ) -> list[tuple[list[Target], Evidence]]:
        """Takes a chunk's solutions; returns the layers of experts that have none, which are to be solved alone."""
        experts = [every[number] for number in chunk.experts]
        config, solved = experts[0][0].config, chunk.solved
        layers: list[list[QuantLinear]] = [[] for _ in experts]
        start = 0
        for part in range(len(experts[0])):
            rows = slice(start, start + experts[0][part].shape[0])
            start = rows.stop
            dtypes = [own[part].parameter.dtype for own in experts]
            packed = partial(packed_layers, solved, rows, config.bits, config.group_size, dtypes)
            for of_expert, layer in zip(layers, with_room(packed, self._runs.make_room), strict=True):
                of_expert.append(layer)
        whole = values[chunk.experts.start : chunk.experts.stop]
        with_room(partial(dequantize, solved, whole), self._runs.make_room)
        good, evidence = chunk.good(), chunk.evidence()
        pairs: list[tuple[Target, QuantLinear, Tensor | None]] = []
        for number, own in enumerate(experts):
            if good[number]:
                parts = whole[number].split([one.shape[0] for one in own])
                pairs += zip(own, layers[number], parts, strict=True)
        self._runs.weights.quantize(pairs)
        for target, layer, _ in pairs:
            self._finished.add(target.name, layer)
        self._outcome.add_experts(experts, chunk.solved, evidence, good, stopwatch, share=1 / len(every))
        each = zip(experts, evidence, good, strict=False)  # the last expert fills a chunk
        return [(own, evidence) for own, evidence, is_good in each if not is_good]


def _empty(experts: Sequence[list[Target]], shape: tuple[int, int], device: torch.device) -> Tensor:
    """Room for the weights of all experts, [experts, rows, in]."""
    return torch.empty(len(experts), *shape, dtype=experts[0][0].parameter.dtype, device=device)


def _one_ahead(chunks: Iterator[Chunk]) -> Iterator[Chunk]:
    """Yields chunks, each when the work on the next one is queued."""
    before = next(chunks)
    for chunk in chunks:
        yield before
        before = chunk
    yield before
