"""GPTQCallback: which weights it takes, what validation says of the result, and what happens when that is too bad."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, WeightAveraging
from lightning.pytorch.loggers import CSVLogger
from torch.optim.swa_utils import get_ema_avg_fn
from torchmetrics import MeanMetric

from gptq_plugin import GPTQCallback, QuantizeModule, load_quantized
from gptq_plugin.errors import CheckpointError, QualityError, TargetError
from gptq_plugin.lightning.validation import validate

from lightning_runs import SMALL, Holds, fit, quantized, token_loader

UP = "model.layers.0.mlp.up_proj"
TWO_BITS = {**SMALL, "bits": 2, "clip_ratios": (1.0,)}


class Validated(Holds):
    """With a validation that logs in every way there is."""

    def __init__(self):
        super().__init__()
        self.mean = MeanMetric()
        self.seen = 0

    def train_dataloader(self):
        return token_loader()

    def val_dataloader(self):
        ids = torch.randint(0, 64, (13, 16), generator=torch.Generator().manual_seed(1))
        return torch.utils.data.DataLoader([{"input_ids": row, "labels": row} for row in ids], batch_size=5)

    def validation_step(self, batch, batch_idx):
        out = self.model(**batch)
        self.mean.update(out.loss, len(batch["input_ids"]))
        self.log("val_loss", out.loss)
        self.log_dict({"val_metric": self.mean, "val_most": out.loss}, reduce_fx="max", on_step=False, on_epoch=True)
        self.log("val_step_only", out.loss, on_step=True, on_epoch=False)
        self.seen += 1

    def on_validation_epoch_end(self):
        self.log("val_batches", float(self.seen))
        self.seen = 0


class Falling(Validated):
    """Its validation is best after the first epoch."""

    def on_validation_epoch_end(self):
        self.log("val_rank", float(self.current_epoch))


def weight_of(module, name=UP):
    return module.model.get_submodule(name).weight.detach().clone()


def near(layer, weight):
    return (layer.dequantize(torch.float32) - weight).abs().max() < 4 * layer.scales.float().max()


def trained_twice(tmp_path, **options):
    """A run of two epochs with the weights after each."""
    after = []

    class Recorder(pl.Callback):
        def on_validation_end(self, trainer, pl_module):
            if not trainer.sanity_checking:
                after.append({n: p.detach().clone() for n, p in pl_module.named_parameters()})

    module = Falling()
    checkpoint = ModelCheckpoint(dirpath=tmp_path / "ckpt", monitor="val_rank", mode="min", save_last=True)
    callback = GPTQCallback(QuantizeModule(**SMALL), tmp_path / "out", **options)
    fit(module, None, [callback, Recorder(), checkpoint], tmp_path, max_epochs=2, enable_checkpointing=True)
    return module, callback, after, checkpoint


# --- which weights ---


@pytest.mark.parametrize("swap", [True, False])
def test_the_best_checkpoint_is_quantized_and_the_module_has_its_weights_or_keeps_its_own(swap, tmp_path):
    module, callback, (first, last), checkpoint = trained_twice(tmp_path, weights="best", swap=swap)
    norm = "model.model.norm.weight"
    exported = load_quantized(tmp_path / "out")
    assert torch.equal(exported.model.norm.weight, first[norm]) and not torch.equal(first[norm], last[norm])
    assert near(exported.get_submodule(UP), first[f"model.{UP}.weight"])
    assert torch.equal(module.model.model.norm.weight, (first if swap else last)[norm])
    assert bool(quantized(module)) == swap
    if not swap:
        assert all(torch.equal(p, last[n]) for n, p in module.named_parameters())
    assert callback.report.float_checkpoint == checkpoint.best_model_path
    assert json.loads((tmp_path / "out/quantization_report.json").read_text())["float_checkpoint"]


def test_a_given_checkpoint_is_quantized_without_any_training(tmp_path):
    torch.manual_seed(3)
    source = Validated()
    for parameter in source.parameters():
        parameter.data += 0.01
    trainer = fit(source, None, [], tmp_path, max_epochs=0)
    trainer.save_checkpoint(tmp_path / "given.ckpt")
    module = Validated()
    callback = GPTQCallback(QuantizeModule(**SMALL), tmp_path / "out", weights=tmp_path / "given.ckpt")
    fit(module, None, [callback], tmp_path, max_epochs=0)
    assert len(quantized(module)) == 7 and callback.report.samples == 16
    assert near(load_quantized(tmp_path / "out").get_submodule(UP), weight_of(source))
    assert set(callback.report.metrics["val_loss"]) == {"float", "gptq"}


def test_max_epochs_0_quantizes_the_model_as_it_is(tmp_path):
    module, twin = Holds(), Holds()
    fit(module, token_loader(), [GPTQCallback(QuantizeModule(**SMALL))], tmp_path, max_epochs=0)
    assert near(module.model.get_submodule(UP), weight_of(twin))


def test_a_checkpoint_that_cannot_be_read_is_reported_and_the_weights_are_kept(tmp_path):
    keeps_none = ModelCheckpoint(tmp_path / "ckpt", monitor="val_loss", save_top_k=0)
    for checkpoints in ([], [keeps_none]):
        callbacks = [GPTQCallback(QuantizeModule(**SMALL), weights="best"), *checkpoints]
        with pytest.raises(CheckpointError, match="none of this trainer's monitors a metric and keeps a checkpoint"):
            fit(Validated(), None, callbacks, tmp_path, enable_checkpointing=bool(checkpoints))
    module, twin = Holds(), Holds()
    fit(twin, token_loader(), [], tmp_path)
    torch.save({"state_dict": {"other": torch.ones(1)}}, tmp_path / "other.ckpt")
    for path, message in (
        (tmp_path / "none.ckpt", "the checkpoint does not exist"),
        (tmp_path / "other.ckpt", "cannot be loaded"),
    ):
        with pytest.raises(CheckpointError, match=message):
            fit(module, token_loader(), [GPTQCallback(QuantizeModule(**SMALL), weights=path)], tmp_path)
        assert all(torch.equal(a, b) for a, b in zip(module.state_dict().values(), twin.state_dict().values()))
        module = Holds()


def test_an_exponential_average_of_the_weights_is_what_is_quantized(tmp_path):
    def average():
        return WeightAveraging(avg_fn=get_ema_avg_fn(0.5))

    module, twin = Holds(), Holds()
    fit(twin, token_loader(), [average()], tmp_path, max_epochs=2)
    callback = GPTQCallback(QuantizeModule(**SMALL), tmp_path / "o", swap=False)
    callbacks = [callback, average(), ModelCheckpoint(dirpath=tmp_path / "ckpt", save_last=True)]
    fit(module, token_loader(), callbacks, tmp_path, max_epochs=2, enable_checkpointing=True)
    assert callback.report.float_checkpoint  # holds the average
    assert torch.equal(weight_of(module), weight_of(twin))
    assert near(load_quantized(tmp_path / "o").get_submodule(UP), weight_of(twin))


@pytest.mark.parametrize("what", ["module", "model", "layer", "in place"])
def test_compiled_modules_are_quantized_under_their_own_names(what, tmp_path):
    class Silent(Holds):
        def training_step(self, batch, batch_idx):
            return self.model(**batch).loss  # Lightning's own log cannot be compiled

    given = module = Silent()
    if what == "module":
        given = torch.compile(module, backend="eager")
    elif what == "model":
        module.model = torch.compile(module.model, backend="eager")
    elif what == "layer":
        module.model.model.layers[0] = torch.compile(module.model.model.layers[0], backend="eager")
    else:
        module.model.compile(backend="eager")
    callback = GPTQCallback(QuantizeModule(**SMALL), tmp_path / "out")
    fit(given, token_loader(), [callback], tmp_path)
    assert {m.name for m in callback.report.quantized} == set(quantized(load_quantized(tmp_path / "out")))
    assert not any("_orig_mod" in m.name for m in callback.report.modules) and len(quantized(module)) == 7
    ids = torch.arange(8)[None]
    with torch.no_grad():  # the compiled module runs on the quantized layers
        found, wanted = module.model(input_ids=ids).logits, load_quantized(tmp_path / "out")(input_ids=ids).logits
    torch.testing.assert_close(found, wanted)


def test_overfitted_and_resumed_runs_are_quantized(tmp_path):
    module = Holds()
    callback = GPTQCallback(QuantizeModule(**SMALL), tmp_path / "a", swap=False)
    trainer = fit(module, token_loader(), [callback], tmp_path, overfit_batches=1)
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    torch.manual_seed(5)
    again = pl.Trainer(max_epochs=2, accelerator="cpu", logger=False, enable_progress_bar=False,
                       enable_checkpointing=False, callbacks=[GPTQCallback(QuantizeModule(**SMALL))])  # fmt: skip
    resumed = Holds()
    again.fit(resumed, token_loader(), ckpt_path=tmp_path / "run.ckpt", weights_only=False)
    assert again.current_epoch == 2 and len(quantized(resumed)) == 7


def test_an_exception_in_training_quantizes_nothing(tmp_path):
    class Breaks(Holds):
        def training_step(self, batch, batch_idx):
            raise RuntimeError("a node is lost")

    module, callback = Breaks(), GPTQCallback(QuantizeModule(**SMALL), tmp_path / "out")
    with pytest.raises(RuntimeError, match="a node is lost"):
        fit(module, token_loader(), [callback], tmp_path)
    assert quantized(module) == [] and callback.report is None and not (tmp_path / "out").exists()


def test_the_error_of_what_a_quantized_module_cannot_do_any_more_names_the_remedy(tmp_path):
    module = Holds()
    checkpoint = ModelCheckpoint(dirpath=tmp_path / "ckpt", save_last=True)
    callback = GPTQCallback(QuantizeModule(**SMALL))
    trainer = fit(module, token_loader(), [callback, checkpoint], tmp_path, enable_checkpointing=True)
    assert trainer.test(module, token_loader(), verbose=False)
    with pytest.raises(
        RuntimeError, match="is quantized, and these are the weights of the float model: load them into"
    ):
        trainer.test(module, token_loader(), ckpt_path=str(tmp_path / "ckpt/last.ckpt"), verbose=False)
    with pytest.raises(TargetError, match=r"quantized weights cannot be trained.*last\.ckpt"):
        trainer.fit(module, token_loader())


# --- validation ---


def test_validation_gives_what_lightnings_own_gives(tmp_path):
    module = Validated()
    trainer = fit(module, None, [], tmp_path, limit_val_batches=2)
    ours = validate(trainer, module)
    theirs = pl.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, limit_val_batches=2).validate(
        module, verbose=False
    )[0]
    assert ours == pytest.approx(theirs) and ours["val_batches"] == 2
    assert "val_step_only" not in ours and {"val_loss", "val_metric", "val_most"} <= set(ours)


def test_several_validation_dataloaders_keep_lightnings_names(tmp_path):
    class Two(Validated):
        def val_dataloader(self):
            return [super().val_dataloader(), token_loader()]

        def validation_step(self, batch, batch_idx, dataloader_idx=0):
            self.log("val_loss", self.model(**batch).loss)

        def on_validation_epoch_end(self):
            pass

    module = Two()
    trainer = fit(module, None, [], tmp_path)
    ours = validate(trainer, module)
    theirs = pl.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False).validate(module, verbose=False)
    assert ours == pytest.approx({k: v for one in theirs for k, v in one.items()})
    assert set(ours) == {"val_loss/dataloader_idx_0", "val_loss/dataloader_idx_1"}


def test_the_metric_before_and_after_is_in_the_report_and_the_log(tmp_path):
    module, logger = Validated(), CSVLogger(tmp_path, name="log")
    callback = GPTQCallback(QuantizeModule(**TWO_BITS))
    trainer = fit(module, None, [callback], tmp_path, logger=logger)
    found = callback.report.metrics["val_loss"]
    assert found["float"] == pytest.approx(float(trainer.callback_metrics["val_loss"]), rel=1e-5)
    again = pl.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False).validate(module, verbose=False)
    assert found["gptq"] == pytest.approx(again[0]["val_loss"], rel=1e-5) and found["gptq"] != found["float"]
    with open(Path(logger.log_dir) / "metrics.csv") as file:
        row = [r for r in csv.DictReader(file) if r.get("gptq/val_loss/difference")][0]
    assert float(row["gptq/val_loss/difference"]) == pytest.approx(found["gptq"] - found["float"], abs=1e-6)
    assert not {"log", "log_dict"} & set(module.__dict__)


def test_validate_false_and_modules_without_validation_measure_nothing(tmp_path):
    for module, options in ((Validated(), {"validate": False}), (Holds(), {})):
        callback = GPTQCallback(QuantizeModule(**SMALL), **options)
        fit(module, None if module.__class__ is Validated else token_loader(), [callback], tmp_path)
        assert callback.report.metrics == {}


# --- the gate ---


def test_a_result_that_is_too_bad_is_refused_and_nothing_is_lost(tmp_path):
    module, twin = Validated(), Validated()
    fit(twin, None, [], tmp_path)
    callback = GPTQCallback(QuantizeModule(**TWO_BITS), tmp_path / "out", max_degradation={"val_loss": 1e-6})
    with pytest.raises(QualityError, match=r"val_loss went from .* to .*0\.00|1e-06 allowed.*on_fail='escalate'"):
        fit(module, None, [callback], tmp_path)
    assert quantized(module) == [] and not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))
    assert all(torch.equal(a, b) for a, b in zip(module.state_dict().values(), twin.state_dict().values()))


def test_a_result_that_is_good_enough_passes(tmp_path):
    callback = GPTQCallback(QuantizeModule(**SMALL), tmp_path / "out", max_degradation={"val_loss": "50%"})
    fit(Validated(), None, [callback], tmp_path)
    assert (tmp_path / "out").is_dir() and not any("val_loss" in d for d in callback.report.deviations)


def test_warn_exports_with_a_warning(tmp_path, caplog):
    callback = GPTQCallback(
        QuantizeModule(**TWO_BITS), tmp_path / "out", max_degradation={"val_loss": 1e-6}, on_fail="warn"
    )
    fit(Validated(), None, [callback], tmp_path)
    assert any(d.startswith("val_loss went from") for d in callback.report.deviations)
    assert "not good enough" in caplog.text and len(quantized(load_quantized(tmp_path / "out"))) == 7


def test_escalate_gives_the_noisiest_layers_more_bits_until_the_gate_holds(tmp_path):
    plain = GPTQCallback(QuantizeModule(**TWO_BITS), tmp_path / "plain", swap=False)
    fit(Validated(), None, [plain], tmp_path)
    change = plain.report.metrics["val_loss"]
    allowed = 0.3 * abs(change["gptq"] - change["float"]) + 1e-9
    worse = 1 if change["gptq"] > change["float"] else -1
    callback = GPTQCallback(
        QuantizeModule(**TWO_BITS), tmp_path / "out", max_degradation={"val_loss": worse * allowed}, on_fail="escalate"
    )
    module = Validated()
    fit(module, None, [callback], tmp_path)
    after = callback.report.metrics["val_loss"]
    assert worse * (after["gptq"] - after["float"]) <= allowed
    bits = {m.name: m.bits for m in callback.report.quantized}
    assert set(bits.values()) - {2} and any("escalated" in d for d in callback.report.deviations)
    loaded = load_quantized(tmp_path / "out")
    assert (
        {n: loaded.get_submodule(n).bits for n in bits} == bits == {n: module.model.get_submodule(n).bits for n in bits}
    )


def test_escalation_stops_at_its_limit_of_bits_and_gives_the_float_weights_back(tmp_path, caplog):
    both_ways = {"val_loss": 1e-9, "val_most": -1e-9}
    for max_bits, said in (
        (2.5, "there is nothing else to try"),
        (2.8, "nor is (the other one|any of the . others) tried"),
    ):
        module, twin = Validated(), Validated()
        fit(twin, None, [], tmp_path)
        callback = GPTQCallback(
            QuantizeModule(**TWO_BITS), tmp_path / "out", max_degradation=both_ways, on_fail="escalate",
            max_bits=max_bits,
        )  # fmt: skip
        with pytest.raises(QualityError, match=f"{said} within max_bits={max_bits}"):  # to begin with, they take 2.5625
            fit(module, None, [callback], tmp_path)
        assert not (tmp_path / "out").exists() and quantized(module) == []
        assert all(torch.equal(a, b) for a, b in zip(module.state_dict().values(), twin.state_dict().values()))
        tried = [float(line.split(", ")[-1].split()[0]) for line in caplog.text.split(" bits per weight")[:-1]]
        assert bool(tried) == (max_bits > 2.5625) and all(2.5625 < bits <= max_bits for bits in tried)
        caplog.clear()


def test_limits_need_a_validation_step(tmp_path):
    class NoValidation(NotTrained):
        validation_step = pl.LightningModule.validation_step

    with pytest.raises(ValueError, match="need a validation_step"):
        fit(NoValidation(), token_loader(), [GPTQCallback(QuantizeModule(**SMALL), max_degradation={"a": 1})], tmp_path)


def test_limits_without_validation_are_refused():
    with pytest.raises(ValueError, match="validate=False switches it off"):
        GPTQCallback(QuantizeModule(), validate=False, max_degradation={"a": 1})


# --- names of metrics, before training ---


class NotTrained(Validated):
    def training_step(self, batch, batch_idx):
        raise AssertionError("training began")


@pytest.mark.parametrize("sanity", [0, 2])
@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"val_los": 0.02}, r"max_degradation names val_los, and validation logs .*: did you mean val_loss\?"),
        ({"val_loss": 0.02, "vall_most": 1}, r"names vall_most, .*: did you mean val_most\?"),
        ({"val_step_only": 1}, "names val_step_only, and validation logs val_batches, val_loss"),  # no epoch value
    ],
)
def test_a_metric_that_is_not_logged_is_refused_before_training_whatever_the_sanity_check(
    sanity, limits, message, tmp_path
):
    callback = GPTQCallback(QuantizeModule(**SMALL), tmp_path / "out", max_degradation=limits)
    with pytest.raises(ValueError, match=message):
        fit(NotTrained(), None, [callback], tmp_path, num_sanity_val_steps=sanity)
    assert not (tmp_path / "out").exists()


def test_a_metric_of_training_is_no_metric_of_validation(tmp_path):
    callback = GPTQCallback(QuantizeModule(**SMALL), max_degradation={"train_loss": 0.02})
    with pytest.raises(ValueError, match="names train_loss"):
        fit(NotTrained(), None, [callback], tmp_path, num_sanity_val_steps=0)


def trial(module, limits, tmp_path):
    """How many validation batches ran before the first training step, of a fit with these limits."""
    seen = []

    class Counted(type(module)):
        def validation_step(self, batch, batch_idx):
            seen.append(batch_idx)
            return super().validation_step(batch, batch_idx)

        def on_train_batch_start(self, batch, batch_idx):
            if batch_idx == 0:
                seen.append("training")

    module.__class__ = Counted
    callback = GPTQCallback(QuantizeModule(**SMALL), max_degradation=limits)
    fit(module, None, [callback], tmp_path, num_sanity_val_steps=0)
    return seen[: seen.index("training")]


def test_one_batch_is_tried_and_all_of_them_for_a_metric_that_comes_later(tmp_path):
    class LastOnly(Validated):
        def validation_step(self, batch, batch_idx):
            super().validation_step(batch, batch_idx)
            if batch_idx == 2:
                self.log("val_last", 1.0)

    assert trial(Validated(), {"val_loss": 100.0, "val_batches": 9}, tmp_path) == [0]
    assert trial(LastOnly(), {"val_last": 1.0}, tmp_path) == [0, 0, 1, 2]


def test_a_trial_leaves_random_numbers_and_metrics_as_they_were(tmp_path):
    weights = []
    for limits in (None, {"val_loss": 100.0}):
        module = Validated()
        fit(module, None, [GPTQCallback(QuantizeModule(**SMALL), max_degradation=limits, swap=None)], tmp_path,
            num_sanity_val_steps=0)  # fmt: skip
        weights.append(module.model.model.norm.weight)
        assert module.mean.update_count == 0 and module.seen == 0
    assert torch.equal(*weights)


def test_a_validation_that_cannot_run_before_training_is_checked_in_the_first_one(tmp_path, caplog):
    class Needs(Validated):
        def on_validation_epoch_end(self):
            self.log("val_seen", self.trainer.callback_metrics["train_loss"])

    module = Needs()
    callback = GPTQCallback(QuantizeModule(**SMALL), max_degradation={"val_sen": 0.02})
    with pytest.raises(ValueError, match=r"names val_sen.*did you mean val_seen\?"):
        fit(module, None, [callback], tmp_path, num_sanity_val_steps=0, max_epochs=3)
    assert module.current_epoch == 0
    assert "not checked before training, because validation_step cannot run yet (KeyError: 'train_loss')" in caplog.text


# --- limits with a confidence ---


class OneByOne(Validated):
    """With 13 batches of one sequence each, or others."""

    def __init__(self, **options):
        super().__init__()
        self.options = {"batch_size": 1, **options}

    def val_dataloader(self):
        return torch.utils.data.DataLoader(super().val_dataloader().dataset, **self.options)


def test_a_change_is_reported_and_judged_with_what_it_is_known_to(tmp_path, caplog):
    caplog.set_level("INFO")
    logger = CSVLogger(tmp_path, name="log")
    limits = {"val_loss": "90% at 95%"}
    callback = GPTQCallback(QuantizeModule(**TWO_BITS), tmp_path / "out", max_degradation=limits)
    fit(OneByOne(), None, [callback], tmp_path, logger=logger)
    found, spread = callback.report.metrics["val_loss"], callback.report.spreads["val_loss"]
    assert spread.parts == 13 and set(callback.report.spreads) == {"val_loss"}  # no mean, or logged once
    assert spread.low < found["gptq"] - found["float"] < spread.high and spread.margin > 0
    shown = f"{100 * (found['gptq'] / found['float'] - 1):+.2f} ± {100 * spread.relative_margin:.2f} %"
    assert shown in (tmp_path / "out/README.md").read_text() and shown in (tmp_path / "out/report.html").read_text()
    assert shown in caplog.text
    with open(Path(logger.log_dir) / "metrics.csv") as file:
        (row,) = [row for row in csv.DictReader(file) if row.get("gptq/val_loss/margin")]
    assert float(row["gptq/val_loss/margin"]) == pytest.approx(spread.margin)
    stored = json.loads((tmp_path / "out/quantization_report.json").read_text())["spreads"]
    assert stored["val_loss"]["parts"] == 13
    # A limit that holds for the change itself, and of which nobody can be sure.
    between = (found["gptq"] - found["float"] + spread.high) / 2
    for limit, good in ((between, True), (f"{between} at 99%", False)):
        callback = GPTQCallback(QuantizeModule(**TWO_BITS), max_degradation={"val_loss": limit}, on_fail="warn")
        fit(OneByOne(), None, [callback], tmp_path)
        told = [one for one in callback.report.deviations if one.startswith("val_loss went from")]
        assert bool(told) != good and all("at 99% confidence up to" in one for one in told)


def test_the_interval_is_over_samples_whatever_the_batches_are(tmp_path):
    """The same as with batches of one, where batches of five are three, of which nothing could be told."""
    found = {}
    for size in (1, 5):
        callback = GPTQCallback(
            QuantizeModule(**TWO_BITS), tmp_path / str(size), max_degradation={"val_loss": "90% at 95%"}
        )
        fit(OneByOne(batch_size=size), None, [callback], tmp_path)
        found[size] = callback.report.metrics["val_loss"], callback.report.spreads["val_loss"]
        assert "paired bootstrap over 13 samples." in (tmp_path / str(size) / "README.md").read_text()
    (metrics, alone), (same_metrics, divided) = found.values()
    assert same_metrics == pytest.approx(metrics, rel=1e-5)
    assert (divided.parts, divided.unit, divided.why) == (13, "samples", "")
    assert (divided.low, divided.high) == pytest.approx((alone.low, alone.high), rel=1e-3)


class Contrastive(OneByOne):
    """A loss of each sample against the others of its batch."""

    def validation_step(self, batch, batch_idx):
        states = self.model(**batch, output_hidden_states=True).hidden_states[-1].mean(1)
        self.log("val_loss", torch.nn.functional.cross_entropy(states @ states.T, torch.arange(len(states))))


def test_a_metric_of_whole_batches_is_noticed_and_they_are_drawn(tmp_path):
    module = Contrastive()
    data = torch.utils.data.ConcatDataset([module.val_dataloader().dataset] * 3)
    module.val_dataloader = lambda: torch.utils.data.DataLoader(data, batch_size=3)
    callback = GPTQCallback(QuantizeModule(**TWO_BITS), tmp_path / "out", max_degradation={"val_loss": "900% at 95%"})
    fit(module, None, [callback], tmp_path)
    spread = callback.report.spreads["val_loss"]
    assert (spread.parts, spread.unit) == (13, "batches") and "is no mean of its samples' (0" in spread.why
    shown = "paired bootstrap over 13 batches, because a batch"
    assert shown in (tmp_path / "out/README.md").read_text() and shown in (tmp_path / "out/report.html").read_text()
    stored = json.loads((tmp_path / "out/quantization_report.json").read_text())["spreads"]["val_loss"]
    assert stored["unit"] == "batches" and stored["why"] == spread.why


def test_samples_run_on_their_own_change_no_metric(tmp_path):
    """What a step gathers itself, in lists or torchmetrics, is that of an epoch of its own."""

    class Gathers(OneByOne):
        epochs = 0

        def on_validation_epoch_start(self):
            self.outputs = []
            self.epochs += 1

        def validation_step(self, batch, batch_idx):
            loss = self.model(**batch).loss
            self.mean.update(loss, len(batch["input_ids"]))
            self.outputs.append(float(loss))
            self.log_dict({"val_loss": loss, "val_mean": self.mean}, on_epoch=True)

        def on_validation_epoch_end(self):
            self.log("val_first", self.outputs[0])

    for size, epochs in ((5, 2), (1, 1)):  # batches of one sample need no epoch of their own
        module = Gathers(batch_size=size)
        trainer = fit(module, None, [], tmp_path)
        whole = validate(trainer, module, by_sample=False)
        for _ in range(2):
            module.epochs = 0
            assert validate(trainer, module) == whole and set(whole) == {"val_loss", "val_mean", "val_first"}
            assert module.epochs == epochs


def test_a_step_that_cannot_run_on_one_sample_is_told(tmp_path):
    class Pairs(OneByOne):
        def validation_step(self, batch, batch_idx):
            if len(batch["input_ids"]) < 2:
                raise ValueError("needs two")
            super().validation_step(batch, batch_idx)

    callback = GPTQCallback(QuantizeModule(**SMALL), max_degradation={"val_loss": "1% at 95%"})
    with pytest.raises(
        ValueError, match=r"there are 3 batches \(single samples cannot be run \(ValueError: needs two\)\)"
    ):
        fit(Pairs(batch_size=5), None, [callback], tmp_path)


@pytest.mark.parametrize(
    ("metric", "options", "why"),
    [
        ("val_loss", {"shuffle": True}, "use a dataloader that neither shuffles nor augments"),
        ("val_most", {}, "it is no mean of values that are logged for each batch"),
        ("val_batches", {}, "it is no mean of values that are logged for each batch"),
    ],
)
def test_confidence_that_cannot_be_had_is_refused_before_training(metric, options, why, tmp_path):
    class Untrained(OneByOne):
        def training_step(self, batch, batch_idx):
            raise AssertionError("training has begun")

    callback = GPTQCallback(QuantizeModule(**SMALL), max_degradation={metric: "1% at 95%"})
    with pytest.raises(ValueError, match=rf"max_degradation\['{metric}'\] asks for a confidence .*{why}"):
        fit(Untrained(**options), None, [callback], tmp_path)
