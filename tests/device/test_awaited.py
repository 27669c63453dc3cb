"""Operations on GPUs that wait for a lost rank are ended, and no others; events are stand-ins, the store is real."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from types import SimpleNamespace

import pytest
import torch.distributed as dist

from gptq_plugin import check_ins
from gptq_plugin.device import awaited
from gptq_plugin.device.awaited import Awaited
from gptq_plugin.errors import RankError

from forked_python import python

KEYS = ("beat/0", "beat/1")


class Event:
    """An event on a GPU that is reached when it has been asked for so often."""

    def __init__(self, asked):
        self.left = asked

    def query(self):
        self.left -= 1
        return self.left < 0


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(awaited, "BEAT", 0.05)
    monkeypatch.setattr(awaited, "PATIENCE", 0.3)


@pytest.fixture
def store():
    return dist.HashStore()


@pytest.fixture
def made(store):
    """Makes the object of a rank, with a list that tells whether it aborted; all are stopped in the end."""
    every = []

    def make(rank, of=store):
        done = []
        every.append(Awaited(of, KEYS, rank, lambda: done.append("aborted")))
        return every[-1], done

    yield make
    for one in every:
        one.stop()


@pytest.mark.parametrize(("asked", "aborted"), [(0, []), (3, []), (10**9, ["aborted"])])
def test_what_waits_once_a_rank_is_known_to_be_lost_is_aborted_and_nothing_else(asked, aborted, made, monkeypatch):
    mine, done = made(0)
    monkeypatch.setattr(check_ins, "_check_ins", SimpleNamespace(awaited=mine))
    monkeypatch.setattr(check_ins, "_exchange", lambda *_: (_ for _ in ()).throw(RankError("rank 3 failed")))
    monkeypatch.setattr(awaited, "MISSED", 10**9)
    mine.queued(Event(asked))
    for _ in range(2):  # once is enough
        with pytest.raises(RankError, match="rank 3 failed"):
            check_ins.check_in("sum")
    assert done == aborted


def test_an_operation_that_has_ended_is_not_asked_for_again(made):
    """That would break a CUDA graph that another thread captures."""
    mine, _ = made(0)
    made(1)
    event = Event(2)
    mine.queued(event)
    _until(lambda: event.left < 0)
    time.sleep(5 * awaited.BEAT)
    assert event.left == -1


def test_an_operation_that_waits_for_a_rank_without_a_sign_of_life_is_aborted_with_its_number(made, caplog):
    mine, done = made(0)
    made(1)  # counts no further
    mine.queued(Event(10**9))
    time.sleep(awaited.BEAT * (awaited.MISSED - 5))
    assert not done
    _until(lambda: done)
    assert "waits for rank 1, which gave no sign of life" in caplog.text
    time.sleep(awaited.BEAT * awaited.MISSED)
    assert done == ["aborted"]


def test_a_rank_that_lives_gives_another_sign_each_time_though_nothing_waits(made):
    (mine, _), (other, done) = made(0), made(1)
    other.queued(Event(10**9))
    before = other.sign_of(0)
    assert other.sign_of(0) == before
    mine.live()
    _until(lambda: other.sign_of(0) not in (before, b"1"))
    time.sleep(1.5 * awaited.BEAT * awaited.MISSED)
    assert done == []


def test_ranks_that_are_alive_wait_for_each_other_as_long_as_it_takes(made):
    of_ranks = [made(rank) for rank in (0, 1)]
    for one, _ in of_ranks:
        one.queued(Event(10**9))
    time.sleep(3 * awaited.BEAT * awaited.MISSED)
    assert [done for _, done in of_ranks] == [[], []]


def test_a_rank_that_counts_no_further_is_no_matter_while_nothing_waits(made):
    mine, done = made(0)
    made(1)
    for _ in range(3):
        mine.queued(Event(0))
        time.sleep(awaited.BEAT * awaited.MISSED / 2)
    assert done == []


def test_a_store_that_is_gone_with_rank_0_ends_what_waits(made, store):
    class Gone:
        def __init__(self):
            self.calls = 0

        def clone(self):
            return self

        def set(self, *_):
            self.calls += 1
            if self.calls > 1:
                raise RuntimeError("Connection reset by peer")

    mine, done = made(1, Gone())
    mine.queued(Event(10**9))
    _until(lambda: done)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_a_killed_process_is_missed_over_tcp(made, tmp_path):
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    (tmp_path / "other.py").write_text(
        "import sys, time\nimport torch.distributed as dist\nfrom gptq_plugin.device import awaited\n"
        "awaited.BEAT = 0.05\n"
        "store = dist.TCPStore('127.0.0.1', int(sys.argv[1]), is_master=False)\n"
        "one = awaited.Awaited(store, ('beat/0', 'beat/1'), 1, lambda: None)\n"
        "class Event:\n    def query(self): return False\n"
        "one.queued(Event())\nprint('here', flush=True)\ntime.sleep(60)\n"
    )
    other = subprocess.Popen([python(), tmp_path / "other.py", str(server.port)], stdout=subprocess.PIPE)
    assert other.stdout is not None and other.stdout.readline() == b"here\n"
    mine, done = made(0, server)
    mine.queued(Event(10**9))
    time.sleep(2 * awaited.BEAT * awaited.MISSED)
    assert not done
    other.send_signal(signal.SIGKILL)
    _until(lambda: done)
    other.wait()


def _until(what, seconds=20):
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.01)
