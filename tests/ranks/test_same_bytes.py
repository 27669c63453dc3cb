"""Any number of ranks gives the bytes of one: on trained weights, padded batches and experts; with gloo and NCCL."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from forked_python import python
from paths import SUPPORT
from rank_runs import PYCODE, saved

pytestmark = pytest.mark.slow

needs_pycode = pytest.mark.skipif(not PYCODE.exists(), reason="needs ../shared/models/pycode-29m")


def compare(scene: str, device: str, ranks: list[int], folder) -> None:
    interpreter = python() if device == "cpu" else sys.executable
    command = [interpreter, SUPPORT / "rank_runs.py", folder, device, scene, "1", *map(str, ranks)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=550, env={**os.environ, "NODE_RANK": "0"})
    assert done.returncode == 0, done.stderr[-6000:]
    ((one, lines),) = saved(folder, scene, 1)
    assert sum(name.endswith("qweight") for name in one) >= 7
    for number in ranks:
        for rank, (state, others) in enumerate(saved(folder, scene, number)):
            differ = [name for name, value in one.items() if not torch.equal(value, state[name])]
            assert differ == [], f"{number} ranks, rank {rank}"
            assert repr(others) == repr(lines), f"{number} ranks, rank {rank}"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
@pytest.mark.parametrize(
    ("scene", "ranks"),
    [
        pytest.param("trained", [4], marks=needs_pycode),
        ("padded", [2]),
        ("experts", [3]),
        ("best", [2, 4]),
        ("budget", [2, 4]),
        ("experts-drift", [2]),
        ("gradients", [2]),
    ],
)
def test_processes_give_the_bytes_of_one(scene, ranks, tmp_path):
    """Of another number of them each; `test_ranks.py` has all on one scene."""
    compare(scene, "cpu", ranks, tmp_path)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize(
    "scene",
    [
        pytest.param("trained-whole", marks=needs_pycode),
        pytest.param("trained-bfloat16", marks=needs_pycode),
        "wide",
        "padded",
        "experts",
        "best",
        "experts-drift",
    ],
)
def test_two_gpus_give_the_bytes_of_one(scene, tmp_path):
    compare(scene, "cuda", [2], tmp_path)
