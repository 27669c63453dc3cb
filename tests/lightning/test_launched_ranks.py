"""Processes that Lightning's launcher started end with a run that has lost one of them."""

from __future__ import annotations

import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher

from gptq_plugin import GPTQCallback, QuantizeModule
from gptq_plugin.errors import RankError
from gptq_plugin.lightning import launched_ranks


@pytest.fixture
def trainer():
    """With two processes of Lightning's launcher: one ends at once, and one hangs."""
    launcher = _SubprocessScriptLauncher(cluster_environment=None, num_processes=3, num_nodes=1)
    launcher.procs = [subprocess.Popen([sys.executable, "-c", code]) for code in ("", "import time; time.sleep(60)")]
    yield SimpleNamespace(strategy=SimpleNamespace(launcher=launcher))
    for process in launcher.procs:
        process.kill()
        process.wait()


def test_a_rank_that_hangs_is_killed_once_the_others_had_time_to_end(trainer, monkeypatch, caplog):
    monkeypatch.setattr(launched_ranks, "_GRACE", 1)
    callback, (ends, hangs) = GPTQCallback(QuantizeModule()), trainer.strategy.launcher.procs
    begun = time.monotonic()
    callback.on_exception(trainer, None, RankError("rank 2 did not come"))
    assert time.monotonic() - begun >= 1 and ends.wait() == 0 and hangs.wait(5) == -9
    assert [message for message in caplog.messages if "rank 2 did not come" in message and str(hangs.pid) in message]


def test_another_error_and_another_launcher_leave_them(trainer):
    callback = GPTQCallback(QuantizeModule())
    callback.on_exception(trainer, None, MemoryError())
    callback.on_exception(SimpleNamespace(strategy=SimpleNamespace(launcher=None)), None, RankError("lost"))
    assert trainer.strategy.launcher.procs[1].poll() is None
