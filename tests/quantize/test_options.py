"""How a pass runs its batches."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn
from transformers import BatchEncoding

from gptq_plugin import distributed
from gptq_plugin.config import QuantizeConfig
from gptq_plugin.quantize.options import PassOptions

from models import tiny_llama


def test_a_batch_runs_through_the_model_or_the_users_forward():
    model, x = nn.Linear(8, 4), torch.ones(3, 8)
    assert torch.equal(PassOptions().runner(every_logit=False)(model, x), model(x))
    given = []
    run = PassOptions(forward=lambda *args: given.append(args)).runner(every_logit=False)
    run(model, {"x": x})
    assert given[0][0] is model and list(given[0][1]) == ["x"] and torch.equal(given[0][1]["x"], x)


@pytest.mark.parametrize("device", [None, "cpu"])
def test_the_users_forward_may_take_out_of_a_batch_what_it_reads(device):
    x = torch.ones(3, 8)
    run = PassOptions(forward=lambda _, batch: batch.pop("x"), device=device).runner(every_logit=False)
    for batch in ({"x": x}, BatchEncoding({"x": x})):
        assert torch.equal(run(nn.Identity(), batch), x) and torch.equal(run(nn.Identity(), batch), x)
        assert list(batch) == ["x"]


@pytest.mark.parametrize("device", [None, "cpu"])
def test_the_users_forward_may_write_to_the_tensors_of_a_batch(device):
    x = torch.ones(3, 8)
    run = PassOptions(forward=lambda _, batch: batch["x"].mul_(2).sum(), device=device).runner(every_logit=False)
    for batch in ({"x": x}, BatchEncoding({"x": x})):
        assert run(nn.Identity(), batch) == 48 and run(nn.Identity(), batch) == 48
    run = PassOptions(device=device).runner(every_logit=False)
    assert torch.equal(run(nn.Hardtanh(-0.5, 0.5, inplace=True), x), x / 2) and torch.equal(x, torch.ones(3, 8))


@pytest.mark.parametrize("every_logit", [True, False])
def test_logits_are_computed_at_every_position_only_if_the_head_is_calibrated(every_logit):
    model, ids = tiny_llama(), torch.arange(6)[None]
    seen = []
    model.lm_head.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    PassOptions().runner(every_logit=every_logit)(model, {"input_ids": ids})
    assert (seen[0] == 6) is every_logit


def test_batches_are_moved_to_the_device_for_either_forward():
    model, given = nn.Linear(8, 4, device="meta"), []
    for forward in (None, lambda network, batch: given.append(batch) or network(batch)):
        options = PassOptions(forward=forward, device="meta")
        assert options.where == torch.device("meta")
        assert options.runner(every_logit=False)(model, torch.ones(3, 8)).device.type == "meta"
    assert given[0].device.type == "meta"
    run = PassOptions(device="meta").runner(every_logit=False)
    assert run(nn.Identity(), torch.ones(3, 8)).device.type == "meta"  # its parameters tell no device
    assert PassOptions().where is None


def test_options_cannot_be_changed_and_unknown_ones_are_refused():
    with pytest.raises(dataclasses.FrozenInstanceError):
        PassOptions().nsamples = 3
    with pytest.raises(TypeError, match="nsample"):
        PassOptions(nsample=3)


@pytest.mark.parametrize(
    ("asked", "device", "ranks", "exact"),
    [
        (None, "cpu", 1, True),
        (None, "cuda", 1, False),
        (None, "cuda", 2, True),
        (True, "cuda", 1, True),
        (False, "cpu", 2, False),
    ],
)
def test_sums_are_exact_on_cpus_and_with_several_ranks_unless_told(asked, device, ranks, exact, monkeypatch):
    monkeypatch.setattr(distributed, "active", lambda: ranks > 1)
    assert PassOptions(exact_sums=asked).sums_exactly(torch.device(device)) is exact


def test_batches_may_run_together_where_nobody_asks_for_the_same_bytes(monkeypatch, tmp_path):
    gpu, cpu, free = torch.device("cuda", 0), torch.device("cpu"), QuantizeConfig()
    assert PassOptions().joins(gpu, free) and not PassOptions().joins(cpu, free)
    assert not PassOptions().joins(gpu, QuantizeConfig(batch_size=8))
    assert not PassOptions().joins(gpu, QuantizeConfig(token_weighting="gradients"))
    assert not PassOptions(exact_sums=True).joins(gpu, free) and not PassOptions(exact_sums=False).joins(cpu, free)
    assert not PassOptions(cache_dir=tmp_path).joins(gpu, free) and not PassOptions(resume=True).joins(gpu, free)
    monkeypatch.setattr(distributed, "active", lambda: True)
    assert not PassOptions(exact_sums=False).joins(gpu, free)
