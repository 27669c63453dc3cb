"""A finish as a whole: what it changes, what it keeps, and what it leaves when it does not help."""

from __future__ import annotations

import copy
import json
import signal

import pytest
import torch
from torch import nn

from gptq_plugin import Finish, QuantizeModule, QuantLinear, load_quantized
from gptq_plugin.errors import CalibrationError, TargetError
from gptq_plugin.finish import finish_model, teacher, train

from finish_cases import FAST, KINDS, divergence, quantized, rows, same, state_of
from models import tiny_gpt2, tiny_llama
from paths import REPOSITORY

SHARED = REPOSITORY.parent / "shared"


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
@pytest.mark.parametrize("options", [{}, {"desc_act": True, "static_groups": False}, {"sym": False}], ids=str)
def test_the_result_is_nearer_to_the_float_model_and_only_scales_and_norms_change(make, options):
    model, twin, quantizer = quantized(make, **options)
    before, float_state, unseen = state_of(model), state_of(twin), rows(seed=9)
    apart = divergence(model, twin, unseen)
    flags = {name: (parameter.requires_grad, parameter.grad) for name, parameter in model.named_parameters()}
    record = quantizer.finish(model, twin, rows(), Finish(**FAST))
    assert record.kept and record.after < record.before and quantizer.report.finish is record
    assert divergence(model, twin, unseen) < apart
    after = state_of(model)
    changed = {name.rpartition(".")[2] if "norm" not in name and "ln_" not in name else "norm" for name in after
               if not torch.equal(after[name], before[name])}  # fmt: skip
    assert changed == {"scales", "norm"}
    assert same(state_of(twin), float_state) and not model.training
    assert flags == {name: (p.requires_grad, p.grad) for name, p in model.named_parameters()}
    assert len(record.curve) == 5 and record.curve[-1].step == 12 and record.held_out_tokens == 8 * 24
    assert record.samples == 32 and record.tokens >= 12 * 200


def test_what_is_exported_is_what_was_judged(tmp_path):
    model, twin, quantizer = quantized()
    record = quantizer.finish(model, twin, rows(), Finish(**FAST, top_logits=128))
    quantizer.export(model, tmp_path / "out")
    loaded = load_quantized(tmp_path / "out")
    assert divergence(loaded, twin, rows()[32:]) == pytest.approx(record.after, rel=1e-4)
    described = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]["meta"]["gptq_plugin"]
    told = described["finish"]
    assert (
        told["kept"] and told["steps"] == 12 and told["tokens"] == record.tokens and told["kl"]["after"] == record.after
    )
    assert told["data"]["sha256"] == record.data_sha256 and len(record.data_sha256) == 64
    report = json.loads((tmp_path / "out/quantization_report.json").read_text())
    assert [one["held_out"] for one in report["finish"]["curve"]] == [one.held_out for one in record.curve]
    for page in ("report.html", "README.md"):
        assert "held-out positions" in (tmp_path / "out" / page).read_text()


@pytest.mark.parametrize("rate", [0.9, 0.3])
def test_a_result_that_is_no_better_leaves_every_byte(rate):
    model, twin, quantizer = quantized(bits=4)
    before = state_of(model)
    record = quantizer.finish(model, twin, rows(), Finish(**{**FAST, "learning_rate": rate}))
    assert not record.kept and "GPTQ's result is best" in record.reason and record.best_step == 0
    assert same(state_of(model), before)
    assert not quantizer.report.finish.kept and "not kept" in quantizer.report.table()


def test_a_forward_has_batches_where_they_are_in_every_step(monkeypatch):
    """One may make NumPy arrays of them; only a graph is given others."""

    def moved(*_):
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    monkeypatch.setattr(teacher.Lesson, "on", moved)
    model, twin, quantizer = quantized()
    assert quantizer.finish(model, twin, rows(), Finish(**FAST)).kept


def test_training_ends_where_held_out_samples_get_no_better():
    model, twin, quantizer = quantized()
    options = {**FAST, "learning_rate": 0.05, "steps": 40, "judgements": 40, "patience": 3}
    record = quantizer.finish(model, twin, rows(), Finish(**options))
    assert record.steps == record.best_step + 3 < 40 and "no better in 3 judgements" in record.reason
    assert record.kept and record.best_step > 0 and record.after == min(one.held_out for one in record.curve)
    assert divergence(model, twin, rows()[32:]) == pytest.approx(record.after, rel=1e-4)  # not that of the last step


def test_labels_choose_positions_where_the_quantizer_weights_tokens_by_labels():
    batches = []
    for number in range(10):
        ids = torch.stack(rows(4, seed=number))
        batches.append({"input_ids": ids, "labels": ids.masked_fill(torch.arange(24) < 20, -100)})
    model, twin, quantizer = quantized(data=batches, token_weighting="labels")
    record = quantizer.finish(model, twin, batches, Finish(**FAST))
    assert record.held_out_tokens == 2 * 4 * 4  # the logits before each label


@pytest.mark.parametrize(("first", "last", "what"), [(8, 10, "held out, by which it is judged"), (0, 8, "to train on")])
@pytest.mark.parametrize("kind", ["scales", "blocks"])
def test_samples_without_a_position_that_counts_are_refused(kind, first, last, what):
    """Nothing could be learned, or decided: a verdict on no position would be none."""
    batches = [{"input_ids": torch.stack(rows(4, seed=number))} for number in range(10)]
    labelled = [{**one, "labels": one["input_ids"].clone()} for one in batches]
    model, twin, quantizer = quantized(data=labelled, token_weighting="labels")
    before = state_of(model)
    for one in labelled[first:last]:
        one["labels"][:] = -100
    with pytest.raises(CalibrationError, match=f"samples {what} counts .all their labels are -100."):
        quantizer.finish(model, twin, labelled, Finish(**FAST, kind=kind))
    assert same(state_of(model), before)


def test_the_float_model_runs_once_on_each_batch_before_it_is_learned_from(monkeypatch):
    model, twin, quantizer = quantized()
    calls, ask = [], finish_model.ask_teacher

    def asked(teacher, rows, *args):
        counted = teacher.get_input_embeddings().register_forward_hook(lambda *_: calls.append(1))
        try:
            return ask(teacher, rows, *args)
        finally:
            counted.remove()
            calls.append(len(rows.batches))

    monkeypatch.setattr(finish_model, "ask_teacher", asked)
    quantizer.finish(model, twin, rows(), Finish(**FAST))
    *forwards, batches = calls
    assert len(forwards) == batches > 1


def test_activations_that_are_computed_twice_give_the_same_result():
    states = []
    for reruns in (False, True):
        model, twin, quantizer = quantized()
        forwards = {module: vars(module).get("forward") for module in model.modules()}
        quantizer.finish(model, twin, rows(), Finish(**FAST, checkpoint_activations=reruns))
        assert {module: vars(module).get("forward") for module in model.modules()} == forwards
        states.append(state_of(model))
    assert same(*states)


def test_blocks_keep_their_inputs_alone_for_the_backward(monkeypatch):
    """Fewer tensors are saved outside of blocks that are run again."""
    saved, original = [], train.Training._forward

    def pack(tensor):
        saved[-1] += 1
        return tensor

    def forward(self, lesson):
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            return original(self, lesson)

    monkeypatch.setattr(train.Training, "_forward", forward)
    for reruns in (False, True):
        model, twin, quantizer = quantized()
        saved.append(0)
        quantizer.finish(model, twin, rows(), Finish(**{**FAST, "steps": 1}, checkpoint_activations=reruns))
    assert 0 < saved[1] < saved[0] / 3


def test_no_room_for_activations_has_them_computed_twice_and_no_gradient_counts_twice(monkeypatch, caplog):
    wanted, twin, quantizer = quantized()
    quantizer.finish(wanted, twin, rows(), Finish(**FAST))
    original, failures = train.Training._gradients_of, iter([torch.OutOfMemoryError("no room")])

    def short(self, lesson):
        found = original(self, lesson)
        if not self._reruns and self.steps == 3:
            raise next(failures)
        return found

    monkeypatch.setattr(train.Training, "_gradients_of", short)
    model, twin, quantizer = quantized()
    with caplog.at_level("INFO"):
        assert quantizer.finish(model, twin, rows(), Finish(**FAST)).kept
    assert "activations are computed twice from here on: there was no room" in caplog.text
    assert same(state_of(model), state_of(wanted))


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_on_all_rows_is_the_same_in_one_batch_and_in_several(kind):
    found = []
    for size in (32, 8):
        model, twin, quantizer = quantized()
        options = {**KINDS[kind], "batch_size": size, "tokens_per_step": 32 * 24, "nsamples": 32, "steps": 4}
        found.append(quantizer.finish(model, twin, rows(), Finish(**options)))
    one, several = found
    assert one.samples == several.samples == 32
    assert [each.held_out for each in several.curve] == pytest.approx([each.held_out for each in one.curve], rel=1e-3)
    assert [each.after for each in several.blocks] == pytest.approx([each.after for each in one.blocks], rel=1e-3)


def test_ctrl_c_ends_it_after_the_step_and_the_best_so_far_is_kept(monkeypatch):
    original = train.Training._step

    def interrupted(self, interruption):
        if self.steps == 5:
            signal.raise_signal(signal.SIGINT)
        return original(self, interruption)

    monkeypatch.setattr(train.Training, "_step", interrupted)
    model, twin, quantizer = quantized()
    record = quantizer.finish(model, twin, rows(), Finish(**FAST))
    assert record.steps == 6 and record.kept and "interrupted after 6 of 12 steps" in record.reason
    assert record.curve[-1].step == 6 and divergence(model, twin, rows(seed=9)) < 10


@pytest.mark.parametrize("where", ["_step", "_judge"])
def test_an_error_leaves_the_quantized_model_as_it_was(where, monkeypatch):
    model, twin, quantizer = quantized()
    before, original = state_of(model), getattr(train.Training, where)

    def failing(self, *args):
        if self.steps == 3:
            raise MemoryError("a fault")
        return original(self, *args)

    monkeypatch.setattr(train.Training, where, failing)
    with pytest.raises(MemoryError, match="a fault"):
        quantizer.finish(model, twin, rows(), Finish(**FAST))
    assert same(state_of(model), before) and quantizer.report.finish is None
    assert sum(isinstance(one, QuantLinear) for one in model.modules()) == 14


def test_gradients_that_are_not_finite_end_it_with_what_was_best(monkeypatch):
    original = train.Training._learn

    def broken(self, lesson):
        value = original(self, lesson)
        if self.steps == 7:
            self._student.ratios[0].grad[0, 0] = torch.nan
        return value

    monkeypatch.setattr(train.Training, "_learn", broken)
    model, twin, quantizer = quantized()
    record = quantizer.finish(model, twin, rows(), Finish(**FAST))
    assert record.kept and record.best_step == 6 and "not finite in step 8" in record.reason


def test_inside_temporarily_the_model_teaches_itself_and_is_float_again_behind_it():
    model = tiny_llama(initializer_range=0.2)
    before = state_of(model)
    quantizer = QuantizeModule(bits=2, group_size=32, nsamples=32)
    with quantizer.temporarily(model, rows()) as report:
        twin = tiny_llama(initializer_range=0.2)
        apart = divergence(model, twin, rows(seed=9))
        record = quantizer.finish(model, None, rows(), Finish(**FAST))
        assert record.kept and divergence(model, twin, rows(seed=9)) < apart and report.finish is record
    assert same(state_of(model), before)


def test_a_finish_inside_temporarily_stays_with_a_model_that_stays_quantized():
    model, twin = (tiny_llama(initializer_range=0.2) for _ in range(2))
    quantizer = QuantizeModule(bits=2, group_size=32, nsamples=32)
    with quantizer.temporarily(model, rows(), keep=True):
        record = quantizer.finish(model, None, rows(), Finish(**FAST, top_logits=128))
    assert divergence(model, twin, rows()[32:]) == pytest.approx(record.after, rel=1e-4)


def test_a_second_finish_inside_temporarily_is_refused_since_norms_are_no_longer_the_float_models():
    model = tiny_llama(initializer_range=0.2)
    before = state_of(model)
    quantizer = QuantizeModule(bits=2, group_size=32, nsamples=32)
    with quantizer.temporarily(model, rows()):
        first = quantizer.finish(model, None, rows(), Finish(**FAST))
        with pytest.raises(TargetError, match="finished already"):
            quantizer.finish(model, None, rows(), Finish(**FAST))
        quantizer.undo_finish("to begin again")
        again = quantizer.finish(model, None, rows(), Finish(**FAST))
        assert again.kept and (again.before, again.after) == (first.before, first.after)
    assert same(state_of(model), before)


def test_a_learning_rate_that_breaks_the_model_ends_it_with_what_was_best():
    model, twin, quantizer = quantized()
    before = state_of(model)
    record = quantizer.finish(model, twin, rows(), Finish(**{**FAST, "steps": 60, "learning_rate": 0.9}))
    assert "the divergence is not finite in step" in record.reason and 0 < record.steps < 60
    assert record.kept != same(state_of(model), before)


def test_it_can_be_undone():
    model, twin, quantizer = quantized()
    before = state_of(model)
    quantizer.finish(model, twin, rows(), Finish(**FAST))
    assert not same(state_of(model), before)
    quantizer.undo_finish("a limit")
    assert same(state_of(model), before)
    assert not quantizer.report.finish.kept and quantizer.report.finish.reason == "a limit"


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda given: given.update(teacher=None), TargetError, "needs the float model"),
        (lambda given: given.update(model=tiny_llama()), TargetError, "no quantized layers to finish"),
        (lambda given: given.update(finish=Finish(kind="none")), ValueError, "leave the call out"),
        (lambda given: given.update(finish="scales"), ValueError, "finish must be a Finish"),
        (lambda given: given.update(model=nn.Linear(2, 2)), TargetError, "Linear holds none of them"),
        (lambda given: given.update(batches=rows(1)), CalibrationError, "there are 1 samples in batches of 4"),
        (lambda given: given.update(forward=lambda model, batch: None), TargetError, "computed none"),
        (
            lambda given: given.update(forward=lambda model, batch: [model(**batch) for _ in range(2)]),
            TargetError,
            r"computed \[4, 24, 128\], \[4, 24, 128\]",
        ),
    ],
)
def test_what_cannot_work_is_refused_and_nothing_changes(change, error, message):
    model, twin, quantizer = quantized()
    before = state_of(model)
    given = {"model": model, "teacher": twin, "batches": rows(), "finish": Finish(**FAST)}
    change(given)
    with pytest.raises(error, match=message):
        quantizer.finish(**given)
    assert same(state_of(model), before)


def test_a_float_model_with_nan_is_refused():
    model, twin, quantizer = quantized()
    twin.model.layers[1].mlp.up_proj.weight.data[3] = torch.nan
    with pytest.raises(CalibrationError, match="the logits of batch 0 of the finish .* are not finite"):
        quantizer.finish(model, twin, rows(), Finish(**FAST))


def test_hooks_of_users_are_called_in_the_finish_and_stay():
    model, twin, quantizer = quantized()
    calls = []
    layer = model.model.layers[0].mlp.up_proj
    layer.register_forward_hook(lambda *_: calls.append(1))
    quantizer.finish(model, twin, rows(), Finish(**FAST))
    assert calls and model.model.layers[0].mlp.up_proj is layer
    count = len(calls)
    model(input_ids=rows()[0][None])
    assert len(calls) == count + 1


def test_experts_are_finished_one_by_one():
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "qwen3_moe", hidden_size=64, intermediate_size=64, moe_intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, num_experts=4, num_experts_per_tok=2, initializer_range=0.2,
        vocab_size=128,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    twin = copy.deepcopy(model)
    quantizer = QuantizeModule(bits=2, group_size=32, nsamples=32)
    quantizer.quantize(model, rows())
    before, apart = state_of(model), divergence(model, twin, rows(seed=9))
    assert quantizer.finish(model, twin, rows(), Finish(**FAST)).kept
    assert divergence(model, twin, rows(seed=9)) < apart
    moved = [name for name, tensor in state_of(model).items() if not torch.equal(tensor, before[name])]
    assert sum("experts" in name and name.endswith("scales") for name in moved) == 12
