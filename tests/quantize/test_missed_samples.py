"""Forwards that take only some of the samples that are put together: each sample runs by itself, or that is refused."""

from __future__ import annotations

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, default_collate
from transformers import TrainingArguments

from gptq_plugin import GPTQCallback, GPTQTrainerCallback, QuantizeConfig, QuantizeModule, distributed
from gptq_plugin.calibration.collect import Calibration, collect
from gptq_plugin.errors import CalibrationError
from gptq_plugin.layers.qlinear import QuantLinear
from gptq_plugin.quantize import missed_samples

from models import Reads, rows, tiny_llama

SMALL = {"bits": 4, "group_size": 32, "nsamples": 24}


def codes(model):
    return {name: one.qweight for name, one in model.named_modules() if isinstance(one, QuantLinear)}


def quantized(forward, data=None, **options):
    model = Reads()
    report = QuantizeModule(**{**SMALL, **options}).quantize(model, rows() if data is None else data, forward=forward)
    return report, codes(model)


def told_in(report):
    return [one for one in report.deviations if "the forward takes only some of" in one]


@pytest.mark.parametrize(
    ("takes", "options"),
    [(slice(1), {}), (0, {}), (slice(4), {}), (slice(7), {}), (slice(1), {"batch_size": 16})],
    ids=["the first", "it without an axis", "half", "all but one", "of a number that was given"],
)
def test_samples_that_a_forward_leaves_out_run_by_themselves(takes, options):
    report, found = quantized(lambda model, batch: model(batch["input_ids"][takes]), **options)
    assert report.batch_size == 1 and [one.tokens for one in report.quantized] == [24 * 40] * 2
    (told,) = told_in(report)
    assert told.endswith("each sample ran in a forward of its own")
    wanted, same = quantized(lambda model, batch: model(batch["input_ids"]), batch_size=1)
    assert not told_in(wanted) and all(torch.equal(found[name], same[name]) for name in same)
    assert report.calibration_sha256 == wanted.calibration_sha256


@pytest.mark.parametrize(
    "forward",
    [
        None,
        lambda model, batch: model(batch["input_ids"]),
        lambda model, batch: model(batch["input_ids"].flatten()),
        lambda model, batch: [model(one) for one in batch["input_ids"]],
    ],
    ids=["of the model", "as it is", "in one row", "one after the other"],
)
def test_a_forward_of_all_samples_has_them_together(forward):
    report, _ = quantized(forward)
    assert report.batch_size == 8 and not told_in(report)


def test_samples_of_other_lengths_and_padding_are_no_samples_left_out():
    def packed(model, batch):
        return model(batch["input_ids"][batch["attention_mask"].bool()])

    data = [{"input_ids": ids, "attention_mask": torch.arange(40) < 40 - 3 * n % 31} for n, ids in enumerate(rows())]
    report, _ = quantized(packed, data)
    assert report.batch_size == 8 and not told_in(report)
    lengths = [ids[: 20 + n % 3] for n, ids in enumerate(rows())]
    assert not told_in(quantized(lambda model, batch: model(batch["input_ids"]), lengths)[0])


def test_what_no_sample_changes_may_be_read_once():
    class Positions(Reads):
        def __init__(self, last=0.0):
            super().__init__()
            self.of_places, self.last_place = nn.Linear(32, 32), last

        def forward(self, input_ids):
            places = torch.arange(input_ids.shape[-1] * 32).view(1, -1, 32) / 100
            places[:, -1] += self.last_place
            return super().forward(input_ids) + self.of_places(places.sin())

    report = QuantizeModule(**SMALL).quantize(Positions(), rows(), forward=lambda m, batch: m(batch["input_ids"]))
    assert report.batch_size == 8 and not told_in(report)
    with pytest.raises(CalibrationError, match="the input of of_places holds NaN"):  # no sample that is left out
        QuantizeModule(**SMALL).quantize(
            Positions(torch.nan), torch.stack(rows())[..., None], forward=lambda m, batch: m(batch.long()[..., 0])
        )


def test_a_part_of_the_model_that_sees_one_sample_is_found():
    class Conditioned(Reads):
        def __init__(self):
            super().__init__()
            self.of_first = nn.Linear(32, 32)

        def forward(self, input_ids):
            return super().forward(input_ids) + self.of_first(self.words(input_ids[:1]))

    report = QuantizeModule(**SMALL).quantize(Conditioned(), rows(), forward=lambda m, batch: m(batch["input_ids"]))
    assert report.batch_size == 1 and "of_first gets 40 rows of them, and 40 of one" in told_in(report)[0]
    assert {one.tokens for one in report.quantized} == {24 * 40}


def test_a_models_own_forward_may_leave_samples_out_too():
    class First(Reads):
        def forward(self, input_ids):
            return super().forward(input_ids[0])

    report = QuantizeModule(**SMALL).quantize(First(), rows())
    assert report.batch_size == 1 and {one.tokens for one in report.quantized} == {24 * 40}


def test_batches_that_users_give_are_theirs_and_so_are_forwards_of_whole_batches():
    given = list(torch.stack(rows()).split(8))
    report, _ = quantized(lambda model, batch: model(batch["input_ids"][:1]), [{"input_ids": one} for one in given])
    assert report.batch_size == 8 and {one.tokens for one in report.quantized} == {3 * 40} and not told_in(report)

    with pytest.raises(CalibrationError, match="of one tensor or from a collate_fn, are not taken apart"):
        quantized(lambda model, batch: model(batch[0].long()[:, 0]), torch.stack(rows())[..., None])

    def whole(model, batch):
        if len(batch["input_ids"]) != 8:
            raise ValueError("eight samples, please")
        return model(batch["input_ids"])

    report, _ = quantized(whole)
    assert report.batch_size == 8 and not told_in(report)


def test_transformers_forwards_are_not_tried(monkeypatch):
    monkeypatch.setattr(missed_samples, "BatchRuns", None)
    assert QuantizeModule(**SMALL).quantize(tiny_llama(num_hidden_layers=1), rows()).batch_size == 8


def test_nothing_is_left_of_the_trial():
    class Keeps(Reads):
        def __init__(self):
            super().__init__()
            self.calls, self.register_buffer_ = 0, self.register_buffer("seen", torch.zeros(()))

        def forward(self, input_ids):
            self.calls += 1
            self.seen += torch.rand(())
            return super().forward(input_ids[:1])

    model = Keeps()
    torch.manual_seed(5)
    QuantizeModule(**SMALL).quantize(model, rows())
    found = torch.rand(())
    torch.manual_seed(5)
    assert model.calls == 0 and float(model.seen) == 0 and model.training and torch.equal(found, torch.rand(()))


def test_hooks_that_a_forward_registers_once_are_there_once():
    """transformers' do, where they are asked for hidden states."""
    model, twin = tiny_llama(num_hidden_layers=2), tiny_llama(num_hidden_layers=2)
    ids = torch.stack(rows(1))
    wanted = len(twin(ids, output_hidden_states=True).hidden_states)
    forward = lambda network, batch: network(**batch, output_hidden_states=True, use_cache=False)  # noqa: E731
    QuantizeModule(**SMALL).quantize(model, rows(), forward=forward)
    assert len(model(ids, output_hidden_states=True).hidden_states) == wanted


# --- callbacks ---


class Step(pl.LightningModule):
    """Written for batches of one sample."""

    def __init__(self):
        super().__init__()
        self.model, self.seen = Reads(), []

    def training_step(self, batch, batch_idx):
        ids = batch[0] if torch.is_tensor(batch[0]) and batch[0].dim() == 1 else batch[0][0]
        return self.model(ids).square().mean()

    calibration_step = lambda self, batch: self.training_step(batch, 0)  # noqa: E731

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-3)


def fitted(data, tmp_path, **options):
    callback = GPTQCallback(QuantizeModule(**{**SMALL, **options}), tmp_path / "out", module="model")
    trainer = pl.Trainer(
        max_steps=1, accelerator="cpu", callbacks=[callback], logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(Step(), data)
    return callback.report


def first_alone(samples):
    return samples[0]


def same_list(samples):
    return samples


def stacked_by_a_function(samples):
    return default_collate(samples)


@pytest.mark.parametrize("collate", [None, first_alone, same_list])
def test_a_step_of_single_samples_sees_all_of_a_dataloaders(collate, tmp_path):
    data = DataLoader(TensorDataset(torch.stack(rows())), batch_size=1, collate_fn=collate)
    report = fitted(data, tmp_path)
    assert report.batch_size == 1 and [one.tokens for one in report.quantized] == [24 * 40] * 2
    assert len(told_in(report)) == (collate is None)


def test_what_a_collator_puts_together_is_refused_before_the_training(tmp_path):
    data = DataLoader(TensorDataset(torch.stack(rows())), batch_size=1, collate_fn=stacked_by_a_function)
    with pytest.raises(CalibrationError, match=r"only some of 8 calibration samples .* give batch_size=1 in the"):
        fitted(data, tmp_path)
    report = fitted(data, tmp_path, batch_size=1)
    assert report.batch_size == 1 and [one.tokens for one in report.quantized] == [24 * 40] * 2


def test_a_forward_of_the_trainers_callback_sees_all_samples(tmp_path):
    from transformers import Trainer

    model = tiny_llama(num_hidden_layers=1)
    data = [{"input_ids": one, "labels": one} for one in rows()]
    callback = GPTQTrainerCallback(
        QuantizeModule(**SMALL), tmp_path / "out", forward=lambda m, batch: m(input_ids=batch["input_ids"][:1])
    )
    options = {"per_device_train_batch_size": 1, "max_steps": 1, "report_to": [], "use_cpu": True}
    with pytest.raises(CalibrationError, match="from a collate_fn, are not taken apart"):
        Trainer(model, TrainingArguments(str(tmp_path), **options), train_dataset=data, callbacks=[callback]).train()
    callback = GPTQTrainerCallback(
        QuantizeModule(**SMALL, batch_size=1), tmp_path / "out", forward=callback.forward
    )  # fmt: skip
    Trainer(model, TrainingArguments(str(tmp_path), **options), train_dataset=data, callbacks=[callback]).train()
    assert {one.tokens for one in callback.report.quantized} == {24 * 40}


# --- several ranks ---


def test_what_one_rank_finds_holds_for_all(monkeypatch):
    monkeypatch.setattr(missed_samples, "_missed", lambda *_: None)
    own = Calibration()
    assert missed_samples.all_seen(None, own, None) is own
    monkeypatch.setattr(missed_samples, "_missed", lambda *_: "a forward leaves some out")
    apart = missed_samples.all_seen(
        None, collect(rows()[:3], QuantizeConfig(batch_size=3), alone=True), None, alone=True
    )
    assert [(one.samples, one.given_apart) for one in apart.batches] == [
        (1, False)
    ] * 3  # and do not run together again
    answers = iter([[None, "a forward leaves some out"], [False, True]])
    monkeypatch.setattr(distributed, "gather_objects", lambda own: next(answers))
    with pytest.raises(CalibrationError, match="a forward leaves some out, and these batches"):
        missed_samples.all_seen(None, own, None)
