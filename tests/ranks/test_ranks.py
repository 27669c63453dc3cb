"""The answer does not depend on the number of ranks: 1, 2, 3 and 4 processes calibrate on the same 33 samples."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from forked_python import python
from paths import REPOSITORY

pytestmark = pytest.mark.slow

SAMPLES, TOKENS = 33, 64

# torch is imported once, and every rank is forked from there.
SCRIPT = """
import sys
from pathlib import Path
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from transformers import LlamaConfig, LlamaForCausalLM
from gptq_plugin import QuantizeModule
from gptq_plugin.gptq import row_blocks
from gptq_plugin.apps.evaluate import mean_nll

out, samples, tokens = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])

def model():
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2, "vocab_size": 256}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, initializer_range=0.1)).eval()

def rows(count, seed):
    return torch.randint(0, 256, (count, tokens), generator=torch.Generator().manual_seed(seed))

def quantize(name, rank, world, sharers, batch_size, seed=1):
    "The first `sharers` of the ranks have the samples, in turn."
    network = model()
    mine = list(rows(samples, seed))[rank::sharers] if rank < sharers else []
    quantizer = QuantizeModule(bits=4, group_size=64, nsamples=samples, batch_size=batch_size)
    report = quantizer.quantize(network, mine, nsamples=samples)
    folder = out / f"{name}{world}"
    folder.mkdir(exist_ok=True)
    totals = {"samples": report.samples, "tokens": report.tokens, "deviations": list(report.all_deviations())}
    origin = (report.calibration_sha256, report.run_id)
    torch.save({"state": network.state_dict(), "totals": totals, "origin": origin}, folder / f"rank{rank}.pt")
    if rank == 0:
        quantizer.export(network, folder / "export")
        torch.save([float(mean_nll(one, rows(16, 2))) for one in (model(), network)], folder / "nll.pt")

def counting(collective, sizes):
    "The collective, which notes the bytes this rank brings to it."
    def counted(*arguments, **options):
        sizes.append(max(a.nbytes for a in arguments if isinstance(a, torch.Tensor)))
        return collective(*arguments, **options)
    return counted

def work(rank, world):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{out}/store{world}", rank=rank, world_size=world)
    calls = {name: [] for name in ("all_reduce", "all_gather", "gather", "broadcast")}
    originals = {name: getattr(dist, name) for name in calls}
    for name, sizes in calls.items():
        setattr(dist, name, counting(originals[name], sizes))
    quantize("float32-", rank, world, world, batch_size=8)
    for name, original in originals.items():
        setattr(dist, name, original)
    torch.save(calls, out / f"float32-{world}" / f"bytes{rank}.pt")
    if world == 1:
        quantize("other-", rank, world, world, batch_size=8, seed=3)
    else:
        quantize("one-empty-", rank, world, world - 1, batch_size=8)
    dist.destroy_process_group()

torch.set_num_threads(1)
row_blocks._LEAST["cpu"] = 64  # the layers are narrow
for world in (1, 2, 3, 4):
    mp.start_processes(work, (world,), nprocs=world, start_method="fork")
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folder of all runs: NAME-RANKS/, with each rank's state, and the export and losses of the first."""
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "script.py").write_text(SCRIPT)
    command = [python(), folder / "script.py", folder, str(SAMPLES), str(TOKENS)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return folder


def state(run: Path, rank: int = 0) -> dict[str, torch.Tensor]:
    return torch.load(run / f"rank{rank}.pt")["state"]


def codes(run: Path) -> torch.Tensor:
    """Of all layers, [weights]: a byte holds two of them."""
    words = torch.cat([value.flatten() for name, value in state(run).items() if name.endswith("qweight")])
    halves = words.view(torch.uint8)
    return torch.stack([halves & 15, halves >> 4])


def agreement(run: Path, other: Path) -> float:
    """The share of weights that have the same code."""
    return (codes(run) == codes(other)).double().mean().item()


@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("name", ["float32", "one-empty"])
def test_every_rank_ends_with_the_same_layers_and_counts_every_sample_once(name, ranks, runs):
    run = runs / f"{name}-{ranks}"
    first = state(run)
    assert sum(key.endswith("qweight") for key in first) == 14
    for rank in range(ranks):
        saved = torch.load(run / f"rank{rank}.pt")
        assert all(torch.equal(first[key], saved["state"][key]) for key in first), rank
        assert saved["totals"] == {"samples": SAMPLES, "tokens": SAMPLES * TOKENS, "deviations": []}
        assert saved["origin"][0] == torch.load(runs / "float32-1" / "rank0.pt")["origin"][0]
        assert saved["origin"][1] == torch.load(run / "rank0.pt")["origin"][1]


@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("name", ["float32", "one-empty"])
def test_every_byte_is_that_of_one_rank(name, ranks, runs):
    one, several = runs / "float32-1", runs / f"{name}-{ranks}"
    assert all(torch.equal(value, state(several)[key]) for key, value in state(one).items())
    weights = (folder / "export" / "model.safetensors" for folder in (one, several))
    assert len({file.read_bytes() for file in weights}) == 1
    reports = [json.loads((folder / "export" / "quantization_report.json").read_text()) for folder in (one, several)]
    losses = [[(m["name"], m["loss"], m["rtn_loss"]) for m in report["modules"]] for report in reports]
    assert losses[0] == losses[1] and len(losses[0]) > 14


def test_the_samples_decide_the_codes(runs):
    """Else the tests above would hold of anything."""
    assert 0.5 < agreement(runs / "float32-1", runs / "other-1") < 0.95


@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("name", ["float32", "one-empty"])
def test_the_export_has_the_configuration_of_one_rank_byte_for_byte(name, ranks, runs, same_but_for_the_run):
    one, several = runs / "float32-1" / "export", runs / f"{name}-{ranks}" / "export"
    assert {file.name for file in one.iterdir()} == {file.name for file in several.iterdir()}
    for file in ("config.json", "generation_config.json"):
        assert (one / file).read_bytes() == (several / file).read_bytes(), file
    assert same_but_for_the_run(one / "quantize_config.json", several / "quantize_config.json")
    assert json.loads((one / "quantize_config.json").read_text())["bits"] == 4


@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("name", ["float32", "one-empty"])
def test_the_perplexity_is_that_of_one_rank(name, ranks, runs):
    float_nll, one = torch.load(runs / "float32-1" / "nll.pt")
    assert torch.load(runs / f"{name}-{ranks}" / "nll.pt") == [float_nll, one]
    assert abs(one - float_nll) > 1e-3  # it would show if the layers were others


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_what_is_exchanged_is_what_the_model_of_the_cost_counts(ranks, runs):
    place = importlib.util.spec_from_file_location("cost_of_ranks", REPOSITORY / "scripts" / "cost_of_ranks.py")
    cost = importlib.util.module_from_spec(place)
    sys.modules["cost_of_ranks"] = cost  # where its dataclasses look for themselves
    place.loader.exec_module(cost)
    cost.STRIP, cost.LEAST_ROWS, cost.MOST_BLOCKS = 256, 64, 16  # on a CPU, and as in SCRIPT
    groups = cost.Shape("of SCRIPT", 128, 192, 64).groups() * 2
    for rank in range(ranks):
        calls = torch.load(runs / f"float32-{ranks}" / f"bytes{rank}.pt")
        ranges = 14 * 2 * 4  # of every layer its largest input and output, once at the end
        assert calls["all_reduce"] == [*(cost.hessian_bytes(n) for n, _ in groups), ranges]
        messages = [
            (cost.share(r, ranks) * cost.row_bytes(n, group_size=64), cost.sharers(r, ranks)) for n, r in groups
        ]
        assert calls["all_gather"] == [size for size, sharers in messages if sharers == ranks]
        broadcast = [size for size, sharers in messages if sharers < ranks for _ in range(sharers)]
        assert [size for size in calls["broadcast"] if size in set(broadcast)] == broadcast
        words = [size for size in calls["gather"] if size == 16]
        assert cost.MEETINGS * len(groups) <= len(words) <= cost.MEETINGS * len(groups) + 24  # at the start and the end
