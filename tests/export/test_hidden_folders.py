"""Hidden folders of unfinished work: their names, and how those of living processes are told from others."""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from forks import ending_here

from gptq_plugin.export.hidden_folders import HiddenFolder, beside, hidden_beside, locked

LONG = ["n" * 238, "n" * 255, "é" * 127]  # bytes: just too long for the hidden name, the longest, two a character
KINDS = ("partial", "leaving", "replaced", "unsharded")


def test_hidden_names_of_one_folder_begin_alike_and_those_of_another_do_not(tmp_path: Path) -> None:
    for name in ("out", *LONG):
        for other in (name[:-1], f"{name[:-1]}m"):
            start = hidden_beside(tmp_path / name, "partial").name[: -len(".12345678.partial")]
            assert all(hidden_beside(tmp_path / name, kind).name.startswith(f"{start}.") for kind in KINDS)
            assert not hidden_beside(tmp_path / other, "partial").name.startswith(f"{start}.")


def test_a_name_beside_a_folder_is_cut_where_it_must(tmp_path: Path) -> None:
    assert beside(tmp_path / "out", "-12345678") == tmp_path / "out-12345678"
    for name in LONG[1:]:
        cut = beside(tmp_path / name, "-12345678")
        cut.mkdir()
        assert cut.name.startswith(name[:100]) and cut.name.endswith("-12345678") and cut.name != name


def test_a_folder_that_is_taken_for_a_leftover_before_it_is_locked_is_made_anew(tmp_path: Path) -> None:
    """A process removes what it finds unlocked, all the while."""
    new, remover = tmp_path / "new", os.fork()
    if not remover:
        with ending_here():
            while True:
                with locked(new) as held:
                    if held:
                        shutil.rmtree(new)
    try:
        for _ in range(300):
            folder = HiddenFolder(new)
            (new / "file").touch()
            time.sleep(0.001)
            assert (new / "file").exists()
            folder.remove()
    finally:
        os.kill(remover, signal.SIGKILL)
        os.waitpid(remover, 0)


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt(), MemoryError("no room")])
@pytest.mark.parametrize("step", ["os.open", "fcntl.flock"])
def test_a_folder_that_could_not_be_locked_does_not_stay(
    step: str, error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, name = step.split(".")
    own, errors = getattr({"os": os, "fcntl": fcntl}[module], name), [error]

    def fails(*given: Any, **named: Any) -> Any:
        if errors:
            raise errors.pop()
        return own(*given, **named)

    monkeypatch.setattr(step, fails)
    with pytest.raises(type(error)):
        HiddenFolder(tmp_path / ".out.12345678.partial")
    monkeypatch.undo()
    assert list(tmp_path.iterdir()) == []
    HiddenFolder(tmp_path / ".out.12345678.partial").remove()
