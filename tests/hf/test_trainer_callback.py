"""GPTQTrainerCallback in real transformers.Trainer runs, on one process and on two."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys

import pytest
import torch
from accelerate.state import DistributedType, PartialState
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    Trainer,
    TrainerCallback,
)

from gptq_plugin import GPTQTrainerCallback, QuantizeModule, load_quantized
from gptq_plugin.errors import CalibrationError, ExportError, TargetError

from forked_python import python
from paths import SUPPORT
from trainer_runs import SMALL, Rows, Some, Stream, Tokenizer, Untrained, llama, quantized, same, train


def test_the_trained_model_is_quantized_and_exported_with_the_trainers_tokenizer(tmp_path):
    callback = GPTQTrainerCallback(QuantizeModule(**SMALL), tmp_path / "out")
    model = llama()
    trainer = train(model, [callback], tmp_path, trainer_options={"processing_class": Tokenizer()}, run_name="run-7")
    assert len(quantized(model)) == 7 and len(callback.report.quantized) == 7
    assert callback.report.run_id == "run-7"
    assert callback.report.samples == 17 and callback.report.tokens == 17 * 16
    assert (tmp_path / "out" / "tokenizer.json").exists()
    ids = torch.arange(12)[None]
    reloaded = load_quantized(tmp_path / "out")
    with torch.no_grad():
        torch.testing.assert_close(reloaded(input_ids=ids).logits, model.eval()(input_ids=ids).logits)
    logged = [entry for entry in trainer.state.log_history if "gptq/loss" in entry]
    assert len(logged) == 1 and logged[0]["gptq/modules"] == 7 and logged[0]["step"] == 3


def test_the_totals_go_to_the_trainers_trackers_when_they_are_handed_on(tmp_path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    trainer = train(llama(), [GPTQTrainerCallback(QuantizeModule(**SMALL))], tmp_path, report_to=["tensorboard"])
    totals = next(one for one in trainer.state.log_history if "gptq/loss" in one)
    trainer.log({name: value for name, value in totals.items() if name != "step"})  # as the how-to has it
    scalars = {}
    for file in tmp_path.rglob("events.out*"):
        found = events.EventAccumulator(str(file)).Reload()
        scalars |= {tag: found.Scalars(tag)[-1].value for tag in found.Tags()["scalars"]}
    assert scalars["train/gptq/modules"] == 7
    assert scalars["train/gptq/loss"] == pytest.approx(totals["gptq/loss"])


def test_the_trainer_evaluates_and_saves_the_quantized_model(tmp_path):
    trainer = train(llama(), [GPTQTrainerCallback(QuantizeModule(**SMALL))], tmp_path)
    before = trainer.evaluate(Rows())["eval_loss"]
    trainer.save_model(str(tmp_path / "saved"))
    reloaded = load_quantized(tmp_path / "saved")
    assert len(quantized(reloaded)) == 7
    ids = Rows().ids
    with torch.no_grad():
        assert float(reloaded(input_ids=ids, labels=ids).loss) == pytest.approx(before, rel=1e-4)


def test_training_itself_is_not_changed_and_swap_false_leaves_the_trained_weights(tmp_path):
    plain, with_callback = llama(), llama()
    train(plain, [], tmp_path, Rows(noisy=True))
    callback = GPTQTrainerCallback(QuantizeModule(**SMALL), tmp_path / "out", swap=False)
    train(with_callback, [callback], tmp_path, Rows(noisy=True))
    assert quantized(with_callback) == [] and same(plain, with_callback)
    assert not hasattr(with_callback.config, "quantization_config")
    assert len(quantized(load_quantized(tmp_path / "out"))) == 7


def test_the_best_model_is_what_is_quantized(tmp_path):
    trained = []

    class Watch(TrainerCallback):
        """Comes before the other, and sees what it is given."""

        def on_train_end(self, args, state, control, model=None, **kwargs):
            trained.append({name: value.clone() for name, value in model.state_dict().items()})

    model = llama()
    trainer = train(
        model, [Watch(), GPTQTrainerCallback(QuantizeModule(**SMALL), tmp_path / "out", swap=False)], tmp_path,
        max_steps=4, greater_is_better=True, eval_strategy="steps", save_strategy="steps", eval_steps=1, save_steps=1,
        load_best_model_at_end=True, trainer_options={"eval_dataset": Rows()},
    )  # fmt: skip
    assert trainer.state.best_model_checkpoint.endswith("-1")  # of the highest loss, to tell it from the last
    best = AutoModelForCausalLM.from_pretrained(trainer.state.best_model_checkpoint).state_dict()
    weight = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(best[weight], trained[0][weight])
    layer = load_quantized(tmp_path / "out").model.layers[0].mlp.up_proj
    assert (layer.dequantize(torch.float32) - best[weight]).abs().max() < 4 * layer.scales.float().max()


def test_the_optimizer_is_freed_before_quantization_and_forgets_the_float_weights_after_it(tmp_path):
    seen = []

    class Watching(GPTQTrainerCallback):
        def calibration_data(self, train_dataloader):
            seen.append((len(self.optimizer.state), [p.grad for p in self.model.parameters()]))
            return super().calibration_data(train_dataloader)

        def on_train_begin(self, args, state, control, **training):
            self.optimizer, self.model = training["optimizer"], training["model"]
            super().on_train_begin(args, state, control, **training)

    model = llama()
    trainer = train(model, [Watching(QuantizeModule(**SMALL))], tmp_path)
    states, gradients = seen[-1]
    assert states == 0 and all(gradient is None for gradient in gradients)
    held = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters()}


def test_the_optimizer_is_left_as_it_is_where_the_model_stays_float(tmp_path):
    model, before = llama(), []

    class Watching(GPTQTrainerCallback):
        def on_train_end(self, args, state, control, **training):
            before.extend(value.clone() for state in training["optimizer"].state.values() for value in state.values())
            super().on_train_end(args, state, control, **training)

    trainer = train(model, [Watching(QuantizeModule(**SMALL), tmp_path / "out", swap=False)], tmp_path)
    after = [value for state in trainer.optimizer.state.values() for value in state.values()]
    assert len(before) == len(after) > 0 and all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
    held = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters()}


@pytest.mark.parametrize("precision", ["bf16", "float32"])
def test_the_runs_autocast_is_used(precision, tmp_path):
    dtypes = set()

    def forward(model, batch):
        dtypes.add(nn.functional.linear(torch.ones(1, 2), torch.ones(1, 2)).dtype)
        return model(**batch)

    callback = GPTQTrainerCallback(QuantizeModule(**SMALL), tmp_path / "out", forward=forward)
    train(llama(), [callback], tmp_path, bf16=precision == "bf16")
    assert dtypes == {torch.bfloat16 if precision == "bf16" else torch.float32}
    assert callback.report.tokens == 17 * 16


def test_a_subclass_with_a_loss_a_collator_and_columns_of_its_own_is_calibrated_like_the_trainer(tmp_path):
    class Tuned(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
            weights = inputs.pop("completion_mask")
            out = model(**inputs)
            loss = (out.logits.square().mean(-1) * weights).mean()
            return (loss, out) if return_outputs else loss

    def collate(samples):
        ids = torch.stack([sample["input_ids"] for sample in samples])
        mask = torch.ones_like(ids)
        mask[:, 11:] = 0
        return {"input_ids": ids, "attention_mask": mask, "completion_mask": mask}

    callback = GPTQTrainerCallback(QuantizeModule(**SMALL))
    train(llama(), [callback], tmp_path, kind=Tuned, trainer_options={"data_collator": collate},
          remove_unused_columns=False)  # fmt: skip
    assert callback.report.tokens == 17 * 11


def test_samples_a_samplers_subset_leaves_out_are_left_out(tmp_path):
    data = Rows()
    callback = GPTQTrainerCallback(QuantizeModule(**SMALL))
    train(llama(), [callback], tmp_path, data, kind=Some)
    assert callback.report.samples == 5 and set(data.read) == {3, 5, 8, 11, 17}


def test_a_stream_is_read_from_its_start(tmp_path):
    callback = GPTQTrainerCallback(QuantizeModule(**SMALL | {"nsamples": 16}))
    train(llama(), [callback], tmp_path, Stream())
    assert callback.report.samples == 16


def test_calibration_texts_are_tokenized_by_the_trainers_processing_class(tmp_path):
    callback = GPTQTrainerCallback(
        QuantizeModule(**SMALL, model_seqlen=32), calibration=["the quick brown fox " * 3] * 8
    )
    train(llama(), [callback], tmp_path, trainer_options={"processing_class": Tokenizer()})
    assert callback.report.samples == 8 and callback.report.tokens == 8 * 32


@pytest.mark.parametrize(
    ("fields", "options", "error", "message"),
    [
        ({"dynamic": {"nothing": {"bits": 8}}}, {}, TargetError, "'nothing' matches none"),
        ({}, {"calibration": []}, CalibrationError, "the calibration set is empty"),
        ({}, {"calibration": ["a text"]}, CalibrationError, "no tokenizer"),
        ({}, {"forward": lambda model, batch: None}, CalibrationError, "no calibration batch reached any of the 7"),
        ({}, {"export_dir": "taken"}, ExportError, "not an export of gptq_plugin"),
        ({}, {"export_dir": "run"}, ExportError, "is or holds output_dir"),
        ({}, {"export_dir": "."}, ExportError, "is or holds output_dir"),
    ],
)
def test_what_cannot_work_is_refused_before_training(fields, options, error, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.txt").write_text("three years of work")
    callback = GPTQTrainerCallback(QuantizeModule(**SMALL | fields), **{"export_dir": "out", **options})
    with pytest.raises(error, match=message):
        train(llama(), [callback], tmp_path, kind=Untrained)
    assert (tmp_path / "taken" / "thesis.txt").exists() and not (tmp_path / "out").exists()


def test_a_hyperparameter_search_is_refused(tmp_path):
    class Search(Untrained):
        def _init_training_state(self, *args):
            values = super()._init_training_state(*args)
            self.state.is_hyper_param_search = True
            return values

    with pytest.raises(ValueError, match="search without the callback"):
        train(llama(), [GPTQTrainerCallback(QuantizeModule(**SMALL))], tmp_path, kind=Search)


def test_a_model_that_was_left_quantized_is_not_trained_again_and_the_float_checkpoint_is_named(tmp_path):
    callback = GPTQTrainerCallback(QuantizeModule(**SMALL))
    trainer = train(llama(), [callback], tmp_path, save_strategy="steps", save_steps=3)
    assert callback.report.float_checkpoint == str(tmp_path / "run" / "checkpoint-3")
    with pytest.raises(TargetError, match=r"quantized weights cannot be trained: .* into a new one \(.*checkpoint-3\)"):
        trainer.train()


def test_two_callbacks_that_both_leave_the_model_quantized_are_refused_before_training(tmp_path):
    both = [GPTQTrainerCallback(QuantizeModule(**SMALL)), GPTQTrainerCallback(QuantizeModule(**SMALL, bits=3))]
    with pytest.raises(ValueError, match=r"leaves the model quantized .*: give all but the last swap=False"):
        train(llama(), both, tmp_path, kind=Untrained)
    both[0] = GPTQTrainerCallback(QuantizeModule(**SMALL), tmp_path / "out", swap=False)
    train(llama(), both, tmp_path)
    assert [callback.report.quantized[0].bits for callback in both] == [4, 3]


def test_sharding_of_other_kinds_is_refused_before_training_with_the_remedy(tmp_path, monkeypatch):
    class Sharded(Untrained):
        def _prepare_for_training(self, *args):
            values = super()._prepare_for_training(*args)
            monkeypatch.setitem(PartialState._shared_state, "distributed_type", DistributedType("MEGATRON_LM"))
            return values

    with pytest.raises(NotImplementedError, match=r"another kind \(MEGATRON_LM\).*save_model.*gptq-quantize"):
        train(llama(), [GPTQTrainerCallback(QuantizeModule(**SMALL))], tmp_path, kind=Sharded)


def test_arguments_that_contradict_are_refused():
    with pytest.raises(ValueError, match="nothing of the quantization would remain"):
        GPTQTrainerCallback(QuantizeModule(), swap=False)
    with pytest.raises(CalibrationError, match="give a list of texts"):
        GPTQTrainerCallback(QuantizeModule(), calibration="a text")
    with pytest.raises(TypeError, match="must be a QuantizeModule"):
        GPTQTrainerCallback({"bits": 4})


@pytest.mark.parametrize("failing", ["calibration", "export"])
def test_a_failure_leaves_the_trained_weights_the_checkpoint_and_no_folder(failing, tmp_path):
    class Full(Tokenizer):
        def save_pretrained(self, directory):
            if "checkpoint" not in str(directory):
                raise OSError("disk full")

    model, twin, steps = llama(), llama(), []
    train(twin, [], tmp_path)

    class Notes(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            steps.append(1)

    def forward(model, batch):
        nan = failing == "calibration" and bool(steps)  # the rehearsal before training finds nothing
        count = len(batch["input_ids"])
        return model(inputs_embeds=torch.full((count, 16, 64), float("nan") if nan else 1.0))

    callback = GPTQTrainerCallback(QuantizeModule(**SMALL), tmp_path / "out", tokenizer=Full(), forward=forward)
    error, message = {"calibration": (CalibrationError, "NaN"), "export": (ExportError, "disk full")}[failing]
    with pytest.raises(error, match=message):
        train(model, [callback, Notes()], tmp_path, save_strategy="steps", save_steps=3)
    assert quantized(model) == [] and same(model, twin)
    assert (tmp_path / "run" / "checkpoint-3" / "model.safetensors").exists()
    assert not (tmp_path / "run" / "trained-3").exists()  # the checkpoint holds them
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


@pytest.mark.parametrize("kind", ["transformers", "plain"])
def test_trained_weights_that_no_checkpoint_holds_are_saved_when_quantization_fails(kind, tmp_path):
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = llama()

        def forward(self, input_ids, labels):
            return self.inner(input_ids=input_ids, labels=labels)

    class Full(Tokenizer):
        def save_pretrained(self, directory):
            raise OSError("disk full")

    new = llama if kind == "transformers" else lambda: Plain()
    model, twin = new(), new()
    (tmp_path / "run" / "checkpoint-3").mkdir(parents=True)  # of an earlier run
    train(twin, [], tmp_path)
    with pytest.raises(ExportError, match="could not be written: disk full"):
        train(model, [GPTQTrainerCallback(QuantizeModule(**SMALL), tmp_path / "out", tokenizer=Full())], tmp_path)
    folder = tmp_path / "run" / "trained-3"
    if kind == "transformers":
        assert same(AutoModelForCausalLM.from_pretrained(folder), twin)
    else:
        model.load_state_dict(torch.load(folder / "pytorch_model.bin"))
        assert same(model, twin)


def test_a_folder_that_was_taken_during_training_costs_nothing(tmp_path):
    class Intruder(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            (tmp_path / "out").mkdir(exist_ok=True)
            (tmp_path / "out" / "other.txt").write_text("somebody else's")

    callback = GPTQTrainerCallback(QuantizeModule(**SMALL), tmp_path / "out")
    train(llama(), [Intruder(), callback], tmp_path)
    assert callback.export_dir.parent == tmp_path and callback.export_dir != tmp_path / "out"
    assert len(quantized(load_quantized(callback.export_dir))) == 7
    assert any("exported to" in deviation for deviation in callback.report.all_deviations())


RANK = """
import os, sys
from pathlib import Path
import peft, torch
sys.path.insert(0, sys.argv[1])
from trainer_runs import Rows, SMALL, Some, Stream, Trainer, llama, train
from gptq_plugin import GPTQTrainerCallback, QuantizeModule
out, rank = Path(sys.argv[2]), os.environ.get("RANK", "0")
runs = {"rows": (Rows(), Trainer, 17), "some": (Rows(), Some, 17), "stream": (Stream(), Trainer, 24)}
for name, (data, kind, samples) in runs.items():
    model = llama()
    callback = GPTQTrainerCallback(QuantizeModule(**SMALL | {"nsamples": samples}), out / name)
    train(model, [callback], out, data, kind, learning_rate=0.0, per_device_train_batch_size=4, max_steps=1)
    torch.save(model.state_dict(), out / f"{name}{rank}.pt")
    (out / f"{name}{rank}.json").write_text(callback.report.to_json())
config = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
callback = GPTQTrainerCallback(
    QuantizeModule(**SMALL), out / "adapters", calibration="val", mix=[[n, 5, 9] for n in range(40)]
)
train(
    peft.get_peft_model(llama(), config), [callback], out, learning_rate=0.0, max_steps=1, eval_on_start=True,
    trainer_options={"eval_dataset": {"a": Rows(), "b": Rows()}}, per_device_eval_batch_size=5,
)
(out / f"adapters{rank}.json").write_text(callback.report.to_json())
class Full:
    def save_pretrained(self, directory):
        raise OSError("disk full")
try:
    train(model := llama(), [GPTQTrainerCallback(QuantizeModule(**SMALL), out / "full", tokenizer=Full())], out)
except Exception as error:
    (out / f"error{rank}.txt").write_text(f"{type(error).__name__}: {error}")
assert not any(key.endswith("qweight") for key in model.state_dict())
"""


@pytest.mark.slow
def test_two_ranks_give_the_codes_of_one_count_each_sample_once_and_both_learn_of_a_failure(tmp_path, monkeypatch):
    (tmp_path / "rank.py").write_text(RANK)
    here = SUPPORT
    (tmp_path / "1").mkdir()
    (tmp_path / "2").mkdir()
    monkeypatch.setattr(sys, "argv", ["rank.py", str(here), str(tmp_path / "1")])
    monkeypatch.setattr(sys, "path", sys.path[:])
    runpy.run_path(str(tmp_path / "rank.py"))
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [python(), *launcher, tmp_path / "rank.py", here, tmp_path / "2"]
    done = subprocess.run(command, cwd=tmp_path, timeout=300, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name, samples in (("rows", 17), ("some", 5), ("stream", 24)):
        one, first, second = (torch.load(tmp_path / f) for f in (f"1/{name}0.pt", f"2/{name}0.pt", f"2/{name}1.pt"))
        assert all(torch.equal(first[key], second[key]) for key in one)
        codes = [key for key in one if key.endswith("qweight")]
        assert len(codes) == 7
        for key in codes:  # another order of addition may flip a near tie
            assert (one[key] == first[key]).float().mean() > 0.97, key
        for run in (f"1/{name}0.json", f"2/{name}0.json", f"2/{name}1.json"):
            totals = json.loads((tmp_path / run).read_text())["totals"]
            assert (totals["samples"], totals["tokens"]) == (samples, samples * 16), run
        assert len(quantized(load_quantized(tmp_path / "2" / name))) == 7
    exported = [load_quantized(tmp_path / ranks / "adapters").state_dict() for ranks in ("1", "2")]
    for key in (key for key in exported[0] if key.endswith("qweight")):
        assert (exported[0][key] == exported[1][key]).float().mean() > 0.97, key
    for run in ("1/adapters0.json", "2/adapters0.json", "2/adapters1.json"):
        totals = json.loads((tmp_path / run).read_text())["totals"]
        assert (totals["samples"], totals["tokens"]) == (17, 13 * 16 + 4 * 3), run
    raised, told = ((tmp_path / "2" / f"error{rank}.txt").read_text() for rank in (0, 1))
    assert raised.startswith("ExportError: ") and "could not be written: disk full" in raised
    assert "rank 0 failed: ExportError: " in told and "disk full" in told


def test_a_budget_of_bits_is_divided_at_the_end_of_training_by_the_logits_of_all_positions(tmp_path):
    callback = GPTQTrainerCallback(QuantizeModule(target_bits=4.2, **SMALL), export_dir=tmp_path / "out")
    train(llama(), [callback], tmp_path)
    assert callback.report.bits_per_weight <= 4.2
    assert callback.report.allocation.tokens == 4 * 16  # a batch of 4 samples


def test_a_second_training_of_the_same_takes_every_layer_and_one_with_another_forward_none(tmp_path):
    def trained(name, forward=None, **options):
        quantizer = QuantizeModule(**SMALL, cache_dir=tmp_path / "cache")
        callback = GPTQTrainerCallback(quantizer, tmp_path / f"export-{name}", forward=forward)
        model = llama()
        train(model, [callback], tmp_path / name, **options)
        return model.state_dict(), callback.report

    first, report = trained("first")
    assert report.cache["layers_solved"] == 7, report.deviations
    second, again = trained("second")
    assert again.cache["layers_taken"] == 7 and again.cache["walk_taken"], again.deviations
    assert all(torch.equal(value, second[key]) for key, value in first.items())
    own = trained("own", lambda model, batch: model(**batch))[1]
    assert own.cache["layers_taken"] == 0 and own.cache["bytes_written"], own.deviations
    assert trained("rounded", bf16=True)[1].cache["layers_taken"] == 0
