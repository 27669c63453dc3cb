"""The samples of a finish: those held out are the last of every source."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import DataLoader

from gptq_plugin import QuantizeConfig
from gptq_plugin.calibration.sampling import deal, sample_loaders
from gptq_plugin.calibration.sources import Source, Sources
from gptq_plugin.errors import CalibrationError
from gptq_plugin.finish.rows import check_batches, rows_of


def samples(count, first=0):
    return [torch.full((8,), first + number) for number in range(count)]


def firsts(batches):
    return [int(row[0]) for batch in batches for row in batch.data["input_ids"]]


@pytest.mark.parametrize(("batch_size", "held_out"), [(1, 5), (2, 5), (5, 10)])
def test_the_last_batches_are_held_out(batch_size, held_out):
    config = QuantizeConfig(nsamples=30, batch_size=batch_size)
    rows = rows_of(samples(40), config, held_out)
    judged = firsts(rows.held_out)
    assert judged == list(range(30 - len(judged), 30)) and held_out <= len(judged) < held_out + batch_size
    assert sorted(firsts(rows.train)) == list(range(30 - len(judged))) and rows.samples == 30 - len(judged)
    assert len(set(rows.numbers)) == len(rows.held_out)
    assert any("10 of 40 given were not used" in one for one in rows.deviations)


def test_samples_to_train_on_are_in_an_order_of_the_seed():
    """Rows cut from files are neighbours there: those of a batch would be alike."""
    config = QuantizeConfig(nsamples=64, batch_size=4)
    one, same, other = (rows_of(samples(64), config, 8, seed=seed) for seed in (0, 0, 1))
    orders = [firsts(rows.train) for rows in (one, same, other)]
    assert orders[0] == orders[1] and orders[2] != orders[0] and all(sorted(each) == list(range(56)) for each in orders)
    for batch in one.train:
        assert max(firsts([batch])) - min(firsts([batch])) > 3
    assert firsts(one.held_out) == firsts(other.held_out) == list(range(56, 64))
    assert one.digest == other.digest


def test_of_a_small_source_only_what_may_be_held_out_stays_in_its_place():
    data = Sources((deal(samples(300), "code", nsamples=300), deal(samples(20, 1000), "prose", nsamples=20)))
    rows = rows_of(data, QuantizeConfig(nsamples=320, batch_size=2), 32)
    prose = [number - 1000 for number in firsts(rows.train) if number >= 1000]
    assert sorted(prose) == list(range(18)) and prose != sorted(prose)
    assert firsts(rows.held_out) == [*range(270, 300), 1018, 1019]


@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_of_samples_of_different_lengths_the_last_are_held_out(batch_size):
    """Batches have samples of one length, and those of rare lengths come last: calibration's would be judged on."""
    short = [torch.full((3 + number,), number) for number in range(5)]
    rows = rows_of(
        [*short, *samples(50, 5), torch.full((3,), 55)], QuantizeConfig(nsamples=56, batch_size=batch_size), 8
    )
    assert sorted(firsts(rows.held_out)) == list(range(48, 56)) and sorted(firsts(rows.train)) == list(range(48))
    assert rows.samples == 48


def test_batches_that_are_given_stay_as_they_are():
    given = [{"input_ids": torch.stack(samples(2, 2 * number))} for number in range(6)]
    rows = rows_of(given, QuantizeConfig(nsamples=12, batch_size=4), 2)
    assert firsts(rows.train) == list(range(10)) and firsts(rows.held_out) == [10, 11]


def test_several_sources_give_held_out_samples_in_their_proportion():
    data = Sources((deal(samples(20), "code", nsamples=20), deal(samples(12, 100), "prose", nsamples=12)))
    rows = rows_of(data, QuantizeConfig(nsamples=32, batch_size=1), 8)
    assert firsts(rows.held_out) == [15, 16, 17, 18, 19, 109, 110, 111]
    assert len(set(rows.numbers)) == 8 and rows.samples == 24
    assert rows.sources == {"code": 20, "prose": 12}
    alike = Sources(tuple(deal(samples(9), name, nsamples=9) for name in ("code", "prose")))
    assert len(set(rows_of(alike, QuantizeConfig(nsamples=18, batch_size=1), 4).numbers)) == 4


def test_of_a_source_with_few_samples_one_is_held_out_and_one_stays_to_train_on():
    few = (deal(samples(2, 100), "code", nsamples=2), deal(samples(1, 200), "prose", nsamples=1))
    rows = rows_of(
        Sources((deal(samples(40), "code", nsamples=40), *few)), QuantizeConfig(nsamples=43, batch_size=1), 4
    )
    assert firsts(rows.held_out) == [36, 37, 38, 39, 101] and {100, 200} < set(firsts(rows.train))
    assert rows.sources == {"code": 42, "prose": 1} and len(set(rows.numbers)) == 5


def test_of_few_samples_a_quarter_at_most_is_held_out():
    rows = rows_of(samples(9), QuantizeConfig(nsamples=40, batch_size=1), 32)
    assert firsts(rows.held_out) == [7, 8]
    assert rows.deviations == ["9 samples given, 40 asked: 2 of them are to be held out"]
    rows = rows_of(samples(3), QuantizeConfig(nsamples=40, batch_size=1), 32)
    assert firsts(rows.held_out) == [2] and rows.deviations[0].endswith("1 of them are to be held out")


def test_of_a_short_dataloader_a_quarter_at_most_is_held_out():
    """What is taken of it knows only the samples that it has."""
    config = QuantizeConfig(nsamples=40, batch_size=1)
    loader = DataLoader([{"input_ids": row} for row in samples(12)], batch_size=3)
    data = Sources(
        (*sample_loaders([loader], config, "rows", nsamples=30), deal(samples(4, 100), "prose", nsamples=10))
    )
    rows = rows_of(data, config, 32)
    assert len(firsts(rows.held_out)) == 4 and rows.samples == 12 and firsts(rows.held_out)[-1] == 103
    assert "16 samples given, 40 asked: 4 of them are to be held out" in rows.deviations


def test_as_many_as_asked_are_held_out_where_there_are_enough():
    assert firsts(rows_of(samples(9), QuantizeConfig(nsamples=9, batch_size=1), 6).held_out) == [3, 4, 5, 6, 7, 8]


def test_the_digest_depends_on_the_samples_and_not_on_their_batches():
    digests = {
        rows_of(given, QuantizeConfig(nsamples=8, batch_size=size), 2).digest
        for given, size in ((samples(8), 1), (samples(8), 2), (samples(8, 1), 1))
    }
    assert len(digests) == 2 and all(len(one) == 64 for one in digests)
    for first in (samples(4), samples(4, 1)):
        data = Sources((deal(first, "code", nsamples=4), deal(samples(4, 100), "prose", nsamples=4)))
        digests.add(rows_of(data, QuantizeConfig(nsamples=8, batch_size=1), 2).digest)
    assert len(digests) == 4


def test_samples_of_one_batch_are_divided():
    rows = rows_of(samples(4), QuantizeConfig(nsamples=4, batch_size=4), 2)
    assert sorted(firsts(rows.train)) == [0, 1] and firsts(rows.held_out) == [2, 3]


def test_a_single_batch_cannot_be_divided():
    with pytest.raises(CalibrationError, match="there are 4 samples in batches of 4: give more samples, or a smaller"):
        rows_of([{"input_ids": torch.stack(samples(4))}], QuantizeConfig(nsamples=4, batch_size=4), 2)
    two, one = (Sources((Source(DataLoader(samples(4), batch_size=size), "code", 4),)) for size in (2, 4))
    check_batches(two, QuantizeConfig(nsamples=4, batch_size=2))
    with pytest.raises(CalibrationError, match="there are too few samples in batches of 4"):
        check_batches(one, QuantizeConfig(nsamples=4, batch_size=4))
