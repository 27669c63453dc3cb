"""Calibration samples from a training dataloader: each once, chosen alike on any number of ranks."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    SubsetRandomSampler,
)
from transformers import default_data_collator

from gptq_plugin import QuantizeConfig, distributed
from gptq_plugin.calibration.collect import collect
from gptq_plugin.calibration.sampling import sample_loaders, share_of
from gptq_plugin.calibration.sources import Sources

DATA = list(range(33))


def batches_of(loader, **fields):
    config = QuantizeConfig(**{"nsamples": 1000, "batch_size": 4, **fields})
    (source,) = sample_loaders([loader], config, "the loader", nsamples=config.nsamples)
    return source.data


def drawn(loader, **fields):
    return [int(value) for batch in batches_of(loader, **fields) for value in batch]


def on_ranks(monkeypatch, size, loader, **fields):
    """What each rank of a group would draw; object_from_first hands on what rank 0 chose."""
    monkeypatch.setattr(distributed, "world_size", lambda: size)
    chosen = {}
    monkeypatch.setattr(distributed, "object_from_first", lambda value: chosen.setdefault(0, value))
    shares = []
    for rank in range(size):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        shares.append(drawn(loader, **fields))
    return shares


@pytest.mark.parametrize("shuffle", [False, True])
def test_every_sample_is_drawn_once_in_a_seeded_order(shuffle):
    loader = DataLoader(DATA, batch_size=8, shuffle=shuffle, drop_last=True)
    samples = drawn(loader)
    assert sorted(samples) == DATA and samples != DATA
    assert samples == drawn(loader) != drawn(loader, seed=1)


def test_nsamples_of_them_are_drawn():
    assert len(set(drawn(DataLoader(DATA, batch_size=8), nsamples=10))) == 10


def test_the_loaders_collator_puts_batches_together():
    loader = DataLoader(DATA, batch_size=8, collate_fn=lambda items: torch.tensor([100 + i for i in items]))
    assert sorted(drawn(loader)) == [100 + i for i in DATA]


def test_the_global_random_state_is_left_alone():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    drawn(DataLoader(DATA, batch_size=8, shuffle=True))
    assert torch.equal(torch.get_rng_state(), before)


def test_samples_a_users_sampler_leaves_out_are_left_out():
    for loader in (
        DataLoader(DATA, batch_size=8, sampler=SubsetRandomSampler([3, 5, 7])),
        DataLoader(DATA, batch_sampler=BatchSampler(SubsetRandomSampler([3, 5, 7]), 2, drop_last=False)),
    ):
        assert sorted(drawn(loader)) == [3, 5, 7]


def test_samples_drawn_with_replacement_count_once():
    samples = drawn(DataLoader(DATA, batch_size=8, sampler=SubsetRandomSampler([4, 4, 9])))
    assert sorted(samples) == [4, 9]
    assert sorted(drawn(DataLoader(DATA, sampler=RandomSampler(DATA, replacement=True)))) == DATA


@pytest.mark.parametrize("size", [2, 4, 40])
def test_ranks_share_the_batches_of_one_rank_without_padding(size, monkeypatch):
    sampler = torch.utils.data.DistributedSampler(DATA, num_replicas=size, rank=0)
    loader = DataLoader(DATA, batch_size=8, sampler=sampler)
    assert len(sampler) * size > len(DATA)  # this sampler counts some twice
    whole = DataLoader(DATA, batch_size=8)
    alone = [batch.tolist() for batch in batches_of(whole)]
    assert [len(batch) for batch in alone] == [4] * 8 + [1]
    monkeypatch.setattr(distributed, "world_size", lambda: size)
    for rank in range(size):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        assert [batch.tolist() for batch in batches_of(loader)] == alone[rank::size]


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_shares_of_ranks_add_up_and_differ_by_one_at_most(size, monkeypatch):
    monkeypatch.setattr(distributed, "world_size", lambda: size)
    shares = []
    for rank in range(size):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        shares.append(share_of(16))
    assert sum(shares) == 16 and max(shares) - min(shares) <= 1


def test_a_users_sampler_behind_lightnings_wrapper_is_respected(monkeypatch):
    from lightning.fabric.utilities.distributed import DistributedSamplerWrapper

    wrapped = DistributedSamplerWrapper(SubsetRandomSampler([3, 5, 7]), num_replicas=2, rank=0)
    shares = on_ranks(monkeypatch, 2, DataLoader(DATA, batch_size=8, sampler=wrapped))
    assert sorted(sample for share in shares for sample in share) == [3, 5, 7]


def test_an_iterable_dataset_is_read_from_its_start():
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(range(5))

    loader = DataLoader(Stream(), batch_size=2)
    assert batches_of(loader) is loader


def test_a_dataset_of_ready_batches_keeps_them():
    loader = DataLoader([torch.full((3,), i) for i in range(4)], batch_size=None)
    batches = list(batches_of(loader))
    assert len(batches) == 4 and all(batch.shape == (3,) for batch in batches)


# --- collators of single samples ---


def in_a_list(samples):
    return samples


def tokens_in_a_list(samples):
    return {"input_ids": [one["input_ids"] for one in samples]}


def first(samples):
    return samples[0]


def in_a_row(samples):
    return {"input_ids": torch.cat([one.pop("input_ids") for one in samples])[None]}  # changes what it is given


def sources_of(collate_fn, batch_size=1):
    data = [{"input_ids": torch.arange(5) + n} for n in range(6)]
    loader = DataLoader(data, batch_size=batch_size, collate_fn=collate_fn)
    (source,) = sample_loaders([loader], QuantizeConfig(batch_size=4), "the loader", nsamples=6)
    return source, [len(indices) for indices in source.data.batch_sampler]


@pytest.mark.parametrize("collate_fn", [in_a_list, tokens_in_a_list, first])
def test_a_collator_of_single_samples_that_does_not_stack_two_gets_one(collate_fn):
    source, sizes = sources_of(collate_fn)
    assert sizes == [1] * 6 and source.is_single and source.is_chosen and not source.is_stacked
    batches = collect(Sources((source,)), QuantizeConfig(), alone=True).batches
    assert sum(batch.samples for batch in batches) == 6
    assert sources_of(collate_fn, batch_size=2)[1] == [4, 2]  # of several: it is no step for one


@pytest.mark.parametrize("collate_fn", [None, in_a_row, default_data_collator])
def test_a_collator_of_single_samples_that_stacks_gets_several(collate_fn):
    source, sizes = sources_of(collate_fn)
    assert sizes == [4, 2] and not source.is_single and source.is_stacked == (collate_fn is None)


def test_a_collator_is_tried_on_copies_and_draws_no_random_numbers_of_others():
    def noisy(samples):
        return torch.stack([one["input_ids"] + torch.rand(()) for one in samples])

    torch.manual_seed(3)
    sources_of(noisy)
    found = torch.rand(())
    torch.manual_seed(3)
    assert torch.equal(found, torch.rand(()))


def test_a_collator_that_raises_is_left_to_what_uses_it():
    def failing(samples):
        raise ValueError("not today")

    assert sources_of(failing)[1] == [4, 2]
