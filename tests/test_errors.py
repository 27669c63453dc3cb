"""Lists of names in messages."""

from __future__ import annotations

import pytest

from gptq_plugin.errors import brief, lines, some


@pytest.mark.parametrize(
    ("names", "most", "text"),
    [
        ([], 4, ""),
        (["a"], 4, "a"),
        (["a", "b", "c", "d"], 4, "a, b, c, d"),
        (["a", "b", "c", "d", "e"], 4, "a, b, c, d and 1 more"),
        (["a", "b", "c"], 1, "a and 2 more"),
    ],
)
def test_a_long_list_ends_in_the_number_of_the_others(names: list[str], most: int, text: str) -> None:
    assert some(names, most) == some(iter(names), most) == text


def test_a_strangers_text_is_cut_in_a_message() -> None:
    assert brief("short") == "short" and brief(ValueError("x" * 1000)) == "x" * 600 + "…" and brief(10**30, 3) == "100…"


def test_problems_have_a_line_each_and_the_last_line_counts_the_others() -> None:
    assert lines(["a", "b"]) == "\n  a\n  b" and lines([]) == ""
    assert lines([str(i) for i in range(1000)], 2) == "\n  0\n  1\n  and 998 more like these"
