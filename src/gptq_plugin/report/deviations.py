"""Deviations that many layers share, as one line with a count: `grouped`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from gptq_plugin.errors import some

# A number by itself: not a part of a name such as layers.3.q_proj or float16.
_NUMBER = re.compile(r"(?<![\w.])\d+(?:[.,]\d+)*(?:e[+-]?\d+)?(?!\w|[.-]\w)")


@dataclass(frozen=True)
class Deviation:
    """A difference from the request, of the layers that share it.

    Attributes:
        text: A sentence; a number that is not the same in all layers is a range in it.
        modules: The layers' names; empty if it concerns no single one.
    """

    text: str
    modules: tuple[str, ...] = ()

    @property
    def line(self) -> str:
        """The sentence after the layer's name, or after the number of layers and the first names."""
        if not self.modules:
            return self.text
        several = f"{len(self.modules)} layers ({some(self.modules)})"
        return f"{self.modules[0] if len(self.modules) == 1 else several}: {self.text}"


def grouped(general: Iterable[str], by_module: Mapping[str, Sequence[str]]) -> list[Deviation]:
    """One of each kind, those of no single module first: sentences are of one kind if they differ in numbers only.

    Args:
        general: Deviations of no single module. One that begins with a module's name and a colon is that module's.
        by_module: Every module's deviations, by its name.
    """
    alone: dict[str, None] = {}
    kinds: dict[str, list[tuple[str, str]]] = {}
    for text in general:
        name, colon, rest = text.partition(": ")
        if colon and name in by_module:
            kinds.setdefault(_NUMBER.sub("#", rest), []).append((name, rest))
        else:
            alone[text] = None
    for name, texts in by_module.items():
        for text in texts:
            kinds.setdefault(_NUMBER.sub("#", text), []).append((name, text))
    return [*map(Deviation, alone), *map(_of_one_kind, kinds.values())]


def _of_one_kind(members: Sequence[tuple[str, str]]) -> Deviation:
    texts = [text for _, text in members]
    numbers = iter([_range(column) for column in zip(*map(_NUMBER.findall, texts), strict=True)])
    return Deviation(_NUMBER.sub(lambda _: next(numbers), texts[0]), tuple(dict.fromkeys(name for name, _ in members)))


def _range(numbers: Sequence[str]) -> str:
    ordered = sorted(set(numbers), key=lambda number: float(number.replace(",", "")))
    return ordered[0] if len(ordered) == 1 else f"{ordered[0]} to {ordered[-1]}"
