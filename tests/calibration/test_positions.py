"""token_weighting="labels": the rows that enter each layer's Hessian are those whose output the loss looks at."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoModelForTokenClassification

import gptq_plugin.quantize.one_pass as jobs
from gptq_plugin import QuantizeModule, QuantLinear
from gptq_plugin.errors import CalibrationError
from gptq_plugin.model.hf_models import predicts_next

SMALL = {"group_size": 32, "nsamples": 64, "batch_size": 4, "clip_ratios": (1.0,), "token_weighting": "labels"}
TINY = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 64}


def llama(kind=AutoModelForCausalLM):
    torch.manual_seed(0)
    return kind.from_config(AutoConfig.for_model("llama", num_key_value_heads=1, **TINY)).eval()


def t5():
    torch.manual_seed(0)
    config = AutoConfig.for_model("t5", d_model=64, d_kv=32, d_ff=96, num_layers=1, num_heads=2, vocab_size=64,
                                  decoder_start_token_id=0)  # fmt: skip
    return AutoModelForSeq2SeqLM.from_config(config).eval()


def batches(count=6, positions=13, masked=5):
    """The prompt (5 labels), some of the answer, and padding at the end have no label."""
    g = torch.Generator().manual_seed(1)
    made = []
    for _ in range(count):
        ids = torch.randint(0, 64, (4, positions), generator=g)
        labels = ids.clone()
        labels[:, :masked] = -100
        labels[torch.rand(ids.shape, generator=g) < 0.2] = -100
        mask = torch.ones_like(ids)
        mask[1, -3:], labels[1, -3:] = 0, -100
        made.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return made


@pytest.fixture
def hessians(monkeypatch):
    """What every solve was given: [in, in] means, with the layers' names from the report's order."""
    seen = []
    solve = jobs.solve_shared

    def watch(weight, hessian, config):
        seen.append(hessian.clone())
        return solve(weight, hessian, config)

    monkeypatch.setattr(jobs, "solve_shared", watch)
    return seen


def by_hook(model, run, selected):
    """Per layer Σ x xᵀ and rows of the finished model's inputs, at `selected(batch)`: the plain way."""
    sums, rows = {}, {}

    def hook(name, number):
        def add(_, args):
            x = args[0].detach()[number[0]].double()
            sums[name] = sums.get(name, 0) + x.T @ x
            rows[name] = rows.get(name, 0) + len(x)

        return add

    keep = [None]
    for name, layer in model.named_modules():
        if isinstance(layer, QuantLinear):
            layer.register_forward_pre_hook(hook(name, keep))
    with torch.no_grad():
        for batch in batches():
            keep[0] = selected(batch)
            run(batch)
    return sums, rows


def predicting(batch):
    """Position i of a causal model predicts label i + 1."""
    later = torch.full_like(batch["labels"], -100)
    later[:, :-1] = batch["labels"][:, 1:]
    return (later != -100) & batch["attention_mask"].bool()


@pytest.mark.parametrize("passes_labels", [False, True])
def test_every_hessian_of_a_causal_model_holds_the_positions_that_predict_a_label(passes_labels, hessians):
    model = llama()
    forward = (lambda model, batch: model(**batch)) if passes_labels else None
    report = QuantizeModule(**SMALL).quantize(model, batches(), forward=forward)
    sums, rows = by_hook(model, lambda batch: model(**batch), predicting)
    groups = [["self_attn.q_proj"], ["self_attn.o_proj"], ["mlp.gate_proj"], ["mlp.down_proj"]]
    assert len(hessians) == 4
    for mean, (name,) in zip(hessians, groups):
        name = f"model.layers.0.{name}"
        torch.testing.assert_close(mean.double(), sums[name] / rows[name], rtol=1e-4, atol=1e-5)
    assert {module.tokens for module in report.quantized} == set(rows.values())
    assert report.tokens == sum(int(predicting(batch).sum()) for batch in batches())
    assert report.tokens < sum(int(batch["attention_mask"].sum()) for batch in batches())
    assert not list(report.all_deviations())[1:]  # only that there are fewer samples than asked


def test_the_positions_are_those_whose_logits_change_the_models_own_loss():
    """The shift is transformers', not ours: the gradient of its loss says which positions it looks at."""
    batch = batches(1)[0]
    for model in (llama(), llama(AutoModelForTokenClassification)):
        if not predicts_next(model):
            batch["labels"] = batch["labels"].clamp(max=1)
        seen = {}
        head = model.lm_head if predicts_next(model) else model.score
        head.register_forward_hook(lambda _, __, out, seen=seen: (out.retain_grad(), seen.update(out=out))[0])
        model(**batch).loss.backward()
        looked_at = seen["out"].grad.abs().sum(-1) > 0
        wanted = predicting(batch) if predicts_next(model) else batch["labels"] != -100
        assert torch.equal(looked_at, wanted)


def test_a_model_that_labels_its_own_positions_is_not_shifted(hessians):
    model = llama(AutoModelForTokenClassification)
    data = [{**batch, "labels": batch["labels"].clamp(max=1)} for batch in batches()]
    report = QuantizeModule(**SMALL).quantize(model, data)
    assert report.tokens == sum(int((batch["labels"] != -100).sum()) for batch in data)


def test_an_encoder_decoders_targets_are_weighed_and_its_sources_counted_whole():
    g = torch.Generator().manual_seed(1)
    data, source, target = [], 0, 0
    for _ in range(6):
        ids, labels = (torch.randint(1, 64, (4, n), generator=g) for n in (13, 7))
        mask = torch.ones_like(ids)
        mask[0, 9:], labels[:, 4:] = 0, -100
        data.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
        source, target = source + int(mask.sum()), target + int((labels != -100).sum())
    report = QuantizeModule(**SMALL).quantize(t5(), data)
    tokens = {module.name: module.tokens for module in report.quantized}
    assert tokens["encoder.block.0.layer.0.SelfAttention.q"] == source
    assert tokens["decoder.block.0.layer.1.EncDecAttention.k"] == source
    assert tokens["decoder.block.0.layer.0.SelfAttention.q"] == target
    assert tokens["decoder.block.0.layer.2.DenseReluDense.wi"] == target


def test_sources_as_long_as_their_targets_are_reported():
    ids = torch.randint(1, 64, (4, 24))
    report = QuantizeModule(**SMALL).quantize(t5(), [{"input_ids": ids, "labels": ids}] * 2)
    assert "2 calibration batches have sources as long as their targets" in " ".join(report.deviations)


def test_a_plain_module_counts_the_labelled_positions_of_its_batches(hessians):
    class Tagger(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(32, 64)

        def forward(self, x):
            return self.net(x)

    x, labels = torch.randn(8, 9, 32), torch.randint(0, 2, (8, 9))
    labels[:, ::2] = -100
    QuantizeModule(**SMALL).quantize(Tagger(), [{"x": x, "labels": labels}])
    kept = x[labels != -100]
    torch.testing.assert_close(hessians[0], kept.T @ kept / len(kept))


def test_a_batch_whose_labels_are_all_masked_contributes_nothing_and_that_is_reported(hessians):
    data = batches()
    without, _ = QuantizeModule(**SMALL).quantize(llama(), data), hessians.clear
    first = [h.clone() for h in hessians]
    hessians.clear()
    blank = {**data[0], "labels": torch.full_like(data[0]["labels"], -100)}
    report = QuantizeModule(**SMALL).quantize(llama(), [*data, blank])
    assert report.tokens == without.tokens
    torch.testing.assert_close(hessians[0], first[0])
    assert "1 calibration batches hold no label that counts (all are -100)" in " ".join(report.deviations)


def test_only_masked_labels_are_refused_with_the_remedy():
    data = [{**batch, "labels": torch.full_like(batch["labels"], -100)} for batch in batches()]
    with pytest.raises(CalibrationError, match="too short: 0 tokens.*token_weighting is 'labels'"):
        QuantizeModule(**SMALL).quantize(llama(), data)


@pytest.mark.parametrize(
    "without",
    [
        lambda batch: {key: value for key, value in batch.items() if key != "labels"},
        lambda batch: {**batch, "labels": torch.zeros(4, dtype=torch.long)},  # a class for each sample
        lambda batch: {**batch, "labels": torch.zeros(4, 13)},  # a regression
    ],
)
def test_a_batch_without_labels_of_positions_is_refused_in_the_rehearsal(without):
    quantizer, data = QuantizeModule(**SMALL), batches()
    with pytest.raises(CalibrationError, match="batch 0 has no labels .samples, positions.: give batches with a field"):
        quantizer.rehearse(llama(), [without(data[0])], whole=False)
    with pytest.raises(CalibrationError, match="batch 2 has no labels"):
        quantizer.rehearse(llama(), [*data[:2], without(data[2])])
    model = llama()
    with pytest.raises(CalibrationError, match="batch 2 has no labels"):
        quantizer.quantize(model, [*data[:2], without(data[2])])
    assert not any(isinstance(module, QuantLinear) for module in model.modules())


def test_a_layer_of_another_sequence_counts_whole_and_that_is_reported():
    class Prefixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = llama()
            self.other = nn.Linear(64, 64)

        def forward(self, input_ids, labels=None):
            embedded = self.other(F.one_hot(input_ids[:, :5], 64).float())
            return self.model(input_ids=input_ids).logits.mean() + embedded.mean()

    data = [{"input_ids": batch["input_ids"], "labels": batch["labels"]} for batch in batches()]
    report = QuantizeModule(**SMALL).quantize(Prefixed(), data)
    other = next(module for module in report.quantized if module.name == "other")
    assert (
        other.tokens == 6 * 4 * 5
        and "reads a sequence that the attention mask or labels do not describe" in other.deviations[0]
    )
