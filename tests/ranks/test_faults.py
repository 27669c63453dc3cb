"""A failure on one rank ends all ranks within seconds, with its cause, and leaves the checkpoints.

Other phases, kinds and launchers are those of scripts/campaigns/ranks.py.
"""

from __future__ import annotations

import json
import subprocess

import pytest
import torch

from forked_python import python
from lightning_runs import FAULTS
from paths import SUPPORT

RANKS = 3
CASES = {
    "raise-setup": "MemoryError: not on this node",
    "raise-rehearsal": "MemoryError: a bad sample",
    "nan-calibration": "holds NaN or infinity in calibration batches [0] (rank 1)",
    "nan-reduction": "the sum over all batches",
    "nan-solve": "the weight holds NaN",
    "raise-export": "MemoryError: disk full",
    "kill-export": "cannot reach the others",
}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    out = tmp_path_factory.mktemp("faults")
    (out / "run.py").write_text(FAULTS)
    command = [python(), out / "run.py", SUPPORT, out, str(RANKS), "cpu", *CASES]
    subprocess.run(command, check=True, timeout=400, cwd=out)
    return out, json.loads((out / "results.json").read_text())


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(__import__("os"), "fork"), reason="needs os.fork")
@pytest.mark.parametrize("case", CASES)
def test_all_ranks_end_with_the_cause_and_the_checkpoints_stay(case, outcomes):
    out, results = outcomes
    kind, phase = case.split("-")
    faulty = 0 if phase == "export" else 1
    ends, cause = results[case]["ends"], CASES[case]
    assert results[case]["seconds"] < 30
    assert ends.pop(faulty) == (-9 if kind == "kill" else 1) and ends == [1] * (RANKS - 1)
    own = "" if kind == "kill" else (out / case / f"{faulty}.txt").read_text()
    assert kind == "kill" or cause in own
    for rank in {*range(RANKS)} - {faulty}:
        message = (out / case / f"{rank}.txt").read_text()
        assert cause in message
        if kind == "raise":
            assert message == f"RankError: rank {faulty} failed: {own}"
    if phase in ("setup", "rehearsal"):
        assert not (out / case / "ckpt").exists()  # before training
        return
    checkpoint = torch.load(out / case / "ckpt" / "last.ckpt", weights_only=False)
    assert all(torch.isfinite(value).all() for value in checkpoint["state_dict"].values())
    assert not (out / case / "export").exists()
