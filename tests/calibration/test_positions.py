"""token_weighting="labels": the rows that enter each layer's Hessian are those whose output the loss looks at."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoModelForTokenClassification

import gptq_plugin.quantize.one_pass as jobs
from gptq_plugin import QuantizeModule, QuantLinear, distributed
from gptq_plugin.calibration.collect import Batch
from gptq_plugin.calibration.layouts import UNKNOWN
from gptq_plugin.calibration.positions import Positions
from gptq_plugin.calibration.sequences import TARGETS
from gptq_plugin.calibration.verdicts import MATTERS, OBSERVED, UNSEEN, Findings, Rule
from gptq_plugin.errors import CalibrationError
from gptq_plugin.model.hf_models import predicts_next
from gptq_plugin.walk.hessian import Hessian

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

    def watch(weight, hessian, config, **options):
        seen.append(hessian.clone())
        return solve(weight, hessian, config, **options)

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


def test_sources_as_long_as_their_targets_are_told_apart():
    ids = torch.randint(1, 64, (4, 24))
    labels = torch.where(torch.arange(24) % 3 == 0, -100, ids)
    report = QuantizeModule(**SMALL).quantize(t5(), [{"input_ids": ids, "labels": labels}] * 2)
    tokens = {module.name: module.tokens for module in report.quantized}
    assert tokens["encoder.block.0.layer.0.SelfAttention.q"] == 2 * 4 * 24
    assert tokens["decoder.block.0.layer.1.EncDecAttention.k"] == 2 * 4 * 24
    assert tokens["decoder.block.0.layer.1.EncDecAttention.q"] == 2 * 4 * 16


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


# --- the positions by themselves ---


def watched(model, data, token_weighting="all"):
    """The positions of `model` while its batches run, one after the other; takes `rows` in between."""
    return Positions(model, [Batch(one, samples=4) for one in data], token_weighting)


def counted(positions, number=0, shape=(4, 13)):
    """Which positions of a layer's input count."""
    x = torch.arange(torch.Size(shape).numel()).reshape(*shape, 1).float()
    rows = positions.rows(number, "model.layers.0.mlp.up_proj", x)
    assert rows.counted.shape[1:] == (1,) and rows.are_tokens is False
    return [int(row) for row in rows.counted], rows.remark


def true_in(mask):
    return mask.flatten().nonzero().flatten().tolist()


@pytest.mark.parametrize("by_name", [True, False])
def test_the_mask_is_that_of_the_call_of_the_batch_that_runs(by_name):
    model, data = llama(), batches(2)
    data[1]["attention_mask"] = torch.ones_like(data[1]["attention_mask"])
    data[1]["attention_mask"][:, 0] = 0
    positions = watched(model, [{}, {}])
    with positions.watching():
        model(**data[0])  # no batch of ours
        for number, batch in enumerate(data):
            ids, mask = batch["input_ids"], batch["attention_mask"]
            with positions.running(number):
                model(input_ids=ids, attention_mask=mask) if by_name else model(ids, mask)
        for number, batch in enumerate(data):
            assert counted(positions, number) == (true_in(batch["attention_mask"]), None)
    assert not model._forward_pre_hooks and not model.model.layers[0].mlp._forward_pre_hooks


def test_a_call_outside_of_the_batches_is_not_read():
    model, batch = llama(), batches(1)[0]
    positions = watched(model, [{}])

    def run():
        with positions.watching():
            model(**batch)

    with ThreadPoolExecutor(1) as another:  # nothing is known to run there
        another.submit(run).result()
    with positions.running(0):
        pass
    run()  # the batch ran before, on this very thread
    assert counted(positions) == (list(range(52)), None)


def test_a_call_without_a_mask_leaves_the_batchs_own():
    model, batch = llama(), batches(1)[0]
    positions = watched(model, [batch])
    with positions.watching(), positions.running(0):
        model(input_ids=batch["input_ids"])
        assert counted(positions) == (true_in(batch["attention_mask"]), None)


def test_labels_of_the_call_come_before_the_batchs():
    model, batch = llama(), batches(1)[0]
    called = batch["labels"].clone()
    called[:, :9] = -100
    positions = watched(model, [batch], "labels")
    with positions.watching(), positions.running(0):
        model(**{**batch, "labels": called})
    assert counted(positions) == (true_in(predicting({**batch, "labels": called})), None)
    Positions(model, [Batch({}, samples=4)], "labels").check()  # none were looked for in a batch
    again = watched(model, [batch], "labels")
    assert counted(again) == (true_in(predicting(batch)), None)  # of the batch, since no model has been called
    with again.watching(), again.running(0):
        model(**{**batch, "labels": called})
    assert counted(again) == counted(positions)
    positions.check()


def test_labels_of_the_batch_are_read_once_where_no_model_has_been_called():
    batch = batches(1)[0]
    positions = watched(nn.ModuleList([llama()]), [batch], "labels")
    assert counted(positions) == (true_in(predicting(batch)), None)  # shifted, as the one transformers model does
    batch["labels"] = torch.full_like(batch["labels"], -100)
    assert counted(positions)[0]  # read once
    plain = watched(nn.ModuleList([nn.Linear(4, 4)]), batches(1), "labels")
    assert counted(plain) == (true_in(batches(1)[0]["labels"] != -100), None)


def test_where_labels_of_one_batch_are_read_every_batch_must_have_some():
    model, batch = llama(), batches(1)[0]
    positions = watched(model, [batch, {}], "labels")
    positions.check()
    with positions.watching(), positions.running(0):
        model(input_ids=batch["input_ids"])
    with pytest.raises(CalibrationError, match="batch 1 has no labels"):
        positions.check()


def test_labels_on_padded_positions_do_not_count():
    batch = batches(1)[0]
    batch["labels"] = batch["input_ids"].clone()  # of padding too
    positions = watched(llama(), [batch], "labels")
    assert counted(positions)[0] == true_in(predicting(batch))
    other = {**batch, "attention_mask": torch.ones(4, 20)}  # a mask of another length is of something else
    assert counted(watched(llama(), [other], "labels"))[0] == true_in(torch.arange(13).expand(4, 13) < 12)


def test_batches_without_labels_that_count_are_counted():
    blank = {**batches(1)[0], "labels": torch.full((4, 13), -100)}
    positions = watched(llama(), [blank, *batches(1), blank], "labels")
    for number in range(3):
        counted(positions, number)
    assert list(positions.notes().values()) == [2]
    del blank["attention_mask"]
    positions = watched(
        nn.ModuleList([nn.Linear(4, 4)]), [blank, {**blank, "labels": blank["input_ids"]}, blank], "labels"
    )
    for number in range(3):
        counted(positions, number)
    assert list(positions.notes().values()) == [2]


SOURCE = torch.tensor([[1] * 9, [1] * 6 + [0] * 3])
TARGET = torch.tensor([[5, 6, 7, -100], [5, -100, 7, 8]])


def sequences(**arguments):
    """What an encoder-decoder counts of its sources [2, 9] and its targets [2, 4], and the notes."""
    positions = watched(t5(), [{"labels": TARGET, **arguments}], "labels")
    return counted(positions, 0, (2, 9)), counted(positions, 0, (2, 4)), list(positions.notes().values())


def test_an_encoder_decoder_has_a_mask_for_each_sequence():
    ids = torch.ones(2, 9, dtype=torch.long)
    targets = true_in(TARGET != -100)
    assert sequences(input_ids=ids, attention_mask=SOURCE) == ((true_in(SOURCE), None), (targets, None), [0])
    assert sequences(input_ids=ids) == ((list(range(18)), None), (targets, None), [0])
    short = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0]])
    _, (kept, _), _ = sequences(input_ids=ids, attention_mask=SOURCE, decoder_attention_mask=short)
    assert kept == true_in((TARGET != -100) & short.bool())


def test_sources_given_as_embeddings_count_whole_and_that_is_noted_where_they_are_read():
    (rows, remark), (kept, _), _ = sequences(inputs_embeds=torch.zeros(2, 9, 64))
    assert rows == list(range(18)) and "do not describe" in remark and kept == true_in(TARGET != -100)


class Routed(nn.Module):
    """Two experts that read every third token, and all of them."""

    def __init__(self):
        super().__init__()
        self.model = llama()
        self.block = nn.Module()
        self.block.experts = nn.ModuleList(nn.Linear(64, 32) for _ in range(2))
        self.block.forward = lambda x: [self.block.experts[0](x.reshape(-1, 64)[::3]), self.block.experts[1](x)]

    def forward(self, batch):
        return self.block(self.model(**batch, output_hidden_states=True).hidden_states[-1])


def test_an_expert_counts_the_tokens_that_count_among_those_routed_to_it():
    torch.manual_seed(0)
    model, batch = Routed(), batches(1)[0]
    mask, inputs, entered = batch["attention_mask"].bool().flatten(), {}, []
    positions = watched(model, [batch])
    for number, expert in enumerate(model.block.experts):
        expert.register_forward_pre_hook(lambda _, args, number=number: inputs.update({number: args[0].detach()}))
    with positions.watching(lambda experts, rows: entered.append((experts, rows))), positions.running(0):
        model({"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]})
        first = positions.rows(0, "block.experts.0", inputs[0])
        second = positions.rows(0, "block.experts.1", inputs[1])
        strange = positions.rows(0, "block.experts.0", torch.randn(4, 64))
        sequences = torch.randn(4, 15, 64)
        sequence = positions.rows(0, "block.experts.1", sequences)
        weighted = torch.randn(52, 64)  # every token, with a weight that may be 0
        all_tokens = positions.rows(0, "block.experts.0", weighted)
    assert torch.equal(first.counted, inputs[0][mask[::3]]) and first.remark is None and first.are_tokens
    assert torch.equal(second.counted, inputs[1].reshape(-1, 64)[mask]) and second.are_tokens
    assert strange.counted.shape == (4, 64) and not strange.are_tokens
    assert strange.remark == "gets rows that are not tokens of its block's input: all of them counted, padding included"
    assert torch.equal(sequence.counted, sequences.reshape(-1, 64)) and sequence.remark == strange.remark
    assert torch.equal(all_tokens.counted, weighted[mask]) and all_tokens.remark is None
    assert [experts for experts, _ in entered] == ["block.experts"] and torch.equal(entered[0][1], second.counted)


def test_every_row_of_an_expert_counts_where_no_position_is_masked():
    torch.manual_seed(0)
    model, batch = Routed(), {"input_ids": batches(1)[0]["input_ids"]}
    positions, inputs = watched(model, [batch]), []
    model.block.experts[0].register_forward_pre_hook(lambda _, args: inputs.append(args[0].detach()))
    with positions.watching(), positions.running(0):
        model(batch)
        for _ in range(2):
            x = torch.randn(5, 64)
            rows = positions.rows(0, "block.experts.0", x)
        assert torch.equal(rows.counted, x) and rows.remark is None and not rows.are_tokens
        routed = watched(model, [batch])
    with routed.watching(), routed.running(0):
        model(batch)
        for _ in range(2):  # by its hashes, and as known from them
            rows = routed.rows(0, "block.experts.0", inputs[-1])
            assert torch.equal(rows.counted, inputs[-1]) and rows.remark is None and rows.are_tokens


# --- by sizes alone ---


def positions_of(batch, x, model=None):
    """What of a layer's input counts, by sizes alone."""
    positions = Positions(model or nn.Sequential(nn.Linear(8, 8)), [Batch(batch, 3)], "all")
    return positions.rows(0, "0", x)[:2]


def padded(left=False):
    ids = torch.arange(1, 13).reshape(3, 4)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0]])
    return ids, mask.flip(1) if left else mask


@pytest.mark.parametrize("left", [False, True])
def test_padded_positions_never_enter_a_hessian(left):
    ids, mask = padded(left)
    batch = {"input_ids": ids, "attention_mask": mask}
    x = torch.randn(3, 4, 8)
    x[mask == 0] = float("nan")
    for shape in ((3, 4, 8), (12, 8), (3, 2, 2, 8)):  # as the model had it, flattened, split in windows
        rows, remark = positions_of(batch, x.reshape(shape))
        hessian = Hessian(8, "cpu")
        hessian.add(rows)
        kept = x[mask == 1]
        torch.testing.assert_close(hessian.mean(), kept.T @ kept / 9)
        assert int(hessian.tokens) == 9 and remark is None


def test_masks_follow_models_that_put_the_sequence_first():
    ids, mask = padded()
    x = torch.randn(4, 3, 8)
    rows, _ = positions_of({"input_ids": ids, "attention_mask": mask}, x)
    assert torch.equal(rows, x[mask.T == 1])


def test_rows_that_cannot_be_matched_to_the_mask_all_count_and_that_is_reported():
    (ids, mask), x = padded(), torch.randn(7, 8)
    rows, remark = positions_of({"input_ids": ids, "attention_mask": mask}, x)
    assert torch.equal(rows, x) and "cannot be matched" in remark


def test_one_row_a_sample_and_another_sequence_count_whole():
    ids, mask = padded()
    batch = {"input_ids": ids, "attention_mask": mask}
    rows, remark = positions_of(batch, torch.randn(3, 8))  # a pooled vector
    assert rows.shape == (3, 8) and "do not describe" in remark
    rows, remark = positions_of(batch, torch.randn(3, 5, 8))  # an image tower's patches
    assert rows.shape == (15, 8) and "do not describe" in remark


def test_an_encoder_decoders_labels_mask_its_second_sequence():
    ids, mask = padded()
    labels = torch.tensor([[1, 2], [1, -100], [-100, 2]])
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    assert positions_of(batch, torch.randn(3, 2, 8), t5())[0].shape == (5, 8)  # what comes before a label matters
    assert positions_of(batch, torch.randn(3, 4, 8), t5())[0].shape == (9, 8)


def test_a_mask_that_hides_nothing_leaves_the_rows_as_they_are():
    (ids, mask), x = padded(), torch.randn(3, 4, 8)
    rows, remark = positions_of({"input_ids": ids, "attention_mask": torch.ones_like(mask)}, x)
    assert rows.data_ptr() == x.data_ptr() and remark is None


# --- as observed ---

KEY = ("", "attention_mask")
MASKED, WHOLE = Rule(KEY, "samples first"), Rule(None)


def learned(*data, rules=(MASKED,), verdict=OBSERVED, model=None, weighting="all"):
    positions = Positions(model or nn.Sequential(nn.Linear(8, 8)), [Batch(one, 3) for one in data], weighting)
    positions.learn(Findings({"0": rules}, {KEY: verdict}))
    return positions


def numbers(positions, number=0, shape=(3, 4, 8)):
    return len(positions.rows(number, "0", torch.zeros(shape)).counted)


def data(padding=True):
    ids, mask = padded()
    return {"input_ids": ids, "attention_mask": mask if padding else torch.ones_like(mask)}


def test_every_call_of_a_layer_has_its_rule_and_a_run_of_the_batch_begins_with_the_first():
    positions = learned(data(), data(), rules=(WHOLE, MASKED, WHOLE))
    assert [numbers(positions) for _ in range(2)] == [12, 9]
    assert [numbers(positions, 1) for _ in range(4)] == [12, 9, 12, 9]  # a call more: by its sizes
    with positions.running(1):
        assert [numbers(positions, 1) for _ in range(2)] == [12, 9] and numbers(positions) == 12
    with positions.running(0):
        assert [numbers(positions) for _ in range(2)] == [12, 9]
    assert [numbers(learned(data(), rules=(MASKED, MASKED))) for _ in range(3)] == [9, 9, 9]


@pytest.mark.parametrize("one", [{"input_ids": padded()[0]}, data(padding=False)])
def test_every_row_counts_where_a_batch_has_no_such_mask_or_hides_nothing(one):
    x = torch.randn(3, 4, 8)
    positions = learned(one)
    rows = positions.rows(0, "0", x)
    assert torch.equal(rows.counted, x.reshape(-1, 8)) and rows.remark is None
    assert positions.over_ranks() == {}  # no mask hides anything


def test_rows_in_no_known_layout_or_of_other_sizes_all_count_and_that_is_reported():
    x = torch.randn(3, 4, 8)
    rows = learned(data(), rules=(Rule(KEY, UNKNOWN),)).rows(0, "0", x)
    assert len(rows.counted) == 12 and "do not describe" in rows.remark
    rows = learned(data()).rows(0, "0", torch.randn(7, 8))
    assert len(rows.counted) == 7 and "cannot be matched" in rows.remark


def test_what_was_learned_takes_the_place_of_what_sizes_told():
    positions = Positions(nn.Sequential(nn.Linear(8, 8)), [Batch(data(), 3)], "all")
    assert numbers(positions) == 9 and positions.over_ranks() == {"`attention_mask`": UNSEEN}
    positions.learn(Findings({"0": (WHOLE, MASKED)}, {KEY: OBSERVED}))
    assert positions.over_ranks() == {}  # no batch has run since
    assert [numbers(positions) for _ in range(2)] == [12, 9]
    assert positions.over_ranks() == {"`attention_mask`": OBSERVED}
    positions.learn(Findings({"0": (MASKED,)}, {KEY: MATTERS}))
    assert numbers(positions) == 12


def test_the_masks_of_all_ranks_are_told_with_what_was_observed_of_them(monkeypatch):
    positions = learned(data())
    numbers(positions)
    told = []

    def gather_objects(hiding):
        told.append(hiding)
        return [hiding, [("decoder", TARGETS), ("", "another_mask")]]

    monkeypatch.setattr(distributed, "gather_objects", gather_objects)
    assert positions.over_ranks() == {"`attention_mask`": OBSERVED} and told == [[KEY]]
    positions.learn(Findings())
    name = "padding behind a decoder's labels or in its mask of decoder"
    assert positions.over_ranks() == {"`another_mask`": UNSEEN, name: UNSEEN}


def test_a_mask_that_means_the_opposite_is_read_so_in_its_own_module_only():
    hidden = 12 - 9
    for inverted, count in ((frozenset({KEY}), hidden), (frozenset({("decoder", "attention_mask")}), 9)):
        positions = learned(data())
        positions.learn(Findings({"0": (MASKED,)}, {KEY: OBSERVED}, inverted))
        assert numbers(positions) == count
