"""Where an allocation fails in the middle, less is kept on the device and the quantization goes on.

An operation of the model finds no room at a chosen call; on a CPU, waiting batches' bytes move to another buffer.
"""

from __future__ import annotations

import itertools
import logging
import subprocess

import pytest
import torch
from torch import nn

from gptq_plugin import QuantizeModule
from gptq_plugin.device.memory import own_bytes
from gptq_plugin.layers.qlinear import QuantLinear
from gptq_plugin.memory import weights
from gptq_plugin.quantize import solve_on_ranks
from gptq_plugin.walk.drift import Drift
from gptq_plugin.walk.hessian import Hessian

from forked_python import python

TENSOR = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB")
HANDLE = RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")
CALLS = {"count": itertools.count(1), "fail": frozenset(), "error": TENSOR}


@torch.library.custom_op("gptq_plugin_tests::scarce", mutates_args=())
def scarce(x: torch.Tensor) -> torch.Tensor:
    if next(CALLS["count"]) in CALLS["fail"]:
        raise CALLS["error"]
    return x.relu()


class Scarce(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(4))

    def forward(self, x):
        for layer in self.layers:
            x = x + scarce(layer(x))
        return x


def _quantized(fail, error=TENSOR, **options):
    CALLS.update(count=itertools.count(1), fail=frozenset(fail), error=error)
    torch.manual_seed(1)
    batches = [torch.randn(1, 6000, 64) for _ in range(4)]  # their activations are more than a megabyte
    model = Scarce()
    report = QuantizeModule(bits=4, group_size=32, batch_size=1, **options).quantize(model, batches)
    return {name: layer.qweight for name, layer in model.named_modules() if hasattr(layer, "qweight")}, report


@pytest.mark.parametrize("options", [{}, {"offload_weights": True}, {"error": HANDLE}])
@pytest.mark.parametrize("call", [2, 22, 27])  # of the planning forward, and of the walk
def test_an_operation_that_finds_no_room_runs_again_with_less_kept(call, options, caplog):
    right, _ = _quantized(())
    with caplog.at_level(logging.WARNING):
        found, report = _quantized({call}, **options)
    assert right.keys() == found.keys() and all(torch.equal(right[name], found[name]) for name in right)
    assert any("no room on cpu" in message for message in caplog.messages)
    assert any("ran out of memory once" in one for one in report.all_deviations())


def test_without_anything_left_to_free_the_error_is_raised_and_the_model_is_float():
    CALLS.update(count=itertools.count(1), fail=frozenset(range(22, 90)), error=TENSOR)
    model, x = Scarce(), torch.randn(1, 600, 64)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(torch.OutOfMemoryError):
        QuantizeModule(bits=4, group_size=32, batch_size=1).quantize(model, [x + i for i in range(4)])
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("options", [{}, {"offload_weights": True}])
@pytest.mark.parametrize(
    "owner, name",
    [(QuantLinear, "from_quantized"), (weights, "_dequantized"), (Hessian, "mean"), (Drift, "mean")],
)
def test_what_is_around_a_solve_and_finds_no_room_runs_again(owner, name, options, monkeypatch):
    options = {**options, "asymmetric_alpha": 0.5 * (owner is Drift)}
    right, _ = _quantized((), **options)
    follows, calls = getattr(owner, name), itertools.count(1)

    def failing(*args):
        if next(calls) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return follows(*args)

    monkeypatch.setattr(owner, name, staticmethod(failing) if owner is QuantLinear else failing)
    found, report = _quantized((), **options)
    assert next(calls) > 5
    assert all(torch.equal(right[name], found[name]) for name in right)
    assert any("ran out of memory once" in one for one in report.all_deviations()) or "offload_weights" in options


def test_a_solve_that_finds_no_room_runs_again(monkeypatch):
    right, _ = _quantized(())
    solve, calls = solve_on_ranks.solve, itertools.count(1)

    def failing(*args, **options):
        if next(calls) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return solve(*args, **options)

    monkeypatch.setattr(solve_on_ranks, "solve", failing)
    found, report = _quantized(())
    assert all(torch.equal(right[name], found[name]) for name in right)
    assert any("ran out of memory once" in one for one in report.all_deviations())


GROWTH = """
import sys, threading, time
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from gptq_plugin import QuantizeModule
from gptq_plugin.device.memory import own_bytes
from gptq_plugin.layers.qlinear import QuantLinear
from gptq_plugin.memory import weights

folder = sys.argv[1]
torch.set_num_threads(1)
config = LlamaConfig(hidden_size=768, intermediate_size=2048, num_hidden_layers=32, num_attention_heads=8,
                     vocab_size=256, dtype="bfloat16")
with torch.device("meta"):
    empty = LlamaForCausalLM(config).bfloat16()
size = sum(parameter.nbytes for parameter in empty.parameters())
empty.to_empty(device="cpu")
for parameter in empty.parameters():
    parameter.data.normal_(std=0.02)
empty.save_pretrained(f"{folder}/model")
del empty, parameter
model = AutoModelForCausalLM.from_pretrained(f"{folder}/model")
data = [{"input_ids": torch.arange(200)[None]} for _ in range(4)]
before, peak, over = own_bytes(), 0, threading.Event()

def watch():
    global peak
    while not over.wait(0.005):
        peak = max(peak, own_bytes())

watching = threading.Thread(target=watch, daemon=True)
watching.start()
later = [f"layers.{number}" for number in range(1, 32)]
quantizer = QuantizeModule(modules_to_not_convert=later, nsamples=4, clip_ratios=(1.0,))
quantizer.quantize(model, data, export_dir=f"{folder}/out")
over.set()
watching.join()
print("SIZE", size, "GROWN", peak - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not own_bytes(), reason="the system does not tell what memory a process has")
def test_the_hosts_memory_does_not_grow_by_a_model_that_is_mapped_from_its_files(tmp_path):
    """Forwards in bfloat16 left as much behind as the weights take, in the walk and where the export is verified."""
    done = subprocess.run([python(), "-c", GROWTH, tmp_path], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    size, grown = (int(word) for word in done.stdout.rpartition("SIZE ")[2].split(" GROWN "))
    assert size > 400e6 and grown < size / 2, (size, grown)
