"""Short runs of the campaigns against configurations, checkpoints and `.ckpt` files: no case is a fault."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from paths import REPOSITORY

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run() -> subprocess.CompletedProcess[str]:
    """All three in one process, which imports once what each needs."""
    names = ["configurations", "checkpoints", "ckpt"]
    command = [sys.executable, REPOSITORY / "scripts" / "campaign.py", *names, "--short", "--processes", "1"]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)


@pytest.mark.parametrize("name", ["configurations", "checkpoints", "ckpt"])
def test_a_few_cases_are_right_or_refused(name: str, run: subprocess.CompletedProcess[str]) -> None:
    row = next(line for line in run.stdout.splitlines() if line.startswith(f"| {name} |"))
    cases, attempts, ok, refused, faults = map(int, re.findall(r"(?<=\| )\d+(?= \|)", row)[:5])
    assert faults == 0, run.stdout
    assert attempts >= cases >= 40 and ok > cases / 10 and refused > cases / 10
    assert run.returncode == 0
