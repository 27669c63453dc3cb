"""The option most like a name."""

from __future__ import annotations

from gptq_plugin.apps.nearest_option import nearest


def test_nearest_prefers_the_same_name_elsewhere_then_what_is_alike():
    tree = {"a": {"size": 1, "seed": 2}, "b": {"seed": 3, "length": {"limit": 4}}, "_target_": "x"}
    assert nearest("b.siz", tree) is None and nearest("size", tree) == "a.size"
    assert nearest("b.c.seed", tree) == "b.seed" and nearest("b.lenght.limt", tree) == "b.length.limit"
    assert nearest("q.limt", tree) == "b.length.limit" and nearest("q.nothing", tree) is None
