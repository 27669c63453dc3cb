"""A forward that leaves samples out is found by a rank that puts some together, and two ranks give the words of one."""

from __future__ import annotations

import subprocess

import pytest
import torch

from forked_python import python

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not hasattr(__import__("os"), "fork"), reason="needs os.fork")]

SCRIPT = """
import sys
from pathlib import Path
import torch
torch.set_num_threads(1)
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from gptq_plugin import QuantizeModule

out = Path(sys.argv[1])

class Reads(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.first, self.last = nn.Embedding(128, 32), nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, input_ids):
        return self.last(self.first(self.words(input_ids)).relu())

# Of two ranks the second has a batch of one sample, and finds nothing by itself
DATA = list(torch.randint(0, 128, (9, 40), generator=torch.Generator().manual_seed(1)))

def work(rank, ranks):
    torch.set_num_threads(1)
    if ranks > 1:
        dist.init_process_group("gloo", f"file://{out}/store{ranks}", rank=rank, world_size=ranks)
    torch.manual_seed(0)
    network = Reads()
    quantizer = QuantizeModule(group_size=32, nsamples=9)
    report = quantizer.quantize(network, DATA[rank::ranks], forward=lambda m, batch: m(batch["input_ids"][0]))
    tokens = {module.name: module.tokens for module in report.quantized}
    torch.save((tokens, report.batch_size, report.deviations, network.state_dict()), out / f"{ranks}{rank}.pt")

for ranks in (1, 2):
    mp.start_processes(work, (ranks,), nprocs=ranks, start_method="fork")
"""


def test_two_ranks_give_the_words_of_one(tmp_path):
    (tmp_path / "run.py").write_text(SCRIPT)
    subprocess.run([python(), tmp_path / "run.py", tmp_path], check=True, timeout=300)
    runs = [torch.load(tmp_path / f"{who}.pt") for who in ("10", "20", "21")]
    for tokens, batch_size, deviations, state in runs:
        assert set(tokens.values()) == {9 * 40} and batch_size == 1
        assert sum("each sample ran in a forward of its own" in one for one in deviations) == 1
        assert all(torch.equal(state[name], value) for name, value in runs[0][3].items())
