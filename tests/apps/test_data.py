"""Documents → tokenizer → rows → data, on real files and data sets."""

from __future__ import annotations

import json

import pytest
import torch
from datasets import Dataset

from gptq_plugin.apps import data
from gptq_plugin.apps.documents import texts
from gptq_plugin.apps.rows import cut_rows
from gptq_plugin.errors import DataError

from texts import PROSE


def documents(count):
    return Dataset.from_dict({"text": [f"Document {i}, {i * i}: {i % 7} {PROSE[0]}" for i in range(count)]})


def test_the_end_of_the_text_is_held_out_when_there_is_no_other(tokenizer):
    whole = cut_rows(texts(documents(40)), tokenizer, 32)
    loaded = data.TextData(documents(40), seq_len=32, eval_fraction=0.25).encode(tokenizer)
    assert len(loaded.validation) == round(len(whole) / 4)
    assert torch.equal(torch.cat([loaded.train, loaded.validation]), whole)


def test_validation_text_of_its_own_leaves_all_rows_to_training(tokenizer):
    loaded = data.TextData(documents(40), documents(9), seq_len=32, eval_rows=2, train_rows=5).encode(tokenizer)
    assert torch.equal(loaded.train, cut_rows(texts(documents(40)), tokenizer, 32)[:5])
    assert torch.equal(loaded.validation, cut_rows(texts(documents(9)), tokenizer, 32)[:2])


def test_calibration_rows_keep_the_texts_order_or_are_drawn_by_the_seed(tokenizer):
    def rows(**options):
        loaded = data.TextData(documents(60), documents(9), seq_len=32, **options).encode(tokenizer)
        return torch.stack(loaded.calibration(8)), loaded.train

    in_order, train = rows(shuffle=False)
    assert torch.equal(in_order, train[:8])
    first, _ = rows(seed=1)
    again, _ = rows(seed=1)
    other, _ = rows(seed=2)
    assert torch.equal(first, again) and not torch.equal(first, other) and not torch.equal(first, in_order)
    assert len({tuple(row.tolist()) for row in first}) == 8


def test_every_training_row_comes_once_an_epoch_in_an_order_of_the_seed(tokenizer):
    def epoch(**options):
        loaded = data.TextData(documents(60), documents(9), seq_len=32, batch_size=5, **options).encode(tokenizer)
        batches = [batch["input_ids"] for batch in loaded.train_dataloader()]
        assert all(batch.shape == (5, 32) for batch in batches[:-1])
        return torch.cat(batches), loaded.train

    shuffled, train = epoch(seed=3)
    assert not torch.equal(shuffled, train)
    assert sorted(map(tuple, shuffled.tolist())) == sorted(map(tuple, train.tolist()))
    assert torch.equal(shuffled, epoch(seed=3)[0])
    assert torch.equal(*epoch(shuffle=False))


def test_text_that_leaves_nothing_to_hold_out_is_refused(tokenizer):
    tokens = cut_rows(texts(documents(2)), tokenizer, 2).numel()
    with pytest.raises(DataError, match=rf"too short to hold out .* fills 1 row of {tokens - 2} tokens"):
        data.TextData(documents(2), seq_len=tokens - 2).encode(tokenizer)
    with pytest.raises(DataError, match="eval_fraction must lie between 0 and 1"):
        data.TextData(documents(2), eval_fraction=1.0)


def test_pycodes_windows_are_those_of_the_measured_figures(shared):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(shared / "models" / "pycode-29m")
    loaded = data.text(
        str(shared / "data/pycode/calib.jsonl"),
        str(shared / "data/pycode/eval.jsonl"),
        eval_rows=200,
        shuffle=False,
    ).encode(tokenizer)
    assert loaded.validation.shape == (200, 512)
    lines = (shared / "data/pycode/calib.jsonl").read_text().splitlines()
    stream = []
    for line in lines[:40]:
        stream += [
            tokenizer.bos_token_id,
            *tokenizer(json.loads(line)["text"], add_special_tokens=False)["input_ids"],
        ]
    assert torch.stack(loaded.calibration(128)).flatten().tolist() == stream[: 128 * 512]
