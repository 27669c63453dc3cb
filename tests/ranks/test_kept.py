"""Several ranks take what a run of as many left, where all of them find it, and get the bytes of one."""

from __future__ import annotations

import os
import subprocess

import pytest
import torch

from forked_python import python
from paths import SUPPORT

pytestmark = pytest.mark.slow


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
@pytest.mark.parametrize("scene", ["padded", "experts-drift"])
def test_ranks_take_what_all_of_them_find_and_give_the_bytes_of_one(scene, tmp_path):
    command = [python(), SUPPORT / "kept_runs.py", tmp_path, scene, "2", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env={**os.environ, "NODE_RANK": "0"})
    assert done.returncode == 0, done.stderr[-6000:]
    plain, lines, nothing, _ = torch.load(tmp_path / "kept-0-0.pt")
    assert nothing == {}
    counts, kept = [], set()
    for run in (1, 2, 3):
        for rank in (0, 1):
            state, others, taken, deviations = torch.load(tmp_path / f"kept-{run}-{rank}.pt")
            assert [name for name, value in plain.items() if not torch.equal(value, state[name])] == []
            kept.add(repr(others))
            # Without a folder experts are solved at once, and losses differ in their last bits.
            assert [(name, method, tokens) for name, method, *_, tokens in others] == [
                (name, method, tokens) for name, method, *_, tokens in lines
            ]
            numbers = [torch.tensor([numbers for _, _, *numbers, _ in of]) for of in (others, lines)]
            torch.testing.assert_close(*numbers, rtol=1e-5, atol=0, equal_nan=True)
            told = [line.partition(":")[0] for line in deviations if "cache_dir" in line]
            assert told == (["cache_dir does not find the same files on every rank"] if run == 3 else [])
            counts.append((taken["layers_taken"], taken["layers_solved"], taken["walk_taken"]))
    assert len(kept) == 1
    layers = counts[0][1]
    assert counts == [(0, layers, 0)] * 2 + [(layers, 0, 1)] * 2 + [(0, layers, 0)] * 2
