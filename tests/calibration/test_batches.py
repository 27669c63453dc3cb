"""Batches of any layout: their fields, labels, samples and digest, and their way to a device."""

from __future__ import annotations

from collections import namedtuple
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from transformers import BatchEncoding

from gptq_plugin import QuantizeConfig
from gptq_plugin.calibration.batches import (
    copies_of,
    digest,
    fields_of,
    is_token_labels,
    labels_of,
    leaves,
    row_of,
    sample_count,
    to_device,
)
from gptq_plugin.calibration.collect import collect

IDS = torch.randint(3, 60, (5, 21), generator=torch.Generator().manual_seed(0))
CONFIG = QuantizeConfig(nsamples=5)


@dataclass(frozen=True)
class Frozen:
    input_ids: torch.Tensor
    labels: torch.Tensor
    image: dict


def odd_batch():
    ids = torch.zeros(3, 4, dtype=torch.long)
    encoding = BatchEncoding({"pixels": torch.zeros(3, 2), "name": "cat"})
    return Frozen(ids, ids + 1, {"views": [encoding, (torch.ones(3), 5)]})


def test_a_batch_moves_to_a_device_however_it_is_nested_and_the_one_given_stays():
    batch = odd_batch()
    moved = to_device({"a": batch, "b": [batch.labels]}, torch.device("meta"))
    assert isinstance(moved["a"], Frozen) and moved["a"].input_ids.is_meta and moved["b"][0].is_meta
    encoding, (ones, five) = moved["a"].image["views"]
    assert isinstance(encoding, BatchEncoding) and encoding.pixels.is_meta and encoding["name"] == "cat"
    assert ones.is_meta and five == 5
    assert not batch.input_ids.is_meta and not batch.image["views"][0].pixels.is_meta


@pytest.mark.parametrize("device", [None, torch.device("cpu")])
def test_a_copy_on_the_same_device_shares_no_tensor_with_the_batch(device):
    batch = {"a": odd_batch(), "b": (torch.zeros(3), [BatchEncoding({"x": torch.zeros(3, 2)})])}
    copied = to_device(batch, device)
    tensors = [value for _, value in leaves(copied) if isinstance(value, torch.Tensor)]
    assert len(tensors) == 6
    for tensor in tensors:
        tensor.add_(7)
    assert all(value.max() <= 1 for _, value in leaves(batch) if isinstance(value, torch.Tensor))


def test_labels_and_samples_are_found_however_deep_they_lie_but_not_guessed():
    batch = odd_batch()
    assert labels_of({"x": [{"y": batch}]}) is batch.labels and sample_count({"x": [{"y": batch}]}) == 3
    assert labels_of({"chosen": batch, "rejected": batch}) is None  # which belongs to a call?
    assert labels_of({"labels": torch.zeros(3)}) is None and labels_of((batch.labels,)) is None
    assert fields_of(batch)["image"] is batch.image and fields_of((1, 2)) is None and fields_of(torch.zeros(2)) is None


def test_fields_are_those_of_mappings_dataclasses_and_named_tuples():
    pair = namedtuple("Pair", ["x", "y"])(1, 2)
    assert fields_of(pair) == {"x": 1, "y": 2}
    assert fields_of(BatchEncoding({"x": 1}))["x"] == 1 and fields_of({"x": 1}) == {"x": 1}
    assert fields_of(SimpleNamespace(x=1)) is None and fields_of([1]) is None
    assert fields_of(Frozen) is None  # the class, not an instance


@pytest.mark.parametrize(
    ("value", "are"),
    [
        (torch.zeros(3, 4, dtype=torch.long), True),
        (torch.zeros(3, dtype=torch.long), False),
        (torch.zeros(3, 4), False),
        ([[1, 2]], False),
    ],
)
def test_token_labels_are_a_class_for_every_position(value, are):
    assert is_token_labels(value) is are


def test_samples_are_the_first_dimension_of_the_first_tensor_that_has_one():
    assert sample_count(torch.zeros(4, 2)) == 4 and sample_count(torch.tensor(1.0)) == 1
    assert sample_count({"scale": torch.tensor(2.0), "x": torch.zeros(3)}) == 3
    assert sample_count({"text": ["a", "b"]}) == sample_count(object()) == 1


# --- the hash of the samples ---


def test_the_hash_does_not_depend_on_order_division_or_batch_size():
    rows = [row[: 21 - n % 2] for n, row in enumerate(IDS)]
    whole = collect(rows, CONFIG).digest
    for size in (1, 2, 4):
        shuffled = collect(rows[::-1], QuantizeConfig(nsamples=5, batch_size=size))
        assert shuffled.digest % 2**256 == whole % 2**256
    ranks = [collect(rows[rank::2], CONFIG).digest for rank in range(2)]
    assert sum(ranks) % 2**256 == whole % 2**256


def test_padding_is_no_part_of_a_sample():
    short = {"input_ids": IDS[:1, :9], "attention_mask": torch.ones(1, 9)}
    for padding in ((0, 4), (4, 0)):
        padded = {key: torch.nn.functional.pad(value, padding) for key, value in short.items()}
        assert digest(padded) == digest(short)


@pytest.mark.parametrize(
    "other",
    [
        {"input_ids": IDS + 1},
        {"input_ids": IDS.int()},
        {"decoder_input_ids": IDS},
        {"input_ids": IDS.reshape(5, 3, 7)},
        {"input_ids": IDS, "labels": IDS},
        {"input_ids": torch.cat([IDS, IDS[:1]])},
    ],
)
def test_other_contents_names_dtypes_or_shapes_have_another_hash(other):
    assert digest(other) != digest({"input_ids": IDS})


def test_texts_and_numbers_count_and_lists_of_them_are_divided_as_the_tensors_are():
    batch = {"input_ids": IDS, "text": list("abcde"), "spans": [[n, 7] for n in range(5)], "task": "qa", "weight": 2}

    def rows(part):
        lists = {key: batch[key][part] for key in ("input_ids", "text", "spans")}
        return digest({**batch, **lists})

    assert (rows(slice(0, 2)) + rows(slice(2, 5))) % 2**256 == digest(batch) != digest({"input_ids": IDS})
    for other in ({"text": list("abcdf")}, {"spans": [[n, n] for n in range(5)]}, {"task": "chat"}, {"weight": 2.0}):
        assert digest({**batch, **other}) != digest(batch)
    alone = {"x": torch.tensor(1.0), "note": "one"}
    assert digest(alone) == digest(dict(alone)) != digest({**alone, "note": "two"})
    assert digest((IDS, ["a"] * 5)) != digest((IDS, ["b"] * 5))


def test_a_batch_that_cannot_be_divided_is_one_sample():
    scalar = {"x": torch.ones(4, 3, dtype=torch.bfloat16), "scale": torch.tensor(2.0)}
    assert digest(scalar) == digest(dict(reversed(scalar.items()))) != digest({**scalar, "scale": torch.tensor(3.0)})
    assert digest(["a text"]) != digest(["another"])
    assert digest(SimpleNamespace(x=IDS)) == digest({"x": IDS})
    assert digest(torch.ones(2, 2).to_sparse()) == digest(torch.ones(2, 2))


def test_a_row_of_a_batch_is_that_sample_of_everything_that_is_divided_into_samples():
    Pair = namedtuple("Pair", "x names")

    @dataclass(frozen=True)
    class Inner:
        y: torch.Tensor
        scale: float

    tensor, shared = torch.arange(12).view(3, 4), torch.ones(4)
    texts = ["a", "b", "c"]
    data = {"x": tensor, "shared": shared, "texts": texts, "pair": Pair(tensor, texts), "inner": Inner(tensor, 2.0)}
    one = row_of(data, 1)
    assert torch.equal(one["x"], tensor[1:2]) and one["shared"] is shared and one["texts"] == ["b"]
    assert isinstance(one["pair"], Pair) and torch.equal(one["pair"].x, tensor[1:2]) and one["pair"].names == ["b"]
    assert isinstance(one["inner"], Inner) and torch.equal(one["inner"].y, tensor[1:2]) and one["inner"].scale == 2.0
    assert torch.equal(row_of(tensor, 2), tensor[2:]) and row_of([tensor, "ab", None], 0)[1:] == ["ab", None]
    encoded = row_of(BatchEncoding({"input_ids": tensor}), 0)
    assert isinstance(encoded, BatchEncoding) and torch.equal(encoded.input_ids, tensor[:1])
    assert data["texts"] == ["a", "b", "c"] and data["x"] is tensor


def test_a_sample_may_stand_in_the_place_of_all():
    data = {"x": torch.arange(6).reshape(3, 2), "texts": ["a", "b", "c"], "rate": 0.5, "table": torch.ones(5, 2)}
    found = copies_of(data, 1, 4)
    assert found["x"].tolist() == [[2, 3]] * 4 and found["texts"] == ["b"] * 4
    assert found["rate"] == 0.5 and found["table"] is data["table"] and data["x"].shape == (3, 2)
    assert copies_of(data, 2, 1)["x"].tolist() == [[4, 5]]
