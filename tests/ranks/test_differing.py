"""Ranks that differ are refused where they first meet, and a rank lost anywhere ends all soon, with the cause."""

from __future__ import annotations

import json
import os
import subprocess

import pytest

from forked_python import python

# Every case forks ranks with a group whose timeout is some seconds; each writes how it ended.
SCRIPT = """
import json, os, signal, sys, time
from datetime import timedelta
from pathlib import Path
import torch
torch.set_num_threads(1)
import torch.distributed as dist
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from gptq_plugin import QuantizeModule
from gptq_plugin.quantize import evidence, same_on_ranks, solve_on_ranks
from gptq_plugin.walk.hessian import Hessian

SIZE, TIMEOUT, FAULTY = 3, 8, 1
signal.signal(signal.SIGINT, signal.default_int_handler)  # what runs the tests may have it ignored

def llama(layers=1, **sizes):
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "vocab_size": 64, "num_attention_heads": 2} | sizes
    return LlamaForCausalLM(LlamaConfig(num_hidden_layers=layers, **sizes)).eval()

class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.linear = nn.BatchNorm1d(64), nn.Linear(64, 64)

    def forward(self, x):
        return self.linear(self.norm(x))

def differ(what):
    "The model, options and data of a rank that differs."
    model, options = llama(), {}
    if what == "weights":
        with torch.no_grad():
            model.model.layers[0].mlp.up_proj.weight[5, 7] += 1e-6
    elif what == "swapped":
        rows = model.model.layers[0].self_attn.q_proj.weight.data
        rows[[0, 1]] = rows[[1, 0]]
    elif what == "norms":
        model.model.norm.weight.data[3] = 2
    elif what == "bits":
        options["bits"] = 3
    elif what == "rule":
        options["dynamic"] = {"-:.*down.*": {}}
    elif what == "sums":
        options["exact_sums"] = False
    elif what == "damping":
        options["damp_percent"] = 0.02
    elif what == "layers":
        model = llama(2)
    elif what == "fewer":
        del model.model.layers[0].mlp
    elif what == "width":
        model = llama(intermediate_size=160)
    elif what == "dtype":
        model = model.bfloat16()
    elif what == "model":
        model = nn.Sequential(nn.Linear(64, 64))
    elif what == "class":
        class Other(LlamaForCausalLM):
            pass
        model = Other(model.config).eval()
    elif what == "version":
        same_on_ranks.torch = type("Torch", (), {"__getattr__": lambda self, name: getattr(torch, name)})()
        same_on_ranks.torch.__version__ = "2.8.0"
    return model, options

def end(kind):
    if kind == "raise":
        raise MemoryError("no room")
    if kind == "exit":
        sys.exit(3)
    if kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "interrupt":
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)
    raise AssertionError(kind)

def failing(kind):
    def fail(*_, **__):
        end(kind)
    return fail

def data(rank, before=lambda number: None):
    for number, row in enumerate(torch.randint(0, 64, (8, 32), generator=torch.Generator().manual_seed(rank))):
        before(number)
        yield row

def run(rank, case):
    kind, _, phase = case.partition("-")
    model, options, batches, faulty = llama(), {}, data(rank), rank == FAULTY
    if kind == "differ" and faulty:
        model, options = differ(phase)
    if case == "buffers-synced":
        torch.manual_seed(rank)
        model, options = Normed().eval(), {"nsamples": 240}
        model.norm.running_mean[:] = torch.randn(64)
        batches = torch.randn(4, 20, 64).unbind()
    if phase == "data" and faulty:
        batches = data(rank, lambda number: end(kind) if number == 5 else None)
    elif phase == "late" and rank == 2:  # comes to the meeting when the faulty one is gone
        batches = data(rank, lambda number: time.sleep(4) if number == 5 else None)
    if phase == "late" and faulty:
        batches = data(rank, lambda number: end(kind) if number == 5 else None)
    elif phase == "meeting" and faulty:
        same_on_ranks.check_same = failing(kind)
        import gptq_plugin.quantize.prepare as prepare
        prepare.check_same = same_on_ranks.check_same
    elif phase in ("waiting", "alone") and faulty:  # interrupted while it waits for another at the first meeting
        signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGINT))
        signal.alarm(2)
    elif phase == "waiting" and rank == 2:
        batches = data(rank, lambda number: time.sleep(4) if number == 5 else None)
    elif phase == "alone" and rank == 2:
        return time.sleep(TIMEOUT + 3)
    elif phase == "never" and faulty:
        return time.sleep(TIMEOUT + 3) if kind == "silent" else end(kind)
    elif phase == "calibration" and faulty:
        model.model.layers[0].mlp.register_forward_hook(failing(kind))
    elif phase == "reduction" and faulty:
        dist.all_reduce = failing(kind)
    elif phase == "solve" and faulty:
        solve_on_ranks.solve_blocks = failing(kind)
    report = QuantizeModule(**{"group_size": 32, "nsamples": 24, "batch_size": 2} | options).quantize(model, batches)
    if case == "buffers-synced":
        return [model.norm.running_mean.tolist(), model.linear.qweight.tolist()]
    return "quantized"

out, cases = Path(sys.argv[1]), sys.argv[2:]
running = {}

def wait():
    pid, _ = os.wait()
    del running[pid]

for case in cases:
    while len(running) > 12:  # most of them wait most of the time
        wait()
    for rank in range(SIZE):
        pid = os.fork()
        if pid:
            running[pid] = case
            continue
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        ended = {}
        dist.init_process_group("gloo", f"file://{out}/{case}.store", rank=rank, world_size=SIZE,
                                timeout=timedelta(seconds=TIMEOUT))
        dist.barrier()
        begun = time.time()
        try:
            ended["told"] = run(rank, case)
        except BaseException as error:
            ended["told"] = f"{type(error).__name__}: {error}"
        ended["seconds"] = time.time() - begun
        (out / f"{case}.{rank}").write_text(json.dumps(ended))
        os._exit(0)
while running:
    wait()

def ended(file):
    return json.loads(file.read_text()) if file.exists() else None

results = {case: [ended(out / f"{case}.{rank}") for rank in range(SIZE)] for case in cases}
(out / "results.json").write_text(json.dumps(results))
"""

DIFFERENCES = {
    "weights": r"weights: rank 0 has model.layers.0.mlp.up_proj.weight (values of digest ",
    "swapped": r"weights: rank 0 has model.layers.0.self_attn.q_proj.weight (values of digest ",
    "norms": "weights: rank 0 has model.norm.weight (values of digest ",
    "bits": "the configuration's bits: rank 0 has 4, rank 1 has 3",
    "rule": "the configuration's dynamic: rank 0 has {}, rank 1 has {'-:.*down.*': {}}",
    "sums": "exact_sums: rank 0 has None, rank 1 has False",
    "damping": "the configuration's damp_percent: rank 0 has 0.01, rank 1 has 0.02",
    "layers": "the model's tensors: rank 0 has no model.layers.1.self_attn.q_proj.weight, rank 1 has "
    "model.layers.1.self_attn.q_proj.weight (float32 [64, 64])",
    "fewer": "the model's tensors: rank 0 has model.layers.0.mlp.gate_proj.weight (float32 [96, 64]), rank 1 has no "
    "model.layers.0.mlp.gate_proj.weight",
    "width": "the model's tensors: rank 0 has model.layers.0.mlp.gate_proj.weight (float32 [96, 64]), rank 1 has "
    "model.layers.0.mlp.gate_proj.weight (float32 [160, 64])",
    "dtype": "the model's tensors: rank 0 has model.embed_tokens.weight (float32 [64, 64]), rank 1 has "
    "model.embed_tokens.weight (bfloat16 [64, 64])",
    "model": "the model's class: rank 0 has transformers.models.llama.modeling_llama.LlamaForCausalLM, rank 1 has "
    "torch.nn.modules.container.Sequential",
    "class": "the model's class: rank 0 has ",
    "version": "torch: rank 0 has ",
}
PHASES = ("data", "late", "meeting", "calibration", "reduction", "solve")
CAUSES = {"raise": "MemoryError: no room", "exit": "SystemExit: 3", "interrupt": "KeyboardInterrupt: "}
KINDS = (*CAUSES, "kill")
LOST = [f"{kind}-{phase}" for phase in PHASES for kind in KINDS]
OTHERS = ["buffers-synced", "interrupt-waiting", "interrupt-alone", "silent-never", "kill-never"]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    out = tmp_path_factory.mktemp("ranks")
    (out / "run.py").write_text(SCRIPT)
    cases = [*OTHERS, *LOST, *(f"differ-{what}" for what in DIFFERENCES)]  # those that wait begin first
    done = subprocess.run([python(), out / "run.py", out, *cases], timeout=550, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads((out / "results.json").read_text())


pytestmark = [pytest.mark.slow, pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")]


@pytest.mark.parametrize("what", DIFFERENCES)
def test_ranks_that_differ_are_refused_with_both_values(what, results):
    for ended in results[f"differ-{what}"]:
        assert ended["told"].startswith(f"RankError: the ranks differ in {DIFFERENCES[what]}"), ended["told"]
        assert ended["seconds"] < 5


@pytest.mark.parametrize("case", LOST)
def test_a_rank_lost_anywhere_ends_all_with_the_cause(case, results):
    kind, _, phase = case.partition("-")
    for rank, ended in enumerate(results[case]):
        if rank == 1:
            assert ended is None if kind == "kill" else ended["told"] == CAUSES[kind]
        else:
            cause = f"rank 1 failed: {CAUSES[kind]}" if kind != "kill" else f"rank {rank} cannot reach the others"
            assert ended["told"].startswith(f"RankError: {cause}"), ended["told"]
        assert ended is None or ended["seconds"] < 25


def test_a_rank_that_is_interrupted_while_it_waits_ends_and_so_do_the_others(results):
    first, interrupted, late = results["interrupt-waiting"]
    assert interrupted["told"] == "KeyboardInterrupt: " and interrupted["seconds"] < 5
    assert first["told"] == late["told"] == "RankError: rank 1 failed: KeyboardInterrupt: "
    assert max(first["seconds"], late["seconds"]) < 8


def test_a_rank_that_is_interrupted_at_the_first_meeting_ends_though_another_never_comes(results):
    first, interrupted, _ = results["interrupt-alone"]
    assert interrupted["told"] == "KeyboardInterrupt: "
    assert first["told"] == "RankError: rank 1 failed: KeyboardInterrupt: "
    assert max(first["seconds"], interrupted["seconds"]) < 6


@pytest.mark.parametrize("case", ["silent-never", "kill-never"])
def test_ranks_wait_no_longer_than_the_groups_timeout_for_one_that_never_calls(case, results):
    for ended in (results[case][0], results[case][2]):
        assert "waited 0:00:08, the process group's timeout, and these did not come: rank 1." in ended["told"]
        assert ended["seconds"] < 10


def test_buffers_that_training_updates_on_every_rank_are_those_of_the_first(results):
    first, *others = (ended["told"] for ended in results["buffers-synced"])
    assert len(first) == 2 and all(other == first for other in others)
