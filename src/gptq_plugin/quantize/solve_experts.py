"""Solves experts together, divided among the ranks in chunks: `solve_experts`.

Tested by tests/quantize/test_experts_pass.py: as part of a pass; on several ranks by tests/ranks/test_same_bytes.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gptq_plugin import distributed
from gptq_plugin.config import QuantizeConfig
from gptq_plugin.device.memory import with_room
from gptq_plugin.device.streams import AsyncRead
from gptq_plugin.gptq.solve_each import Solutions, most, solve_each
from gptq_plugin.walk.expert_hessians import EachEvidence, Evidence, SomeEvidence


@dataclass(frozen=True)
class Chunk:
    """Experts that were solved together.

    Attributes:
        experts: Their numbers.
        evidence: Returns that of each; waits for the device.
        solved: Their solutions, on every rank.
        good: Returns for each whether its solution is one; waits for the device.
    """

    experts: range
    evidence: Callable[[], list[Evidence]]
    solved: Solutions
    good: Callable[[], list[bool]]


def solve_experts(
    weights: Callable[[int], Sequence[Tensor]],
    evidence: EachEvidence,
    experts: int,
    shape: tuple[int, int],
    config: QuantizeConfig,
    make_room: Callable[[], bool] = lambda: False,
    memory: int = 0,
) -> Iterator[Chunk]:
    """Yields all experts in chunks. Collective.

    Chunks are the same for any number of ranks, which solve one at a time each and send it to the others.

    Args:
        weights: Returns the parts of an expert's weight, whose rows are one below the other.
        evidence: Of all experts.
        experts: Their number.
        shape: Of a weight.
        config: For all.
        make_room: As for `with_room`.
        memory: As for `most`; 0 on several ranks.
    """
    chunks = -(-experts // most(*shape, config, memory))
    size, ranks, rank = -(-experts // chunks), distributed.world_size(), distributed.rank()
    numbers = [range(start, min(start + size, experts)) for start in range(0, experts, size)]
    for first in range(0, len(numbers), ranks):
        turn = [numbers[min(first + one, len(numbers) - 1)] for one in range(ranks)]
        mine: Callable[[], Solutions] | None = None
        told: dict[range, SomeEvidence] = {}
        for which in dict.fromkeys(turn):
            told[which] = evidence.take(len(which))
            if turn[rank] == which:
                mine = _solver(weights, which, told[which], size, config)
        assert mine is not None
        solved = _on_all_ranks(with_room(mine, make_room), len(told), make_room)
        for which, of_rank in zip(told, solved, strict=True):
            yield Chunk(which, told[which].each, of_rank, AsyncRead(of_rank.good).get)


def _solver(
    weights: Callable[[int], Sequence[Tensor]],
    experts: range,
    evidence: SomeEvidence,
    size: int,
    config: QuantizeConfig,
) -> Callable[[], Solutions]:
    """Solves some experts; the last one fills a chunk that has fewer, since sums may depend on their number."""
    chosen = [*experts, *[experts[-1]] * (size - len(experts))]

    def filled(values: Tensor) -> Tensor:
        missing = size - len(values)
        return torch.cat([values, values[-1:].expand(missing, *values.shape[1:])]) if missing else values

    def solve() -> Solutions:
        stacked = torch.cat([part for number in chosen for part in weights(number)]).unflatten(0, (size, -1))
        damp_percents = evidence.damp_percents.clamp(min=config.damp_percent)
        drifts = None if evidence.drifts is None else filled(evidence.drifts)
        return solve_each(stacked, filled(evidence.means), config, filled(damp_percents), drifts)

    return solve


def _on_all_ranks(mine: Solutions, sharers: int, make_room: Callable[[], bool]) -> list[Solutions]:
    """The solutions of the first ranks, which have different ones."""
    if distributed.world_size() == 1:
        return [mine]
    names = [field.name for field in dataclasses.fields(mine)]
    values = [getattr(mine, name).contiguous() for name in names]
    gathered = with_room(lambda: distributed.gather_rows(values, len(mine.good), sharers), make_room)
    return [Solutions(**dict(zip(names, of_rank, strict=True))) for of_rank in zip(*gathered, strict=True)]
