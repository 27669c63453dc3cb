"""A finish on a GPU."""

from __future__ import annotations

import copy

import pytest
import torch

from gptq_plugin import Finish, QuantizeModule

from models import tiny_llama

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

OPTIONS = {"steps": 8, "learning_rate": 0.01, "tokens_per_step": 200, "held_out": 8, "judgements": 2}


@pytest.mark.parametrize("home", ["cpu", "cuda"])
@pytest.mark.parametrize("reruns", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_gives_what_a_cpu_gives_and_leaves_the_model_where_it_is(home, reruns, dtype):
    rows = list(torch.randint(4, 128, (40, 24), generator=torch.Generator().manual_seed(0)))
    model = tiny_llama(initializer_range=0.2).to(dtype)
    twin, quantizer = copy.deepcopy(model), QuantizeModule(bits=2, group_size=32, nsamples=32)
    quantizer.quantize(model, rows)
    there, its_twin = copy.deepcopy(model).to(home), copy.deepcopy(twin).to(home)
    finish = Finish(**OPTIONS, checkpoint_activations=reruns)
    wanted = quantizer.finish(model, twin, rows, finish)
    found = quantizer.finish(there, its_twin, rows, finish, device="cuda")
    assert found.kept and found.before == pytest.approx(wanted.before, rel=0.02)
    assert found.after == pytest.approx(wanted.after, rel=0.03)
    state, expected = there.state_dict(), model.state_dict()
    for name, tensor in state.items():
        assert tensor.device.type == home
        assert tensor.dtype == expected[name].dtype
        torch.testing.assert_close(tensor.cpu().float(), expected[name].float(), rtol=0.06, atol=0.02)


def test_it_keeps_within_the_memory_that_is_allowed_by_computing_activations_twice():
    rows = list(torch.randint(4, 128, (40, 64), generator=torch.Generator().manual_seed(0)))
    model = tiny_llama(num_hidden_layers=8, initializer_range=0.2).cuda()
    twin, quantizer = copy.deepcopy(model), QuantizeModule(bits=4, group_size=32, nsamples=32)
    quantizer.quantize(model, rows)
    finish = Finish(**{**OPTIONS, "batch_size": 8, "tokens_per_step": 512})
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    quantizer.finish(copy.deepcopy(model), twin, rows, finish)
    peak = torch.cuda.max_memory_allocated()
    found = quantizer.finish(model, twin, rows, finish, device_memory=before + (peak - before) * 3 // 4)
    assert found.steps == 8
    assert not any("MiB on" in one and "finish" in one for one in quantizer.report.deviations)
