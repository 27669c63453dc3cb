"""Short runs of the campaigns against configurations, checkpoints and `.ckpt` files: no case is a fault."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from paths import REPOSITORY

pytestmark = pytest.mark.slow

NAMES = {"configurations": 30, "command_lines": 10, "checkpoints": 30, "ckpt": 30}  # with the cases of a short run


@pytest.fixture(scope="module")
def run() -> subprocess.CompletedProcess[str]:
    """All in one process, which imports once what each needs."""
    command = [sys.executable, REPOSITORY / "scripts" / "campaign.py", *NAMES, "--short", "--processes", "1"]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)


@pytest.mark.parametrize("name", NAMES)
def test_a_few_cases_are_right_or_refused(name: str, run: subprocess.CompletedProcess[str]) -> None:
    row = next(line for line in run.stdout.splitlines() if line.startswith(f"| {name} |"))
    cases, attempts, ok, refused, faults = map(int, re.findall(r"(?<=\| )\d+(?= \|)", row)[:5])
    assert faults == 0, run.stdout
    assert attempts >= cases * 0.9 and cases >= NAMES[name]
    assert ok > (0 if name == "command_lines" else cases / 10) and refused > cases / 10
    assert run.returncode == 0
