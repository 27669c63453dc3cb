"""The page of what users of a stack expect names tests and scripts that are there."""

from __future__ import annotations

import re

from pages import DOCS
from paths import REPOSITORY

PAGE = DOCS / "reference" / "expected.md"


def test_every_row_of_what_is_here_names_tests_that_are_there():
    text, _, missing = PAGE.read_text().partition("## What is not here")
    rows = [line.split("|")[1:-1] for line in text.splitlines() if re.match(r"\| (?!expected|-)", line)]
    assert len(rows) > 20 and missing
    for expected, _, tests in rows:
        named = re.findall(r"`([\w./]+(?:\.py|\.sh|/))`", tests)
        assert named, expected
        for place in named:
            assert (REPOSITORY / "tests" / place).exists() or (REPOSITORY / place).exists(), place


def test_every_row_of_what_is_not_here_gives_a_reason():
    rows = [line.split("|")[1:-1] for line in PAGE.read_text().partition("## What is not here")[2].splitlines()]
    reasons = [row[1].strip() for row in rows if len(row) == 2 and not row[0].strip(" -").startswith("expected")]
    assert len(reasons) > 5 and all(len(reason) > 2 for reason in reasons)
