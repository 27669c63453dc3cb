"""Generated texts that were edited by hand and are generated again."""

from __future__ import annotations

import pytest

from gptq_plugin.report.merged_text import merged

BEFORE = "title\n\n4 bits, 10 MB\n\n## License\n\nunknown\n\n## Load\n\nwith gptq\n"
AFTER = BEFORE.replace("10 MB", "9 MB").replace("with gptq", "first this\nwith vllm")


def test_what_nobody_edited_is_the_new_text():
    assert merged(BEFORE, BEFORE, AFTER) == (AFTER, [])
    assert merged(BEFORE, BEFORE, BEFORE) == (BEFORE, [])


@pytest.mark.parametrize(
    ("own", "edit"),
    [
        ("license changed", lambda text: text.replace("unknown", "mit\n\nSee LICENSE.")),
        ("beginning", lambda text: f"my words\n\n{text}"),
        ("end", lambda text: f"{text}\n## Contact\n\nme\n"),
        ("before a generated line", lambda text: text.replace("4 bits", "mine:\n4 bits")),
        ("section deleted", lambda text: text.replace("## License\n\nunknown\n\n", "")),
        ("everything", lambda text: f"a\n{text.replace('title', 'My model')}b\n"),
    ],
)
def test_what_a_person_changed_elsewhere_stays_beside_what_is_new(own, edit):
    assert merged(BEFORE, edit(BEFORE), AFTER) == (edit(AFTER), []), own


def test_where_both_changed_a_line_the_persons_stays_and_the_new_one_is_returned():
    edited = BEFORE.replace("10 MB", "ten megabytes")
    assert merged(BEFORE, edited, AFTER) == (AFTER.replace("9 MB", "ten megabytes"), ["4 bits, 9 MB"])


def test_a_place_that_a_person_deleted_stays_so_without_a_word():
    edited = BEFORE.replace("## Load\n\nwith gptq\n", "")
    text, lost = merged(BEFORE, edited, AFTER)
    assert "vllm" not in text and "gptq" not in text and "9 MB" in text and lost == []


def test_an_insertion_into_lines_that_are_replaced_is_kept_in_their_place():
    before, after = "a\nb\nc\n", "a2\nb2\nc2\n"
    assert merged(before, "a\nmine\nb\nc\n", after) == ("a\nmine\nb\nc\n", ["a2", "b2", "c2"])
    assert merged(before, "a\nb\nc\nmine\n", after) == ("a2\nb2\nc2\nmine\n", [])


def test_a_text_of_somebody_else_stays_as_it_is():
    assert merged(BEFORE, "something\nelse\n", AFTER)[0] == "something\nelse\n"
