"""Any number of ranks calibrates on the batches of one rank, and each batch is on one of them."""

from __future__ import annotations

import pytest
import torch

from gptq_plugin import QuantizeConfig, distributed
from gptq_plugin.calibration.collect import collect
from gptq_plugin.calibration.sampling import deal
from gptq_plugin.calibration.sources import Sources

CONFIG = QuantizeConfig(nsamples=33, batch_size=8)


def rows(count, length=5):
    return [torch.arange(length) + 10 * number for number in range(count)]


def on_ranks(monkeypatch, size, part, nsamples=None):
    """What each rank collects of part(rank), at most nsamples(rank)."""
    brought, found = [], []

    def bring(own):
        brought.append(own)
        return [own]

    with monkeypatch.context() as patch:
        patch.setattr(distributed, "active", lambda: size > 1)
        patch.setattr(distributed, "world_size", lambda: size)
        for gather in (bring, lambda own: brought):  # first each rank's word is heard, then all of them are
            patch.setattr(distributed, "gather_objects", gather)
            found.clear()
            for rank in range(size):
                patch.setattr(distributed, "rank", lambda rank=rank: rank)
                found.append(collect(part(rank), CONFIG, None, nsamples(rank) if nsamples else None))
    return found


def ids(batch):
    value = batch.data["input_ids"] if isinstance(batch.data, dict) else batch.data
    return value.tolist()


def in_order(found):
    """The batches of all ranks by number."""
    numbered = [(number, ids(batch)) for one in found for number, batch in zip(one.numbers, one.batches, strict=True)]
    assert [number for number, _ in sorted(numbered)] == list(range(found[0].of_all_ranks))
    return [batch for _, batch in sorted(numbered)]


@pytest.mark.parametrize("size", [2, 3, 4, 7])
@pytest.mark.parametrize("sharers", [None, 1, 2])
def test_token_samples_dealt_in_turn_make_the_batches_of_one_rank(size, sharers, monkeypatch):
    samples, sharers = rows(33), sharers or size
    found = on_ranks(monkeypatch, size, lambda rank: samples[rank::sharers] if rank < sharers else [])
    assert in_order(found) == [ids(batch) for batch in collect(samples, CONFIG).batches]
    assert sum(one.samples for one in found) == 33
    assert max(len(one.batches) for one in found) - min(len(one.batches) for one in found) <= 1
    assert all(one.first_batches == ([0] if one.batches else []) for one in found)


def test_samples_of_several_lengths_are_batched_as_on_one_rank(monkeypatch):
    samples = [sample[: 3 + number % 3] for number, sample in enumerate(rows(20))]
    found = on_ranks(monkeypatch, 2, lambda rank: samples[rank::2])
    assert in_order(found) == [ids(batch) for batch in collect(samples, CONFIG).batches]


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("nsamples", [20, 24, 33, 100])
def test_ready_batches_stay_on_their_rank_and_nsamples_ends_where_it_does_on_one_rank(size, nsamples, monkeypatch):
    batches = [torch.full((4, 2), float(number)) for number in range(10)]
    alone = collect(batches, CONFIG, None, nsamples)
    found = on_ranks(monkeypatch, size, lambda rank: batches[rank::size], lambda rank: len(range(rank, nsamples, size)))
    assert in_order(found) == [ids(batch) for batch in alone.batches]
    for rank, one in enumerate(found):
        assert [ids(batch) for batch in one.batches] == [ids(batch) for batch in alone.batches][rank::size]
        assert one.deviations == alone.deviations


def test_a_ranks_single_sample_is_a_batch_where_another_rank_holds_batches(monkeypatch):
    loader = [{"input_ids": torch.arange(10).view(2, 5)}, {"input_ids": torch.arange(5)[None]}]
    found = on_ranks(monkeypatch, 2, lambda rank: loader[rank::2])
    assert in_order(found) == [loader[0]["input_ids"].tolist(), loader[1]["input_ids"].tolist()]


@pytest.mark.parametrize("size", [1, 2, 3])
def test_data_that_is_the_same_on_every_rank_gives_the_samples_of_one_rank_whatever_is_empty(size, monkeypatch):
    samples = [sample[: 0 if number % 4 == 1 else 5] for number, sample in enumerate(rows(40))]
    alone = collect(Sources((deal(samples, "given", nsamples=20),)), CONFIG)
    found = on_ranks(monkeypatch, size, lambda rank: Sources((deal(samples, "given", nsamples=20),)))
    assert in_order(found) == [ids(batch) for batch in alone.batches] and alone.samples == 20
    assert all(one.deviations == alone.deviations for one in found)
    assert "7 empty calibration samples dropped" in alone.deviations


def test_batches_of_several_sources_are_numbered_one_source_after_the_other(monkeypatch):
    def part(rank):
        return Sources((deal(rows(20), "own", nsamples=20), deal(rows(9), "general", nsamples=9, is_general=True)))

    alone, (first, second) = collect(part(0), CONFIG), on_ranks(monkeypatch, 2, part)
    assert in_order([first, second]) == [ids(batch) for batch in alone.batches]
    assert first.numbers == [0, 2, 3] and second.numbers == [1, 4]
    assert (first.first_batches, second.first_batches) == ([0, 2], [0, 1])


def test_alone_a_rank_keeps_to_its_part(monkeypatch):
    for name, value in {"active": True, "rank": 1, "world_size": 2}.items():
        monkeypatch.setattr(distributed, name, lambda value=value: value)
    alone = collect(iter(rows(9)), CONFIG, alone=True)  # an exchange would fail without a group
    assert [batch.samples for batch in alone.batches] == [8, 1] and alone.numbers == [0, 1]
