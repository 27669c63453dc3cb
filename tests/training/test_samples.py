"""Batches divided into their samples: which can be, what samples weigh, and what is noticed where they tell nothing."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional
from transformers import BatchEncoding

from gptq_plugin.errors import RankError
from gptq_plugin.training import samples
from gptq_plugin.training.paired import Measured, Pairs, spread
from gptq_plugin.training.samples import Chosen, Divided, Part, Samples, counts_in, samples_of


@dataclasses.dataclass
class Rows:
    ids: torch.Tensor
    names: list[str]


@pytest.mark.parametrize("kind", [dict, BatchEncoding, Rows, tuple])
def test_a_batch_is_divided_with_all_that_belongs_to_each_sample(kind):
    ids, names = torch.arange(12).view(3, 4), ["a", "b", "c"]
    batch = (ids, names) if kind is tuple else kind(ids=ids, names=names) if kind is Rows else kind(
        {"ids": ids, "names": names}
    )  # fmt: skip
    rows = samples_of(batch)
    assert len(rows) == 3 and all(type(row) is kind for row in rows)
    for number, row in enumerate(rows):
        found = row if kind is tuple else (row.ids, row.names) if kind is Rows else (row["ids"], row["names"])
        assert torch.equal(found[0], ids[number : number + 1]) and found[1] == [names[number]]


def test_what_belongs_to_all_samples_stays_whole():
    row = samples_of({"ids": torch.ones(3, 4), "positions": torch.ones(1, 4), "scale": torch.tensor(2.0), "n": 7})[1]
    assert row["ids"].shape == (1, 4) and row["positions"].shape == (1, 4) and row["scale"] == 2 and row["n"] == 7


@pytest.mark.parametrize("batch", [["a", "b"], SimpleNamespace(ids=torch.ones(3, 4)), {"n": 3, "t": torch.tensor(1.0)}])
def test_other_batches_are_refused(batch):
    with pytest.raises(ValueError, match="has no tensors whose first|is no structure of"):
        samples_of(batch)


def divided(labels, values_of, value, **options):
    counts = counts_in({"labels": labels}, [1] * len(labels))
    return Divided(float(value), len(labels), [float(v) for v in values_of], counts, [*range(len(labels))], **options)


def test_a_mean_over_tokens_is_a_weighted_mean_of_its_samples():
    """Cross-entropy as transformers has it: labels are shifted, and -100 does not count."""
    torch.manual_seed(0)
    logits, labels = torch.randn(4, 9, 7), torch.randint(0, 7, (4, 9))
    for row, length in enumerate((9, 3, 6, 1)):  # the last has no token to predict
        labels[row, length:] = -100

    def loss(rows):
        return functional.cross_entropy(logits[rows, :-1].flatten(0, 1), labels[rows, 1:].flatten())

    one = divided(labels, [loss([row]) for row in range(4)], loss([0, 1, 2, 3]))
    assert math.isnan(one.values[3])
    assert Samples([one], 4).names() == ["labels but the first"]
    parts = list(one.parts("labels but the first"))
    assert [weight for _, weight, _ in parts] == pytest.approx([4 * n / 15 for n in (8, 2, 5)])
    assert sum(v * w for v, w, _ in parts) / 4 == pytest.approx(one.value, rel=1e-5)


def test_equal_weights_and_those_that_are_logged_come_first():
    labels = torch.zeros(3, 5, dtype=torch.long)
    assert Samples([divided(labels, [1.0, 2.0, 6.0], 3.0)], 3).names()[0] == ""
    logged = Divided(4.0, 3, [1.0, 2.0, 6.0], counts_in({"x": torch.ones(3)}, [1, 1, 3]), [0, 1, 2])
    assert counts_in({"x": torch.ones(3, 2, 2, dtype=torch.long)}, [1, 1, 3]) == {"": [1, 1, 3]}
    assert logged.mean("") == 4.2 and Samples([dataclasses.replace(logged, value=4.2)], 3).names() == [""]


def test_a_metric_that_is_no_mean_over_samples_is_noticed():
    """In-batch negatives: alone, a sample has none, and its loss is 0."""
    one = divided(torch.zeros(3, 5, dtype=torch.long), [0.0, 0.0, 0.0], 1.1)
    two = dataclasses.replace(one, value=0.0)
    known = Samples([two, one], 6)
    assert known.names() == [] and "a batch's value, 1.1, is no mean of its samples'" in known.unfit()
    metric = Measured.mean([0.0, 1.1], [3, 3], [1, 2], known)
    pairs = Pairs.of(metric, metric)
    assert pairs.unit == "batches" and pairs.before == [0.0, 1.1] and "is no mean" in pairs.why
    assert "it is measured on 2 batches (a batch's value" in pairs.unpaired


def test_dtypes_of_few_bits_are_compared_as_they_are_exact():
    values, labels = [1.0, 2.0, 3.0], torch.zeros(3, 5, dtype=torch.long)
    assert not divided(labels, values, 2.01).fits("")
    assert not divided(labels, [1.0, 2.0, math.inf], 2.0).fits("")
    assert divided(labels, values, 2.01, precision=torch.finfo(torch.bfloat16).eps).fits("")


def test_both_models_need_the_same_weights():
    labels = torch.tensor([[0, 1, 2], [0, -100, -100]])
    by_tokens = divided(labels, [1.0, 3.0], 1.5)
    evenly = divided(labels, [1.0, 3.0], 2.0)
    assert Samples([by_tokens], 2).names() == ["labels"] and Samples([evenly], 2).names() == [""]
    one, two = (Measured.mean([of.value], [2], [1], Samples([of], 2)) for of in (by_tokens, evenly))
    assert Pairs.of(one, one).unit == "samples" and Pairs.of(one, two).unit == "batches"
    of_none = Measured.mean([9.0], [2], [1], Samples([divided(labels, [1.0, 3.0], 9.0)], 2))
    failed = Measured.mean([2.0], [2], [1], Samples(why="a sample failed"))
    for other, why in ((of_none, "a batch's value, 9, is no mean"), (failed, "a sample failed")):
        assert all(Pairs.of(*pair).why.startswith(why) for pair in ((one, other), (other, one)))
    alone = Measured.mean([2.0], [2], [1])  # its batches are samples
    assert all(Pairs.of(*pair).unit == "samples" for pair in ((alone, two), (two, alone)))


def test_of_weights_that_all_fit_those_that_were_logged_count():
    labels = torch.tensor([[0, 1, 2], [0, -100, -100]])
    counts = counts_in({"labels": labels}, [3, 1])
    one, other = (Divided(2.0, 4, [2.0, 2.0], {**counts, "": logged}, [0, 1]) for logged in ([3, 1], [1, 3]))
    first, second = (Measured.mean([2.0], [4], [1], Samples([of], 2)) for of in (one, other))
    assert Pairs.of(first, first).weights == [3, 1]
    assert Pairs.of(first, second).why == "the two models' samples differ"


def test_samples_that_differ_are_no_pairs():
    """The batches are the same, by their keys, and single samples are not: an augmentation may be random."""
    one = divided(torch.zeros(3, 5, dtype=torch.long), [1.0, 2.0, 6.0], 3.0)
    other = dataclasses.replace(one, keys=[0, 1, 3])
    first, second = (Measured.mean([3.0], [3], [1], Samples([of], 3)) for of in (one, other))
    assert Pairs.of(first, first).unit == "samples"
    assert (Pairs.of(first, second).unit, Pairs.of(first, second).why) == ("batches", "the two models' samples differ")


def test_some_batches_are_chosen_evenly_and_before_a_step_changes_them(monkeypatch):
    monkeypatch.setattr(samples, "MOST", 16)
    chosen = Chosen()
    for number in range(20):
        batch = {"ids": torch.full((3, 2), number), "labels": torch.zeros(3)}
        chosen.add(None, batch)
        batch.pop("labels")
    assert list(chosen.kept) == [0, 4, 8, 12, 16] and chosen.sizes == [3] * 20
    seen = []
    chosen.run(lambda number, _, sample: seen.append((number, sample["ids"].tolist(), len(sample))))
    assert seen == [(n, [[n, n]], 2) for n in (0, 16, 8, 4, 12) for _ in range(3)]
    assert chosen.why == "" and not chosen.are_ones
    large = Chosen()
    monkeypatch.setattr(samples.distributed, "world_size", lambda: 4)
    shared = Chosen()
    for _ in range(6):
        large.add(None, torch.ones(40, 2))
        shared.add(None, torch.ones(2, 2))
    assert list(large.kept) == [0] and list(shared.kept) == [0, 4]  # a quarter of 16 samples


def test_single_samples_need_no_second_run_and_errors_are_told():
    ones = Chosen()
    for _ in range(3):
        ones.add(None, torch.ones(1, 2))

    def step(*_):
        raise RuntimeError("batches of one\ncannot be")

    assert ones.samples([Part(1.0, 1, 0)], []).why == "none were run"
    ones.run(step)
    assert ones.why == "" and ones.are_ones and ones.samples([Part(1.0, 1, 0)], []) is None
    ones.add(None, torch.ones(2, 2))
    ones.run(step)
    assert ones.why == "single samples cannot be run (RuntimeError: batches of one)" and not ones.are_ones
    assert ones.samples([Part(1.0, 1, 0)], []).why == ones.why
    texts = Chosen()
    texts.add(None, ["a", "b"])
    texts.run(step)
    assert "has no tensors whose first dimension" in texts.why


def test_a_mean_has_the_samples_of_the_batches_it_is_over(monkeypatch):
    """Some batches may give no value; each of its samples has to give one, and no batch two."""
    monkeypatch.setattr(samples.distributed, "rank", lambda: 1)
    chosen = Chosen()
    for number in range(3):
        chosen.add(None, torch.full((2, 3), number))
    single = []
    chosen.run(lambda number, _, sample: single.append(Part(torch.tensor(float(number)), 2.0, number)))
    parts = [Part(torch.tensor(float(number)), 5, number, key=number, precision=0.5) for number in range(3)]
    found = chosen.samples([*parts[:2], Part(7.0, 1, None)], single)
    assert found.why == "" and found.total == 4 and [one.place for one in found.batches] == [(1, 0), (1, 1)]
    assert [(one.value, one.weight, one.values, one.precision) for one in found.batches] == [
        (0.0, 5, [0.0, 0.0], 0.5), (1.0, 5, [1.0, 1.0], 0.5),
    ]  # fmt: skip
    assert found.batches[0].counts[""] == [2.0, 2.0] and len(set(found.batches[1].keys)) == 1
    for wrong in (([*parts, parts[0]], single), (parts, single[1:]), (parts, [*single, single[0]])):
        assert chosen.samples(*wrong).why == "there is not one value for each sample"


def test_ranks_run_as_many_samples_each_and_the_same_batches(monkeypatch):
    """A step may wait for the others': another rank has two batches more, larger ones, and keeps every second."""
    other = {(0, number): size for number, size in enumerate((2, 9, 4, 9, 3))}
    monkeypatch.setattr(samples.distributed, "gather_objects", lambda mine: [mine, (other, 2)])
    chosen, steps = Chosen(), []
    for number, size in enumerate((3, 3, 3)):
        chosen.add(None, {"ids": torch.full((size, 2), number)})

    def step(number, _, sample):
        steps.append((number, int(sample.pop("ids")[0, 0])))

    chosen.run(step)
    assert steps == [(0, 0)] * 3 + [(-1, 0)] * 3 + [(2, 2)] * 3 + [(-1, 2)]
    assert [*chosen.kept] == [0, 2] and chosen.why == ""
    monkeypatch.setattr(samples.distributed, "gather_objects", lambda mine: [mine, ({}, 1)])
    chosen.run(step)
    assert chosen.why == "a rank has no batches of a dataloader" and len(steps) == 10


def test_ranks_run_the_same_dataloaders_samples_at_the_same_time(monkeypatch):
    """Steps of one dataloader may wait for the other rank's, and those of another not."""
    shares, told, steps = (((3, 3, 3), (2,)), ((2,), (2, 2))), [], []
    chosen = [Chosen(), Chosen()]
    for one, loaders in zip(chosen, shares):
        for loader, sizes in enumerate(loaders):
            for number, size in enumerate(sizes):
                one.add((loader, number), torch.ones(size, 2), loader)

    def gathers(objects):
        monkeypatch.setattr(samples.distributed, "gather_objects", objects)

    for one in chosen:  # first, what each tells
        gathers(lambda mine: [told.append(mine), mine][1:])
        one.run(lambda *_: None)
    gathers(lambda mine: told)
    for one in chosen:
        ran = []
        one.run(lambda number, place, sample, ran=ran: ran.append((number, place[0])))
        steps.append(ran)
    ran_of = [[loader for _, loader in ran] for ran in steps]
    assert ran_of[0] == ran_of[1] and Counter(ran_of[0]) == {0: 9, 1: 4}
    for ran, loaders in zip(steps, shares):
        numbers = Counter(number for number, _ in ran if number >= 0)
        assert [numbers[number] for number in range(len(numbers))] == [size for sizes in loaders for size in sizes]


def test_a_rank_without_a_batch_repeats_a_sample_of_its_dataloader_of_which_it_keeps_none(monkeypatch):
    monkeypatch.setattr(samples, "MOST", 2)
    chosen, ran = Chosen(), []
    for loader, count in ((0, 3), (1, 1)):
        for number in range(count):
            chosen.add((loader, number), torch.ones(2, 2), loader)
    assert [*chosen.kept] == [0]
    other = {**{(0, number): 2 for number in range(3)}, **{(1, number): 2 for number in range(4)}}
    monkeypatch.setattr(samples.distributed, "gather_objects", lambda mine: [mine, (other, 4)])
    chosen.run(lambda number, place, _: ran.append((number, place)))
    assert chosen.why == "" and ran == [(0, (0, 0))] * 2 + [(-1, (1, 0))] * 2


def test_batches_that_cannot_be_divided_are_found_before_a_sample_runs():
    """Another rank may have none of them: the steps of its samples would wait for this one's."""
    chosen, ran = Chosen(), []
    chosen.add(None, {"ids": torch.zeros(3, 2)})
    chosen.add(None, {"ids": "a text"})
    chosen.run(lambda number, *_: ran.append(number))
    assert not ran and chosen.why.startswith("single samples cannot be run (ValueError: a batch (dict) has no tensors")


@pytest.mark.parametrize(("end", "steps"), [(0, 0), (1, 6)])
def test_what_fails_on_another_rank_is_told_on_this_one(end, steps, monkeypatch):
    """At the end of the division of batches, before any step; or of the steps."""
    ends = iter(range(2))

    @contextlib.contextmanager
    def failing_together():
        yield
        if next(ends) == end:
            raise RankError("rank 1 failed")

    monkeypatch.setattr(samples.distributed, "failing_together", failing_together)
    chosen, ran = Chosen(), []
    for _ in range(2):
        chosen.add(None, torch.zeros(3, 2))
    chosen.run(lambda number, *_: ran.append(number))
    assert chosen.why == "single samples cannot be run (RankError: rank 1 failed)" and len(ran) == steps


def test_samples_take_no_longer_than_the_validation_and_those_that_ran_for_both_models_are_pairs(monkeypatch):
    """The clock is one of steps. What is enough to tell something runs in any case."""
    clock = iter(range(10**6))
    monkeypatch.setattr(samples.time, "perf_counter", lambda: float(next(clock)))
    monkeypatch.setattr(samples, "_SECONDS", 6.0)
    monkeypatch.setattr(samples, "_LEAST", 4)
    metrics = []
    for slow in (0, 2):  # the first validation took longer
        chosen = Chosen()
        for number in range(16):
            chosen.add(None, torch.full((2, 3), number))
        for _ in range(6 - 3 * slow):
            next(clock)
        ran = []
        chosen.run(lambda number, *_, ran=ran: ran.append(number))
        known = chosen.samples([Part(1.0 + n, 2, n) for n in range(16)], [Part(1.0 + n, 1, n) for n in ran])
        metrics.append(Measured.mean([1.0] * 16, [2] * 16, [*range(16)], known))
        assert 4 <= len(ran) < 32 and [*chosen.kept] == [0, 8, 4, 12, 2, 10, 6, 14, 1][: len(chosen.kept)]
    first, second = (len(metric.samples.batches) for metric in metrics)
    pairs = Pairs.of(*metrics)
    assert second < first and len(pairs.before) == 2 * second and pairs.share == second / 16 and pairs.unit == "samples"


@pytest.mark.parametrize(
    ("rank_0", "batches"), [(lambda mine: mine, [0, 4]), (lambda mine: False, [0, 4, 2, 6, 1, 5, 3, 7])]
)
def test_some_samples_run_however_long_they_take_and_all_while_rank_0_has_time(rank_0, batches, monkeypatch):
    monkeypatch.setattr(samples, "_LEAST", 4)
    monkeypatch.setattr(samples.distributed, "object_from_first", rank_0)
    clock = iter([0.0] * 3)
    monkeypatch.setattr(samples.time, "perf_counter", lambda: next(clock, 1e9))  # the first one takes all the time
    chosen, ran = Chosen(), []
    for n in range(8):
        chosen.add(None, torch.full((2, 3), n))
    chosen.run(lambda n, *_: ran.append(n))
    assert ran == [n for n in batches for _ in range(2)]


def test_of_some_samples_the_interval_is_that_of_a_mean_of_all():
    """Sixty of 240, of the same changes: half as wide as if there were sixty."""
    torch.manual_seed(0)
    before = 3 + torch.randn(60).double()
    after = before + 0.05 + 0.1 * torch.randn(60).double()

    def metric(values, total):
        batches = [
            Divided(float(part.mean()), 6, part.tolist(), {"": [1.0] * 6}, [*range(n * 6, n * 6 + 6)], (0, n))
            for n, part in enumerate(values.split(6))
        ]
        return Measured.mean([one.value for one in batches], [6] * 10, [*range(10)], Samples(batches, total))

    whole, some = (spread(metric(before, total), metric(after, total)) for total in (60, 240))
    assert whole.parts == some.parts == 60 and some.margin == pytest.approx(whole.margin / 2, rel=1e-6)
    plain = spread(*(Measured.mean(values.tolist(), [1] * 60) for values in (before, after)))
    assert whole.margin == pytest.approx(plain.margin, rel=1e-6)
    error = float((after - before).std()) / 60**0.5
    assert whole.margin == pytest.approx(2.0 * error, rel=0.05)


def test_samples_that_ran_and_weigh_nothing_are_not_taken_for_some_that_did_not():
    labels = torch.ones(20, 3, dtype=torch.int64)
    labels[::2] = -100
    torch.manual_seed(0)
    values = [float(v) if row[0] == 1 else math.nan for v, row in zip(torch.rand(20), labels, strict=True)]
    mean = sum(values[1::2]) / 10
    one = divided(labels, values, mean)
    measured = Measured.mean([mean], [20], [1], Samples([one], 20))
    found = Pairs.of(measured, measured)
    assert (found.unit, len(found.before), found.share) == ("samples", 10, 1.0)
    half = Measured.mean([mean, mean], [20, 20], [1, 2], Samples([one], 40))
    assert Pairs.of(half, half).share == 0.5


def test_masks_are_counted_by_what_they_keep():
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    counts = counts_in({"attention_mask": mask, "kept": mask.bool(), "labels": mask - 100}, [1, 1])
    assert counts["attention_mask"] == counts["kept"] == [2, 1] and counts["attention_mask but the first"] == [1, 0]
    assert counts["labels"] == [2, 1]


def test_a_table_beside_the_samples_is_no_weight_of_theirs():
    batch = {"ids": torch.ones(3, 4, dtype=torch.int64), "positions": torch.ones(1, 4, dtype=torch.int64)}
    assert {name.split()[0] for name in counts_in(batch, [1, 1, 1]) if name} == {"ids"}
