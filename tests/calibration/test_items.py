"""What an item of calibration data is: fields that the model takes, tokens, rows of numbers, and batches."""

from __future__ import annotations

import dataclasses
from collections import namedtuple

import numpy
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset
from transformers import BatchEncoding

from gptq_plugin import QuantizeConfig
from gptq_plugin.calibration.collect import collect
from gptq_plugin.calibration.takes import Takes
from gptq_plugin.errors import CalibrationError

CONFIG = QuantizeConfig(nsamples=64, batch_size=4, model_seqlen=6)
LLAMA = Takes("LlamaForCausalLM.forward", frozenset({"input_ids", "attention_mask", "position_ids", "labels"}))
NOTE = "had fields that LlamaForCausalLM.forward does not take, left out"


def collected(data, takes=LLAMA, tokenizer=None, config=CONFIG):
    return collect(data, config, tokenizer, takes=takes)


# --- fields ---


@pytest.mark.parametrize(
    ("others", "kept", "left_out"),
    [
        ({"position_ids": [0, 1, 2]}, ["position_ids"], None),
        ({"text": "abc"}, [], "text"),
        ({"position_ids": [[0, 1, 2]], "text": "abc"}, ["position_ids"], "text"),
        ({"offset_mapping": [(0, 1), (1, 2), (2, 3)]}, [], "offset_mapping"),
        ({"special_tokens_mask": torch.tensor([1, 0, 1])}, [], "special_tokens_mask"),
        ({"length": [3], "overflow_to_sample_mapping": [0]}, [], "length, overflow_to_sample_mapping"),
        ({"label": 3, "id": "x-7"}, [], "label, id"),
        ({"label": torch.tensor(3)}, [], "label"),
        ({"words": ["a", "b", "c"]}, [], "words"),
        ({"token_type_ids": [0, 0, 0]}, ["token_type_ids"], None),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_fields_that_the_model_takes_are_kept_and_others_dropped_and_reported(others, kept, left_out):
    items = [{"input_ids": [5, 6, 7], "attention_mask": [1, 1, 1], **others}] * 5
    calibration = collected(items)
    assert [batch.samples for batch in calibration.batches] == [4, 1]  # stacked, and cut as other samples are
    assert sorted(calibration.batches[0].data) == sorted(["input_ids", "attention_mask", *kept])
    assert all(value.shape == (4, 3) for value in calibration.batches[0].data.values())
    assert calibration.deviations == ([] if left_out is None else [f"5 calibration samples {NOTE}: {left_out}"])


def test_a_tokenizer_that_returns_more_than_tokens_makes_samples():
    def tokenizer(text):
        ids = [ord(c) for c in text]
        return BatchEncoding({"input_ids": ids, "position_ids": list(range(len(ids))), "text": text, "words": [*text]})

    calibration = collected(["abc", "xyz", "abcdefghijk"], tokenizer=tokenizer)
    assert [sorted(batch.data) for batch in calibration.batches] == [["input_ids", "position_ids"]] * 2
    assert calibration.batches[1].data["position_ids"].tolist() == [[0, 1, 2, 3, 4, 5]]
    assert calibration.deviations == [f"3 calibration samples {NOTE}: text, words"]


def test_a_field_that_is_needed_and_no_row_makes_the_item_a_batch():
    takes = Takes("M.forward", frozenset({"input_ids", "pixel_values"}))
    item = {"input_ids": torch.tensor([[1, 2, 3]]), "pixel_values": torch.zeros(1, 3, 4, 4), "name": ["x"]}
    (batch,) = collected([item], takes).batches
    assert batch.data is item


def test_where_sequences_of_a_packed_row_begin_is_the_whole_rows():
    begin = {"cu_seq_lens_q": torch.tensor([0, 4, 7], dtype=torch.int32), "max_length_q": 4}
    takes = dataclasses.replace(
        LLAMA, fields=LLAMA.fields | {*begin, "seq_idx"}, options=frozenset({*begin, "seq_idx"})
    )
    item = {"input_ids": torch.arange(7)[None], "seq_idx": torch.tensor([[0] * 4 + [1] * 3])}
    (batch,) = collected([packed := {**item, **begin}], takes).batches
    assert batch.data is packed  # neither cut to 6 positions nor of another shape
    (stacked,) = collected([item] * 2, takes).batches
    assert stacked.data["seq_idx"].shape == (2, 6)
    calibration = collected([{"input_ids": [1, 2], **begin}], takes)
    assert [told.partition(f"{NOTE}: ")[2] for told in calibration.deviations] == ["max_length_q", "cu_seq_lens_q"]


def test_where_any_field_may_be_read_only_what_cannot_be_stacked_is_left_out():
    item = {"input_ids": [1, 2, 3], "weights": [0.5, 1.0, 2.0], "text": "abc", "offset_mapping": [(0, 1)] * 3}
    calibration = collected([item] * 2, Takes())
    assert sorted(calibration.batches[0].data) == ["input_ids", "weights"]
    assert "2 calibration samples had fields that the model does not take, left out" in calibration.deviations[0]
    images = {"input_ids": torch.tensor([[1, 2]]), "pixels": torch.zeros(1, 3, 2, 2)}
    assert collected([images], Takes()).batches[0].data is images


# --- lengths ---


def test_samples_longer_than_the_models_positions_are_cut_and_that_is_reported():
    takes = dataclasses.replace(LLAMA, longest=4)
    items = [{"input_ids": list(range(n)), "attention_mask": [1] * n} for n in (3, 4, 5, 9)]
    calibration = collected(items, takes)
    assert sorted(tuple(b.data["input_ids"].shape) for b in calibration.batches) == [(1, 3), (3, 4)]
    assert calibration.deviations == ["2 calibration samples were cut to the 4 positions that the model has"]
    shorter = collected(items, takes, config=QuantizeConfig(nsamples=8, model_seqlen=3))
    assert shorter.batches[0].data["input_ids"].shape[1] == 3 and shorter.deviations == []


# --- tokens ---


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ({"input_ids": [1, -100, 3]}, "a token id of the calibration data is -100: ids begin at 0"),
        ([4, -1], "a token id of the calibration data is -1"),
        ({"input_ids": [0.5, 1.0]}, "input_ids of the calibration data are float32: give whole numbers"),
        ({"input_ids": torch.ones(3)}, "are float32"),
        ({"input_ids": numpy.ones(3)}, "are float32"),
        ({"input_ids": [True, False]}, "are bool"),
        ({"input_ids": [[1, 2, 3], [4, 5]]}, "token lists of different lengths: give each list as a sample of its own"),
        ([[1, 2, 3], [4, 5]], "token lists of different lengths"),
    ],
)
def test_tokens_that_are_none_are_refused(item, message):
    with pytest.raises(CalibrationError, match=message):
        collected([item])


@pytest.mark.parametrize(
    "sample",
    [
        numpy.array([5, 6, 7]),
        {"input_ids": numpy.array([5, 6, 7])},
        (5, 6, 7),
        numpy.array([5, 6, 7], dtype=numpy.int32),
    ],
    ids=["array", "dict of arrays", "tuple", "int32"],
)
def test_arrays_and_tuples_of_ids_are_samples(sample):
    (batch,) = collected([sample] * 3).batches
    assert batch.data["input_ids"].tolist() == [[5, 6, 7]] * 3


def test_lists_of_one_length_are_a_batch():
    encoded = {"input_ids": [[1, 2], [3, 4]], "attention_mask": [[1, 1], [1, 0]]}
    (batch,) = collected([encoded]).batches
    assert batch.samples == 2 and batch.data["attention_mask"].tolist() == [[1, 1], [1, 0]]


# --- rows of numbers ---


def row(number):
    return torch.full((3,), float(number))


Pair = namedtuple("Pair", "x y")


@pytest.mark.parametrize(
    ("data", "first"),
    [
        (torch.stack([row(n) for n in range(6)]), lambda data: data),
        (numpy.stack([row(n).numpy() for n in range(6)]), lambda data: data),
        ([row(n) for n in range(6)], lambda data: data),
        ([row(n).tolist() for n in range(6)], lambda data: data),
        ([(row(n), n) for n in range(6)], lambda data: data[0]),
        ([Pair(row(n), row(n)) for n in range(6)], lambda data: data.x),
        ([{"x": row(n), "label": n} for n in range(6)], lambda data: data["x"]),
        (TensorDataset(torch.stack([row(n) for n in range(6)]), torch.arange(6)), lambda data: data[0]),
    ],
    ids=["tensor", "array", "list", "lists", "pairs", "named", "mappings", "dataset"],
)
def test_rows_of_numbers_are_samples_with_whatever_belongs_to_them(data, first):
    calibration = collected(data)
    assert calibration.samples == 6 and [batch.samples for batch in calibration.batches] == [4, 2]
    rows = torch.cat([first(batch.data) for batch in calibration.batches])
    assert torch.equal(rows, torch.stack([row(n) for n in range(6)])) and calibration.deviations == []


@pytest.mark.parametrize("wrap", [lambda array: array, list, lambda array: [(row, 1) for row in array]])
def test_arrays_in_numpys_default_dtype_come_in_pytorchs(wrap):
    data = collected(wrap(numpy.ones((4, 3)))).batches[0].data
    assert (data if isinstance(data, torch.Tensor) else data[0]).dtype == torch.float32


def test_rows_of_different_widths_do_not_share_a_batch():
    calibration = collected([torch.ones(3), torch.ones(5), torch.ones(3)])
    assert [tuple(batch.data.shape) for batch in calibration.batches] == [(2, 3), (1, 5)]


def test_a_loaders_batches_of_single_numbers_stay_batches():
    loader = DataLoader(TensorDataset(torch.randn(6), torch.randn(6)), batch_size=3)
    assert [batch.samples for batch in collected(loader).batches] == [3, 3]


def test_rows_that_cannot_be_put_together_are_refused_with_the_remedy():
    with pytest.raises(CalibrationError, match="cannot be put into a batch.*give a DataLoader with a collate_fn"):
        collected([(torch.ones(3), object()), (torch.ones(3), object())])


def test_a_tensor_of_sequences_is_batches_of_them():
    calibration = collected(torch.randn(6, 5, 3))
    assert [tuple(batch.data.shape) for batch in calibration.batches] == [(4, 5, 3), (2, 5, 3)]
