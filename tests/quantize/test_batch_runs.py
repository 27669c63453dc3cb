"""The forwards of calibration batches, and what is decided from the first of them."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from types import SimpleNamespace

import pytest
import torch
from plans import CONFIG, Attention, calibration_of, plan_of, rows
from torch import nn

from gptq_plugin import QuantizeModule, distributed
from gptq_plugin.calibration.batches import digest
from gptq_plugin.calibration.positions import Positions
from gptq_plugin.errors import TargetError
from gptq_plugin.layers.qlinear import QuantLinear
from gptq_plugin.memory import placement
from gptq_plugin.memory.weights import neighbour_bytes
from gptq_plugin.quantize import batch_runs, first_forward
from gptq_plugin.quantize.batch_runs import BatchRuns
from gptq_plugin.quantize.options import PassOptions

from models import tiny_llama


def runs_of(model, batches, **options):
    plan, calibration = plan_of(model), calibration_of(batches)
    return plan, BatchRuns(plan, calibration, Positions(model, calibration.batches, "all"), PassOptions(**options))


def modules(plan):
    return {target.name: target.module for target in plan.targets}


def test_layers_with_one_input_are_a_group_and_the_model_is_left_as_it_was():
    model = nn.Sequential(Attention(), nn.Linear(32, 16))
    before = dict(model.named_parameters())
    plan, runs = runs_of(model, [rows(4, 32)])
    with runs:
        groups, reads = runs.find_groups(modules(plan))
    assert [group.names for group in groups] == [("0.q", "0.k", "0.v"), ("0.o",), ("1",)] and reads == {}
    assert all(before[name] is parameter for name, parameter in model.named_parameters())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_layers_whose_weights_the_model_reads_are_told_apart():
    layer = nn.TransformerEncoderLayer(32, 2, dim_feedforward=64, batch_first=True).eval()
    plan, runs = runs_of(layer, [torch.randn(2, 5, 32)])
    with runs:
        _, reads = runs.find_groups(modules(plan))
    assert reads == {"self_attn.out_proj": "the model reads its weight by itself"}


@pytest.mark.parametrize("batches", [[[1] * 3, [1] * 9, [1] * 5], [rows(2, 32), rows(7, 32), rows(5, 32)]])
def test_the_largest_batch_shows_what_the_walk_needs(batches):
    """By tokens, or by samples where tokens are not known."""
    ran = []
    model = nn.Sequential(nn.Linear(32, 32))
    forward = lambda network, batch: ran.append(batch) or network(torch.ones(1, 32))  # noqa: E731
    calibration, plan = calibration_of(batches), plan_of(model)
    if calibration.batches[0].tokens is None:  # whole batches, not single samples
        calibration.batches.sort(key=lambda batch: batch.samples)
    runs = BatchRuns(plan, calibration, Positions(model, calibration.batches, "all"), PassOptions(forward=forward))
    sizes = [batch.tokens or batch.samples for batch in calibration.batches]
    with runs:
        runs.find_groups(modules(plan))
    (data,) = ran
    assert digest(data) == digest(calibration.batches[sizes.index(max(sizes))].data)


@pytest.mark.parametrize("takes_parts", [True, False])
def test_a_part_of_a_large_batch_shows_the_layers_if_the_forward_takes_it(takes_parts, monkeypatch):
    """What all of its samples need is as many times what the part did."""
    monkeypatch.setattr(first_forward, "_FIRST", 10)
    needs, ran = [], []
    monkeypatch.setattr(
        placement, "place", lambda *given, place=placement.place: needs.append(given[2]) or place(*given)
    )

    def forward(network, batch):
        ran.append(len(batch["input_ids"]))
        if not takes_parts and len(batch["input_ids"]) < 6:
            raise ValueError("a batch has six samples")
        return network(torch.nn.functional.one_hot(batch["input_ids"], 2**15).float())

    model = nn.Sequential(nn.Linear(2**15, 32))
    batches = [{"input_ids": torch.arange(24).reshape(6, 4)}]
    plan, runs = runs_of(model, batches, forward=forward)
    runs.activations._smallest = 2**10
    with runs:
        groups, _ = runs.find_groups(modules(plan))
        assert runs._noticed.keys() == {}
    assert ran == ([3] if takes_parts else [3, 6]) and [group.names for group in groups] == [("0",)]
    assert needs[0].batch == needs[0].activations == 24 * 2**17


def test_all_ranks_take_the_groups_of_the_largest_batch_of_all_and_of_these_the_first(monkeypatch):
    model = Attention()
    plan, runs = runs_of(model, [rows(4, 32)])
    with runs:
        told = runs.find_groups(modules(plan))
    plan, runs = runs_of(model, [])
    others = [((-4, 5), []), ((-4, 2), told[0]), ((-3, 0), [])]
    judged = [({"q": "for one"}, {"q", "k", "v"}), ({"o": "for another"}, set())]
    gathered = [others, judged]
    monkeypatch.setattr(distributed, "gather_objects", lambda own: [own, *gathered.pop(0)])  # this one has no batch
    with runs:
        groups, reads = runs.find_groups(modules(plan))
    assert groups == told[0] and reads == {"q": "for one", "o": "for another"}


def test_a_batch_runs_under_its_number(monkeypatch):
    plan, runs = runs_of(nn.Sequential(nn.Linear(32, 32)), [rows(1, 32, seed=n) for n in range(3)])
    told = []
    monkeypatch.setattr(runs._positions, "running", lambda number: contextlib.nullcontext(told.append(number)))
    with runs:
        outputs = [forward() for forward in runs.forwards()]
        again = runs.forward(2)()
    assert told == [0, 1, 2, 2] and len(outputs) == 3
    assert torch.equal(outputs[2], again) and not torch.equal(outputs[1], again)


def test_inputs_that_are_not_finite_are_found_by_number():
    _, runs = runs_of(nn.Sequential(nn.Linear(32, 32)), [rows(1, 32)])
    nan, infinite = torch.zeros(2, 4), torch.zeros(4)
    nan[1, 2], infinite[0] = float("nan"), float("-inf")
    assert runs.not_finite({3: torch.zeros(4), 5: nan, 8: infinite}) == [5, 8]


def test_what_stays_where_is_logged_and_streaming_can_be_asked_for(caplog):
    model = nn.Sequential(*(nn.Linear(32, 32) for _ in range(4)))
    plan, runs = runs_of(model, [rows(4, 32)], offload_weights=True, offload_activations=True)
    with caplog.at_level(logging.INFO, logger="gptq_plugin.quantize.batch_runs"), runs:
        runs.find_groups(modules(plan))
        assert runs.weights.capacity == runs.weights.min_resident_bytes < runs.weights.total_bytes
    assert "weights streamed block by block" in caplog.text and "activations beyond 0.0 GiB on the CPU" in caplog.text


def test_a_cpu_has_no_budget_to_exceed():
    _, runs = runs_of(nn.Sequential(nn.Linear(32, 32)), [rows(1, 32)], device_memory=1)
    assert runs.over_budget() == []


@pytest.mark.parametrize(
    ("peak", "told"), [(3 * 2**20, ["3 MiB on cpu at the peak, where 2 were allowed"]), (2**21, [])]
)
def test_more_memory_than_allowed_is_told(peak, told, monkeypatch):
    monkeypatch.setattr("gptq_plugin.memory.placement.peak_bytes", lambda device: peak)
    _, runs = runs_of(nn.Sequential(nn.Linear(32, 32)), [rows(1, 32)], device_memory=2**21)
    assert [sentence.partition(":")[0] for sentence in runs.over_budget()] == told
    _, runs = runs_of(nn.Sequential(nn.Linear(32, 32)), [rows(1, 32)])
    assert runs.over_budget() == []


def test_layers_on_several_devices_are_refused():
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32, device="meta"))
    with pytest.raises(TargetError, match=r"on several devices \(0 on cpu, 1 on meta\): move the model to one"):
        runs_of(model, [rows(1, 32)])


def test_batches_run_where_the_model_is_or_where_they_are_asked_to():
    model = nn.Sequential(nn.Linear(32, 32))
    assert runs_of(model, [rows(1, 32)])[1].device == torch.device("cpu")
    assert runs_of(model, [rows(1, 32)], device="meta")[1].device == torch.device("meta")


# --- what a run is told, and what is decided from it ---


def batches_of(sizes):
    return [rows(size, 32, seed=size) for size in sizes]


def test_experts_are_entered_first_by_the_first_run_of_each_batch():
    _, runs = runs_of(nn.Sequential(nn.Linear(32, 32)), batches_of([2, 3]))
    with runs:
        runs.forward(0)()
        assert runs.is_first_to_enter("a") and runs.is_first_to_enter("a")  # called twice in one run
        runs.forward(1)()
        assert runs.is_first_to_enter("a")
        runs.forward(0)()
        assert not runs.is_first_to_enter("a") and runs.is_first_to_enter("b")


def test_a_batch_that_waits_gives_its_memory_away_and_is_there_while_its_input_is_looked_at(monkeypatch):
    _, runs = runs_of(nn.Sequential(nn.Linear(32, 32)), batches_of([2]))
    seen = []

    def record(kind):
        @contextlib.contextmanager
        def context(number):
            seen.append((kind, number))
            yield

        return context

    with runs:
        monkeypatch.setattr(runs.activations, "waiting", record("waits"))
        monkeypatch.setattr(runs.activations, "on_device", record("there"))
        with runs.waiting(4, "0"):
            assert seen == [("waits", 4)]
        runs.not_finite({7: torch.zeros(3)})
    assert seen == [("waits", 4), ("there", 7)]


def test_ranks_compare_the_size_and_the_number_of_their_largest_batches(monkeypatch):
    plan, runs = runs_of(nn.Sequential(nn.Linear(32, 32)), batches_of([2, 7, 5]))
    runs.calibration.numbers = [10, 11, 12]
    told = []
    monkeypatch.setattr(distributed, "gather_objects", lambda own: told.append(own) or [own])
    with runs:
        runs.find_groups(modules(plan))
    assert told[0][0] == (-7, 11)


def test_batches_run_one_at_a_time_if_one_rank_has_to(monkeypatch):
    plan, runs = runs_of(nn.Sequential(nn.Linear(32, 32)), batches_of([2, 3]))
    with runs:
        runs.find_groups(modules(plan))
        assert runs.disturbance(modules(plan)) is None
        monkeypatch.setattr(distributed, "gather_objects", lambda own: [own, "theirs", None])
        assert runs.disturbance(modules(plan)) == "theirs"


@pytest.mark.parametrize(("freed", "told"), [([True, False], True), ([False, True], True), ([False, False], False)])
def test_room_that_was_made_is_reported(freed, told, monkeypatch, caplog):
    _, runs = runs_of(nn.Sequential(nn.Linear(32, 32)), batches_of([2]))
    with runs:
        monkeypatch.setattr(runs.activations, "keep_least", lambda: freed[0])
        monkeypatch.setattr(runs.weights, "keep_least", lambda: freed[1])
        assert runs.make_room() is told
        assert [one.partition(",")[0] for one in runs.over_budget()] == ["cpu ran out of memory once"] * told
    assert ("no room on cpu" in caplog.text) is told


@pytest.mark.parametrize(
    ("free", "offload", "capacity"),
    [(None, None, placement.UNLIMITED), (1000, False, placement.UNLIMITED), (1000, None, 500), (1000, True, "least")],
)
def test_the_first_forward_has_half_of_the_free_memory_for_weights(free, offload, capacity, monkeypatch):
    monkeypatch.setattr(batch_runs, "free_bytes", lambda device, allowed: free)
    _, runs = runs_of(nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32)), batches_of([2]), offload_weights=offload)
    with runs:
        assert runs.weights.capacity == (runs.weights.min_resident_bytes if capacity == "least" else capacity)


def test_what_is_placed_is_what_the_first_forward_needed(monkeypatch):
    """Of three batches the largest ran, with 7 of 14 rows: all together need twice its activations."""
    plan, runs = runs_of(nn.Sequential(nn.Linear(32, 32)), batches_of([2, 7, 5]))
    given, placed = [], placement.Placement(123, 45, True, False, "as asked")
    monkeypatch.setattr(batch_runs, "free_bytes", lambda device, allowed: 10**6)
    monkeypatch.setattr(batch_runs, "Peak", lambda device: SimpleNamespace(bytes=lambda: 9000))
    monkeypatch.setattr(placement, "fixed_bytes", lambda targets, device, batches: 10 * batches)
    monkeypatch.setattr(placement, "place", lambda *args: given.append(args) or placed)
    with runs:
        runs.activations.peak_bytes, runs.weights.peak_bytes = 400, 1000
        runs.find_groups(modules(plan))
        (_, free, needs, least, *_), weights = given[0], runs.weights
        assert (free, needs.forward, needs.activations, needs.batch, needs.fixed) == (10**6, 8000, 800, 400, 30)
        assert (needs.weights, least) == (weights.total_bytes, neighbour_bytes(weights)) == (0, 33 * 32 * 4)
        assert runs.weights.capacity == 123 and runs.activations._budget == 45


@pytest.mark.parametrize("lm_head", [False, True])
def test_every_logit_is_asked_for_where_the_output_embedding_is_quantized(lm_head, monkeypatch):
    asked = []
    monkeypatch.setattr(PassOptions, "runner", lambda self, *, every_logit, **_: asked.append(every_logit))
    model = nn.Sequential(nn.Linear(32, 32))
    plan, calibration = plan_of(model, dataclasses.replace(CONFIG, lm_head=lm_head)), calibration_of(batches_of([2]))
    BatchRuns(plan, calibration, Positions(model, calibration.batches, "all"), PassOptions())
    assert set(asked) == {lm_head}


# --- batches that run together ---


@pytest.fixture
def roomy(monkeypatch):
    """Batches may run together, up to 100 tokens."""
    monkeypatch.setattr(PassOptions, "joins", lambda self, device, config: config.batch_size is None)
    monkeypatch.setattr(batch_runs, "free_bytes", lambda device, allowed: 10**12)
    monkeypatch.setattr(batch_runs, "most_tokens", lambda plan: 100)


@pytest.mark.usefixtures("roomy")
def test_batches_run_together_once_the_groups_are_found(caplog):
    model, config = nn.Sequential(nn.Linear(32, 32)), dataclasses.replace(CONFIG, batch_size=None)
    plan, calibration = plan_of(model, config), calibration_of([[1] * 5] * 34 + [[1] * 9] * 3, config)
    ran = []
    forward = lambda network, batch: ran.append(batch) or network(torch.ones(1, 32))  # noqa: E731
    positions, options = Positions(model, calibration.batches, "all"), PassOptions(forward=forward)
    apart = BatchRuns(plan, calibration, positions, options)  # as where the divergence of each batch is measured
    with apart:
        apart.find_groups(modules(plan))
    assert apart.calibration is calibration and [len(batch["input_ids"]) for batch in ran] == [8]
    ran.clear()
    runs = BatchRuns(plan, calibration, positions, options, at_once=True)
    with caplog.at_level(logging.INFO, logger="gptq_plugin.quantize.first_forward"), runs:
        runs.find_groups(modules(plan))
        for run in runs.forwards():
            run()
    shapes = [tuple(batch["input_ids"].shape) for batch in ran]
    assert shapes == [(8, 5), (16, 5), (18, 5), (3, 9)]
    assert "up to 18 samples in a forward" in caplog.text
    assert len(calibration.batches) == 6 and (runs.calibration.digest - calibration.digest) % 2**256 == 0


def padded(count, length):
    generator = torch.Generator().manual_seed(1)
    for number in range(count):
        ids = torch.randint(0, 128, (length,), generator=generator)
        mask = torch.ones(length, dtype=torch.long)
        mask[length - number % 3 :] = 0
        labels = ids.masked_fill(torch.arange(length) < 5 * (number % 2), -100)
        yield {"input_ids": ids, "attention_mask": mask, "labels": labels}


@pytest.mark.usefixtures("roomy")
@pytest.mark.parametrize("changes", [{}, {"token_weighting": "labels"}, {"method": "best"}])
def test_the_codes_are_those_of_batches_of_that_size(changes, monkeypatch):
    """To the bit, with padding, labels and a float walk beside the other."""
    monkeypatch.setattr(batch_runs, "most_tokens", lambda plan: 200)
    results = []
    for size in (None, 16):
        torch.manual_seed(0)
        quantizer = QuantizeModule(bits=3, group_size=32, nsamples=30, batch_size=size, **changes)
        model = tiny_llama(num_hidden_layers=2)
        report = quantizer.quantize(model, list(padded(30, 10)))
        codes = {name: one.qweight for name, one in model.named_modules() if isinstance(one, QuantLinear)}
        results.append((report, codes))
    (report, codes), (wanted, same) = results
    assert report.batch_size == wanted.batch_size == 16 and report.config.batch_size is None
    assert codes.keys() == same.keys() and all(torch.equal(codes[name], same[name]) for name in same)
    assert [one.tokens for one in report.quantized] == [one.tokens for one in wanted.quantized]
    assert report.positions == wanted.positions
    assert report.calibration_sha256 == wanted.calibration_sha256


@pytest.mark.usefixtures("roomy")
def test_grids_are_chosen_by_batches_as_they_were_collected():
    torch.manual_seed(0)
    model = tiny_llama(num_hidden_layers=1)
    quantizer = QuantizeModule(group_size=32, nsamples=80, target_bits=4.6)
    report = quantizer.quantize(model, list(torch.randint(0, 128, (80, 5))))
    assert report.batch_size == 16 and report.allocation.tokens > 0
