"""What users give as calibration data: each mistake is refused with what to give instead."""

from __future__ import annotations

import functools
import time

import numpy
import pandas
import pytest
import torch
from lightning.pytorch import LightningDataModule
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from gptq_plugin.calibration.collect import collect
from gptq_plugin.calibration.given import items_of, refuse_item, refuse_single, rereadable
from gptq_plugin.calibration.items import Items
from gptq_plugin.calibration.takes import Takes
from gptq_plugin.config import QuantizeConfig
from gptq_plugin.errors import CalibrationError


class Modular(LightningDataModule):
    def train_dataloader(self):
        return DataLoader(torch.randn(4, 2))


def texts():
    yield "a text"


TABLE = pandas.DataFrame({"text": ["one", "two"], "label": [0, 1]})


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (None, "there is no calibration data"),
        ("one text", r"give a list of texts, \[text\]"),
        (b"bytes", r"give a list of texts, \[text\]"),
        ({"input_ids": [1]}, r"one mapping: give a list of batches, \[batch\]"),
        ([1, 2, 3], r"holds numbers \(1, \.\.\.\), and one sample is a list of them: give .* \[\[1, 2, 3\]\]"),
        ((0.5, 1.5), r"holds numbers \(0\.5, \.\.\.\)"),
        ([None, "text"], "an item of the calibration data is None"),
        (torch.tensor([1, 2, 3]), r"one list of token ids \(int64 \(3,\)\): give a list of samples, \[ids\]"),
        (torch.randn(5), r"one row of numbers \(float32 \(5,\)\): give a tensor \[rows, features\]"),
        (numpy.arange(3), "one list of token ids"),
        (numpy.float32(3), "which holds no samples"),
        (TABLE.to_numpy(), r"is an array \(2, 2\) of object: give a list of samples"),
        (TABLE, r"is a table \(DataFrame\), of which only the names of its columns would be read.*table\['text'\]"),
        (Modular(), r"is a Modular: give one of its dataloaders, \.train_dataloader\(\)"),
        (nn.Sequential(nn.Linear(2, 2)), "which holds no samples"),
        (texts, "which holds no samples"),
        (list, "which holds no samples"),
        (5, "calibration data is 5, which holds no samples"),
        (True, "calibration data is True, which holds no samples"),
        ({"one", "two"}, "a set, whose order is another in every run"),
    ],
    ids=lambda value: "" if isinstance(value, str) else type(value).__name__,
)  # fmt: skip
def test_what_is_no_calibration_data_is_refused_with_what_to_give(data, message):
    with pytest.raises(CalibrationError, match=message):
        refuse_single(data)


@pytest.mark.parametrize(
    "data",
    [[], ["a text"], [[1, 2]], texts(), TABLE["text"], TABLE["text"].to_numpy(), DataLoader(torch.randn(4, 2)),
     TensorDataset(torch.randn(4, 2)), torch.ones(2, 3), torch.ones(2, 3, 4), numpy.ones((2, 3)), range(0),
     {1: 2}.values()],
    ids=lambda data: type(data).__name__,
)  # fmt: skip
def test_data_is_let_through(data):
    refuse_single(data)


@pytest.mark.parametrize("item", [3, 0.5, True, numpy.int64(3), torch.tensor(3), torch.tensor(0.5), None])
def test_an_item_that_is_no_sample_is_refused(item):
    with pytest.raises(CalibrationError):
        refuse_item(item)


def _doubled(times):
    whole = []
    for _ in range(times):
        whole = [whole, whole]
    return whole


def _in_itself():
    whole = {"x": torch.ones(2)}
    whole["y"] = [whole]
    return whole


@pytest.mark.parametrize(
    "make", [lambda: _doubled(40), _in_itself, lambda: functools.reduce(lambda x, _: [x], range(99), 1)]
)
def test_an_item_that_cannot_be_walked_in_time_is_refused_at_once(make):
    item = make()
    for data in (item, [item], [torch.ones(1, 2), {"x": item}]):
        started = time.perf_counter()
        with pytest.raises(
            CalibrationError, match="holds more than 4,194,304 values, lists in more than 64 others, or"
        ):
            collect(data if isinstance(data, list) else [data], QuantizeConfig(nsamples=4), None)
        assert time.perf_counter() - started < 2
    refuse_item(_doubled(20))


@pytest.mark.parametrize("item", ["", "text", [1], [], torch.tensor([1]), {"x": 1}, (1, 2), numpy.ones(2)])
def test_any_other_item_is_let_through(item):
    refuse_item(item)


def test_a_tensors_items_are_its_rows_or_batches_of_what_has_more_dimensions():
    rows = torch.randn(5, 3)
    assert [tuple(item.shape) for item in items_of(rows, 2)] == [(3,)] * 5
    assert all(torch.equal(a, b) for a, b in zip(items_of(rows.numpy(), 2), rows, strict=True))
    sequences = torch.randn(5, 4, 3)
    batches = items_of(sequences, 2)
    assert [tuple(batch.shape) for batch in batches] == [(2, 4, 3), (2, 4, 3), (1, 4, 3)]
    assert torch.equal(torch.cat(list(batches)), sequences)


def test_an_array_of_texts_is_a_list_of_them():
    assert list(items_of(numpy.array(["a", "b"]), 2)) == ["a", "b"]


def test_data_can_be_read_twice_and_of_an_iterator_as_much_is_kept_as_may_be_needed():
    given = ["a", "b", "c", "d"]
    assert rereadable(given, 2) is given
    assert rereadable(iter(given), 2) == ["a", "b", "c"]
    assert rereadable(iter([]), 2) == []
    loader = DataLoader(torch.randn(4, 2))
    assert rereadable(loader, 2) is loader
    with pytest.raises(CalibrationError, match="one text"):
        rereadable("text", 2)


@pytest.mark.parametrize("array", [numpy.array([object(), None]), numpy.array([[1, 2], [3]], dtype=object)])
def test_arrays_that_hold_no_numbers_are_refused(array):
    for data in ([array], [{"x": array}], [(array, 1)]):
        with pytest.raises(CalibrationError, match="array .* of object, which are no numbers"):
            Items(None, 16, Takes()).read(data[0])


def test_one_tensor_of_batches_stays_one_so_that_they_are_known_as_ours():
    rows = torch.zeros(6, 3, 4)
    assert rereadable(rows, 6, 2) is rows
    assert all(batch.is_chosen for batch in collect(rows, QuantizeConfig(batch_size=2), alone=True).batches)
    assert not any(batch.is_chosen for batch in collect(list(rows.split(2)), QuantizeConfig(), alone=True).batches)
