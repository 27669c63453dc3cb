"""Metrics of a Trainer before and after, and their limits; with transformers.Trainer's own evaluation."""

from __future__ import annotations

import functools
import math
from collections import deque

import numpy
import pytest
import torch
from transformers import Trainer, TrainingArguments

from gptq_plugin import GPTQTrainerCallback, QuantizeModule, load_quantized
from gptq_plugin.errors import QualityError
from gptq_plugin.hf.evaluation_losses import Losses, _Batches
from gptq_plugin.hf.validation import Validation
from gptq_plugin.training.quality_gate import QualityGate
from gptq_plugin.training.samples import Part

from trainer_runs import SMALL, Rows, llama, quantized


def run(tmp_path, config=None, kind=Trainer, validate=None, **options):
    """Trains with the callback added, whose validate is the trainer's own unless given; returns both."""
    arguments = TrainingArguments(
        str(tmp_path / "run"), use_cpu=True, max_steps=3, per_device_train_batch_size=8, report_to=[],
        disable_tqdm=True, save_strategy="no", learning_rate=1e-3, **options.pop("arguments", {}),
    )  # fmt: skip
    data = options.pop("eval_dataset", None) or Rows()
    trainer = kind(llama(), arguments, train_dataset=Rows(), eval_dataset=data)
    callback = GPTQTrainerCallback(
        QuantizeModule(**{**SMALL, **(config or {})}),
        tmp_path / "out",
        validate=trainer.evaluate if validate is None else validate,
        **options,
    )
    trainer.add_callback(callback)
    trainer.train()
    return trainer, callback


def test_the_trainers_metrics_before_and_after_are_reported_and_logged(tmp_path):
    trainer, callback = run(tmp_path, {"bits": 2})
    measured = callback.report.metrics
    assert set(measured) == {"eval_loss"}  # and no times
    assert measured["eval_loss"]["gptq"] == pytest.approx(trainer.evaluate()["eval_loss"], abs=1e-6)
    assert measured["eval_loss"]["gptq"] != measured["eval_loss"]["float"]
    float_model = load_quantized(tmp_path / "out")  # the export is the quantized one
    ids = Rows().ids
    with torch.no_grad():
        assert float_model(input_ids=ids, labels=ids).loss == pytest.approx(measured["eval_loss"]["gptq"], abs=1e-4)
    (entry,) = [entry for entry in trainer.state.log_history if "gptq/eval_loss/difference" in entry]
    change = measured["eval_loss"]["gptq"] - measured["eval_loss"]["float"]
    assert entry["gptq/eval_loss/difference"] == pytest.approx(change)


def test_a_result_that_is_worse_than_allowed_raises_and_leaves_the_float_model(tmp_path):
    with pytest.raises(QualityError, match=r"eval_loss went from .* \+1e-09 allowed"):
        run(tmp_path, {"bits": 2}, max_degradation={"eval_loss": 1e-9})
    assert not (tmp_path / "out").exists() and (tmp_path / "run" / "trained-3").is_dir()


def test_warn_exports_and_escalate_takes_more_bits_until_the_limit_holds(tmp_path, caplog):
    _, callback = run(tmp_path, {"bits": 2}, max_degradation={"eval_loss": 1e-9}, on_fail="warn")
    assert load_quantized(tmp_path / "out") and any("eval_loss went from" in d for d in callback.report.deviations)
    (found,) = callback.report.metrics.values()
    limit = (found["gptq"] - found["float"]) / 2
    assert limit > 0
    trainer, callback = run(
        tmp_path / "second", {"bits": 2}, max_degradation={"eval_loss": limit}, on_fail="escalate", max_bits=9
    )
    (found,) = callback.report.metrics.values()
    assert found["gptq"] - found["float"] <= limit
    assert any(d.startswith("escalated") for d in callback.report.deviations) and quantized(trainer.model)


def test_what_a_subclass_evaluates_is_what_counts(tmp_path):
    class Twice(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
            loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
            return (2 * loss, outputs) if return_outputs else 2 * loss

    trainer, callback = run(tmp_path, kind=Twice)
    plain = trainer.model(input_ids=Rows().ids, labels=Rows().ids).loss
    assert callback.report.metrics["eval_loss"]["gptq"] == pytest.approx(2 * plain.item(), rel=1e-4)


def test_evaluations_of_the_callback_are_no_evaluations_of_training(tmp_path):
    """calibration="val" samples the last evaluation in training: measuring adds no data to it."""
    arguments = {"eval_strategy": "steps", "eval_steps": 3}
    _, callback = run(tmp_path, calibration="val", arguments=arguments, max_degradation={"eval_loss": 10.0})
    assert callback.report.samples == SMALL["nsamples"]


def test_a_limit_of_a_metric_that_is_not_evaluated_is_refused_in_the_first_evaluation(tmp_path):
    arguments = {"eval_strategy": "steps", "eval_steps": 1}
    with pytest.raises(ValueError, match="max_degradation names eval_los, .* did you mean eval_loss"):
        run(tmp_path, max_degradation={"eval_los": 0.1}, arguments=arguments)
    assert not (tmp_path / "run" / "trained-3").exists()


def test_without_evaluations_in_training_it_is_refused_at_the_end_and_the_weights_are_kept(tmp_path):
    with pytest.raises(ValueError, match="did you mean eval_loss"):
        run(tmp_path, max_degradation={"eval_los": 0.1})
    assert (tmp_path / "run" / "trained-3").is_dir() and not (tmp_path / "out").exists()


def test_several_evaluation_sets_have_their_own_limits(tmp_path):
    _, callback = run(
        tmp_path, eval_dataset={"a": Rows(), "b": Rows()}, max_degradation={"eval_b_loss": 10.0},
        arguments={"eval_strategy": "steps", "eval_steps": 1},
    )  # fmt: skip
    assert set(callback.report.metrics) == {"eval_a_loss", "eval_b_loss"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_degradation": {"eval_loss": 0.1}}, "validate=trainer.evaluate"),
        ({"validate": True}, "validate must be a function that returns metrics, such as trainer.evaluate"),
        ({"validate": dict, "max_degradation": {"eval_loss": 0}}, "other than zero"),
        ({"validate": dict, "on_fail": "ignore"}, "on_fail must be one of"),
    ],
)
def test_options_that_cannot_work_are_refused_when_the_callback_is_made(options, message):
    with pytest.raises(ValueError, match=message):
        GPTQTrainerCallback(QuantizeModule(**SMALL), **options)


def test_a_model_with_adapters_is_refused_before_training(tmp_path):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(llama(), peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="of a model with PEFT adapters a merged copy is quantized"):
        Validation(dict, QualityGate({})).check_model(model)


def test_numbers_alone_are_metrics():
    found = {"a": 1, "b": 0.5, "c": "text", "d": True, "eval_runtime": 3.0, "nan": math.nan}
    before = Validation(lambda: found, QualityGate({})).of_float_model().before
    assert {name: value for name, value in before.items() if name != "nan"} == {"a": 1.0, "b": 0.5}
    with pytest.raises(ValueError, match="must return a mapping"):
        Validation(lambda: 3, QualityGate({})).of_float_model()
    with pytest.raises(ValueError, match="must return a mapping from names to numbers"):
        Validation(lambda: {0: 3.0}, QualityGate({})).of_float_model()


@pytest.mark.parametrize("kind", [torch.tensor, numpy.float32, numpy.array])
def test_numbers_of_libraries_are_metrics(kind):
    assert Validation(lambda: {"a": kind(0.5)}, QualityGate({"a": 1})).of_float_model().before == {"a": 0.5}


# --- limits with a confidence ---


def test_the_trainers_loss_is_judged_by_its_batches(tmp_path):
    """Of its own evaluation the batches' losses are known, whatever a subclass computes."""

    class Twice(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
            loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
            return (2 * loss, outputs) if return_outputs else 2 * loss

        def evaluate(self, *args, **kwargs):
            found = super().evaluate(*args, **kwargs)
            ids = Rows().ids[:5]
            self.prediction_step(self.model, {"input_ids": ids, "labels": ids}, True)  # of no evaluation
            return found

    limits = {"eval_loss": "90% at 95%"}
    one_by_one = {"per_device_eval_batch_size": 2}
    trainer, callback = run(tmp_path, {"bits": 2}, kind=Twice, max_degradation=limits, arguments=one_by_one)
    (spread,), (found,) = callback.report.spreads.values(), callback.report.metrics.values()
    assert (spread.parts, spread.unit, spread.why) == (len(Rows()), "samples", "") and spread.low < found[
        "gptq"
    ] - found["float"] < spread.high
    assert found["gptq"] == pytest.approx(trainer.evaluate()["eval_loss"], abs=1e-5)
    assert "±" in (tmp_path / "out/README.md").read_text()
    (entry,) = [entry for entry in trainer.state.log_history if "gptq/eval_loss/margin" in entry]
    assert entry["gptq/eval_loss/margin"] == pytest.approx(spread.margin)
    assert "prediction_step" not in vars(trainer) and "evaluation_loop" not in vars(trainer)


def test_the_interval_is_over_samples_whatever_the_batches_are(tmp_path):
    spreads = []
    for size in (1, 5):
        arguments = {"per_device_eval_batch_size": size}
        _, callback = run(
            tmp_path / str(size), {"bits": 2}, max_degradation={"eval_loss": "90% at 95%"}, arguments=arguments
        )
        spreads += callback.report.spreads.values()
    assert [one.parts for one in spreads] == [len(Rows())] * 2 and spreads[1].unit == "samples"
    assert spreads[1].low == pytest.approx(spreads[0].low, rel=1e-3)
    assert spreads[1].high == pytest.approx(spreads[0].high, rel=1e-3)


class Contrastive(Trainer):
    """A loss of each sample against the others of its batch, from which it takes the labels."""

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        inputs.pop("labels")
        outputs = model(**inputs, output_hidden_states=True)
        states = outputs.hidden_states[-1].mean(1)
        loss = torch.nn.functional.cross_entropy(states @ states.T, torch.arange(len(states)))
        return (loss, outputs) if return_outputs else loss


def test_a_loss_of_whole_batches_is_noticed_and_they_are_drawn(tmp_path):
    arguments = {"per_device_eval_batch_size": 2}
    _, callback = run(tmp_path, {"bits": 2}, kind=Contrastive, arguments=arguments)
    (spread,) = callback.report.spreads.values()
    assert (spread.parts, spread.unit) == (12, "batches") and "is no mean of its samples' (0" in spread.why
    assert "over 12 batches, because a batch's value" in (tmp_path / "out/README.md").read_text()


def test_a_mean_over_tokens_is_drawn_with_the_samples_tokens(tmp_path):
    class Padded(Rows):
        def __getitem__(self, index):
            labels = self.ids[index].clone()
            labels[2 + index % 13 :] = -100
            return {"input_ids": self.ids[index], "labels": labels}

    arguments = {"per_device_eval_batch_size": 6}
    trainer, callback = run(tmp_path, {"bits": 2}, eval_dataset=Padded(), arguments=arguments)
    (spread,), (found,) = callback.report.spreads.values(), callback.report.metrics.values()
    assert (spread.parts, spread.unit) == (24, "samples")
    assert spread.low < found["gptq"] - found["float"] < spread.high


def test_what_a_trainer_gathers_for_its_own_metrics_is_of_batches_alone(tmp_path):
    class Gathers(Trainer):
        steps = 0

        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.gathered, self.queue, self.seen = {"eval": {"sizes": []}}, deque(), set()
            self.own = self.evaluation_loop = functools.partial(Trainer.evaluation_loop, self)

        def prediction_step(self, model, inputs, *args, **kwargs):
            self.gathered["eval"]["sizes"].append(len(inputs["input_ids"]))
            self.queue.append(0)
            self.seen.add(len(inputs["input_ids"]))
            self.steps += 1
            return super().prediction_step(model, inputs, *args, **kwargs)

    trainer, callback = run(tmp_path, kind=Gathers, arguments={"per_device_eval_batch_size": 5})
    assert trainer.gathered["eval"]["sizes"] == [5, 5, 5, 5, 4] * 2 and trainer.steps == 10
    assert len(trainer.queue) == 10 and trainer.seen == {4, 5}
    assert trainer.evaluation_loop is trainer.own
    assert next(iter(callback.report.spreads.values())).unit == "samples"


def test_losses_of_16_bits_are_compared_as_they_are_exact(tmp_path):
    class Rough(Trainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.prediction_step = functools.partial(Trainer.prediction_step, self)  # no method

        def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
            loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
            return (loss.bfloat16(), outputs) if return_outputs else loss

    _, callback = run(tmp_path, {"bits": 2}, kind=Rough, arguments={"per_device_eval_batch_size": 6})
    (spread,) = callback.report.spreads.values()
    assert (spread.parts, spread.unit, spread.why) == (24, "samples", "")


class NoCopies(dict):
    def __copy__(self):
        raise RuntimeError("there is one of these")


def test_a_trainer_that_cannot_be_copied_is_evaluated_all_the_same_and_batches_are_drawn(tmp_path):
    class Holding(Trainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.held = NoCopies()

    _, callback = run(tmp_path, {"bits": 2}, kind=Holding, arguments={"per_device_eval_batch_size": 2})
    (spread,) = callback.report.spreads.values()
    assert (spread.parts, spread.unit) == (12, "batches")
    assert spread.why == "single samples cannot be run (RuntimeError: there is one of these)"


def test_batches_without_a_loss_are_no_part_of_its_mean(tmp_path):
    class Some(Trainer):
        def prediction_step(self, model, inputs, *args, **kwargs):
            loss, *rest = super().prediction_step(model, inputs, *args, **kwargs)
            return (None if torch.equal(inputs["input_ids"][0], Rows().ids[4]) else loss, *rest)

    _, callback = run(tmp_path, {"bits": 2}, kind=Some, arguments={"per_device_eval_batch_size": 4})
    (spread,) = callback.report.spreads.values()
    assert (spread.parts, spread.unit) == (20, "samples")


def test_a_value_that_is_no_mean_of_the_batches_is_a_plain_number():
    """A subclass may return something else under the loss's name, or nothing."""
    losses = Losses({"eval_loss": _Batches([Part(torch.tensor(1.0), 1, 0, 7), Part(torch.tensor(3.0), 1, 1, 8)])})
    assert losses.measured("eval_loss", 2.0).values == [1.0, 3.0]
    assert type(losses.measured("eval_loss", 2.1)) is float and losses.measured("eval_loss", None) is None


def test_several_evaluation_datasets_have_their_spreads(tmp_path):
    sets = {"one": Rows(), "two": Rows()}
    _, callback = run(tmp_path, eval_dataset=sets, arguments={"per_device_eval_batch_size": 1})
    assert set(callback.report.spreads) == {"eval_one_loss", "eval_two_loss"} == set(callback.report.metrics)


@pytest.mark.parametrize("kind", [list, torch.tensor])
def test_a_function_returns_a_value_for_each_sample(kind, tmp_path):
    calls = []

    def validate():
        calls.append(0)
        return {"nll": kind([1.0 + 0.01 * len(calls) * n for n in range(12)]), "words": ["a"], "none": []}

    _, callback = run(tmp_path, validate=validate, max_degradation={"nll": "50% at 95%"})
    assert callback.report.metrics["nll"] == pytest.approx({"float": 1.055, "gptq": 1.11})
    assert set(callback.report.metrics) == {"nll"} and callback.report.spreads["nll"].parts == 12


def test_confidence_that_cannot_be_had_is_refused_before_the_model_is_quantized(tmp_path):
    for validate, why in ((lambda: {"loss": 1.0}, "it is no mean"), (lambda: {"loss": [1.0] * 9}, "there are 9")):
        with pytest.raises(ValueError, match=rf"max_degradation\['loss'\] asks for a confidence .*{why}"):
            run(tmp_path, validate=validate, max_degradation={"loss": "1% at 95%"})
    with pytest.raises(ValueError, match=r"asks for a confidence that cannot be had: there are 4 batches \(a batch's"):
        arguments = {"per_device_eval_batch_size": len(Rows()) // 4}
        run(tmp_path, kind=Contrastive, max_degradation={"eval_loss": "1% at 95%"}, arguments=arguments)
