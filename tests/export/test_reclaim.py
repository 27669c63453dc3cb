"""What exports that were killed left: removed, put back or completed by the next, at once."""

from __future__ import annotations

import errno
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from forks import ending_here

from gptq_plugin import QuantizeConfig
from gptq_plugin.errors import ExportError
from gptq_plugin.export import staging
from gptq_plugin.export.export import export_model
from gptq_plugin.export.export_dir import check_export_dir
from gptq_plugin.export.hidden_folders import HiddenFolder, hidden_beside
from gptq_plugin.export.reclaim import reclaim

from exports import description, files
from models import Plain

Rtn = Callable[..., Any]
EARLIER, NEW = QuantizeConfig(bits=8, group_size=16), QuantizeConfig(bits=4, group_size=16)


def killed_at(
    rename: int,
    run: Callable[[], Any],
    monkeypatch: pytest.MonkeyPatch,
    exchanges: bool = True,
    overlay: bool = False,
) -> bool:
    """Runs in a fork that is killed before its n-th rename; returns whether it was."""
    child = os.fork()
    if not child:
        with ending_here():
            renames, original = [], Path.rename

            def killing(path: Path, target: Path) -> Path:
                renames.append(path)
                if len(renames) == rename:
                    os.kill(os.getpid(), signal.SIGKILL)
                return original(path, target)

            monkeypatch.setattr(Path, "rename", killing)
            if not exchanges:
                monkeypatch.setattr(staging, "_exchange", lambda one, other: False)
            if overlay:
                monkeypatch.setattr(staging, "_step_aside", _not_in_an_overlay)
            run()
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, -signal.SIGKILL), "the fork failed: see what it wrote"
    return code == -signal.SIGKILL


def _not_in_an_overlay(one: Path, other: Path) -> None:
    raise OSError(errno.EXDEV, "Invalid cross-device link")


@pytest.mark.parametrize("kind", ["inside", "beside", "overlay"])
def test_a_kill_at_any_rename_leaves_an_export_that_the_next_check_brings_back(
    rtn: Rtn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Inside the target files are moved one by one; beside it the folders are, without the system's exchange. A folder
    of an overlay's lower layer cannot be moved: the new one goes inside, and then its files."""
    inside = kind == "inside"
    target = tmp_path / "out"
    target.mkdir()
    if inside:
        monkeypatch.chdir(target)
    earlier, new = rtn(Plain(), EARLIER), rtn(Plain(), NEW)
    kills, bits = 0, []
    while True:
        export_model(earlier, target, EARLIER, overwrite=True)
        before = files(target)
        again = lambda: export_model(new, target, NEW, overwrite=True)  # noqa: E731
        if not killed_at(kills + 1, again, monkeypatch, exchanges=inside, overlay=kind == "overlay"):
            break
        kills += 1
        check_export_dir(target, overwrite=True)
        bits.append(description(target)["bits"])
        assert bits[-1] == 4 or files(target) == before
        assert sorted(files(target)) == sorted(before)
        assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert kills == {"inside": 8, "beside": 3, "overlay": 9}[kind]  # the first one names the shard
    assert bits == sorted(bits, reverse=True) and set(bits) == ({8} if kind == "beside" else {8, 4})


def test_a_first_export_that_is_killed_on_its_way_out_is_completed(
    rtn: Rtn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model = rtn(Plain(), NEW)
    assert killed_at(4, lambda: export_model(model, tmp_path, NEW), monkeypatch)
    assert 0 < len([path for path in tmp_path.iterdir() if path.is_file()]) < 3
    with pytest.raises(ExportError, match="holds an earlier export"):
        check_export_dir(tmp_path)
    assert description(tmp_path)["bits"] == 4 and len(list(tmp_path.iterdir())) == 3


def test_what_lies_in_the_target_meanwhile_is_not_touched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    earlier = tmp_path / ".out.12345678.replaced"
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    earlier.mkdir()
    (earlier / "config.json").write_text("earlier")
    inside = tmp_path / "out" / ".12345678.leaving"
    inside.mkdir()
    (inside / "thesis.txt").write_text("another")
    before = files(tmp_path)
    reclaim(tmp_path / "out")
    assert files(tmp_path) == before
    os.remove(tmp_path / "out" / "thesis.txt")
    reclaim(tmp_path / "out")
    assert files(tmp_path / "out") == {"thesis.txt": b"another"} and not inside.exists() and earlier.exists()


def test_two_processes_reclaim_one_export(rtn: Rtn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The ranks of a node check the folder at the same time."""
    monkeypatch.chdir(tmp_path)
    model = rtn(Plain(), EARLIER)
    for rename in (3, 7):
        export_model(model, tmp_path, EARLIER, overwrite=True)
        assert killed_at(rename, lambda: export_model(model, tmp_path, EARLIER, overwrite=True), monkeypatch)
        children = []
        for _ in range(3):
            child = os.fork()
            if not child:
                with ending_here():
                    check_export_dir(tmp_path, overwrite=True)
                    assert (tmp_path / "quantize_config.json").exists()
            children.append(child)
        assert [os.waitpid(child, 0)[1] for child in children] == [0, 0, 0]


def test_work_of_a_living_process_is_waited_for_and_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gptq_plugin.export.reclaim._PATIENCE", 0.2)
    aside, writing = (HiddenFolder(hidden_beside(tmp_path / "out", kind)) for kind in ("replaced", "partial"))
    begun = time.monotonic()
    reclaim(tmp_path / "out")
    assert time.monotonic() - begun > 0.2 and aside.path.exists() and writing.path.exists()
    aside.release()
    writing.release()
    reclaim(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"] and not writing.path.exists()
