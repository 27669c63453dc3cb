"""Short runs of the campaigns against runs: kills, faults, lost ranks, and repetition."""

from __future__ import annotations

import subprocess
import sys

import pytest

from paths import REPOSITORY

NAMES = ("kills", "faults", "ranks", "soak")


@pytest.mark.slow
def test_no_fault_is_found(tmp_path):
    """One process, since what they import takes as long as some of them."""
    command = [sys.executable, "scripts/campaign.py", *NAMES, "--short", "--folder", tmp_path, "--processes", "2"]
    run = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=500)
    assert run.returncode == 0, run.stdout[-5000:] + run.stderr[-5000:]
    rows = {row.split("|")[1].strip(): row for row in run.stdout.splitlines() if row.startswith("| ")}
    assert set(NAMES) <= set(rows)
