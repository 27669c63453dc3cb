"""Kinds of layers, by their names."""

from __future__ import annotations

import pytest

from gptq_plugin.walk.kinds import kind_of


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("model.layers.11.mlp.up_proj", "model.layers.*.mlp.up_proj"),
        ("layers.0.experts.3.w1", "layers.*.experts.*.w1"),
        ("0", "*"),
        ("conv2d.fc1", "conv2d.fc1"),
    ],
)
def test_a_kind_is_a_name_without_its_places_numbers(name: str, kind: str) -> None:
    assert kind_of(name) == kind
