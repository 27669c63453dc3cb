"""Many expressions and many names: what each matches is what `re.match` finds, and the time is limited."""

from __future__ import annotations

import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptq_plugin.options import expression_table
from gptq_plugin.options.expression_table import ExpressionTable
from gptq_plugin.options.expressions import literal_beginning
from gptq_plugin.options.rules import matching_rules

_PIECES = st.sampled_from(["a", "b", r"\.", "^", "(?:ab)", "(?i:a)", ".*", "a?", "[ab]", "$", "(?=a)", "b{2}"])
_EXPRESSIONS = st.lists(_PIECES, max_size=5).map("".join) | st.sampled_from(["(?i)AB", "(?x) a b", "a|b", ""])


@settings(deadline=None, max_examples=150)
@given(st.lists(_EXPRESSIONS, max_size=6), st.lists(st.text("abAB.", max_size=6), max_size=4))
def test_each_name_is_matched_by_those_that_match_it_in_python_in_their_order(expressions, names):
    table = ExpressionTable(expressions, "rules")
    for name in [*names, *names]:
        assert table.matching(name) == [i for i, one in enumerate(expressions) if re.match(one, name)]


@pytest.mark.parametrize(
    ("expression", "beginning"),
    [
        (r"model\.layers\.3\.up$", "model.layers.3.up"), ("^lm_head", "lm_head"), ("a*", ""), ("ab?c", "a"),
        ("(?i)layers", ""), ("a|b", ""), ("(ab)c", ""), (".*x", ""), ("(?x) a b", "ab"),
    ],
)  # fmt: skip
def test_an_expression_is_tried_only_with_names_that_begin_as_it_does(expression, beginning, monkeypatch):
    assert literal_beginning(expression) == beginning
    tried = []
    monkeypatch.setattr(expression_table, "matches", lambda one, name: bool(tried.append(one)))
    table = ExpressionTable([expression], "rules")
    table.matching("zz")
    assert bool(tried) == (not beginning)
    table.matching(beginning + "zz")
    assert tried


def test_an_expression_that_cannot_be_matched_with_any_of_many_names_takes_its_time_once(monkeypatch):
    monkeypatch.setattr(expression_table, "_SECONDS", 0.05)
    table = ExpressionTable([".*" * 10_000 + "!"], "rules")
    with pytest.raises(ValueError, match="takes more than 500,000 steps"):
        table.matching("model.layers.0.mlp.experts.0.gate_up_proj.weight.a.b")
    with pytest.raises(ValueError, match="rules: 1 expressions take more than"):
        table.matching("model.layers.0.mlp.experts.1.gate_up_proj.weight.a.b")


def test_ten_thousand_exact_rules_for_ten_thousand_layers_take_seconds():
    names = [f"model.layers.{i // 100}.mlp.experts.{i % 100}.up_proj" for i in range(3000)]
    rules = [re.escape(name) + "$" for name in names]
    start = time.process_time()
    table = ExpressionTable(rules, "dynamic")
    assert [table.matching(name) for name in names] == [[i] for i in range(3000)]
    assert time.process_time() - start < 5


def test_rules_that_take_too_long_for_all_names_together_are_refused(monkeypatch):
    monkeypatch.setattr(expression_table, "_SECONDS", 0.05)
    rules = [f"(.*a)+{i}b" for i in range(500)]
    start = time.process_time()
    with pytest.raises(ValueError, match=r"dynamic: 500 expressions take more than"):
        for i in range(1000):
            matching_rules(rules, f"a.layer.{i}" * 3)
    assert time.process_time() - start < 3
    with pytest.raises(ValueError, match="dynamic"):  # and at once the next time
        matching_rules(rules, "another")
