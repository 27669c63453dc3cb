"""The choices between which a measurement decides, a dozen at most: `candidates`."""

from __future__ import annotations

import itertools

import torch

from .choice import Choice, Gpu
from .layout import Layout
from .registry import KERNELS, fits
from .rule import by_rule

MOST = 12


def candidates(layout: Layout, rows: int, dtype: torch.dtype, gpu: Gpu) -> list[Choice]:
    """The rule's choice first, then those near it, of every kernel in turn; no more than `MOST`."""
    found = {by_rule(layout, rows, dtype, gpu): None}  # a set in order
    near = [
        [Choice.of(name, **options) for options in kernel.near(layout, rows, dtype, gpu)]
        for name, kernel in KERNELS.items()
    ]
    for choice in itertools.chain.from_iterable(itertools.zip_longest(*near)):
        if choice is not None and len(found) < MOST and fits(choice, layout, rows, dtype, gpu):
            found.setdefault(choice)
    return list(found)
