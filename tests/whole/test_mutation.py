"""scripts/mutate.py: which mutants it makes, and that tests meet the mutated module."""

from __future__ import annotations

import sys
import threading
from types import SimpleNamespace

import pytest

from paths import REPOSITORY

pytest.importorskip("mutmut")

SOURCE = '''"""A module."""
Kind = list[int]; log = logging.getLogger(__name__)
LIMIT = 3
def f(x: int, device=None):
    """Text."""
    log("a message of words", x)
    if x:
        raise ValueError("no", x)
    y = x + 1 if x.is_cuda and x > 2 else x
    return dict(zip(y, y, strict=True))
class C:
    def __repr__(self):
        return "C"
    def g(self):
        log.debug("%s", self)
'''


@pytest.fixture
def scripts(monkeypatch):
    """scripts/mutation importable; its modules are forgotten afterwards, as their names are common ones."""
    monkeypatch.syspath_prepend(REPOSITORY / "scripts" / "mutation")
    yield
    for name in ("mutants", "report", "runner", "targets"):
        sys.modules.pop(name, None)


def test_what_cannot_matter_is_not_mutated_and_all_else_is(scripts):
    from mutants import mutants_of

    changes = [mutant.described() for mutant in mutants_of(SOURCE) if mutant.source()]
    assert sorted(changes) == [
        (2, "module: Kind = list[int]; log = {logging.getLogger(__name__) -> None}"),
        (3, "module: LIMIT = {3 -> 4}"),
        (3, "module: LIMIT = {3 -> None}"),
        (6, 'f: log("a message of words", {x -> None})'),
        (6, 'f: log("a message of words", {x -> })'),
        (6, 'f: log({"a message of words" -> None}, x)'),
        (6, 'f: log({"a message of words", x -> x})'),
        (6, 'f: {log("a message of words", x) -> pass}'),
        (7, "f: if {x -> not (x)}:"),
        (9, "f: y = {x + 1 if x.is_cuda and x > 2 else x -> None}"),
        (10, "f: return dict(zip(y, {y -> None}, strict=True))"),
        (10, "f: return dict(zip(y, {y, strict -> strict}=True))"),
        (10, "f: return dict(zip(y, {y, strict -> strict}=True))"),
        (10, "f: return dict(zip({y -> None}, y, strict=True))"),
        (10, "f: return dict({zip(y, y, strict=True) -> None})"),
    ]


def test_a_change_meets_the_tests_that_call_its_function_and_those_that_nobody_saw_calling(scripts):
    from runner import Baseline

    before = Baseline(
        1.0, {"calls_another": 2.0}, {"calls": {"f", "g"}, "calls_another": {"g"}, "starts_a_process": set()}
    )
    assert before.tests_of("C.f") == {"calls", "starts_a_process"}
    assert before.tests_of("C.f.g") == {"calls", "calls_another", "starts_a_process"}
    assert before.tests_of("C.f.g", longest=1.5) == {"calls", "starts_a_process"}
    assert before.tests_of("") == before.tests_of("C") == {"calls", "calls_another", "starts_a_process"}


def test_a_test_is_seen_calling_functions_in_threads_of_its_own(scripts):
    from runner import _Entered

    def work() -> None:
        names.append("called")

    names: list[str] = []
    entered = _Entered(__file__)
    protocol = entered.pytest_runtest_protocol(SimpleNamespace(nodeid="test"))
    next(protocol)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    with pytest.raises(StopIteration):
        next(protocol)
    assert names == ["called"] and entered.recorded == {"test": ["work"]}
