"""Batches of samples that were given one by one, put together."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.utils.data import DataLoader, default_collate

from gptq_plugin import distributed
from gptq_plugin.calibration.collect import collect
from gptq_plugin.calibration.joined import divided, joined
from gptq_plugin.calibration.sampling import sample_loaders
from gptq_plugin.calibration.sources import Source, Sources
from gptq_plugin.config import QuantizeConfig

CONFIG = QuantizeConfig(nsamples=1000, batch_size=2)


def of(data, most):
    calibration = collect(data, CONFIG, alone=True)
    return calibration, joined(calibration, [batch.tokens or batch.samples for batch in calibration.batches], most)


def same_samples(one, two):
    return (one.digest - two.digest) % 2**256 == 0


def samples(*lengths, begin=0):
    return [torch.arange(begin + number, begin + number + length) for number, length in enumerate(lengths)]


def test_neighbours_of_one_length_run_together_up_to_a_size():
    given, found = of(samples(*[5] * 9), 20)
    assert [batch.samples for batch in given.batches] == [2, 2, 2, 2, 1]
    assert [batch.samples for batch in found.batches] == [4, 4, 1]
    assert torch.equal(found.batches[1].data["input_ids"], torch.stack(samples(*[5] * 9)[4:8]))
    assert same_samples(found, given) and found.samples == given.samples == 9
    assert list(found.numbers) == [0, 1, 2] and found.of_all_ranks == 3 and found.sources == given.sources


def test_no_sample_is_padded_and_no_order_changed():
    given, found = of(samples(3, 5, 3, 3, 5, 3, 3), 1000)
    assert [batch.data["input_ids"].shape for batch in found.batches] == [(5, 3), (2, 5)]
    assert same_samples(found, given)


def test_batches_that_are_large_enough_stay():
    given, found = of(samples(*[5] * 4), 19)
    assert found.batches == given.batches and all(one is two for one, two in zip(found.batches, given.batches))


def test_no_more_samples_run_together_than_a_grid_of_a_gpu_has_blocks():
    config = QuantizeConfig(nsamples=70000, batch_size=7000)
    calibration = collect(torch.zeros(70000, 1), config, alone=True)
    assert [batch.samples for batch in joined(calibration, [7000] * 10, 10**9).batches] == [63000, 7000]


@pytest.mark.parametrize(
    "data",
    [
        DataLoader(torch.randn(8, 5), batch_size=2),
        [torch.zeros(2, 5, dtype=torch.long)] * 4,
        torch.randn(8, 3, 5),
        [{"input_ids": torch.zeros(2, 5, dtype=torch.long), "note": "mine"}] * 4,
    ],
)
def test_batches_that_users_made_stay(data):
    given, found = of(data, 1000)
    assert len(given.batches) == 4 and found.batches == given.batches


def test_samples_with_other_fields_dtypes_or_texts_run_apart():
    plain, masked = samples(*[5] * 4), {"attention_mask": torch.ones(5, dtype=torch.long)}
    data = [{"input_ids": ids, **(masked if number > 1 else {})} for number, ids in enumerate(plain)]
    assert [sorted(batch.data) for batch in of(data, 1000)[1].batches] == [
        ["input_ids"], ["attention_mask", "input_ids"],
    ]  # fmt: skip
    narrow = [ids.int() if number > 1 else ids for number, ids in enumerate(plain)]
    assert [batch.data["input_ids"].dtype for batch in of(narrow, 1000)[1].batches] == [torch.int64, torch.int32]
    rows = [(row, torch.tensor(1.0)) for row in torch.randn(4, 5)]
    (batch,) = of(rows, 1000)[1].batches
    assert [part.shape for part in batch.data] == [(4, 5), (4,)] and batch.samples == 4
    named = [(row, "name") for row in torch.randn(4, 5)]
    assert [batch.samples for batch in of(named, 1000)[1].batches] == [2, 2]


def test_batches_chosen_of_a_dataset_run_together_if_they_are_but_stacked():
    def found(**options):
        loader = DataLoader([{"input_ids": ids, "weight": 1.0} for ids in samples(*[5] * 8)], batch_size=4, **options)
        sources = Sources(tuple(sample_loaders([loader], CONFIG, "own", nsamples=8)))
        return [batch.samples for batch in of(sources, 1000)[1].batches]

    assert found() == [8]
    assert found(collate_fn=lambda given: default_collate(given)) == [2, 2, 2, 2]  # may do anything
    single = DataLoader([{"input_ids": ids} for ids in samples(*[5] * 8)], batch_size=1)
    sources = Sources(tuple(sample_loaders([single], CONFIG, "own", nsamples=8)))
    assert [batch.samples for batch in of(sources, 1000)[1].batches] == [8]
    loader = DataLoader([torch.zeros(2, 5, dtype=torch.long)] * 4, batch_size=None)
    sources = Sources(tuple(sample_loaders([loader], CONFIG, "own", nsamples=8)))
    assert {batch.samples for batch in of(sources, 1000)[1].batches} == {2}


def test_the_first_batch_of_a_source_is_the_one_that_holds_it():
    data = Sources((Source(samples(*[5] * 6), "own", 6), Source(samples(*[5] * 6, begin=50), "mix", 6)))
    given, found = of(data, 20)
    assert given.first_batches == [0, 3] and [batch.samples for batch in found.batches] == [4, 4, 4]
    assert found.first_batches == [0, 1] and found.sources == {"own": 6, "mix": 6}


# --- the other way ---


def test_batches_are_divided_into_samples_in_their_order():
    given = collect(samples(*[5] * 5), QuantizeConfig(nsamples=1000, batch_size=3), alone=True)
    found = divided(given, 2)
    assert [batch.samples for batch in given.batches] == [3, 2]
    assert [batch.samples for batch in found.batches] == [2, 1, 2]
    assert all(batch.given_apart and batch.is_chosen for batch in found.batches)
    assert torch.equal(found.batches[1].data["input_ids"], torch.stack(samples(*[5] * 5)[2:3]))
    assert (found.numbers, found.of_all_ranks, same_samples(found, given)) == ([0, 1, 2], 3, True)
    given = collect(samples(*[5] * 4), QuantizeConfig(nsamples=1000, batch_size=3), alone=True)  # the last one is alone
    alone = divided(given, 1, for_good=True)
    assert [batch.samples for batch in alone.batches] == [1] * 4 and not any(one.given_apart for one in alone.batches)
    assert joined(alone, [5] * 4, 1000).batches == alone.batches


def test_batches_of_users_are_not_divided():
    given = collect([torch.zeros(2, 5, dtype=torch.long)] * 4, CONFIG, alone=True)
    assert divided(given, 1).batches == given.batches


def test_divided_batches_have_numbers_of_their_own_over_all_ranks(monkeypatch):
    own, others = calibration_of_ranks(samples(*[5] * 7), 2)
    monkeypatch.setattr(distributed, "gather_objects", lambda counts: [counts, {1: 2, 3: 1}])
    assert own.numbers == [0, 2] and others.numbers == [1, 3]
    found = divided(own, 1)
    assert found.numbers == [0, 1, 4, 5] and found.of_all_ranks == 7
    assert divided(own, 1, alone=True).of_all_ranks == 4


def calibration_of_ranks(data, ranks):
    whole = collect(data, CONFIG, alone=True)
    for rank in range(ranks):
        places = range(rank, len(whole.batches), ranks)
        yield replace(whole, batches=[whole.batches[n] for n in places], numbers=list(places))


def test_the_first_batch_of_a_source_is_still_the_first_where_it_is_divided():
    data = Sources((Source(samples(*[5] * 4), "own", 4), Source(samples(*[5] * 4, begin=50), "mix", 4)))
    assert divided(collect(data, CONFIG, alone=True), 1).first_batches == [0, 4]


def test_no_more_samples_run_together_than_asked():
    given = collect(samples(*[5] * 9), CONFIG, alone=True)
    found = joined(given, [10] * 4 + [5], 1000, most_samples=5)
    assert [batch.samples for batch in found.batches] == [4, 5]
