"""scripts/campaigns: what a case may do to the harness, each told as the fault that it is."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest

from gptq_plugin.errors import CheckpointError

from paths import REPOSITORY


@pytest.fixture(autouse=True)
def scripts(monkeypatch):
    """scripts/campaigns importable."""
    monkeypatch.syspath_prepend(REPOSITORY / "scripts")


def ends(attack, tmp_path, cases=1, **limits):
    """What became of the cases."""
    from campaigns.campaign import Campaign
    from campaigns.processes import run

    campaign = Campaign("", cases, cases, lambda seed, count: range(count), attack, **limits)
    return sorted(run(campaign, iter(enumerate(range(cases))), 2, tmp_path), key=lambda case: case.number)


def raises(error):
    def run():
        raise error

    return run


@pytest.mark.parametrize(
    ("run", "kind", "text"),
    [
        (lambda: None, "ok", ""),
        (raises(CheckpointError("x.json: bits")), "refused", "x.json: bits"),
        (raises(ValueError("x")), "fault", "not ours: ValueError"),
        (raises(SystemExit(0)), "fault", "try: its process ended with 1"),
        (lambda: os._exit(0), "fault", "its process ended before the case did"),
        (lambda: os.kill(os.getpid(), signal.SIGSEGV), "fault", f"its process ended with {-signal.SIGSEGV}"),
        (lambda: bytearray(3 << 30), "fault", "not ours: MemoryError"),
    ],
)
def test_an_attempt_is_ok_or_refused_by_an_error_of_ours_or_a_fault(run, kind, text, tmp_path):
    (case,) = ends(lambda case, _: case.attempt("try", run), tmp_path)
    (outcome,) = case.outcomes
    assert outcome.kind == kind and text in f"{outcome.attempt}: {outcome.text}"
    assert bool(case.faults) == (kind == "fault")


def test_a_hang_is_ended_and_shows_where_it_hung(tmp_path):
    def hang(case, number):
        case.is_of(f"number {number}")
        case.attempt("quick", lambda: None)
        case.attempt("slow", lambda: time.sleep(100 * number))

    start = time.monotonic()
    quick, slow = ends(hang, tmp_path, cases=2, seconds=1.5)
    assert time.monotonic() - start < 10
    assert [one.kind for one in quick.outcomes] == ["ok", "ok"]
    assert slow.what == "number 1" and [one.kind for one in slow.outcomes] == ["ok", "fault"]
    assert slow.outcomes[1].attempt == "slow"
    assert "took more than 1.5 s" in slow.outcomes[1].text and "test_harness.py" in slow.outcomes[1].text


def test_an_exception_of_python_is_a_refusal_only_where_this_package_raises_it():
    from campaigns.campaign import own_error

    from gptq_plugin import QuantizeConfig
    from gptq_plugin.options.rules import rule_regex

    refusals = {}
    for name, run in {"raised": lambda: QuantizeConfig(bits=5), "happened": lambda: rule_regex(3)}.items():
        try:
            run()
        except Exception as error:
            refusals[name] = own_error(error)
    assert refusals == {"raised": "", "happened": "not ours"}


def test_a_case_that_touches_what_is_not_its_own_is_seen(tmp_path):
    from campaigns.campaign import Wrong
    from campaigns.watch import nothing_outside, untouched

    inside, outside, secret = (tmp_path / name for name in ("inside", "outside", "secret"))
    for folder in (inside, outside, secret):
        folder.mkdir()
        (folder / "file").write_text("content")
    (inside / "link").symlink_to(outside)
    deeds = {
        "opened": lambda: (outside / "new").write_text("x"),
        "link": lambda: (inside / "link" / "other").write_text("x"),
        "os.chmod": lambda: (outside / "file").chmod(0o600),
        "os.rename": lambda: (outside / "file").rename(inside / "moved"),
        "subprocess.Popen": lambda: os.popen("true").close(),
        "read": lambda: (secret / "file").read_text(),
    }
    for word, deed in deeds.items():
        with pytest.raises(Wrong, match=word), nothing_outside(inside, secret=secret):
            deed()
    with nothing_outside(inside, secret=secret):
        (inside / "file").write_text("y")
        (outside / "other").read_text()
    with pytest.raises(Wrong, match="changed in inside: file"), untouched(inside):
        (inside / "file").write_text("z")


def test_cases_of_a_seed_do_not_depend_on_their_number():
    from campaigns.examples import examples, randoms
    from hypothesis import strategies as st

    strategy = st.dictionaries(st.text(max_size=3), st.integers())
    many = list(examples([strategy, st.just(3)], 5, 30))
    assert len(many) == 30 and many[:13] == list(examples([strategy, st.just(3)], 5, 13))
    assert many[1::2] == [3] * 15 and len({str(one) for one in many[::2]}) > 10
    assert many != list(examples([strategy, st.just(3)], 6, 30))
    assert [r.random() for r in randoms(5, 3)] == [r.random() for r in randoms(5, 9)][:3]


def test_rows_of_a_page_are_replaced_by_name_and_the_others_stay(tmp_path):
    from campaigns.campaign import Outcome
    from campaigns.processes import Ended
    from campaigns.table import Result, into_page, table

    page = tmp_path / "page.md"
    first, second = Result("one", "files", 3, "abc"), Result("two", "kills", 4, "abc")
    page.write_text("# Title\n\n" + table([]) + "\n\nAfter.\n")
    first.add(Ended(0, "case", [Outcome("load", "ok"), Outcome("check", "fault", "x")]))
    into_page(page, [first.row, second.row])
    assert "| one | files | 1 | 2 | 1 | 0 | 1 |" in page.read_text()
    first.add(Ended(1, "case", [Outcome("load", "refused")]))
    into_page(page, [first.row])
    text = page.read_text()
    assert text.count("| one |") == text.count("| two |") == 1 and "| one | files | 2 | 3 | 1 | 1 | 1 |" in text
    assert text.startswith("# Title\n") and text.endswith("\n\nAfter.\n")


def test_nothing_is_told_twice_or_lost_where_lines_come_in_pieces(tmp_path):
    text = "é" * 100_000

    def long(case, _):
        case.is_of(text)
        case.attempt("try", raises(CheckpointError(text)))

    (case,) = ends(long, tmp_path)
    assert case.what == text and [json.loads(json.dumps(one.text)) for one in case.outcomes] == [text]


def test_a_case_has_a_folder_of_its_own_that_does_not_stay(tmp_path):
    def write(case, number):
        Path("here").write_text(str(number))
        case.attempt("try", raises(CheckpointError(",".join(sorted(os.listdir(case.folder))))))

    cases = ends(write, tmp_path, cases=3)
    assert [case.outcomes[0].text for case in cases] == ["here"] * 3
    assert not list(tmp_path.iterdir())
