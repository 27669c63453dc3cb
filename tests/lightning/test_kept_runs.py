"""A second fit of the same takes every layer that the first one kept, of any LightningModule; another takes none."""

from __future__ import annotations

import lightning.pytorch as pl
import pytest
import torch

from gptq_plugin import GPTQCallback, QuantizeModule

from lightning_runs import SMALL, Contains, Holds, Is, Normed, Plain, fit, pair_loader, token_loader


class Stepped(Holds):
    def calibration_step(self, batch):
        return self.model(input_ids=batch["input_ids"])


class SteppedOtherwise(Holds):
    def calibration_step(self, batch):
        return self.model(input_ids=batch["input_ids"], output_hidden_states=True)


class Fields(Holds):
    """With what users keep on their modules."""

    def __init__(self):
        super().__init__()
        self.save_hyperparameters()
        self.losses = []
        self.register_buffer("steps", torch.zeros(1))

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.losses.append(float(outputs["loss"]))


def fitted(kind, tmp_path, name, loader=token_loader, **options):
    given = {key: options.pop(key) for key in ("max_degradation", "on_fail", "max_bits") if key in options}
    bits = options.pop("bits", 4)
    quantizer = QuantizeModule(**{**SMALL, "nsamples": 96}, bits=bits, cache_dir=tmp_path / "cache")
    callback = GPTQCallback(quantizer, tmp_path / name, swap=True, **given)
    torch.manual_seed(1)
    module = kind()
    fit(module, loader(), [callback], tmp_path, loader() if given else None, **options)
    return module.state_dict(), callback.report


@pytest.mark.parametrize(
    "kind, loader",
    [
        (Holds, token_loader),
        (Is, token_loader),
        (Contains, token_loader),
        (Stepped, token_loader),
        (Fields, token_loader),
        (Plain, pair_loader),
        (Normed, pair_loader),
    ],
)
def test_a_second_fit_takes_every_layer(kind, loader, tmp_path):
    first, report = fitted(kind, tmp_path, "first", loader)
    assert report.cache["layers_solved"] == len(report.quantized), report.deviations
    second, again = fitted(kind, tmp_path, "second", loader)
    assert again.cache["layers_taken"] == len(report.quantized) and again.cache["walk_taken"], again.deviations
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_another_calibration_step_or_precision_takes_nothing(tmp_path):
    fitted(Stepped, tmp_path, "first")
    for name, kind, options in (("second", SteppedOtherwise, {}), ("third", Stepped, {"precision": "bf16-mixed"})):
        report = fitted(kind, tmp_path, name, **options)[1]
        assert report.cache["layers_taken"] == 0 and report.cache["bytes_written"]


def test_a_second_run_of_an_escalation_takes_all_of_its_attempts(tmp_path, caplog):
    limits = {"max_degradation": {"train_loss": 1e-3}, "on_fail": "escalate", "bits": 2}
    first, report = fitted(Holds, tmp_path, "first", **limits)
    assert any("escalated" in line for line in report.deviations) and report.cache["layers_solved"]
    second, again = fitted(Holds, tmp_path, "second", **limits)
    assert again.cache["layers_solved"] == 0 and again.cache["walk_taken"]
    assert again.metrics == report.metrics
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_trainer_loggers_and_callbacks_are_no_part_of_a_model(tmp_path):
    class Watches(pl.Callback):
        def __init__(self, number):
            self.number, self.stream = number, (x for x in "ab")

    for number in (1, 2):
        quantizer = QuantizeModule(**SMALL, cache_dir=tmp_path / "cache")
        callback = GPTQCallback(quantizer, tmp_path / f"export-{number}")
        torch.manual_seed(1)
        fit(Holds(), token_loader(), [callback, Watches(number)], tmp_path / str(number) / "run", logger=True)
    assert callback.report.cache["layers_taken"] == 7
