"""Judges an observation: what each mask does, and of which sequence each layer's rows are.

Tested by tests/calibration/test_observing.py: every verdict is that of a model which deserves it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gptq_plugin.calibration.layouts import BY_SHAPE, LAYOUTS, UNKNOWN, by_sample, fitting
from gptq_plugin.calibration.mask_calls import Key
from gptq_plugin.calibration.observation import AGAIN, Call, Observation, moved_samples
from gptq_plugin.calibration.sequences import TARGETS
from gptq_plugin.walk.kinds import kind_of

OBSERVED = "observed: what stands at hidden positions changes no row that counts"
LEAKS = "declared: what stands at hidden positions changes some rows that count too; hidden positions are left out"
MATTERS = "observed: what stands at hidden positions changes every row, as if there were no mask; all positions count"
UNSEEN = "declared: the observed batch shows no change at hidden positions; hidden positions are left out"
UNREPEATABLE = "declared: two runs of one batch differ; hidden positions are left out"
CROSSES = "declared: samples of one batch change one another; hidden positions are left out"
BY_NAME = "declared: the mask's name tells whether its ones hide, since no position changes another"
DISTURBED = "declared: runs of this model disturb one another; hidden positions are left out"
FAILED = "declared: a batch could not be run with other values at hidden positions"
_BEST = (OBSERVED, LEAKS, MATTERS)
_DEPARTS = (LEAKS, MATTERS, UNREPEATABLE, CROSSES, BY_NAME, DISTURBED, FAILED)  # for the report's deviations
_BESIDE = 2  # rows beside padding that a convolution mixes with it


@dataclass(frozen=True)
class Rule:
    """Which rows of a layer's input count.

    Attributes:
        key: The mask that hides the others; None if every row counts.
        layout: Of the rows, see `layouts`; UNKNOWN where padding is among them in none of those.
    """

    key: Key | None
    layout: str = ""


@dataclass(frozen=True)
class Findings:
    """What an observation showed; the same for all batches.

    Attributes:
        rules: By layer, call by call.
        masks: How each mask is read, in a sentence.
        inverted: The masks that mean the opposite of what documentation or name tell.
    """

    rules: Mapping[str, tuple[Rule, ...]] = field(default_factory=dict)
    masks: Mapping[Key, str] = field(default_factory=dict)
    inverted: frozenset[Key] = frozenset()

    def of_layer(self, layer: str) -> tuple[Rule, ...]:
        """The rules of a layer, call by call; of one that was not called those of its kind, if they agree."""
        if layer in self.rules:
            return self.rules[layer]
        alike = {rules for name, rules in self.rules.items() if kind_of(name) == kind_of(layer)}
        return alike.pop() if len(alike) == 1 else ()

    def ignores(self, key: Key) -> bool:
        """True if the model computes as if there were no such mask, so that it hides nothing."""
        return self.masks.get(key) == MATTERS


def departs(verdict: str) -> bool:
    """True if the way a mask is read belongs among the report's deviations."""
    return verdict.startswith(_DEPARTS)


def most_seen(of_ranks: Sequence[Findings]) -> Findings:
    """The findings of the first rank that saw most, to hold for all."""

    def extent(findings: Findings) -> int:
        return sum(verdict != UNSEEN and not verdict.startswith(FAILED) for verdict in findings.masks.values())

    return max(of_ranks, key=extent)


def judge(seen: Observation) -> Findings:
    """Judges an observation that was run."""
    masks: dict[Key, str] = {}
    inverted: set[Key] = set()
    for key in seen.sequences:
        masks[key] = _verdict(seen, key, inverted=False)
        other = seen.number(key, inverted=True)
        opposite = _verdict(seen, key, inverted=True) if other is not None else CROSSES
        if not {masks[key], opposite} <= set(_BEST):
            continue
        if _BEST.index(opposite) < _BEST.index(masks[key]):
            masks[key] = opposite
            inverted.add(key)
        elif masks[key] == opposite == OBSERVED:
            masks[key] = BY_NAME
    rules = {name: tuple(_rule(seen, call, masks, inverted) for call in calls) for name, calls in seen.calls.items()}
    return Findings(rules, masks, frozenset(inverted))


def _verdict(seen: Observation, key: Key, *, inverted: bool) -> str:
    number, kept = seen.number(key, inverted=inverted), seen.sequences[key].kept.cpu()
    kept = ~kept if inverted else kept
    if number is None or bool(kept.all()):
        return UNSEEN
    calls = [call for of_layer in seen.calls.values() for call in of_layer]
    if any(again is None or bool(again.any()) for again in (call.changed.get(AGAIN) for call in calls)):
        return UNREPEATABLE
    moved = moved_samples(~kept)
    judged = moved & kept.any(1)
    responds = leaks = crosses = False
    for call in calls:
        changed = call.changed.get(number)
        if changed is None or not bool(changed.any()):
            continue
        responds = True
        samples = by_sample(changed, call.shape, len(kept))
        if samples is not None:
            if bool(samples[~moved].any()):
                crosses = True
            elif samples.shape[1] == 1:  # pooled, or the output of a position that may be hidden itself
                leaks = True
            elif bool(judged.any()) and bool(samples[judged].all()):
                return MATTERS
        fits = next(fitting(kept, call.shape), None)
        leaks |= fits is not None and next(_matching(kept, call.shape, changed), None) is None
    return CROSSES if crosses else LEAKS if leaks else OBSERVED if responds else UNSEEN


def _rule(seen: Observation, call: Call, masks: Mapping[Key, str], inverted: set[Key]) -> Rule:
    by_sizes: list[Rule] = []  # of masks whose hidden positions show nothing here
    unmatched: list[Rule] = []
    for key in _candidates(seen, call):
        kept = seen.sequences[key].kept.cpu()
        kept = ~kept if key in inverted else kept
        number = seen.number(key, inverted=key in inverted)
        changed = call.changed.get(number) if number is not None else None
        fits = [Rule(key, layout) for layout, _ in fitting(kept, call.shape)]
        if masks[key] not in (OBSERVED, LEAKS, BY_NAME) or changed is None:
            by_sizes += fits
        elif bool(changed.any()):
            matched = next(_matching(kept, call.shape, changed), None)
            if matched is not None:
                return Rule(key, matched)
            if fits and masks[key] == LEAKS:
                return fits[0]
            unmatched.append(Rule(key, UNKNOWN))
        elif fits and key not in inverted and _is_true(call.is_still.get(key)):
            return fits[0]
    return next(iter([*by_sizes, *unmatched]), Rule(None))


def _is_true(value: Tensor | None) -> bool:
    return value is not None and bool(value)


def _candidates(seen: Observation, call: Call) -> Iterator[Key]:
    """The sequences that the rows may be of: an encoder-decoder's targets, if the rows answer to these; else others."""
    targets = [key for key in seen.sequences if key[1] == TARGETS]
    numbers = [seen.number(key, whole=whole) for key in targets for whole in (False, True)]
    answers = [call.changed.get(number) for number in numbers if number is not None]
    if any(changed is not None and bool(changed.any()) for changed in answers):
        yield from targets
    else:
        yield from (key for key in seen.sequences if key not in targets)


def _matching(kept: Tensor, shape: torch.Size, changed: Tensor) -> Iterator[str]:
    """The layouts in which only rows of hidden positions changed."""
    for layout, rows in fitting(kept, shape, tuple(LAYOUTS)):
        near = rows
        if layout not in BY_SHAPE and len(shape) == 3:
            hidden = (~rows).reshape(shape[:2]).float()[:, None]
            near = torch.nn.functional.max_pool1d(hidden, 2 * _BESIDE + 1, 1, _BESIDE)[:, 0].reshape(-1) == 0
        if not bool((changed & near).any()):
            yield layout
