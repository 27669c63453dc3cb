"""No walk leaves a thread behind."""

from __future__ import annotations

import pytest

from walks import threads_left


@pytest.fixture(autouse=True)
def nothing_is_left_behind():
    yield
    assert threads_left() == []
