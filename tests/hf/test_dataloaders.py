"""accelerate's dataloaders without their division over ranks, and those of a Trainer's last evaluation.

Real ranks calibrate on them in tests/hf/test_trainer_callback.py.
"""

from __future__ import annotations

import numpy
import pytest
import torch
from accelerate.data_loader import prepare_data_loader
from torch.utils.data import DataLoader, IterableDataset, SubsetRandomSampler

from gptq_plugin import distributed
from gptq_plugin.hf.dataloaders import Evaluations, undivided


class Numbers(IterableDataset):
    def __iter__(self):
        return iter(range(12))


def divided(loader, rank=0, **options):
    """What accelerate makes of it on one of two ranks."""
    options = {"put_on_device": False, "device": torch.device("cpu"), **options}
    return prepare_data_loader(loader, num_processes=2, process_index=rank, **options)


def numbers(loader):
    return [number for batch in loader for number in batch.tolist()]


@pytest.mark.parametrize("loader", [DataLoader(range(12), batch_size=2), [1, 2], None, "train"])
def test_what_accelerate_did_not_wrap_is_returned_itself(loader):
    assert undivided(loader) is loader


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("split_batches", [False, True])
def test_every_rank_sees_all_samples_in_the_batches_of_the_original(rank, split_batches):
    original = DataLoader(range(12), batch_size=2)
    part = divided(original, rank, split_batches=split_batches)
    assert len(numbers(part)) == 6
    whole = undivided(part)
    assert [batch.tolist() for batch in whole] == [batch.tolist() for batch in original]


def test_the_sampler_and_the_collator_are_kept():
    original = DataLoader(
        range(12), 2, sampler=SubsetRandomSampler([3, 5, 8]), collate_fn=lambda some: torch.tensor(some) * 10
    )
    found = undivided(divided(original))
    assert sorted(numbers(found)) == [30, 50, 80] and found.collate_fn is original.collate_fn


def test_batches_that_were_not_divided_are_the_originals():
    original = DataLoader(range(12), batch_size=2)
    alone = prepare_data_loader(original, num_processes=1, process_index=0, put_on_device=False)
    assert [batch.tolist() for batch in undivided(alone)] == [batch.tolist() for batch in original]


def test_a_stream_stays_divided(monkeypatch):
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    parts = []
    for rank in (0, 1):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        parts.append(numbers(undivided(divided(DataLoader(Numbers(), batch_size=2), rank, dispatch_batches=False))))
    first, second = parts
    assert sorted(first + second) == list(range(12)) and len(first) == len(second) == 6


def test_a_stream_that_rank_0_reads_for_all_is_dealt_batch_by_batch(monkeypatch):
    dealt = undivided(divided(DataLoader(Numbers(), batch_size=3), dispatch_batches=True, put_on_device=True))
    assert numbers(dealt) == list(range(12))  # one process
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    for rank, expected in ((0, [0, 1, 2, 6, 7, 8]), (1, [3, 4, 5, 9, 10, 11])):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        assert numbers(dealt) == expected


def test_a_dealt_batch_is_what_the_streams_collator_made():
    made = DataLoader(Numbers(), batch_size=3, collate_fn=numpy.array)
    dealt = undivided(divided(made, dispatch_batches=True, put_on_device=True))
    assert all(isinstance(batch, numpy.ndarray) for batch in dealt)


def test_the_last_evaluations_loaders_are_kept_and_only_the_first_evaluation_is_new():
    evaluations = Evaluations()
    assert evaluations.loaders == []
    assert evaluations.add(0, "a") and evaluations.add(0, "b")  # a dataset each
    assert evaluations.loaders == ["a", "b"]
    assert not evaluations.add(5, "c") and evaluations.loaders == ["c"]
    assert not evaluations.add(5, "d") and evaluations.loaders == ["c", "d"]
    assert not evaluations.add(9, "e") and evaluations.loaders == ["e"]
