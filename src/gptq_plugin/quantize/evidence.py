"""Evidence for the solver, gathered while batches walk the model: `Observations`."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from gptq_plugin.calibration.positions import Positions, Rows
from gptq_plugin.device.memory import with_room
from gptq_plugin.model.experts import experts_of, in_expert
from gptq_plugin.model.experts_at_once import Grouped, by_expert
from gptq_plugin.model.plan import Plan
from gptq_plugin.model.targets import Target
from gptq_plugin.quantize.drifts import Drifts
from gptq_plugin.quantize.gradient_weights import GradientWeights
from gptq_plugin.quantize.grouped_evidence import GroupedEvidence
from gptq_plugin.quantize.outcome import sum_over_ranks
from gptq_plugin.walk.expert_hessians import EachEvidence, Evidence, ExpertHessians
from gptq_plugin.walk.groups import Group
from gptq_plugin.walk.hessian import Hessian
from gptq_plugin.walk.ranges import Ranges

_NOT_WEIGHTED = (
    "token_weighting='gradients' is not applied: no gradient is known for the rows of its input, or all are 0"
)
_OTHER_CALLS = (
    "is called more often forward and backward than in the walk: its tokens may have the weights of other calls"
)


class Observations:
    """Hessians of groups and of blocks of experts, each until its layers are solved, and the ranges of all layers.

    All ranks ask for the same evidence in the same order.

    Args:
        plan: The layers.
        positions: Knows which rows of an input count.
        device: Where the Hessians live.
        weight_of: As for `Drifts`.
        exact: Their sums depend on neither order nor ranks.
        calls: Of experts that are called at once, by name.
        make_room: As for `with_room`; for means.

    Attributes:
        ranges: Of the inputs that were observed; of the outputs too, while it watches.
        known: Groups, by the names of their layers, whose evidence is known: nothing is summed up for them.
    """

    def __init__(
        self,
        plan: Plan,
        positions: Positions,
        device: torch.device,
        weight_of: Callable[[Target], Tensor],
        exact: bool = True,
        calls: Mapping[str, Grouped] | None = None,
        make_room: Callable[[], bool] = lambda: False,
    ) -> None:
        self.ranges = Ranges()
        self.known: set[tuple[str, ...]] = set()
        self._targets = {target.name: target for target in plan.targets}
        self._positions = positions
        self._device = device
        self._hessians: dict[tuple[str, ...], Hessian] = {}  # by the names of a group
        self._exact = exact
        self._experts = ExpertHessians(device, exact, make_room)
        self._calls = calls or {}
        self._grouped = GroupedEvidence(self._calls, device, exact, self.ranges)
        self._make_room = make_room
        self._drifts = Drifts(plan, device, exact, weight_of, make_room)
        self._remarks: dict[tuple[str, str], int] = defaultdict(int)  # batches, by layer and remark
        self._read_tokens: set[str] = set()  # experts' layers, see `positions.Rows`
        self._weights: GradientWeights | None = None

    def weight_by(self, weights: GradientWeights) -> None:
        """Weights the tokens of layers from now on; to be called before any is observed. Groups hold one layer each."""
        self._weights = weights

    def observe(self, group: Group, number: int, x: Tensor) -> None:
        """Adds a batch's input of a group, [..., in]."""
        first = group.names[0]
        rows = self._positions.rows(number, first, x, by_expert=bool(group.at_once))
        rows = self._weighted(first, number, rows, x)
        self._positions.share_input(group.names)
        if rows.remark is not None:
            for name in group.names:
                self._remarks[name, rows.remark] += 1
        if rows.are_tokens:
            self._read_tokens.add(first)
        if group.at_once:
            self._grouped.add(group, rows, x, self._drifts.of_tokens(group, number, x, rows))
            return
        if group.names not in self.known:
            self._hessian(group).add(rows.weighted(rows.counted))
            self._drifts.add(group, number, x, rows)
        self.ranges.read(group.names, x)

    def observe_float(self, group: Group, number: int, x: Tensor) -> None:
        """Notes the float model's input of a group, [..., in]; the batch's other one, of the same call, comes later."""
        if group.names not in self.known:
            self._drifts.note(group, number, x)

    @contextlib.contextmanager
    def watching(self, layers: Mapping[str, nn.Module]) -> Iterator[None]:
        """Takes in the outputs of layers and, in both walks, what enters blocks of experts, while batches run.

        Args:
            layers: By name; others than targets are left out.
        """
        widths = {name: target.shape[0] for name, target in self._targets.items()}
        at_once = [(one.call, one.layers) for one in self._calls.values()]
        with (
            self.ranges.watching({name: layer for name, layer in layers.items() if name in self._targets}),
            self.ranges.watching_experts(at_once, widths),
            self._drifts.watching(self._positions.sources()),
        ):
            yield

    def observe_experts(self, experts: str, rows: Tensor) -> None:
        """Adds the rows [tokens, in] that enter a block of experts and count."""
        self._experts.entered(experts, rows)

    def count_other_calls(self, group: Group) -> None:
        """Notes the weights of a group's tokens that no call asked for, once all its calls were observed."""
        first = group.names[0]
        if self._weights is not None and (left := self._weights.left(first)):
            self._remarks[first, _OTHER_CALLS] += left

    def of_group(self, group: Group) -> Evidence:
        """Sums a group's Hessian over all ranks, and drops it: it is as large as the mean that is returned."""
        hessian = self._hessian(group)
        del self._hessians[group.names]
        hessian.over_ranks()
        first = self._targets[group.names[0]]
        experts = experts_of(first.name, first.module)
        if experts is not None and hessian.tokens:
            layers = [in_expert(experts, name) for name in group.names]
            reads = self._experts.reads_tokens(experts, layers, first.name in self._read_tokens)
            evidence = self._experts.weighted(experts, reads, hessian)
            return self._with_drift(group, evidence, hessian.tokens + reads * hessian.in_features, paired=reads)
        tokens, width = hessian.tokens, hessian.in_features
        few = f"only {tokens} calibration tokens for {width} inputs: the Hessian is singular"
        mean = with_room(hessian.mean, self._make_room)
        evidence = Evidence(mean, tokens, deviations=(few,) if 0 < tokens < width else ())
        return self._with_drift(group, evidence, tokens, paired=experts is None)

    def of_experts(self, group: Group) -> EachEvidence:
        """The evidence for each expert of a group that is called at once, as `of_group` gives it for others."""
        first = self._targets[group.names[0]]
        experts = experts_of(first.name, first.module)
        assert experts is not None
        own = list(dict.fromkeys(in_expert(experts, name) for name in group.names))
        reads = self._experts.reads_tokens(experts, own, first.name in self._read_tokens)
        hessians, asked = self._grouped.take(group, first.shape[1]), self._drifts.asked(group)
        drift = self._grouped.take_drift(group, first.shape[1]) if asked and reads else None
        layers = by_expert(group, self._calls) if asked else []
        wanted = [any(self._targets[name].config.asymmetric_alpha for name in own) for own in layers]
        return self._experts.weighted_each(experts, reads, hessians, drift, wanted)

    def _with_drift(self, group: Group, evidence: Evidence, weight: int, *, paired: bool) -> Evidence:
        drift, told = self._drifts.mean(group, evidence.tokens, weight, paired=paired)
        return replace(evidence, drift=drift, deviations=evidence.deviations + told)

    def of_unreached(self, experts: str, target: Target) -> Evidence:
        """The evidence for an expert's layer that no token reached: that of its block."""
        reads = self._experts.reads_tokens(experts, [in_expert(experts, target.name)], False)
        nothing = Hessian(target.shape[1], self._device, exact=self._exact)
        return self._experts.weighted(experts, reads, nothing)

    def remarks(self) -> dict[str, tuple[str, ...]]:
        """Sentences on the layers' inputs, with the number of batches on all ranks, by layer. Collective."""
        found: dict[str, tuple[str, ...]] = defaultdict(tuple)
        for (name, remark), batches in sorted(sum_over_ranks(self._remarks).items()):
            found[name] += (f"{remark} ({batches} batches)",)
        return found

    def discard(self, group: Group) -> None:
        """Drops what was observed of a group that is solved."""
        self._hessians.pop(group.names, None)
        self._grouped.discard(group)
        self._drifts.discard(group)

    def leave(self, experts: str) -> None:
        """Drops what entered a block of experts."""
        self._experts.leave(experts)
        self._drifts.leave(experts)

    def _weighted(self, name: str, number: int, rows: Rows, x: Tensor) -> Rows:
        if self._weights is None:
            return rows
        roots = self._weights.take(name, number, x.numel() // x.shape[-1])
        if roots is None:
            self._remarks[name, _NOT_WEIGHTED] += 1
            return rows
        return rows._replace(roots=roots if rows.mask is None else roots[rows.mask])

    def _hessian(self, group: Group) -> Hessian:
        if group.names not in self._hessians:
            in_features = self._targets[group.names[0]].shape[1]
            self._hessians[group.names] = Hessian(in_features, self._device, exact=self._exact)
        return self._hessians[group.names]
