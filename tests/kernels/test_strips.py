"""Strips of a symmetric matrix lie one behind the other, each row up to the end of its strip."""

from __future__ import annotations

import pytest
import torch
from gptq_plugin.kernels.strips import Strips


@pytest.mark.parametrize(("n", "width", "shapes"), [(7, 3, [(3, 3), (3, 6), (1, 7)]), (4, 9, [(4, 4)]), (0, 3, [])])
def test_strips_are_views_of_all_entries(n, width, shapes):
    strips = Strips(n, width)
    flat = torch.zeros(2, strips.size)
    found = strips.of(flat)
    assert [tuple(strip.shape[1:]) for strip in found] == shapes
    assert [(stop - start, stop) for start, stop in strips.bounds] == shapes
    for number, strip in enumerate(found):
        strip += number + 1
    assert flat.all() and [float(flat[0].sum())] == [sum((k + 1) * a * b for k, (a, b) in enumerate(shapes))]
