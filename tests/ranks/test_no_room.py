"""A rank whose device has no room for its share solves it again with less kept there, or ends all."""

from __future__ import annotations

import json
import os
import subprocess

import pytest
import torch

from gptq_plugin import distributed

from forked_python import python

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")]

# On rank 1 the third share finds no room once, or from there on. Rank 0 is the only one to know nothing of it.
CASES = """
import itertools, json, os, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from gptq_plugin import QuantizeModule
from gptq_plugin.quantize import solve_on_ranks

def model():
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(64, 600) if n % 2 == 0 else nn.Linear(600, 64) for n in range(4)))

def scarce(fails):
    solve_blocks, calls = solve_on_ranks.solve_blocks, itertools.count(1)
    def solve(*args):
        if next(calls) in fails:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB")
        return solve_blocks(*args)
    solve_on_ranks.solve_blocks = solve

def work(rank, ranks, out, case):
    torch.set_num_threads(1)
    if ranks > 1:
        dist.init_process_group("gloo", f"file://{out}/{case}.store", rank=rank, world_size=ranks)
    if rank == 1:
        scarce({"once": {3}, "always": range(3, 99)}[case])
    batches, network = list(torch.randn(40, 16, 64, generator=torch.Generator().manual_seed(1))), model()
    try:
        report = QuantizeModule(group_size=32, nsamples=640).quantize(network, batches[rank::ranks])
        sums = {name: value.double().sum().item() for name, value in network.state_dict().items()}
        found = [sums, report.deviations]
    except Exception as error:
        kinds = [type(layer).__name__ for layer in network]
        found = [kinds, f"{type(error).__name__}: {error}"]
    Path(out, f"{case}{rank}.json").write_text(json.dumps(found))

out = sys.argv[1]
for case, ranks in (("alone", 1), ("once", 2), ("always", 2)):
    mp.start_processes(work, (ranks, out, case), nprocs=ranks, start_method="fork")
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    out = tmp_path_factory.mktemp("no-room")
    (out / "run.py").write_text(CASES)
    subprocess.run([python(), out / "run.py", out], check=True, timeout=200)
    return lambda case, rank=0: json.loads((out / f"{case}{rank}.json").read_text())


def test_the_layers_are_those_of_one_rank_and_all_ranks_tell_of_it(found):
    layers, deviations = found("alone")
    assert deviations == [] and any(name.endswith("qweight") for name in layers)
    for rank in range(2):
        theirs, told = found("once", rank)
        assert theirs == layers
        assert told == ["cpu ran out of memory once, and kept as little as possible from there on"]


def test_without_room_even_then_all_ranks_end_with_the_cause_and_their_float_models(found):
    (layers, error), (others, told) = found("always", 1), found("always", 0)
    assert error.startswith("OutOfMemoryError: the work on a layer lacked memory on cpu; the model is as it was")
    assert "(CUDA out of memory" in error and told.startswith(f"RankError: rank 1 failed: {error[:60]}")
    assert layers == others == ["Linear"] * 4


def test_a_rank_without_room_for_the_rows_of_all_does_not_check_in(monkeypatch):
    def scarce(tensor):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(distributed, "active", lambda: True)
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(distributed, "check_in", lambda *_: pytest.fail("the others would begin to send"))
    monkeypatch.setattr(torch, "empty_like", scarce)
    with pytest.raises(torch.OutOfMemoryError):
        distributed.gather_rows([torch.zeros(3)], 3, 2)
