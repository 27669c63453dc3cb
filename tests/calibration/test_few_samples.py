"""The part of a batch that is observed."""

from __future__ import annotations

import pytest
import torch

from gptq_plugin.calibration.collect import Batch, ready_batch
from gptq_plugin.calibration.few_samples import few_samples, first_samples, paddings

LENGTHS = torch.tensor([200, 300, 90, 250, 300])
MASK = (torch.arange(300) < LENGTHS[:, None]).long()
IDS = torch.arange(5 * 300).reshape(5, 300)


def part(data, targets=False):
    return few_samples(ready_batch(data), targets=targets)


def test_the_samples_that_hide_most_and_least_are_taken_around_the_edge():
    few = part({"input_ids": IDS, "attention_mask": MASK})
    assert torch.equal(few["input_ids"], IDS[[2, 1], 90 - 64 : 90 + 64])
    assert torch.equal(few["attention_mask"], MASK[[2, 1], 90 - 64 : 90 + 64])
    flipped = part({"input_ids": IDS, "attention_mask": MASK.flip(1)})
    assert torch.equal(flipped["attention_mask"][0], torch.tensor([0] * 64 + [1] * 64))
    short = (torch.arange(300) < (LENGTHS - 70)[:, None]).long()
    assert torch.equal(part({"input_ids": IDS, "attention_mask": short})["input_ids"], IDS[[2, 1], : 20 + 64])
    plain = part({"input_ids": IDS})  # two samples, for comparison
    assert torch.equal(plain["input_ids"], IDS[:2, :128])


def test_targets_have_an_edge_of_their_own():
    labels = torch.where(torch.arange(300) < torch.tensor([[280], [299], [299], [299], [299]]), IDS, -100)
    few = part({"input_ids": IDS, "attention_mask": MASK, "labels": labels}, targets=True)
    assert few["input_ids"].shape[0] == 3 and few["input_ids"][0, 0] == 2 * 300 + 26
    assert few["labels"].shape == (3, 300 - 216) and set((few["labels"][2] != -100).tolist()) == {True, False}
    alike = part({"input_ids": IDS, "attention_mask": MASK, "labels": IDS.clone()})  # of one sequence: cut alike
    assert torch.equal(alike["labels"], alike["input_ids"]) and alike["labels"].shape[1] == 128
    shown = (torch.arange(150) < torch.tensor([140, 140, 20, 140, 140])[:, None]).long()
    decoder = {"decoder_input_ids": IDS[:, :150], "decoder_attention_mask": shown}
    few = part({"input_ids": IDS, "attention_mask": MASK, **decoder}, targets=True)
    assert few["input_ids"].shape[1] == 128 and few["decoder_input_ids"].shape[1] == 20 + 64


@pytest.mark.parametrize(
    "other",
    [
        {"pixel_values": torch.randn(5, 3, 4, 4)},
        {"position_ids": torch.zeros(5, 299, dtype=torch.long)},
        {"input_values": torch.randn(5, 300)},  # perhaps sounds, of which many numbers are a position
        {"sample_mask": torch.ones(5)},
    ],
)
def test_only_what_is_of_positions_alone_is_cut(other):
    few = part({"input_ids": IDS, "attention_mask": MASK, **other})
    assert torch.equal(few["input_ids"], IDS[[2, 1]]) and all(len(few[name]) == 2 for name in other)


@pytest.mark.parametrize("data", [{"x": torch.zeros(5, 3), "patches": torch.zeros(7, 2)}, {"x": torch.tensor(3.0)}, {}])
def test_a_batch_that_is_not_of_samples_is_not_divided(data):
    assert few_samples(Batch(data, 5), targets=False) is None


def test_a_single_sample_is_taken_twice():
    few = part({"input_ids": IDS[2:3], "attention_mask": MASK[2:3]})
    assert torch.equal(few["attention_mask"][0], few["attention_mask"][1]) and len(few["input_ids"]) == 2


def test_masks_that_hide_something_are_counted():
    labels = torch.where(MASK == 1, IDS, -100)
    assert paddings(ready_batch({"input_ids": IDS, "attention_mask": MASK, "labels": labels})) == 2
    assert paddings(ready_batch({"input_ids": IDS, "attention_mask": torch.ones_like(MASK)})) == 0
    assert paddings(ready_batch(IDS)) == 0


def test_the_first_samples_are_as_many_as_have_some_tokens():
    batch = ready_batch({"input_ids": IDS, "position_ids": torch.arange(300)[None]})
    few = first_samples(batch, 301)
    assert few.samples == 2 and torch.equal(few.data["input_ids"], IDS[:2])
    assert few.data["position_ids"].shape == (1, 300)  # of all samples
    assert first_samples(batch, 5 * 300 - 299) is batch
    images = Batch(torch.ones(5, 3, 8, 8), 5)
    assert first_samples(images, 1) is images  # which have no tokens
