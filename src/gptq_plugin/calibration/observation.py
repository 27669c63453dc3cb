"""Observes in one batch which rows of each layer's input belong to padding, by changing what stands there.

A padded position is one that does not matter. So the batch runs several times, side by side: twice as it is, and once
for each mask with something else at the positions it hides. Rows that change belong to hidden positions, in whatever
layout the layer has them. If hidden positions did matter, other rows would change too (`verdicts`).

Tested by tests/calibration/test_observing.py: what changes is shown by the forwards of real models.
"""

from __future__ import annotations

import contextlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from gptq_plugin.calibration.layouts import fitting, within
from gptq_plugin.calibration.mask_calls import Key, MaskCalls, watch_calls, with_masks
from gptq_plugin.calibration.other_values import Embedded, other_floats, other_ids
from gptq_plugin.calibration.sequences import TARGETS, Sequence, sequences_in
from gptq_plugin.walk.batch_thread import Waiting
from gptq_plugin.walk.kept_state import KeptState
from gptq_plugin.walk.kinds import kind_of
from gptq_plugin.walk.side_by_side import side_by_side

_running: ContextVar[int | None] = ContextVar("number of the variant that runs on this thread", default=None)
_OF_A_KIND = 2
PLAIN, AGAIN = 0, 1  # numbers of the variants without a change


@dataclass(frozen=True)
class Variant:
    """What is changed in a run.

    Attributes:
        key: The mask at whose hidden positions something else stands.
        inverted: The mask is read the other way round.
        whole: All positions change.
    """

    key: Key
    inverted: bool = False
    whole: bool = False


@dataclass
class Call:
    """A layer's call in the plain run.

    Attributes:
        shape: Of its input, [..., width].
        changed: By the number of a variant, the rows that are others there, bool [rows]; None if it has other sizes.
        x: Until all variants were compared with it.
        is_still: By key, True if hidden rows are all the same, as where a model sets padding to 0, or None.
    """

    shape: torch.Size
    changed: dict[int, Tensor | None] = field(default_factory=dict)
    x: Tensor | None = None
    is_still: dict[Key, Tensor | None] = field(default_factory=dict)


class Observation:
    """Runs the variants of a batch, and keeps what changed.

    Args:
        model: The model.
        layers: Its layers to quantize by name.
        others: Further modules whose first floating argument is watched, by name: blocks of experts.
        keys: The masks, see `MaskCalls`.
        of_batch: Masks in the batch itself.
        ids: Change ids, where no `nn.Embedding` reads them.
        whole: Run all of the forward; else two layers of a kind, whose names differ in numbers, show the others.

    Attributes:
        variants: By number.
        sequences: Of the plain run, by key.
        calls: By layer, and call by call.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, nn.Module],
        others: Mapping[str, nn.Module],
        keys: Mapping[Key, bool],
        of_batch: Mapping[str, Tensor],
        ids: bool = False,
        whole: bool = True,
    ) -> None:
        self.variants = dict(enumerate(_variants(keys), start=AGAIN + 1))
        self.calls: dict[str, list[Call]] = defaultdict(list)
        self._model = model
        self._layers = layers
        self._others = others
        self._of_batch = of_batch
        self._ids = ids
        self._whole = whole
        self._masks = MaskCalls(of_batch)
        self._embedded = {number: Embedded() for number in self.variants}
        self._called: dict[int, Counter[str]] = defaultdict(Counter)
        self._kinds = Counter(map(kind_of, layers))
        self._tried: set[int] = set()  # variants with something to change

    @property
    def sequences(self) -> dict[Key, Sequence]:
        return self._masks.sequences

    def run(
        self, forward: Callable[[int], Any], waiting: Waiting | None = None, state: KeptState | None = None
    ) -> None:
        """Runs the variants side by side, until two layers of every kind were called if that is to do.

        Args:
            forward: Of the batch, called with the number of a variant.
            waiting: See `lockstep.walk`; called with the number of a variant.
            state: See `lockstep.walk`.

        Raises:
            Exception: That of the forward.
        """

        def numbered(number: int) -> Callable[[], Any]:
            def run() -> Any:
                _running.set(number)
                return forward(number)

            return run

        numbers = (PLAIN, AGAIN, *self.variants)
        modules = dict(self._model.named_modules())
        with contextlib.ExitStack() as hooks:
            hooks.enter_context(watch_calls(modules, self._visit))
            hooks.enter_context(self._embeddings_watched())
            hooks.enter_context(self._others_watched())
            forwards = {number: numbered(number) for number in numbers}
            side_by_side(self._layers, forwards, self._compare, waiting, state, self._is_enough)
        for call in (call for of_layer in self.calls.values() for call in of_layer):
            call.changed = {n: None if rows is None else rows.cpu() for n, rows in call.changed.items()}

    def number(self, key: Key, *, inverted: bool = False, whole: bool = False) -> int | None:
        """The number of a variant."""
        return next((n for n, variant in self.variants.items() if variant == Variant(key, inverted, whole)), None)

    def responds(self) -> bool:
        """True if something changed in every variant that was to change something."""
        calls = [call for of_layer in self.calls.values() for call in of_layer]
        changed = {n for call in calls for n, rows in call.changed.items() if rows is not None and bool(rows.any())}
        return self._tried <= changed

    def _is_enough(self) -> bool:
        if self._whole or any(variant.inverted for variant in self.variants.values()):  # outputs may have to tell
            return False
        called = Counter(map(kind_of, self.calls))
        return all(called[kind] >= min(_OF_A_KIND, count) for kind, count in self._kinds.items())

    def _visit(self, name: str, module: nn.Module, arguments: dict[str, Tensor]) -> dict[int, Tensor]:
        number = _running.get()
        if number == PLAIN:
            self._masks.visit(name, module, arguments)
        variant = self.variants.get(number) if number is not None else None
        if variant is None or variant.key[0] != name or number is None:
            return {}
        mask = variant.key[1]
        sequences = sequences_in(module, with_masks(arguments, self._of_batch), {mask} if variant.inverted else ())
        return self._changed(sequences[mask], variant, number) if mask in sequences else {}

    def _changed(self, sequence: Sequence, variant: Variant, number: int) -> dict[int, Tensor]:
        """Other values for the arguments, by `id`."""
        hidden = torch.ones_like(sequence.kept) if variant.whole else ~sequence.kept
        hidden = hidden & moved_samples(hidden)[:, None]
        replaced: dict[int, Tensor] = {}
        for content in sequence.contents:
            chosen = within(hidden, content)
            if chosen is None or not bool(chosen.any()):
                continue
            chosen = chosen.to(content.device)
            self._tried.add(number)
            if content.is_floating_point():
                replaced[id(content)] = other_floats(content, chosen)
            elif sequence.is_labels:
                replaced[id(content)] = other_ids(content, chosen, content[content >= 0])
            elif self._ids:
                replaced[id(content)] = other_ids(content, chosen, content if variant.whole else content[~chosen])
            else:
                self._embedded[number].add(content, chosen)
        return replaced

    def _compare(self, number: int, name: str, x: Tensor) -> None:
        """Takes in a layer's input in a variant; the plain run's comes first."""
        if number == PLAIN:
            call = Call(x.shape, x=x.detach())
            for key, sequence in self.sequences.items():
                call.is_still[key] = _is_still(x, sequence.kept)
            self.calls[name].append(call)
            return
        position = self._called[number][name]
        self._called[number][name] += 1
        if position < len(self.calls[name]):
            call = self.calls[name][position]
            if call.x is not None:
                call.changed[number] = _changed_rows(x, call.x) if x.shape == call.shape else None
            if len(call.changed) == len(self.variants) + 1:
                call.x = None

    @contextlib.contextmanager
    def _others_watched(self) -> Iterator[None]:
        """Compares inputs of further modules, and outputs of modules whose masks no documentation explains."""
        with contextlib.ExitStack() as hooks:
            for name, module in self._others.items():

                def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], name: str = name) -> None:
                    self._compare_other(name, (*args, *kwargs.values()))

                hooks.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
            for name in {variant.key[0] for variant in self.variants.values() if variant.inverted}:

                def after(_: nn.Module, __: Any, out: Any, name: str = name) -> None:
                    self._compare_other(f"{name}()", tree_leaves(out))

                hooks.callback(self._model.get_submodule(name).register_forward_hook(after).remove)
            yield

    def _compare_other(self, name: str, values: Iterable[Any]) -> None:
        x = next((v for v in values if isinstance(v, Tensor) and v.is_floating_point() and v.dim() > 1), None)
        number = _running.get()
        if x is not None and number is not None:
            self._compare(number, name, x)

    @contextlib.contextmanager
    def _embeddings_watched(self) -> Iterator[None]:
        def after(_: nn.Module, args: tuple[Any, ...], out: Any) -> Tensor | None:
            embedded = self._embedded.get(_running.get())  # type: ignore[arg-type]
            if embedded is None or not args or not isinstance(out, Tensor):
                return None
            return embedded.changed(args[0], out)

        embeddings = [module for module in self._model.modules() if isinstance(module, nn.Embedding)]
        handles = [module.register_forward_hook(after) for module in embeddings]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def moved_samples(hidden: Tensor) -> Tensor:
    """The samples in which something changes, bool [samples]: those with hidden positions but for one, unless there is
    no other. That one shows if samples change one another. It has nothing but hidden positions, or fewest."""
    moved, count = hidden.any(1), hidden.sum(1)
    if len(moved) > 1:
        count = torch.where(hidden.all(1), -1, count)
        moved[len(moved) - 1 - int(count.flip(0).argmin())] = False
    return moved


def _variants(keys: Mapping[Key, bool]) -> Iterator[Variant]:
    """Variants for masks; for one whose sense is not documented (False), both senses."""
    for key, is_documented in keys.items():
        yield Variant(key)
        if key[1] == TARGETS:
            yield Variant(key, whole=True)
        if not is_documented:
            yield Variant(key, inverted=True)


def _changed_rows(x: Tensor, plain: Tensor) -> Tensor:
    """The rows that are others than in the plain run beyond rounding, bool [rows]."""
    width = max(1, x.shape[-1])
    now, was = (one.detach().reshape(-1, width).float().nan_to_num() for one in (x, plain))
    apart, size = (one.square().mean(-1).sqrt() for one in (now - was, was))
    rounding = torch.finfo(x.dtype).eps ** 0.5 if x.is_floating_point() else 0.0
    return apart > rounding * size


def _is_still(x: Tensor, kept: Tensor) -> Tensor | None:
    """True if the rows of hidden positions are all the same, as where a model sets padding to 0; None if none fits."""
    rows = x.detach().reshape(-1, x.shape[-1])
    for _, mask in fitting(kept.to(x.device), x.shape):
        first = rows[(~mask).int().argmax()]
        return ((rows == first).all(-1) | mask).all() & ~mask.all()
    return None
