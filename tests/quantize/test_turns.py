"""State that forwards keep on the model does not pass from one calibration batch to another."""

from __future__ import annotations

from threading import Lock

import numpy as np
import pytest
import torch
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM

from gptq_plugin import QuantizeModule
from gptq_plugin.quantize.batch_runs import BatchRuns

REASON = "the calibration batches ran one at a time"


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)
        self.register_buffer("scale", torch.ones(1))
        self.register_buffer("shift", torch.zeros(32))
        self.tokens = np.zeros(32, dtype=np.float32)


class Conditioned(nn.Module):
    """Two blocks, conditioned by an outer forward that keeps the condition on them, or hands it over."""

    def __init__(self, kept="attribute"):
        super().__init__()
        torch.manual_seed(0)
        self.kept = kept
        self.blocks = nn.ModuleList([Block(), Block()])

    def forward(self, x, condition):
        for block in self.blocks:
            if self.kept == "attribute":
                block.condition = condition
            elif self.kept == "buffers":
                block.shift = condition  # assigned
                block.scale.fill_(2.0).sub_(1.0)  # written to
            elif self.kept == "array":
                block.tokens[:] = condition[0].numpy()
        for block in self.blocks:
            y = torch.relu(block.up(x))
            x = x + block.down(y) + self._condition_of(block, condition)
        return x

    def _condition_of(self, block, condition):
        if self.kept == "attribute":
            return block.condition
        if self.kept == "buffers":
            return block.shift * block.scale
        return torch.from_numpy(block.tokens) if self.kept == "array" else condition


def _batches():
    torch.manual_seed(1)
    return [{"x": torch.randn(1, 40, 32), "condition": 3 * torch.randn(1, 32).repeat(1, 1)} for _ in range(6)]


def _quantized(model, batches, **options):
    module = QuantizeModule(bits=3, group_size=16, **options)
    report = module.quantize(model, batches)
    layers = {name: layer.qweight for name, layer in model.named_modules() if hasattr(layer, "qweight")}
    return layers, report


@pytest.mark.parametrize("options", [{}, {"offload_weights": True, "offload_activations": True}])
@pytest.mark.parametrize("kept", ["attribute", "buffers", "array"])
def test_a_condition_that_is_kept_on_modules_gives_the_codes_of_one_that_is_handed_over(kept, options):
    right, _ = _quantized(Conditioned("nowhere"), _batches())
    model = Conditioned(kept)
    found, report = _quantized(model, _batches(), **options)
    assert found.keys() == right.keys() and all(torch.equal(found[name], right[name]) for name in right)
    told = [one for one in report.all_deviations() if REASON in one]
    assert len(told) == (kept == "array")
    if kept == "buffers":
        assert not any(block.shift.any() for block in model.blocks)
    assert not any(hasattr(block, "condition") for block in model.blocks)


def test_one_at_a_time_is_named_in_the_log_with_the_layer(caplog):
    _quantized(Conditioned("array"), _batches())
    assert any("the input of blocks.1.up depends on which batch ran before it" in one for one in caplog.messages)


def _mixtral():
    sizes = {"hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 2, "num_local_experts": 4}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 128}
    torch.manual_seed(0)
    return MixtralForCausalLM(MixtralConfig(**sizes, **heads)).eval()


def test_experts_quantized_one_batch_at_a_time_get_the_codes_of_lock_step(monkeypatch):
    batches = [{"input_ids": torch.randint(0, 128, (1, 60), generator=torch.manual_seed(i))} for i in range(3)]
    right, report = _quantized(_mixtral(), batches)
    monkeypatch.setattr(BatchRuns, "disturbance", lambda self, layers: "asked for")
    found, alone = _quantized(_mixtral(), batches)
    assert all(torch.equal(found[name], right[name]) for name in right) and found.keys() == right.keys()
    assert [one.tokens for one in alone.modules] == [one.tokens for one in report.modules]
    assert set(alone.all_deviations()) - set(report.all_deviations()) == {
        f"{REASON}, each from its beginning for every group of layers: asked for"
    }


def test_batches_of_a_model_that_keeps_what_cannot_be_copied_run_one_at_a_time():
    class Locked(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.lock, self.calls = nn.Linear(32, 32), nn.Linear(32, 32), Lock(), [0]

        def forward(self, x):
            y = self.first(x)
            self.lock, self.calls[0] = Lock(), self.calls[0] + 1
            return self.second(y)

    model = Locked()
    lock = model.lock
    report = QuantizeModule(bits=8, group_size=32, batch_size=64).quantize(model, [torch.randn(64, 32)] * 2)
    (told,) = report.deviations
    assert told.startswith(REASON) and "what the forward keeps at .lock" in told and "cannot be copied" in told
    assert len(report.quantized) == 2 and model.lock is lock and model.calls == [0]


def test_a_batch_by_itself_takes_turns_with_its_float_forward_and_is_tried_for_it():
    (batch,) = [{name: torch.cat([one[name] for one in _batches()]) for name in _batches()[0]}]
    batch["condition"] = torch.arange(1.0, 1 + len(batch["x"]))[:, None].expand(-1, 32).clone()
    options = {"batch_size": 1024, "nsamples": 1024}
    for alpha, tried in ((0.0, False), (0.5, True)):
        _, report = _quantized(Conditioned("array"), [batch], asymmetric_alpha=alpha, **options)
        assert any(REASON in one for one in report.all_deviations()) == tried
