"""Regular expressions of strangers: what Python's `re.match` finds, in little time whatever they are."""

from __future__ import annotations

import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptq_plugin.options import expressions
from gptq_plugin.options.expressions import check_expression, matches

NAME = "model.layers.11.self_attn.q_proj" + "a" * 40

_LEAVES = st.sampled_from(
    ["a", "b", ".", r"\.", "[ab]", "[^a]", r"\d", r"\w", "^", "$", r"\b", r"\B", r"\Z", "A", "", "ab.", "(?i:A)"]
)
_TIMES = ["*", "+", "?", "{2}", "{1,2}", "{2,}", "*?", "{0,3}?"]
_WRAPS = [("(", f"){times}") for times in _TIMES] + [
    (look, ")") for look in ("(?=", "(?!", "(?<=", "(?<!", "(?s:", "(?m:")
]


def _wrapped(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    return st.one_of(
        st.tuples(inner, inner).map("".join),
        st.tuples(inner, inner).map(lambda two: f"(?:{two[0]}|{two[1]})"),
        st.tuples(st.sampled_from(_WRAPS), inner).map(lambda two: two[1].join(two[0])),
    )


@settings(deadline=None, max_examples=200)
@given(st.recursive(_LEAVES, _wrapped, max_leaves=8), st.text("abA.1\n", max_size=8))
def test_every_expression_matches_what_it_matches_in_python(expression: str, name: str) -> None:
    try:
        expected = re.match(expression, name) is not None
    except re.error:  # what is behind has no fixed width
        return
    assert matches(expression, name) == expected
    stepwise = expressions._Walk(expression, name).after(expressions._parsed_wholly(expression).parts, 1)
    assert bool(stepwise) == expected, "by the positions that its parts reach"


@pytest.mark.parametrize(
    "expression",
    [
        r"(a+)+!",
        r"(.*a+)+b",
        r"(.*a)*(.*a)*(.*)*!",
        ".*" * 12 + "!",
        "(?:a|a)*" * 20 + "!",
        "(?:a|.)" * 40 + "(?:a|.)*!",
        "(?:.{0,1000000}){0,1000000}!",
        "((((.{1,300}){1,300}){1,300}){1,300})!",
        "(?:" * 40 + "." + "{0,9})" * 40 + "!",
        r"(?=(.*a)*!)x|(.*.*.*)*!",
    ],
)
def test_no_expression_takes_long(expression: str) -> None:
    start = time.process_time()
    assert not matches(expression, NAME)
    assert time.process_time() - start < 1


@pytest.mark.parametrize(
    "expression", [".*" * 20_000 + "!", "(?=.*)" * 5000 + "!", "(?=.*" * 40 + "!" + ")" * 40, "(?:.|a)*" * 5000 + "!"]
)
def test_an_expression_that_takes_too_many_steps_is_refused_by_its_text_and_the_name(expression: str) -> None:
    check_expression(expression)
    start = time.process_time()
    with pytest.raises(ValueError, match=r"\(str\) takes more than 500,000 steps to be matched with 'model\.x\.x"):
        matches(expression, "model" + ".x" * 490)
    assert time.process_time() - start < 5


@settings(deadline=None, max_examples=200)
@given(
    st.text("ab._-/$^\\\n éß1*(", max_size=5),
    st.sampled_from(["", "$"]),
    st.text("ab._-/$\\\n éß1*(", max_size=5),
)
def test_an_escaped_name_is_matched_as_python_does_without_being_parsed(letters: str, end: str, other: str) -> None:
    expression = re.escape(letters) + end
    assert expressions.is_name(expression)
    for name in (letters, letters + other, letters + "\n", other):
        assert matches(expression, name) == (re.match(expression, name) is not None)
    assert expressions.literal_beginning(expression) == letters


@pytest.mark.parametrize("expression", ["a.b", r"a\d", r"\1", "a*", "(a)", "a|b", "[a]", "a$b", r"\Z", "a$$", "{1}"])
def test_what_is_no_escaped_name_is_parsed(expression: str) -> None:
    assert not expressions.is_name(expression)


@pytest.mark.parametrize(
    ("expression", "because"),
    [
        ("(", "is not a regular expression: missing"),
        (r"(a)\1", "groups that are referred to"),
        (r"(a)?(?(1)b|c)", "groups that are referred to"),
        ("(" * 200 + ")" * 200, "nested too deeply"),
        ("(" * 3000 + ")" * 3000, "nested too deeply"),
        ("a{99999999999999999999}", "repetition number is too large"),
    ],
)
def test_what_cannot_be_matched_is_refused(expression: str, because: str) -> None:
    with pytest.raises(ValueError, match=re.escape(because)):
        check_expression(expression)


@pytest.mark.parametrize(
    ("expression", "name", "found"),
    [
        (r"^(?!.*(lm_head|visual)).*(q|k|v)_proj$", "model.layers.1.self_attn.q_proj", True),
        (r"^(?!.*(lm_head|visual)).*(q|k|v)_proj$", "visual.layers.1.self_attn.q_proj", False),
        (r".*layers\.\d+\..*(gate|up)_proj.*", "model.layers.11.mlp.experts.3.gate_proj", True),
        (r".*layers\.\d+\..*(gate|up)_proj.*", "model.layers.11.mlp.experts.3.down_proj", False),
        (r"model\.layers\.\d+\.mlp\.experts(\..*)?$", "model.layers.0.mlp.experts.7.up_proj", True),
    ],
)
def test_expressions_of_published_checkpoints_match(expression: str, name: str, found: bool) -> None:
    assert matches(expression, name) is found
