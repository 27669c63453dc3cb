"""What the first forward shows: bytes that a pass needs, and which batches may run together."""

from __future__ import annotations

import gc
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from plans import calibration_of, plan_of
from torch import nn

from gptq_plugin import QuantizeModule, distributed
from gptq_plugin.calibration.collect import Calibration, collect, ready_batch
from gptq_plugin.config import QuantizeConfig
from gptq_plugin.errors import CalibrationError
from gptq_plugin.layers.qlinear import QuantLinear
from gptq_plugin.memory import placement
from gptq_plugin.quantize import batch_runs, first_forward
from gptq_plugin.quantize.first_forward import (
    Measured,
    found_in,
    most_tokens,
    needs_of,
    put_together,
    refuse_late,
    sizes_of,
    told_of,
)
from gptq_plugin.quantize.options import PassOptions

from models import tiny_llama

GIB = 2**30


def test_sizes_are_samples_where_another_rank_does_not_know_its_tokens(monkeypatch):
    batches = calibration_of([[1] * 3, [1] * 9]).batches
    assert sizes_of(batches) == [3, 9]
    monkeypatch.setattr(distributed, "minimum", lambda value: False)
    assert sizes_of(batches) == [1, 1]


def test_no_tensor_of_batches_put_together_has_more_elements_than_32_bits_number():
    assert most_tokens(plan_of(nn.Sequential(nn.Linear(32, 48)))) == 2**17
    with torch.device("meta"):
        wide = nn.Sequential(nn.Linear(32, 2**16), nn.Linear(2**16, 32))
    assert most_tokens(plan_of(wide)) == 2**15


def test_sizes_count_padding_and_labels_which_take_memory_too():
    ids, mask = torch.ones(2, 6, dtype=torch.long), torch.tensor([[1] * 6, [1] + [0] * 5])
    data = [{"input_ids": ids, "attention_mask": mask}, {"input_ids": ids, "labels": torch.ones(2, 9).long()}]
    assert sizes_of([ready_batch(one) for one in data]) == [12, 18]


def test_each_walk_of_a_batch_keeps_activations_and_has_a_workspace():
    plan, gpu = plan_of(nn.Sequential(nn.Linear(32, 48))), torch.device("cuda", 0)
    weights = SimpleNamespace(total_bytes=7, peak_bytes=100)
    one, two = (needs_of(plan, gpu, weights, 5, Measured(350, 64, 2.0), [3, 4, 1], walks) for walks in (1, 2))
    fixed = [placement.fixed_bytes(plan.targets, gpu, batches) for batches in (3, 6)]
    assert fixed[0] < fixed[1]
    assert one == placement.Needs(weights=7, fixed=fixed[0], solver=5, forward=500, activations=256, batch=128)
    assert two == replace(one, fixed=fixed[1], activations=512)


@pytest.mark.parametrize(("calls", "ran", "parts"), [(1, [2], 4.0), (2, [2, 8], 1.0)])
def test_the_part_of_a_batch_that_ran_is_all_of_it_where_layers_are_called_again(calls, ran, parts, monkeypatch):
    monkeypatch.setattr(first_forward, "_FIRST", 80)  # two samples
    (batch,) = calibration_of([[1] * 40] * 8, QuantizeConfig(batch_size=8)).batches
    seen = []
    found, times = found_in(batch, lambda part: seen.append(part.samples) or [SimpleNamespace(calls=calls)])
    assert (seen, len(found), times) == (ran, 1, parts)


def test_an_interruption_has_no_note_of_the_samples_that_ran():
    leave = told_of(calibration_of([[1] * 5] * 3, QuantizeConfig(batch_size=3)))
    failed, interrupted = RuntimeError(), KeyboardInterrupt()
    for error in (failed, interrupted):
        leave(type(error), error, None)
    assert "up to 3 samples ran" in failed.__notes__[0] and not hasattr(interrupted, "__notes__")


def test_late_calls_are_no_error_where_no_batches_were_put_together():
    apart, joined = (calibration_of([[1] * 5] * 4, QuantizeConfig(batch_size=size)) for size in (2, 4))
    refuse_late({"layer": 1}, apart, apart)
    refuse_late({}, joined, apart)
    with pytest.raises(CalibrationError, match="with up to 4 samples in a forward it calls layer more often"):
        refuse_late({"layer": 1}, joined, apart)


@pytest.mark.parametrize("kind", ["numbers", "whole numbers without ids"])
def test_what_batches_without_tokens_become_is_limited_by_bytes(kind):
    if kind == "numbers":
        calibration = collect([torch.randn(5) for _ in range(12)], QuantizeConfig(batch_size=2), alone=True)
    else:
        data = [ready_batch({"x": torch.ones(2, 5, dtype=torch.long)}) for _ in range(6)]
        calibration = Calibration([replace(one, given_apart=True) for one in data], [*range(6)], 6, first_batches=[0])
    needs = placement.Needs(weights=0, fixed=0, solver=0, forward=GIB, activations=GIB, batch=GIB // 6)
    placed = placement.place(torch.device("cpu"), None, needs, 0, None, None)
    found, _ = put_together(calibration, [2] * 6, 1000, 1000 * GIB, needs, lambda needs: placed)
    assert [batch.samples for batch in found.batches] == [8, 4]  # 4 GiB at most


class ByParts(nn.Module):
    """Runs so many of its samples at a time, each one `L` rows."""

    def __init__(self, size):
        super().__init__()
        self.size, self.words = size, nn.Embedding(128, 32)
        self.layer, self.last = nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, input_ids):
        return torch.cat([self.last(self.layer(self.words(part))) for part in input_ids.split(self.size)])


@pytest.mark.parametrize(("size", "samples"), [(1, 8), (3, 8), (30, 24)])
def test_samples_stay_apart_where_a_forward_calls_layers_for_each(size, samples, monkeypatch):
    monkeypatch.setattr(PassOptions, "joins", lambda self, device, config: config.batch_size is None)
    monkeypatch.setattr(batch_runs, "free_bytes", lambda device, allowed: 10**12)
    report = QuantizeModule(group_size=32).quantize(ByParts(size), rows(24, 40))
    assert report.batch_size == samples and [one.tokens for one in report.quantized] == [24 * 40] * 2
    assert not any("came when" in one for one in report.deviations)


def test_samples_that_call_layers_late_together_are_refused(monkeypatch):
    monkeypatch.setattr(PassOptions, "joins", lambda self, device, config: config.batch_size is None)
    monkeypatch.setattr(batch_runs, "free_bytes", lambda device, allowed: 10**12)
    with pytest.raises(CalibrationError, match="with up to 24 samples in a forward it calls .*give batch_size"):
        QuantizeModule(group_size=32).quantize(ByParts(8), rows(24, 40))
    report = QuantizeModule(group_size=32, batch_size=8).quantize(ByParts(8), rows(24, 40))
    assert [one.tokens for one in report.quantized] == [24 * 40] * 2


def test_an_error_tells_how_many_samples_ran_in_a_forward(monkeypatch):
    monkeypatch.setattr(PassOptions, "joins", lambda self, device, config: config.batch_size is None)
    monkeypatch.setattr(batch_runs, "free_bytes", lambda device, allowed: 10**12)

    def forward(model, batch):
        if len(batch["input_ids"]) > 8:
            raise ValueError("eight samples at most")
        return model(batch["input_ids"])

    with pytest.raises(CalibrationError, match="eight samples at most") as raised:
        QuantizeModule(group_size=32).quantize(ByParts(100), rows(24, 40), forward=forward)
    assert any(note.startswith("up to 24 samples ran in a forward") for note in raised.value.__notes__)
    assert QuantizeModule(group_size=32, batch_size=8).quantize(ByParts(100), rows(24, 40), forward=forward).quantized


def test_calls_of_a_whole_batch_are_counted_where_a_part_calls_layers_again(monkeypatch):
    monkeypatch.setattr(first_forward, "_FIRST", 80)  # two samples
    report = QuantizeModule(group_size=32, batch_size=8).quantize(ByParts(1), rows(24, 40))
    assert [one.tokens for one in report.quantized] == [24 * 40] * 2


def together(free, forward, most=1000):
    calibration = calibration_of([[1] * 5] * 12, QuantizeConfig(nsamples=12, batch_size=2))
    needs = placement.Needs(weights=0, fixed=0, solver=0, forward=forward, activations=GIB, batch=GIB // 6)
    gpu = torch.device("cuda", 0)
    found, then = put_together(
        calibration, [10] * 6, most, free, needs, lambda needs: placement.place(gpu, free, needs, 0, None, None)
    )
    return [batch.samples for batch in found.batches], then.forward / forward, then.batch / needs.batch


def test_batches_are_put_together_as_far_as_data_size_and_room_go():
    assert together(100 * GIB, GIB) == ([12], 6, 6)  # no more is planned for than there is
    assert together(100 * GIB, GIB, most=45) == ([8, 4], 4.5, 4.5)
    sizes, *times = together(10 * GIB, GIB)
    assert sizes == [6, 6] and times == pytest.approx([10 / 3, 10 / 3])
    assert together(2 * GIB, GIB) == ([2] * 6, 1, 1)
    assert together(None, GIB)[0] == [2] * 6


# --- on a GPU ---


def rows(count, length):
    generator = torch.Generator().manual_seed(1)
    return list(torch.randint(0, 128, (count, length), generator=generator))


def quantized(count, length, width=64, device_memory=None, **options):
    model = tiny_llama(
        hidden_size=width, intermediate_size=2 * width, num_attention_heads=4, num_hidden_layers=2,
        max_position_embeddings=length,
    ).cuda().bfloat16()  # fmt: skip
    gc.collect()  # what other tests left would be in every peak
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    report = QuantizeModule(group_size=32, **options).quantize(model, rows(count, length), device_memory=device_memory)
    codes = [one.qweight.cpu() for one in model.modules() if isinstance(one, QuantLinear)]
    return report, codes, torch.cuda.max_memory_allocated()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_the_samples_of_one_length_run_in_one_forward_by_default():
    report, codes, _ = quantized(40, 64)
    wanted, same, _ = quantized(40, 64, batch_size=40)
    assert report.batch_size == wanted.batch_size == 40
    assert codes and all(map(torch.equal, codes, same))
    assert quantized(40, 64, batch_size=8)[0].batch_size == quantized(40, 64, exact_sums=True)[0].batch_size == 8


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_batches_become_no_larger_than_what_is_allowed_on_the_device():
    """As after a training, within whose peak a quantization keeps."""
    *_, least = quantized(64, 512, 1024, batch_size=8)
    whole, _, most = quantized(64, 512, 1024)
    left = torch.cuda.memory_allocated()
    print(f"{whole.batch_size} samples took {most / 2**20:.0f} MiB, 8 {least / 2**20:.0f}; {left / 2**20:.0f} are left")
    assert whole.batch_size == 64 and most - left > 1.2 * (least - left)
    for allowed in (least, (least + most) // 2, int(0.9 * most)):
        report, _, peak = quantized(64, 512, 1024, device_memory=allowed)
        print(f"{allowed / 2**20:.0f} MiB allowed, {peak / 2**20:.0f} taken, {report.batch_size} samples in a forward")
        assert peak <= allowed * 1.02 and not any("at the peak" in one for one in report.deviations)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_grids_are_chosen_on_a_gpu_with_the_default_batches():
    report, _, _ = quantized(80, 64, target_bits=5.2)
    assert report.batch_size == 80 and report.allocation.bits <= 5.2
