"""Calibration data: what becomes a batch, which positions count, and what is said about the rest."""

from __future__ import annotations

import numpy
import pytest
import torch
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader
from transformers import BatchEncoding

from gptq_plugin import QuantizeConfig
from gptq_plugin.calibration.collect import collect, ready_batch
from gptq_plugin.calibration.given import rereadable
from gptq_plugin.calibration.sources import Source, Sources
from gptq_plugin.errors import CalibrationError

CONFIG = QuantizeConfig(nsamples=8, batch_size=4, model_seqlen=6)


def tokenizer(text):
    return {"input_ids": [ord(c) for c in text], "attention_mask": [1] * len(text)}


def test_texts_are_tokenized_cut_and_stacked_by_length_without_padding():
    calibration = collect(["abc", "defghijkl", "xyz", "mnopqrst"], CONFIG, tokenizer)
    shapes = [tuple(batch.data["input_ids"].shape) for batch in calibration.batches]
    assert shapes == [(2, 3), (2, 6)]
    assert calibration.batches[0].data["input_ids"].tolist() == [[97, 98, 99], [120, 121, 122]]
    assert calibration.samples == 4 and calibration.deviations == []


@pytest.mark.parametrize(
    "sample",
    [
        [5, 6, 7],
        torch.tensor([5, 6, 7]),
        {"input_ids": [5, 6, 7]},
        {"input_ids": torch.tensor([5, 6, 7])},
        {"input_ids": torch.tensor([[5, 6, 7]]), "attention_mask": torch.ones(1, 3, dtype=torch.long)},
        {"input_ids": [[5, 6, 7]], "attention_mask": [[1, 1, 1]]},
        BatchEncoding({"input_ids": [5, 6, 7], "attention_mask": [1, 1, 1]}),
    ],
    ids=["list", "tensor", "dict of lists", "dict of 1-D", "dict of [1, T]", "nested lists", "BatchEncoding"],
)
def test_token_samples_of_every_kind_become_one_batch(sample):
    batches = collect([sample] * 3, CONFIG).batches
    assert len(batches) == 1 and batches[0].samples == 3
    assert batches[0].data["input_ids"].tolist() == [[5, 6, 7]] * 3


def test_ready_batches_stay_as_they_are():
    batch = {"input_ids": torch.zeros(3, 9, dtype=torch.long), "pixel_values": torch.zeros(3, 2)}
    pair = (torch.zeros(2, 5), torch.zeros(2))
    assert collect([batch], CONFIG).batches[0].data is batch
    assert collect([pair], CONFIG).batches[0].data is pair and collect([pair], CONFIG).samples == 2
    loader = DataLoader(torch.randn(6, 5), batch_size=2)
    assert [b.samples for b in collect(loader, CONFIG).batches] == [2, 2, 2]


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ([[1, 2]] * 11, "3 of 11 given were not used"),
        (iter([[1, 2]] * 11), "more samples given were not used"),
        (DataLoader(torch.randn(20, 5), batch_size=4), "3 of 5 given were not used"),
    ],
)
def test_samples_beyond_nsamples_are_left_out_and_reported(data, said):
    calibration = collect(data, CONFIG)
    assert calibration.samples == 8
    assert any("nsamples=8" in d and said in d for d in calibration.deviations)


def test_empty_samples_are_dropped_and_reported():
    calibration = collect(["", "abc", ""], CONFIG, tokenizer)
    assert calibration.samples == 1
    assert calibration.deviations == ["2 empty calibration samples dropped"]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("one text", "give a list of texts"),
        ({"input_ids": [1]}, "give a list of batches"),
        (["text"], "no tokenizer"),
        ([[1, 2], torch.zeros(2, 5)], "mixes"),
        ([torch.zeros(2, 5), [1, 2]], "mixes"),
    ],
)
def test_data_of_the_wrong_kind_is_refused_with_the_remedy(data, message):
    with pytest.raises(CalibrationError, match=message):
        collect(data, CONFIG)


@pytest.mark.parametrize(
    "given",
    [
        {"input_ids": torch.zeros(3, dtype=torch.long)},
        {"input_ids": numpy.zeros(3, dtype=int)},
        (torch.zeros(3), torch.zeros(3)),
        torch.zeros(1, 3, dtype=torch.long),
    ],
    ids=["token sample", "array", "row", "batch"],
)
@pytest.mark.parametrize("again", [False, True])
def test_an_iterator_may_give_the_same_tensors_again_with_other_values(given, again):
    def items():
        for number in range(4):
            for leaf in tree_leaves(given):
                leaf[:] = number
            yield given

    data = rereadable(items(), 4) if again else items()
    batches = collect(data, QuantizeConfig(batch_size=1), alone=True).batches
    assert [tree_leaves(one.data)[0].unique().tolist() for one in batches] == [[0], [1], [2], [3]]


def test_positions_are_those_of_sequences_of_whole_numbers_not_of_features_or_masks_of_pairs():
    ids = torch.ones(2, 6, dtype=torch.long)
    beside = {"features": torch.randn(2, 50), "mask": torch.ones(2, 1, 6, 6, dtype=torch.bool)}
    assert ready_batch({"input_ids": ids, **beside}).positions == 12


def test_samples_of_sources_with_one_name_are_added_up():
    parts = [Source([[1, 2, 3]] * count, name, 8) for count, name in ((2, "own"), (3, "other"), (4, "own"))]
    assert collect(Sources(tuple(parts)), CONFIG).sources == {"own": 6, "other": 3}


@pytest.mark.parametrize("weighting", ["all", "labels"])
@pytest.mark.parametrize("general", [True, False])
def test_general_samples_are_their_own_labels_where_labels_weight_and_are_never_told_to_be_left(weighting, general):
    config = QuantizeConfig(nsamples=2, batch_size=4, token_weighting=weighting)
    data = [{"input_ids": [5, 6, 7]} for _ in range(3)]
    found = collect(Sources((Source(data, "text", 2, is_general=general),)), config)
    assert ("labels" in found.batches[0].data) == (general and weighting == "labels")
    assert bool(found.deviations) != general
