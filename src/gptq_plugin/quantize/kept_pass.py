"""Hessians and solutions that earlier passes kept, found along the chain of layers solved so far: `KeptPass`.

The key of a stop of the walk is a hash of the pass (`PassIdentity`) and of the codes, scales and zeros of all layers
solved before it. So a layer is taken from an earlier pass only if that had the same model, data and code, and made the
same of every layer before.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gptq_plugin.config import MODULE_FIELDS, QuantizeConfig
from gptq_plugin.errors import CalibrationError
from gptq_plugin.gptq.solver import Solution
from gptq_plugin.model.experts import experts_of
from gptq_plugin.model.targets import Target
from gptq_plugin.quantize.kept_on_ranks import KeptOnRanks
from gptq_plugin.quantize.kept_values import (
    Solved,
    evidence_content,
    kept_evidence,
    kept_solution,
    solution_content,
    solution_on,
    weight_digests,
)
from gptq_plugin.quantize.walk_record import WalkRecord
from gptq_plugin.walk.expert_hessians import Evidence

Names = tuple[str, ...]


@dataclass
class Link:
    """A stop of the walk, as an earlier pass left it.

    Attributes:
        names: Of the group's layers, or of an expert's layer that no token reached.
        reached: False for the latter.
        evidence: On the CPU; None if it is not known, or not needed.
        solved: By the names of layers solved together; complete, or the chain ends here.
    """

    names: Names
    reached: bool
    evidence: Evidence | None = None
    solved: dict[Names, Solved] = field(default_factory=dict)


class KeptPass:
    """What one pass takes from a folder, and leaves there. All ranks make the same calls; rank 0 writes.

    Args:
        kept: None keeps nothing, and finds nothing.
        targets: The layers by name.
        device: Where layers are solved.
        exact: See `Observations`.

    Attributes:
        ahead: By the names of their layers, the stops to come that are known, in their order.
        record: Of the rest of the walk, if all stops are known.
        counts: For the report.
        key: Of the next stop; None if nothing is kept.
        device: As given.
    """

    def __init__(
        self, kept: KeptOnRanks | None, targets: Mapping[str, Target], device: torch.device, exact: bool
    ) -> None:
        self.ahead: dict[Names, Link] = {}
        self.record: WalkRecord | None = None
        self.counts = {"layers_taken": 0, "hessians_taken": 0, "layers_solved": 0}
        self.key: str | None = None
        self.device = device
        self._kept, self._targets, self._exact = kept, targets, exact
        self._done: set[str] = set()  # names of the layers solved

    def begin(self, key: str, problems: Sequence[str]) -> None:
        """Looks along the chain; called at the first stop.

        Args:
            key: Of the pass.
            problems: Why nothing may be kept.
        """
        if self._kept is None:
            return
        self._kept.problems += [f"{self._kept.option} is not used: {problem}" for problem in problems]
        if not problems:
            self.key = key
            self._follow(self._kept, key)

    def stop(
        self, names: Names, observe: Callable[[], Evidence], *, reached: bool = True, shown: Evidence | None = None
    ) -> Stop:
        """The stop of a group, or of an expert's layer that no token reached.

        Args:
            names: Of its layers.
            observe: Returns the evidence that the walk has shown. Called unless all is known.
            reached: False for the latter.
            shown: The evidence, where it was looked at in any case: it need not be kept.
        """
        return Stop(self, self.ahead.pop(names) if names in self.ahead else Link(names, reached), observe, shown)

    def end(self, record: WalkRecord) -> None:
        """Keeps what the walk showed beside the layers."""
        if self.key is not None and self.record is None:
            self.write("walk", self.key, record.to_facts(), {})

    def told(self) -> list[str]:
        """Sentences on what was not kept, on any rank. Collective."""
        return [] if self._kept is None else self._kept.told()

    def totals(self) -> dict[str, int]:
        """What was taken and what was solved; empty if nothing was to be kept."""
        if self._kept is None:
            return {}
        return {**self.counts, "walk_taken": int(self.record is not None), "bytes_written": self._kept.written()}

    def write(self, kind: str, key: str, facts: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Keeps something of a stop that has a key."""
        assert self._kept is not None
        self._kept.write(kind, key, facts, tensors)

    def keys_of(self, link: Link, key: str | None) -> Keys | None:
        """Keys at a stop, of that key."""
        return None if key is None else Keys(key, link, self._targets, self._exact)

    def advance(self, link: Link) -> None:
        """Called when all layers of a stop are solved. Looks along the chain again: another run may have been here."""
        self._done |= set(link.names)
        if self._kept is not None and self.key is not None:
            self.key = _after(self.key, link)
            if not self.ahead and self.record is None and self._block(link) is None:
                self._follow(self._kept, self.key)

    def _follow(self, files: KeptOnRanks, key: str) -> None:
        done = set(self._done)
        while (known := files.read("stop", key)) is not None:
            link = Link(tuple(known.facts["names"]), known.facts["reached"])
            sets = alike([self._targets[name] for name in link.names if name not in done])
            keys = Keys(key, link, self._targets, self._exact)
            self.ahead[link.names] = link
            for same in sets:
                kept = files.read("solution", keys.solution(same))
                if kept is not None:
                    link.solved[_names(same)] = kept_solution(kept, same[0].config)
            if len(link.solved) < len(sets):
                kept = files.read("hessian", keys.evidence)
                link.evidence = None if kept is None else kept_evidence(kept)
                if kept is None:
                    del self.ahead[link.names]
                self._leave_block()
                return
            done |= set(link.names)
            key = _after(key, link)
        kept = files.read("walk", key)
        self.record = None if kept is None else WalkRecord.of_facts(kept.facts)
        if self.record is None:
            self._leave_block()

    def _leave_block(self) -> None:
        """Goes back to before a block of experts, whose layers' evidence is gathered together."""
        blocks = [self._block(link) for link in self.ahead.values()]
        last = blocks[-1] if blocks else None
        while last is not None and blocks and blocks[-1] == last:
            self.ahead.popitem()
            blocks.pop()

    def _block(self, link: Link) -> str | None:
        """The block of experts that a stop is in."""
        target = self._targets[link.names[0]]
        return experts_of(target.name, target.module)


class Stop:
    """A stop of the walk, under way.

    Args:
        kept: The pass.
        link: As it is known.
        observe, shown: See `KeptPass.stop`.
    """

    def __init__(self, kept: KeptPass, link: Link, observe: Callable[[], Evidence], shown: Evidence | None) -> None:
        self._kept, self._link, self._observe = kept, link, observe
        self._keys = kept.keys_of(link, kept.key)
        self._is_known = link.evidence is not None or bool(link.solved)
        self._evidence = shown if link.evidence is None else link.evidence.to(kept.device)

    def evidence(self) -> Evidence:
        """That of the stop, from an earlier pass or from this one, which keeps it.

        Raises:
            CalibrationError: Layers came in another order than in an earlier pass on the same.
        """
        if self._evidence is None:
            if self._is_known:
                raise CalibrationError(
                    f"{self._link.names[0]}: its layers came together with others than in an earlier run of the same, "
                    "which kept them: the model's forward is not repeatable. Leave cache_dir and resume out"
                )
            self._evidence = self._observe()
            if self._keys is not None:
                self._kept.write("hessian", self._keys.evidence, *evidence_content(self._evidence))
        return self._evidence

    def solve(self, same: Sequence[Target], solve: Callable[[Evidence], Solution]) -> Solved:
        """The solution of layers of one configuration."""
        found = self._link.solved.get(_names(same))
        if found is not None:
            self._kept.counts["layers_taken"] += len(same)
            return dataclasses.replace(found, solution=solution_on(self._kept.device, found.solution))
        taken = self._link.evidence is not None
        evidence = self.evidence()
        if self._keys is not None and not (self._is_known or self._link.solved):
            names = {"names": list(self._link.names), "reached": self._link.reached}
            self._kept.write("stop", self._keys.stop, names, {})
        self._kept.counts["hessians_taken"] += taken
        self._kept.counts["layers_solved"] += len(same)
        found = Solved(solve(evidence), evidence.tokens, evidence.deviations)
        self._link.solved[_names(same)] = found
        if self._keys is not None:
            self._kept.write("solution", self._keys.solution(same), *solution_content(found))
        return found

    def end(self) -> None:
        """To be called when all its layers are solved."""
        self._kept.advance(self._link)


class Keys:
    """The keys of what is kept at a stop.

    Args:
        key: Of the stop.
        link: Which one.
        targets: By name.
        exact: See `Observations`.
    """

    def __init__(self, key: str, link: Link, targets: Mapping[str, Target], exact: bool) -> None:
        asymmetric = any(targets[name].config.asymmetric_alpha > 0 for name in link.names)
        self.stop = key
        self.evidence = _hash(key, list(link.names), link.reached, asymmetric)
        self._exact = exact

    def solution(self, same: Sequence[Target]) -> str:
        """Of layers of one configuration."""
        return _hash(self.evidence, list(_names(same)), _of_solver(same[0].config), self._exact)


def alike(targets: Sequence[Target]) -> list[list[Target]]:
    """The layers by configuration. Rows are solved independently: those of one are one matrix to the solver."""
    sets: dict[str, list[Target]] = {}
    for target in targets:
        sets.setdefault(repr(target.config), []).append(target)
    return list(sets.values())


def _of_solver(config: QuantizeConfig) -> dict[str, Any]:
    return {name: getattr(config, name) for name in (*MODULE_FIELDS, "checkpoint_format") if name != "method"}


def _after(key: str, link: Link) -> str:
    digests = {names: weight_digests(solved.solution.weight) for names, solved in link.solved.items()}
    return _hash(key, sorted(digests.items()))


def _names(same: Sequence[Target]) -> Names:
    return tuple(target.name for target in same)


def _hash(*parts: Any) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()
