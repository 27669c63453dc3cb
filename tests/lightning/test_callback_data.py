"""What GPTQCallback calibrates on: every kind of batch, the train or validation dataloader, general text beside it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch
from datasets import Dataset
from torch.utils.data import DataLoader, IterableDataset
from transformers import BatchEncoding, T5Config, T5ForConditionalGeneration

import gptq_plugin.quantize.one_pass as jobs
from gptq_plugin import GPTQCallback, QuantizeModule, distributed
from gptq_plugin.calibration.collect import collect
from gptq_plugin.calibration.sources import Sources
from gptq_plugin.errors import CalibrationError

import lightning_runs
from lightning_runs import llama
from texts import CHATS, chat_words

SMALL = {**lightning_runs.SMALL, "clip_ratios": (1.0,)}


class Holds(lightning_runs.Holds):
    """Its weights stay what they are, so that inputs can be computed again."""

    def loss(self, batch):
        return self.model(**batch).loss

    def training_step(self, batch, batch_idx):
        return self.loss(batch)

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        self.log("val_loss", self.loss(batch))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


def fit(module, loader, callback, tmp_path, val=None, **options):
    """Trains on one batch and returns the report."""
    lightning_runs.fit(module, loader, [callback], tmp_path, val, **{"limit_train_batches": 1, **options})
    return callback.report


def rows(count=16, positions=11, seed=0, low=1):
    return torch.randint(low, 64, (count, positions), generator=torch.Generator().manual_seed(seed))


def loader(count=16, low=1, **options):
    return DataLoader([{"input_ids": row, "labels": row} for row in rows(count, low=low)], batch_size=4, **options)


# --- kinds of batches ---


def padded(left):
    """Sequences of 4 to 11 tokens."""
    ids, mask = rows(32), torch.ones(32, 11, dtype=torch.long)
    for number in range(32):
        mask[number, 4 + number % 8 :] = 0
    mask = mask.flip(1) if left else mask
    return {"input_ids": ids * mask, "attention_mask": mask, "labels": ids.where(mask == 1, -100)}


def packed():
    """Three documents a row; positions start again with each, and its first token is predicted by nothing."""
    ids = rows(32)
    position_ids = torch.cat([torch.arange(n) for n in (4, 5, 2)]).repeat(32, 1)
    return {"input_ids": ids, "position_ids": position_ids, "labels": ids.where(position_ids > 0, -100)}


def chat():
    """A prompt whose tokens have no label, then the answer and padding."""
    batch = padded(left=False)
    batch["labels"][:, :3] = -100
    return batch


@dataclass
class Sample:
    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    labels: torch.Tensor
    what: str = "chat"


class Triple(NamedTuple):
    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    labels: torch.Tensor


class Tuples(Holds):
    def loss(self, batch):
        return self.model(input_ids=batch[0], attention_mask=batch[1], labels=batch[2]).loss

    def calibration_step(self, batch):
        return self.loss(batch)


class Names(Holds):
    def loss(self, batch):
        return super().loss({key: getattr(batch, key) for key in ("input_ids", "attention_mask", "labels")})


class Nested(Holds):
    def loss(self, batch):
        return super().loss(batch["text"])

    def calibration_step(self, batch):
        text = batch["text"]  # the labels of the batch are found though this call has none
        return self.model(input_ids=text["input_ids"], attention_mask=text["attention_mask"])


KINDS = {
    "left padding": (Holds, padded(True), dict),
    "right padding": (Holds, padded(False), dict),
    "packed": (Holds, packed(), dict),
    "chat": (Holds, chat(), dict),
    "tuple": (Tuples, chat(), lambda batch: tuple(batch.values())),
    "named tuple": (Names, chat(), lambda batch: Triple(**batch)),
    "dataclass": (Names, chat(), lambda batch: Sample(**batch)),
    "BatchEncoding": (Holds, chat(), BatchEncoding),
    "nested": (Nested, chat(), lambda batch: {"text": BatchEncoding(batch), "image": [Sample(*[torch.ones(4)] * 3)]}),
}


def collated(batch, make):
    samples = [dict(zip(batch, row, strict=True)) for row in zip(*batch.values(), strict=True)]
    collate = lambda some: make({key: torch.stack([one[key] for one in some]) for key in batch})  # noqa: E731
    return DataLoader(samples, batch_size=4, collate_fn=collate)


@pytest.mark.parametrize("weighting", ["all", "labels"])
@pytest.mark.parametrize("kind", KINDS)
def test_exactly_the_positions_that_count_enter_the_hessian_of_every_kind_of_batch(
    kind, weighting, tmp_path, monkeypatch
):
    module_class, batch, make = KINDS[kind]
    counts = batch.get("attention_mask", torch.ones(32, 11)).bool()
    if weighting == "labels":
        labelled = torch.zeros_like(counts)
        labelled[:, :-1] = batch["labels"][:, 1:] != -100
        counts = counts & labelled
    inputs, hessians, solve = [], [], jobs.solve_shared
    twin = llama().eval()
    twin.model.layers[0].self_attn.q_proj.register_forward_pre_hook(lambda _, args: inputs.append(args[0].detach()))
    twin(**batch)
    kept = inputs[0][counts]
    monkeypatch.setattr(
        jobs, "solve_shared", lambda *args, **kw: (hessians.append(args[1].clone()), solve(*args, **kw))[1]
    )
    callback = GPTQCallback(QuantizeModule(**{**SMALL, "nsamples": 32}, token_weighting=weighting))
    report = fit(module_class(), collated(batch, make), callback, tmp_path)
    assert {module.tokens for module in report.quantized} == {int(counts.sum())}
    torch.testing.assert_close(hessians[0], kept.T @ kept / len(kept), rtol=1e-4, atol=1e-6)
    assert report.deviations == [] and not any(module.deviations for module in report.quantized)


class Translates(Holds):
    def __init__(self):
        super().__init__()
        config = T5Config(d_model=64, d_kv=32, d_ff=96, num_layers=1, num_heads=2, vocab_size=64,
                          decoder_start_token_id=0)  # fmt: skip
        self.model = T5ForConditionalGeneration(config)


def test_sources_and_targets_of_one_length_are_told_apart(tmp_path):
    batch = padded(left=False)
    batch["labels"] = batch["input_ids"].where(torch.arange(11) < 9, -100)
    callback = GPTQCallback(QuantizeModule(**{**SMALL, "nsamples": 32}))
    report = fit(Translates(), collated(batch, dict), callback, tmp_path)
    tokens = {module.name: module.tokens for module in report.quantized}
    source, target = int(batch["attention_mask"].sum()), 32 * 9
    assert tokens["encoder.block.0.layer.0.SelfAttention.q"] == source
    assert tokens["decoder.block.0.layer.1.EncDecAttention.k"] == source
    assert tokens["decoder.block.0.layer.0.SelfAttention.q"] == target
    assert set(tokens.values()) == {source, target}


def test_labels_that_are_asked_for_and_missing_are_refused_before_training(tmp_path):
    class Untrained(Holds):
        def training_step(self, batch, batch_idx):
            raise AssertionError("training began")

    data = DataLoader([{"input_ids": row} for row in rows()], batch_size=4)
    callback = GPTQCallback(QuantizeModule(**SMALL, token_weighting="labels"))
    with pytest.raises(CalibrationError, match="has no labels.*leave token_weighting at 'all'"):
        fit(Untrained(), data, callback, tmp_path)


# --- how a batch is run ---


def test_a_calibration_step_may_be_given_to_the_callback_and_comes_before_the_modules_own(tmp_path):
    seen = []

    def step(pl_module, batch):
        seen.append(type(pl_module))
        return pl_module.model(input_ids=batch[0])

    class Own(Tuples):
        def calibration_step(self, batch):
            raise AssertionError("the callback's was given")

    data = DataLoader(torch.utils.data.TensorDataset(*chat().values()), batch_size=4)
    report = fit(Own(), data, GPTQCallback(QuantizeModule(**SMALL), calibration_step=step), tmp_path)
    assert report.tokens == 16 * 11 and set(seen) == {Own}
    with pytest.raises(ValueError, match="calibration_step must be a function, .*; got 'step'"):
        GPTQCallback(QuantizeModule(**SMALL), calibration_step="step")


def test_the_modules_own_preparation_of_a_batch_runs_as_in_training(tmp_path):
    class Prepares(Holds):
        def on_before_batch_transfer(self, batch, dataloader_idx):
            return {"input_ids": batch["raw"], "labels": batch["raw"]}

    data = DataLoader([{"raw": row} for row in rows()], batch_size=4)
    assert fit(Prepares(), data, GPTQCallback(QuantizeModule(**SMALL)), tmp_path).tokens == 16 * 11


# --- where the samples come from ---


class Seen(Holds):
    """Remembers which tokens it calibrates on."""

    def __init__(self):
        super().__init__()
        self.rows = []

    def calibration_step(self, batch):
        self.rows += batch["input_ids"].tolist()
        return self.model(input_ids=batch["input_ids"])


def test_the_report_tells_where_the_samples_come_from(tmp_path):
    callback = GPTQCallback(QuantizeModule(**SMALL, seed=7), tmp_path / "out")
    report = fit(Holds(), loader(33), callback, tmp_path)
    assert report.calibration == "16 samples of the train dataloader's 33 (seed 7)"
    assert report.calibration in (tmp_path / "out" / "quantization_report.json").read_text()
    report = fit(Holds(), loader(33), GPTQCallback(QuantizeModule(**SMALL), calibration=[[5] * 70] * 3), tmp_path)
    assert report.calibration == "3 samples of the data given"


@pytest.mark.parametrize("options", [{}, {"check_val_every_n_epoch": 2, "num_sanity_val_steps": 0}])
def test_val_draws_from_all_validation_dataloaders(options, tmp_path):
    module, val = Seen(), [loader(9, low=32), loader(12, low=48)]
    report = fit(module, loader(), GPTQCallback(QuantizeModule(**SMALL), calibration="val"), tmp_path, val, **options)
    assert report.samples == 16 and report.calibration == "16 samples of the validation dataloader's 21 (seed 0)"
    assert min(token for row in module.rows for token in row) >= 32
    samples = {tuple(row) for row in module.rows}
    wanted = {tuple(row) for data in val for row in (one["input_ids"].tolist() for one in data.dataset)}
    assert samples <= wanted and len(samples) == 16


def test_val_without_a_validation_dataloader_is_refused_with_the_remedy(tmp_path):
    with pytest.raises(CalibrationError, match="the trainer has none: give it one"):
        fit(Holds(), loader(), GPTQCallback(QuantizeModule(**SMALL), calibration="val"), tmp_path)
    with pytest.raises(CalibrationError, match="give a list of texts"):
        GPTQCallback(QuantizeModule(**SMALL), calibration="test")


def test_a_dataloader_given_is_sampled_like_the_trainers(tmp_path):
    module, other = Seen(), loader(200, low=40)
    report = fit(module, loader(), GPTQCallback(QuantizeModule(**SMALL), calibration=other), tmp_path)
    assert report.calibration == "16 samples of the dataloader given's 200 (seed 0)"
    assert min(token for row in module.rows for token in row) >= 40
    first = {tuple(one["input_ids"].tolist()) for one in list(other.dataset)[:16]}
    assert len({tuple(row) for row in module.rows} & first) < 8  # drawn, not read from the start
    assert report.deviations == []


# --- general text beside it ---


def tokens_of(text):
    return {"input_ids": [ord(c) % 32 + 32 for c in text]}  # the run's own are below 32


def below_32(count=40):
    return DataLoader([{"input_ids": row % 31 + 1, "labels": row % 31 + 1} for row in rows(count)], batch_size=4)


@pytest.mark.parametrize(("fraction", "general"), [(0.25, 4), (0.01, 1), (0.99, 15), (0, 0)])
def test_a_fraction_of_the_samples_is_general_text(fraction, general, tmp_path):
    module = Seen()
    callback = GPTQCallback(
        QuantizeModule(**SMALL), mix=(f"text number {n}" for n in range(50)), mix_fraction=fraction, tokenizer=tokens_of
    )
    report = fit(module, below_32(), callback, tmp_path)
    assert report.samples == 16 and report.deviations == []
    other = f"; {general} samples of the general text" if general else ""
    assert report.calibration == f"{16 - general} samples of the train dataloader's 40 (seed 0){other}"
    distinct = {tuple(row) for row in module.rows}
    assert sum(min(row) >= 32 for row in distinct) == general and len(distinct) == 16


def test_texts_beside_texts_and_loaders_beside_loaders_may_be_mixed(tmp_path):
    report = fit(
        Holds(), loader(),
        GPTQCallback(QuantizeModule(**SMALL), calibration=["own text"] * 40, mix=below_32(20), tokenizer=tokens_of),
        tmp_path,
    )  # fmt: skip
    assert report.calibration == "12 samples of the data given; 4 samples of the general dataloader's 20 (seed 0)"


def test_with_weighted_labels_every_token_of_general_text_counts(tmp_path):
    answers = {key: value[:1].repeat(40, 1) for key, value in chat().items()}  # one sample many times over
    answers["labels"] = answers["input_ids"].where(torch.arange(11) == 2, -100)  # of which one position counts
    callback = GPTQCallback(
        QuantizeModule(**SMALL, token_weighting="labels"), mix=["abcdefghij" * 4] * 9, tokenizer=tokens_of
    )
    report = fit(Holds(), collated(answers, dict), callback, tmp_path)
    assert report.calibration.endswith("4 samples of the general text")
    assert report.tokens == 12 * 1 + 4 * 39  # nothing follows the last token


def test_general_text_that_does_not_fit_is_refused_before_training(tmp_path):
    class Untrained(Holds):
        def training_step(self, batch, batch_idx):
            raise AssertionError("training began")

    with pytest.raises(CalibrationError, match="no tokenizer"):
        fit(Untrained(), loader(), GPTQCallback(QuantizeModule(**SMALL), mix=["a text"] * 9), tmp_path)
    callback = GPTQCallback(QuantizeModule(**SMALL), mix=[{"pixels": torch.zeros(1, 3)}] * 9)
    with pytest.raises(CalibrationError, match="keys pixels. does not fit"):
        fit(Untrained(), loader(), callback, tmp_path)


@pytest.mark.parametrize("fraction", [-0.1, 1, 1.5, True, "half"])
def test_a_fraction_that_is_none_is_refused(fraction):
    with pytest.raises(ValueError, match=r"mix_fraction must be a number in \[0, 1\)"):
        GPTQCallback(QuantizeModule(**SMALL), mix=[[1, 2]], mix_fraction=fraction)


def test_one_general_text_alone_is_refused():
    with pytest.raises(CalibrationError, match="give a list of texts"):
        GPTQCallback(QuantizeModule(**SMALL), mix="a text")
    with pytest.raises(ValueError, match="cannot be mixed"):
        GPTQCallback(QuantizeModule(**{**SMALL, "nsamples": 1}), mix=["a text"])


def test_a_stream_is_not_read_ahead_of_training_and_is_mixed_all_the_same(tmp_path):
    class Stream(IterableDataset):
        def __iter__(self):
            return iter([{"input_ids": row, "labels": row} for row in rows(30)])

    report = fit(
        Holds(), DataLoader(Stream(), batch_size=4),
        GPTQCallback(QuantizeModule(**SMALL), mix=[[5, 6, 7]] * 9), tmp_path,
    )  # fmt: skip
    assert report.calibration == "12 samples of the train dataloader of Stream; 4 samples of the general text"


def test_a_stream_that_goes_on_where_it_was_left_loses_no_sample_to_a_trial_before_training(tmp_path):
    class Queue(IterableDataset):
        def __init__(self):
            self.rest = iter([{"input_ids": row, "labels": row} for row in rows(28)])

        def __iter__(self):
            return self.rest

    class Noting(Holds):
        def training_step(self, batch, batch_idx):
            seen.append(batch["input_ids"])
            return super().training_step(batch, batch_idx)

    seen = []
    callback = GPTQCallback(QuantizeModule(**SMALL))
    report = fit(Noting(), DataLoader(Queue(), batch_size=4), callback, tmp_path, limit_train_batches=3)
    assert torch.equal(torch.cat(seen), rows(28)[:12]) and report.samples == 16
    callback = GPTQCallback(QuantizeModule(**SMALL))
    with pytest.raises(CalibrationError, match="is empty: [a-z ]* Queue has nothing left, .* calibration="):
        fit(Noting(), DataLoader(Queue(), batch_size=4), callback, tmp_path, limit_train_batches=None)


@pytest.mark.parametrize("size", [2, 3, 5])
def test_ranks_share_both_parts_so_that_each_sample_counts_once(size, monkeypatch):
    class Trainer:
        train_dataloader = below_32(33)

    monkeypatch.setattr(distributed, "world_size", lambda: size)
    chosen = {}
    monkeypatch.setattr(distributed, "object_from_first", lambda value: chosen.setdefault(0, value))
    callback = GPTQCallback(QuantizeModule(**SMALL), mix=[[32 + n] for n in range(20)], mix_fraction=0.3)
    shares = []
    for rank in range(size):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        own, general = callback.calibration_data(Trainer()).parts
        own_rows = [tuple(row) for batch in own.data for row in batch["input_ids"].tolist()]
        dealt = collect(Sources((general,)), callback.quantizer.config).batches
        given = [tuple(row) for batch in dealt for row in batch.data["input_ids"].tolist()]
        assert len(own_rows) == own.nsamples
        shares.append(own_rows + given)
    everything = [sample for share in shares for sample in share]
    assert len(everything) == len(set(everything)) == 16
    assert sorted(sample for sample in everything if len(sample) == 1) == [(32 + n,) for n in range(5)]


# --- rows of data sets ---


class Untrained(Holds):
    def training_step(self, batch, batch_idx):
        raise AssertionError("training began")


@pytest.mark.parametrize("column", ["text", "messages"])
def test_rows_of_a_data_set_calibrate_like_what_is_in_them(column, tmp_path):
    words = chat_words()
    chats = [[{**message, "content": f"{message['content']} {n}"} for message in CHATS[n % 2]] for n in range(9)]
    given = [words.apply_chat_template(chat, tokenize=False) for chat in chats]
    data = Dataset.from_list([{"text": text, "id": 3} for text in given] if column == "text" else
                             [{"messages": chat} for chat in chats])  # fmt: skip
    plain = [words(text, add_special_tokens=column == "text") for text in given]
    reports = []
    for calibration in (data, plain):
        module = Holds()
        module.model.resize_token_embeddings(len(words))
        callback = GPTQCallback(QuantizeModule(**SMALL), tokenizer=words, calibration=calibration)
        reports.append(fit(module, loader(), callback, tmp_path))
    assert [layer.loss for layer in reports[0].modules] == [layer.loss for layer in reports[1].modules]
    assert reports[0].samples == 9 and reports[0].calibration_sha256 == reports[1].calibration_sha256


@pytest.mark.parametrize("option", ["calibration", "mix"])
@pytest.mark.parametrize(
    ("row", "tokenizer", "message"),
    [
        ({"text": "some words"}, None, "holds texts, and there is no tokenizer"),
        ({"messages": CHATS[0]}, None, "holds chat messages, and there is no tokenizer"),
        ({"messages": CHATS[0]}, tokens_of, "has no chat template"),
    ],
)
def test_rows_that_cannot_be_made_into_tokens_are_refused_before_training(option, row, tokenizer, message, tmp_path):
    callback = GPTQCallback(QuantizeModule(**SMALL), tokenizer=tokenizer, **{option: Dataset.from_list([row] * 20)})
    with pytest.raises(CalibrationError, match=message):
        fit(Untrained(), loader(), callback, tmp_path)
