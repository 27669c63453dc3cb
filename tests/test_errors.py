"""Lists of names in messages."""

from __future__ import annotations

import pytest

from gptq_plugin.errors import brief, some


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
