"""A finish on a GPU."""

from __future__ import annotations

import copy
import logging

import pytest
import torch

from gptq_plugin import Finish, QuantizeModule, QuantLinear
from gptq_plugin.finish import recorder

from finish_cases import divergence
from models import tiny_llama

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

OPTIONS = {"steps": 8, "learning_rate": 0.01, "tokens_per_step": 200, "held_out": 8, "judgements": 2}


def samples(length=24):
    return list(torch.randint(4, 128, (40, length), generator=torch.Generator().manual_seed(0)))


@pytest.mark.parametrize(
    ("home", "reruns", "dtype"),
    [("cpu", False, torch.float32), ("cuda", True, torch.float32), ("cuda", False, torch.bfloat16)],
)
def test_it_gives_what_a_cpu_gives_and_leaves_the_model_where_it_is(home, reruns, dtype):
    rows = samples()
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


@pytest.mark.parametrize(
    ("home", "kind", "dtype"),
    [("cpu", "full", torch.float32), ("cuda", "blocks", torch.float32), ("cuda", "blocks", torch.bfloat16)],
)
def test_blocks_are_trained_there_and_the_model_stays_where_it_is(home, kind, dtype):
    """Codes near the middle of two are rounded either way, so that results differ from a CPU's."""
    rows = samples()
    model = tiny_llama(initializer_range=0.2).to(dtype)
    twin, quantizer = copy.deepcopy(model), QuantizeModule(bits=2, group_size=32, nsamples=32)
    quantizer.quantize(model, rows)
    there, its_twin = copy.deepcopy(model).to(home), copy.deepcopy(twin).to(home)
    finish = Finish(kind, **OPTIONS, block_steps=20, block_learning_rate=3e-3, block_code_learning_rate=0.02)
    wanted = quantizer.finish(model, twin, rows, finish)
    found = quantizer.finish(there, its_twin, rows, finish, device="cuda")
    assert found.kept and all(one.after < one.before for one in found.blocks)
    assert [one.before for one in found.blocks] == pytest.approx([one.before for one in wanted.blocks], rel=0.05)
    assert found.after == pytest.approx(wanted.after, rel=0.1)
    assert {tensor.device.type for tensor in there.state_dict().values()} == {home}
    as_float = copy.deepcopy(twin).float()
    for name, layer in there.named_modules():
        if isinstance(layer, QuantLinear):
            as_float.get_submodule(name).weight.data.copy_(layer.dequantize())
    for name, parameter in there.named_parameters():
        as_float.get_parameter(name).data.copy_(parameter)
    assert divergence(as_float, twin.float(), rows[32:]) == pytest.approx(found.after, rel=0.05)


def test_it_keeps_within_the_memory_that_is_allowed_by_computing_activations_twice(monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    rows = samples(256)  # activations are large beside what libraries keep on a GPU
    model = tiny_llama(num_hidden_layers=16, max_position_embeddings=256, initializer_range=0.2).cuda()
    twin, quantizer = copy.deepcopy(model), QuantizeModule(bits=4, group_size=32, nsamples=32)
    quantizer.quantize(model, rows)
    finish = Finish(**{**OPTIONS, "batch_size": 8, "tokens_per_step": 2048})
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    with monkeypatch.context() as patch:
        patch.setattr(recorder.Recorder, "_record", lambda *_: None)  # a graph takes as much again
        quantizer.finish(copy.deepcopy(model), twin, rows, finish)
    peak = torch.cuda.max_memory_allocated()
    assert "computed twice" not in caplog.text
    found = quantizer.finish(model, twin, rows, finish, device_memory=before + (peak - before) * 3 // 4)
    assert found.steps == 8 and "computed twice" in caplog.text
    assert not any("MiB on" in one and "finish" in one for one in quantizer.report.deviations)
