"""What GPTQTrainerCallback calibrates on: the train or evaluation datasets, given data, general text beside it."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import (
    DataCollatorForSeq2Seq,
    DataCollatorWithFlattening,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
)

from gptq_plugin import GPTQTrainerCallback, QuantizeModule
from gptq_plugin.errors import CalibrationError

from models import tokenizer
from texts import CHATS
from trainer_runs import SMALL, Rows, Stream, Tokenizer, Trainer, Untrained, llama, quantized, same, train

EACH_STEP = {"eval_strategy": "steps", "eval_steps": 1}


class High(Rows):
    """Tokens from `low` on, to tell where a sample is from."""

    def __init__(self, count, low):
        super().__init__()
        self.ids = torch.randint(low, 64, (count, 16), generator=torch.Generator().manual_seed(low))


class Low(Rows):
    """Tokens below 32."""

    def __init__(self):
        super().__init__()
        self.ids = self.ids % 32


class Seen(GPTQTrainerCallback):
    """Remembers which rows it calibrates on."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options, forward=self.run)
        self.rows = []

    def run(self, model, batch):
        self.rows += batch["input_ids"].tolist()
        return model(input_ids=batch["input_ids"])


def test_the_report_tells_where_the_samples_come_from(tmp_path):
    callback = GPTQTrainerCallback(QuantizeModule(**SMALL, seed=7), tmp_path / "out")
    train(llama(), [callback], tmp_path)
    assert callback.report.calibration == "17 samples of the train dataloader's 24 of Rows (seed 7)"
    assert callback.report.calibration in (tmp_path / "out" / "quantization_report.json").read_text()
    callback = GPTQTrainerCallback(QuantizeModule(**SMALL), calibration=[[5] * 70] * 3)
    train(llama(), [callback], tmp_path)
    assert callback.report.calibration == "3 samples of the data given"


@pytest.mark.parametrize("eval_steps", [1, 3])
def test_val_draws_from_all_datasets_that_training_evaluates(eval_steps, tmp_path):
    callback = Seen(QuantizeModule(**SMALL), calibration="val")
    data = {"first": High(9, 32), "second": High(12, 48)}
    options = {**EACH_STEP, "eval_steps": eval_steps}
    trainer = train(llama(), [callback], tmp_path, Low(), trainer_options={"eval_dataset": data}, **options)
    assert callback.report.calibration == "17 samples of the validation dataloader's 21 of High (seed 0)"
    samples = {tuple(row) for row in callback.rows}
    assert samples <= {tuple(row) for part in data.values() for row in part.ids.tolist()} and len(samples) >= 17
    assert len(quantized(trainer.model)) == 7
    read = len(callback.rows)
    trainer.evaluate()
    assert len(callback.rows) == read  # evaluations after training are none of its business


def test_calibrating_on_val_changes_nothing_of_the_training(tmp_path):
    plain, model = llama(), llama()
    options = {"trainer_options": {"eval_dataset": High(9, 32)}, **EACH_STEP}
    train(plain, [], tmp_path, Rows(noisy=True), **options)
    callback = GPTQTrainerCallback(QuantizeModule(**SMALL), tmp_path / "out", calibration="val", swap=False)
    train(model, [callback], tmp_path, Rows(noisy=True), **options)
    assert same(plain, model)


class Unfit(Rows):
    """Rows that the trainer evaluates, and the model is not called with."""

    def __getitem__(self, index):
        return {"pixels": torch.zeros(3)}


class Evaluates(Trainer):
    """Whose evaluation does not look at the data."""

    def prediction_step(self, model, inputs, *args, **kwargs):
        return torch.tensor(0.0), None, None


class EvaluatesOnly(Evaluates, Untrained):
    pass


def test_evaluation_data_that_does_not_fit_is_found_in_the_first_evaluation_which_may_be_before_training(tmp_path):
    callback = GPTQTrainerCallback(QuantizeModule(**SMALL), tmp_path / "out", calibration="val")
    options = {"trainer_options": {"eval_dataset": {"a": Rows(), "b": Unfit()}}, "remove_unused_columns": False}
    with pytest.raises(CalibrationError, match="keys pixels. does not fit"):
        train(llama(), [callback], tmp_path, kind=EvaluatesOnly, eval_on_start=True, **options)
    assert not (tmp_path / "run" / "trained-0").exists()
    with pytest.raises(CalibrationError, match="keys pixels. does not fit"):
        train(llama(), [callback], tmp_path, kind=Evaluates, eval_strategy="steps", eval_steps=2, **options)
    assert (tmp_path / "run" / "trained-2" / "model.safetensors").exists()  # of 3 steps, and nothing is lost


def test_val_without_an_evaluation_is_refused_before_training_or_its_weights_are_saved(tmp_path):
    callback = GPTQTrainerCallback(QuantizeModule(**SMALL), calibration="val")
    with pytest.raises(CalibrationError, match=r"and it does not: give it an eval_strategy, or .*get_eval_dataloader"):
        train(llama(), [callback], tmp_path, kind=Untrained, trainer_options={"eval_dataset": Rows()})
    with pytest.raises(CalibrationError, match="training ended without an evaluation"):
        train(llama(), [callback], tmp_path, trainer_options={"eval_dataset": Rows()}, eval_delay=9, **EACH_STEP)
    assert (tmp_path / "run" / "trained-3" / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("loader_of", "number", "low"),
    [
        (lambda trainer: DataLoader(High(200, 40), batch_size=3), 200, 40),
        (lambda trainer: trainer.get_eval_dataloader(), 33, 48),
    ],
    ids=["another", "the trainer's"],
)
def test_a_dataloader_given_is_sampled_like_the_trainers(loader_of, number, low, tmp_path):
    class Adds(Trainer):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            self.added = Seen(QuantizeModule(**SMALL), calibration=loader_of(self))
            self.add_callback(self.added)

    trainer = train(llama(), [], tmp_path, Low(), kind=Adds, trainer_options={"eval_dataset": High(33, 48)})
    callback = trainer.added
    assert callback.report.calibration == f"17 samples of the dataloader given's {number} of High (seed 0)"
    assert min(token for row in callback.rows for token in row) >= low and callback.report.deviations == []


@pytest.mark.parametrize(
    ("data", "own"),
    [
        (Rows(), "13 samples of the train dataloader's 24 of Rows (seed 0)"),
        (Stream(), "16 samples of the train dataloader of Stream"),
    ],
    ids=["rows", "stream"],
)
def test_general_text_is_mixed_in_with_the_trainers_tokenizer(data, own, tmp_path):
    callback = GPTQTrainerCallback(QuantizeModule(**SMALL), mix=(f"text number {n}" for n in range(50)))
    train(llama(), [callback], tmp_path, data, trainer_options={"processing_class": Tokenizer()})
    assert callback.report.calibration == f"{own}; 4 samples of the general text"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mix": ["a text"] * 9}, "no tokenizer"),
        ({"mix": [{"pixels": torch.zeros(1, 3)}] * 9}, "keys pixels. does not fit"),
        ({"mix": DataLoader(Unfit(), batch_size=3)}, "keys pixels. does not fit"),
        ({"calibration": DataLoader(Unfit(), batch_size=3)}, "keys pixels. does not fit"),
    ],
)
def test_data_that_does_not_fit_is_refused_before_training(options, message, tmp_path):
    with pytest.raises(CalibrationError, match=message):
        train(llama(), [GPTQTrainerCallback(QuantizeModule(**SMALL), **options)], tmp_path, kind=Untrained)


def test_what_cannot_be_mixed_is_refused_at_once():
    with pytest.raises(ValueError, match=r"mix_fraction must be a number in \[0, 1\)"):
        GPTQTrainerCallback(QuantizeModule(), mix=[[1, 2]], mix_fraction=1)
    with pytest.raises(CalibrationError, match="give a list of texts"):
        GPTQTrainerCallback(QuantizeModule(), mix="a text")


def test_a_train_dataloader_of_a_kind_of_its_own_is_not_read_ahead_of_training(tmp_path):
    class Batches:
        def __init__(self, loader):
            self.loader, self.dataset, self.starts = loader, loader.dataset, 0

        def __len__(self):
            return len(self.loader)

        def __iter__(self):
            self.starts += 1
            return iter(self.loader)

    class Own(Trainer):
        def get_train_dataloader(self):
            self.batches = Batches(super().get_train_dataloader())
            return self.batches

    callback = GPTQTrainerCallback(QuantizeModule(**SMALL))
    trainer = train(llama(), [callback], tmp_path, kind=Own)
    assert trainer.batches.starts == 2  # by training, and then by calibration
    assert callback.report.calibration == "24 samples of the train dataloader of Rows"


def test_rows_of_a_data_set_calibrate_with_the_trainers_tokenizer(tmp_path):
    data = Dataset.from_list([{"text": f"text number {n}", "id": n} for n in range(9)])
    callback = Seen(QuantizeModule(**SMALL), calibration=data)
    train(llama(), [callback], tmp_path, trainer_options={"processing_class": Tokenizer()})
    expected = [Tokenizer()(row["text"])["input_ids"] for row in data]
    assert {*map(tuple, callback.rows)} == {*map(tuple, expected)}


@pytest.mark.parametrize(
    ("tokenizer", "message"), [(None, "there is no tokenizer"), (Tokenizer(), "has no chat template")]
)
def test_chats_that_cannot_be_made_into_tokens_are_refused_before_training(tokenizer, message, tmp_path):
    callback = GPTQTrainerCallback(QuantizeModule(**SMALL), calibration=[{"messages": CHATS[0]}] * 9)
    with pytest.raises(CalibrationError, match=message):
        train(llama(), [callback], tmp_path, kind=Untrained, trainer_options={"processing_class": tokenizer})


class Pairs(Rows):
    """Sources of 5 tokens and targets of 15, padded to 20 tokens each."""

    def __getitem__(self, index):
        ids = torch.cat([self.ids[index].clamp(min=2), self.ids[index].clamp(min=2)])[:20]
        mask, labels = (torch.arange(20) < 5).long(), torch.where(torch.arange(20) < 15, ids, -100)
        return {"input_ids": ids.tolist(), "attention_mask": mask.tolist(), "labels": labels.tolist()}


@pytest.mark.parametrize("collated", [False, True])
def test_a_seq2seq_trainers_sources_and_targets_are_told_apart(collated, tmp_path):
    torch.manual_seed(0)
    config = T5Config(d_model=64, d_kv=32, d_ff=96, num_layers=1, num_heads=2, vocab_size=64, decoder_start_token_id=0)
    model = T5ForConditionalGeneration(config)
    options = {"data_collator": DataCollatorForSeq2Seq(tokenizer(), model)} if collated else {}
    callback = GPTQTrainerCallback(QuantizeModule(**{**SMALL, "nsamples": 16}))
    arguments = Seq2SeqTrainingArguments(
        str(tmp_path / "run"), use_cpu=True, max_steps=1, report_to=[], disable_tqdm=True, save_strategy="no"
    )
    Seq2SeqTrainer(model, arguments, train_dataset=Pairs(), callbacks=[callback], **options).train()
    tokens = {module.name: module.tokens for module in callback.report.quantized}
    assert tokens["encoder.block.0.layer.0.SelfAttention.q"] == 16 * 5
    assert tokens["decoder.block.0.layer.1.EncDecAttention.k"] == 16 * 5
    assert tokens["decoder.block.0.layer.0.SelfAttention.q"] == 16 * 15
    assert set(tokens.values()) == {16 * 5, 16 * 15}


def test_packed_rows_run_with_where_their_sequences_begin_as_in_training(tmp_path):
    class Lists(Rows):
        def __getitem__(self, index):
            return {"input_ids": self.ids[index].tolist()}

    model, runs = llama(), {True: set(), False: set()}
    packed = DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_seq_idx=True)

    def note(own, _, given):
        runs[own.training].add(tuple((name, getattr(value, "dim", int)()) for name, value in given.items()))

    model.register_forward_pre_hook(note, with_kwargs=True)
    callback = GPTQTrainerCallback(QuantizeModule(**SMALL))
    train(model, [callback], tmp_path, Lists(), trainer_options={"data_collator": packed})
    fields = {("cu_seq_lens_q", 1), ("cu_seq_lens_k", 1), ("max_length_q", 0), ("max_length_k", 0), ("seq_idx", 2)}
    assert len(runs[True]) == 1 and all(fields < set(given) for given in runs[True] | runs[False])
    assert not any("does not take" in told for told in callback.report.deviations)
