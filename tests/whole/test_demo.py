"""scripts/demo.sh: where it runs, and what it hands on."""

from __future__ import annotations

import hashlib
import platform
import shutil
import subprocess
import sys

import pytest

from paths import REPOSITORY


@pytest.fixture
def clone(tmp_path):
    """A clone that is installed already, whose gptq-finetune prints where and how it was called."""
    clone = tmp_path / "a clone"
    (clone / ".venv" / "bin").mkdir(parents=True)
    shutil.copytree(REPOSITORY / "scripts", clone / "scripts", ignore=shutil.ignore_patterns("__pycache__"))
    pinned = b""
    for name in ("constraints.txt", "pyproject.toml"):
        shutil.copy(REPOSITORY / name, clone)
        pinned += (clone / name).read_bytes()
    (clone / ".venv" / "stamp").write_text(f"{platform.python_version()} {hashlib.sha256(pinned).hexdigest()}")
    program = clone / ".venv" / "bin" / "gptq-finetune"
    program.write_text('#!/bin/sh\nprintf "%s\\n" "$PWD" "$@"; exit "${STATUS:-0}"\n')
    program.chmod(0o755)
    return clone


def demo(clone, cwd, *arguments, **env):
    command = ["bash", clone / "scripts" / "demo.sh", *arguments]
    return subprocess.run(command, cwd=cwd, env={"PATH": "/usr/bin:/bin", "PYTHON": sys.executable, **env}, text=True,
                          capture_output=True)  # fmt: skip


def test_it_runs_where_the_user_stands_with_the_users_arguments(clone, tmp_path):
    for cwd in (clone, tmp_path):
        done = demo(clone, cwd, "quantizer.bits=3", "data.path=my texts/*.txt")
        assert done.stdout.splitlines()[:3] == [str(cwd), "quantizer.bits=3", "data.path=my texts/*.txt"], done.stderr
        assert "after installation" in done.stdout and done.returncode == 0


def test_a_failed_run_and_a_missing_python_fail_it(clone, tmp_path):
    assert demo(clone, tmp_path, STATUS="3").returncode == 3
    done = demo(clone, tmp_path, PYTHON="no-such-python")
    assert done.returncode != 0 and "no Python at 'no-such-python'" in done.stderr and not done.stdout
