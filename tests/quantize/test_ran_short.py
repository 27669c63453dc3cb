"""A pass whose forward lacks memory begins again with fewer samples in a forward."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest
import torch

from gptq_plugin import QuantizeModule
from gptq_plugin.layers.qlinear import QuantLinear
from gptq_plugin.quantize import batch_runs, ran_short, sensitivity
from gptq_plugin.quantize.divergence import Divergence
from gptq_plugin.quantize.options import PassOptions

from models import Reads, rows, tiny_llama

TOLD = "a forward of calibration samples lacked memory on {}: the pass began again with up to {}"
SMALL = {"bits": 4, "group_size": 32, "nsamples": 24}


class Allocator:
    """A device with room for the forwards of so many samples, which shows between two layers.

    Attributes:
        ran: Samples of each forward that reached it.
    """

    def __init__(self, room, passes=0, error=None):
        self.room, self.passes, self.ran = room, passes, []
        self.error = error or torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    def __call__(self, model, batch):
        ids = batch["input_ids"]
        hidden = model.first(model.words(ids)).relu()
        self.ran.append(len(ids))
        if len(ids) > self.room and len(self.ran) > self.passes:
            raise self.error
        return model.last(hidden)


def codes(model):
    return {name: one.qweight for name, one in model.named_modules() if isinstance(one, QuantLinear)}


def quantized(forward, data=None, model=None, to=None, **options):
    model = Reads() if model is None else model
    quantizer = QuantizeModule(**{**SMALL, **options})
    return quantizer.quantize(model, rows() if data is None else data, forward=forward, export_dir=to), codes(model)


def told_in(report):
    return [one for one in report.deviations if "lacked memory" in one]


@pytest.mark.parametrize("passes", [0, 2, 5])
@pytest.mark.parametrize(("room", "numbers"), [(4, [4]), (3, [4, 2]), (1, [4, 2, 1])])
def test_half_as_many_samples_run_in_a_forward_and_the_sums_are_right(room, numbers, passes, caplog):
    """Also where layers are quantized already when it happens: the words are those of a run that began with fewer."""
    with caplog.at_level(logging.WARNING, logger="gptq_plugin.quantize.ran_short"):
        report, found = quantized(Allocator(room, passes))
    assert report.batch_size == numbers[-1] and [one.tokens for one in report.quantized] == [24 * 40] * 2
    wanted = [TOLD.format("cpu", number) for number in numbers]
    assert told_in(report) == wanted and all(one in caplog.text for one in wanted)
    again, same = quantized(Allocator(room), batch_size=numbers[-1])
    assert not told_in(again) and all(torch.equal(found[name], same[name]) for name in same)
    assert report.calibration_sha256 == again.calibration_sha256


def test_an_export_begins_again_too(tmp_path):
    """Of the broken pass one layer was in the export already."""
    report, found = quantized(Allocator(4, passes=6), to=tmp_path / "out")
    assert told_in(report) and (tmp_path / "out" / "quantization_report.json").exists()
    assert [one.name for one in tmp_path.iterdir()] == ["out"]
    wanted, same = quantized(Allocator(4), to=tmp_path / "other", batch_size=4)
    assert all(torch.equal(found[name], same[name]) for name in same)
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "other")]
    assert files[0] == files[1]


def test_samples_that_a_gpu_puts_together_run_in_halves(monkeypatch):
    monkeypatch.setattr(PassOptions, "joins", lambda self, device, config: config.batch_size is None)
    monkeypatch.setattr(batch_runs, "free_bytes", lambda device, allowed: 10**12)
    forward = Allocator(13)
    report, _ = quantized(forward)
    assert report.batch_size == 8 and told_in(report) == [TOLD.format("cpu", 12)]  # batches of 8 stay whole
    assert 24 in forward.ran and [one.tokens for one in report.quantized] == [24 * 40] * 2


def test_what_a_driver_has_no_room_for_is_a_shortage_too():
    report, _ = quantized(Allocator(4, error=RuntimeError("CUDA error: out of memory")))
    assert report.batch_size == 4 and told_in(report)


@pytest.mark.parametrize(
    ("why", "remedy"),
    [
        ("one sample", r"\(1\) lacked .* Give shorter samples"),
        ("a number was given", r"\(8\) lacked .* Give batch_size=4"),
        ("batches of users", r"\(8\) lacked .* Give batches of fewer samples"),
        ("kept", r"\(8\) lacked .* Give batch_size=4"),
        ("ranks", r"\(8\) lacked .* Give batch_size=4"),
    ],
)
def test_where_the_number_is_not_ours_to_choose_the_error_tells_what_to_change(why, remedy, tmp_path, monkeypatch):
    data = {"batches of users": [{"input_ids": one} for one in torch.stack(rows()).split(8)]}.get(why)
    options = {"a number was given": {"batch_size": 8}, "kept": {"cache_dir": str(tmp_path)}}.get(why, {})
    if why == "ranks":
        monkeypatch.setattr(ran_short, "distributed", SimpleNamespace(active=lambda: True))
    model, forward = Reads(), Allocator(0 if why == "one sample" else 4)
    with pytest.raises(torch.OutOfMemoryError, match=f"{remedy}, or .* 2.00 GiB"):
        quantized(forward, data, model, to=None if why == "ranks" else tmp_path / "out", **options)
    assert not codes(model) and (why != "one sample" or 1 in forward.ran) and not (tmp_path / "out").exists()


def test_other_work_that_lacks_memory_is_not_tried_again(monkeypatch):
    calls = []

    def solve(*args, **options):
        calls.append(1)
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("gptq_plugin.quantize.one_pass.solve_shared", solve)
    with pytest.raises(torch.OutOfMemoryError, match="the work on a layer lacked memory on cpu; the model is"):
        quantized(Allocator(8))
    assert len(calls) == 1


def test_measuring_the_float_model_tells_what_to_change(monkeypatch):
    measuring = []

    def forward(model, batch):
        if measuring and len(batch["input_ids"]) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return model(input_ids=batch["input_ids"], use_cache=False)

    monkeypatch.setattr(sensitivity, "Divergence", lambda *given: measuring.append(1) or Divergence(*given))
    with pytest.raises(torch.OutOfMemoryError, match=r"calibration samples \(8\) lacked .* Give batch_size=4, or"):
        quantized(forward, rows(80, 5), tiny_llama(num_hidden_layers=1), nsamples=80, target_bits=4.6)


def test_trials_of_widths_begin_again_too(monkeypatch):
    in_trial, trial = [], sensitivity._trial

    def noted(*args):
        in_trial.append(True)
        try:
            return trial(*args)
        finally:
            in_trial.clear()

    def forward(model, batch):
        if in_trial and len(batch["input_ids"]) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return model(input_ids=batch["input_ids"], use_cache=False)

    monkeypatch.setattr(sensitivity, "_trial", noted)
    model = tiny_llama(num_hidden_layers=1)
    report, _ = quantized(forward, rows(80, 5), model, nsamples=80, target_bits=4.6)
    assert report.allocation.tokens > 0 and report.batch_size == 8 and not told_in(report)


# --- on a GPU ---


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_a_forward_that_takes_more_than_was_planned_runs_in_halves():
    """It takes memory that grows with the square of the samples, of which the first forward shows little."""

    class Greedy(Reads):
        def forward(self, input_ids):
            hidden = self.first(self.words(input_ids)).relu()
            room = torch.empty(max(0, len(input_ids) - 8) * 2**28, dtype=torch.uint8, device=hidden.device)
            return self.last(hidden + room[:1].sum() * 0)

    limit = torch.cuda.get_per_process_memory_fraction()
    torch.cuda.empty_cache()
    total = torch.cuda.mem_get_info()[1]
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 8 * 2**30) / total)
    try:
        model = Greedy().cuda()
        report = QuantizeModule(**{**SMALL, "nsamples": 64}).quantize(model, rows(64))
        least = torch.cuda.memory_allocated()
    finally:
        torch.cuda.set_per_process_memory_fraction(limit)
    assert report.batch_size == 32 and [one.tokens for one in report.quantized] == [64 * 40] * 2
    assert told_in(report) == [TOLD.format("cuda:0", 32)]
    assert least < 2**30
    other = Greedy().cuda()
    QuantizeModule(**{**SMALL, "nsamples": 64}, batch_size=32).quantize(other, rows(64))
    assert all(torch.equal(one, codes(other)[name]) for name, one in codes(model).items())
