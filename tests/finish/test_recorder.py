"""Gradients of batches by a CUDA graph."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import logging
import types
import unittest.mock
import weakref
from collections import OrderedDict, UserDict
from collections.abc import Mapping
from functools import partial

import pytest
import torch
from torch import nn
from transformers import BatchEncoding

from gptq_plugin import Finish, QuantizeModule
from gptq_plugin.finish import recorder
from gptq_plugin.finish.recorder import NotRecordableError, Recorder

from models import tiny_llama

on_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def made(device, calls, also=lambda x: None, memory=None, layer=None):
    layer = nn.Linear(8, 8, device=device) if layer is None else layer

    def compute(batch):
        calls.append(torch.device(device).type == "cuda" and torch.cuda.is_current_stream_capturing())
        x, of = batch
        also(x)
        loss = nn.functional.dropout(layer(x), 0.5).square().sum() * of["by"]
        return loss.detach(), torch.autograd.grad(loss, [layer.weight, layer.bias])

    return layer, Recorder(compute, layer, partial(torch.manual_seed, 0), torch.device(device), memory, "a test")


def test_on_a_cpu_every_batch_is_computed():
    calls = []
    _, gradients_of = made("cpu", calls)
    for _ in range(4):
        gradients_of((torch.ones(3, 8), {"by": 2}))
    assert calls == [False] * 4


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ((torch.ones(2), 1), (torch.ones(3), 1)),
        ((torch.ones(2), 1), (torch.ones(2), 2)),
        ((torch.ones(2), 1), (torch.ones(2), True)),
        ((torch.ones(2), {"a": 1}), (torch.ones(2), {"b": 1})),
        ((torch.ones(2, 2), 1), (torch.ones(2, 2).t(), None)),
        ((torch.ones(2),), (torch.ones(2).half(),)),
        ((torch.ones(2),), [torch.ones(2)]),
    ],
)
def test_batches_that_differ_in_more_than_values_have_graphs_of_their_own(one, other):
    shapes = [recorder._shapes(batch, [], torch.device("cpu")) for batch in (one, other)]
    assert shapes[0] != shapes[1]
    assert shapes[0] == recorder._shapes(copy.deepcopy(one), [], torch.device("cpu"))


def test_a_batch_of_other_objects_cannot_be_recorded():
    with pytest.raises(NotRecordableError, match="holds a set"):
        recorder._shapes((torch.ones(2), {1, 2}), [], torch.device("cpu"))
    with pytest.raises(NotRecordableError, match="is on cpu"):
        recorder._shapes((torch.ones(2),), [], torch.device("cuda", 0))


def test_such_batches_are_computed_and_the_log_tells_why(caplog):
    caplog.set_level(logging.INFO)
    calls = []
    _, gradients_of = made("cpu", calls)
    gradients_of._records = True  # as on a GPU
    for _ in range(3):
        loss, _ = gradients_of((torch.ones(3, 8), {"by": 2, "more": {1, 2}}))
    assert calls == [False] * 3 and loss > 0
    assert "a test is computed without a CUDA graph: a batch holds a set" in caplog.text


def recording_on_a_cpu(gradients_of, monkeypatch):
    """Has a recorder go through all that a GPU's does, but for the capture: a graph's result is the first one."""

    def captured(batch):
        torch.manual_seed(0)
        return types.SimpleNamespace(replay=lambda: None), gradients_of._compute(batch)

    gradients_of._records = True
    monkeypatch.setattr(gradients_of, "_check_room", lambda: None)
    monkeypatch.setattr(gradients_of, "_captured", captured)
    monkeypatch.setattr(recorder, "_end_capture", lambda device: None)


@dataclasses.dataclass(frozen=True)
class Numbered:
    x: torch.Tensor
    number: int = dataclasses.field(init=False, default=3)


def test_a_batch_of_any_dataclass_is_recorded_with_other_tensors(monkeypatch):
    seen, layer = [], nn.Linear(8, 8)

    def compute(batch):
        seen.append(batch)
        loss = layer(batch["some"].x).square().sum()
        return loss.detach(), torch.autograd.grad(loss, [layer.weight, layer.bias])

    gradients_of = Recorder(compute, layer, lambda: None, torch.device("cpu"), None, "a test")
    recording_on_a_cpu(gradients_of, monkeypatch)
    batch = {"some": Numbered(torch.ones(3, 8))}
    for _ in range(3):
        gradients_of(batch)
    assert len(seen) == 3 and seen[2]["some"].number == 3
    assert torch.equal(seen[2]["some"].x, batch["some"].x) and seen[2]["some"].x is not batch["some"].x


class Named(UserDict):
    """A batch with more than items: a plain value, and what no graph can be given."""

    def __init__(self, data, times=2):
        super().__init__(data)
        self.times, self.encodings = times, {object()}


class Own(Mapping):
    def __init__(self, data):
        self._data = data

    def __getitem__(self, key):
        return self._data[key]

    def __iter__(self):
        return iter(self._data)

    def __len__(self):
        return len(self._data)


@pytest.mark.parametrize("kind", [dict, OrderedDict, BatchEncoding, Named, Own])
def test_mappings_of_any_class_are_recorded_by_their_items(kind, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    seen, layer = [], nn.Linear(8, 8)

    def compute(batch):
        seen.append(batch["some"])
        loss = layer(batch["some"]["x"]).square().sum() * getattr(batch["some"], "times", 1)
        return loss.detach(), torch.autograd.grad(loss, [layer.weight, layer.bias])

    gradients_of = Recorder(compute, layer, lambda: None, torch.device("cpu"), None, "a test")
    recording_on_a_cpu(gradients_of, monkeypatch)
    batch = {"some": kind({"x": torch.ones(3, 8), "by": 2})}
    for _ in range(4):
        gradients_of(batch)
    assert len(seen) == 3 and not caplog.messages
    assert dict(seen[2]) == {"x": seen[2]["x"], "by": 2} and seen[2]["x"] is not batch["some"]["x"]
    assert kind is not Named or (batch["some"].encodings and not hasattr(seen[2], "encodings"))
    gradients_of({"some": kind({"x": torch.ones(3, 8), "by": 3})})
    assert len(seen) == 4
    if kind is Named:
        gradients_of({"some": Named({"x": torch.ones(3, 8), "by": 2}, times=3)})
        assert len(seen) == 5 and seen[2].times == 2


def test_what_reads_more_of_a_mapping_than_its_items_is_computed(monkeypatch, caplog):
    """Such as words by a tokenizer's encodings, which are others in every batch."""
    caplog.set_level(logging.INFO)
    computed, layer = [], nn.Linear(8, 8)

    def compute(batch):
        loss = layer(batch["x"]).square().sum() * len(batch.encodings)
        computed.append(loss)
        return loss.detach(), torch.autograd.grad(loss, [layer.weight, layer.bias])

    gradients_of = Recorder(compute, layer, lambda: None, torch.device("cpu"), None, "a test")
    recording_on_a_cpu(gradients_of, monkeypatch)
    for _ in range(4):
        gradients_of(Named({"x": torch.ones(3, 8)}))
    assert len(computed) == 4
    assert "without a CUDA graph: 'Named' object has no attribute 'encodings'" in caplog.text


@pytest.mark.parametrize("place", ["attribute", "buffer"])
def test_what_a_graph_reads_lives_on_where_a_module_puts_another_in_its_place(place, monkeypatch):
    """A table of angles, or a mask, that is made anew for a longer batch."""

    class Masked(nn.Linear):
        def forward(self, x):
            return super().forward(x) + self.mask

    layer, mask = Masked(8, 8), torch.zeros(8)
    layer.register_buffer("mask", mask) if place == "buffer" else setattr(layer, "mask", mask)
    _, gradients_of = made("cpu", [], layer=layer)
    recording_on_a_cpu(gradients_of, monkeypatch)
    for _ in range(2):
        gradients_of((torch.ones(3, 8), {"by": 2}))
    read, layer.mask = weakref.ref(mask), torch.zeros(9)
    del mask
    assert read() is not None
    gradients_of.forget()
    assert read() is None


def test_without_room_to_compare_a_graph_batches_are_computed(monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    calls = []
    _, gradients_of = made("cpu", calls)
    recording_on_a_cpu(gradients_of, monkeypatch)

    def no_room(*_):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(gradients_of, "_check_same", no_room)
    for _ in range(3):
        gradients_of((torch.ones(3, 8), {"by": 2}))
    assert len(calls) == 4 and "a test is computed without a CUDA graph: CUDA out of memory" in caplog.text


def test_what_a_forward_does_not_take_on_the_device_is_computed_where_it_is(monkeypatch, caplog):
    """Such as one that makes NumPy arrays of a batch."""
    caplog.set_level(logging.INFO)
    batch, moved, computed = (torch.ones(3, 8), {"by": 2}), (torch.ones(3, 8), {"by": 2}), []

    def also(x):
        if x is not batch[0]:
            raise TypeError("can't convert cuda:0 device type tensor to numpy")
        computed.append(x)

    _, gradients_of = made("cpu", [], also=also)
    recording_on_a_cpu(gradients_of, monkeypatch)
    for _ in range(4):
        gradients_of(batch, lambda: moved)
    assert len(computed) == 4 and "without a CUDA graph: can't convert cuda:0" in caplog.text


@pytest.mark.parametrize("fails", [False, True])
def test_what_cublas_takes_in_a_capture_is_given_back(fails, monkeypatch):
    """It keeps memory for each stream: with those of captures a finish would exceed what it may use."""
    seen = []
    for name in ("device", "synchronize", "empty_cache", "graph_pool_handle", "Stream", "current_stream", "CUDAGraph"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: unittest.mock.MagicMock())
    monkeypatch.setattr(torch.cuda, "stream", lambda side: contextlib.nullcontext())
    monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: seen.append("cleared"), raising=False)

    def also(x):
        seen.append("computed")
        if fails:
            raise RuntimeError("operation not permitted")

    _, gradients_of = made("cpu", [], also=also)
    with contextlib.suppress(RuntimeError):
        gradients_of._captured((torch.ones(3, 8), {"by": 2}))
    assert seen == ["cleared", "computed", "cleared"]


@pytest.mark.parametrize("was_told", [False, True])
def test_the_allocator_is_told_of_a_capture_that_failed(was_told, monkeypatch):
    """Else it gives no memory back as long as the process lives (pytorch/pytorch#180395)."""
    told = []

    def end(*given):
        told.append(("end", *given))
        if was_told:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")

    graph = unittest.mock.Mock(capture_end=unittest.mock.Mock(side_effect=RuntimeError("operation not permitted")))
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", end, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_releasePool", lambda *given: told.append(("release", *given)), raising=False)
    with pytest.raises(RuntimeError, match="operation not permitted"):
        recorder._end(graph, torch.device("cuda", 1), (0, 3))
    assert told == [("end", 1, (0, 3)), ("release", 1, (0, 3))][: 1 if was_told else 2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
class TestOnAGpu:
    pytestmark = on_gpu

    def test_from_the_third_batch_of_its_shapes_on_a_graph_gives_what_is_computed(self, dtype):
        calls = []
        layer, gradients_of = made("cuda:0", calls, layer=nn.Linear(8, 8, device="cuda", dtype=dtype))
        for _ in range(6):
            batch = (torch.randn(5, 8, device="cuda", dtype=dtype), {"by": 2})
            with torch.no_grad():
                layer.weight.add_(0.1)  # as an optimizer does: a graph reads what is there
            wanted = made("cuda:0", [], layer=layer)[1](batch)
            found = gradients_of(batch)
            for one, other in zip((found[0], *found[1]), (wanted[0], *wanted[1]), strict=True):
                torch.testing.assert_close(one, other)
        assert calls == [False, False, True]

    def test_what_reads_a_value_is_computed_each_time_and_random_numbers_are_drawn_as_before(self, dtype, caplog):
        calls = []
        layer = nn.Linear(8, 8, device="cuda", dtype=dtype)
        _, gradients_of = made("cuda:0", calls, also=lambda x: x.sum().item(), layer=layer)
        caplog.set_level(logging.INFO)
        batch = (torch.ones(5, 8, device="cuda", dtype=dtype), {"by": 2})
        wanted = [part.clone() for part in gradients_of(batch)[1]]
        for _ in range(3):
            found = gradients_of(batch)[1]
            assert all(map(torch.equal, found, wanted))
        assert calls == [False, False, True, False, False]
        assert "a test is computed without a CUDA graph" in caplog.text
        torch.manual_seed(1)
        assert torch.randn(3, device="cuda").isfinite().all()
        _, others = made("cuda:0", [], layer=layer)
        for _ in range(4):
            assert all(map(torch.equal, others(batch)[1], wanted))
        assert others._known and others._records

    def test_without_room_nothing_is_recorded(self, dtype, caplog):
        calls = []
        caplog.set_level(logging.INFO)
        _, gradients_of = made("cuda:0", calls, memory=1, layer=nn.Linear(8, 8, device="cuda", dtype=dtype))
        for _ in range(4):
            gradients_of((torch.ones(5, 8, device="cuda", dtype=dtype), {"by": 2}))
        assert calls == [False] * 4
        assert "are free" in caplog.text

    def test_batches_as_a_tokenizer_returns_them_have_graphs(self, dtype, caplog):
        caplog.set_level(logging.INFO)
        ids = torch.randint(4, 128, (10, 4, 24), generator=torch.Generator().manual_seed(0))
        batches = [BatchEncoding({"input_ids": rows}) for rows in ids]
        model = tiny_llama(initializer_range=0.2).to("cuda", dtype)
        twin, quantizer = copy.deepcopy(model), QuantizeModule(bits=2, group_size=32, nsamples=32)
        quantizer.quantize(model, batches)
        quantizer.finish(model, twin, batches, Finish(steps=8, tokens_per_step=200, held_out=8, judgements=2))
        assert "finish (scales)" in caplog.text and "without a CUDA graph" not in caplog.text

    def test_what_a_graph_takes_goes_with_it(self, dtype):
        layer, gradients_of = made("cuda:0", [], layer=nn.Linear(8, 8, device="cuda", dtype=dtype))
        batch = (torch.ones(5, 8, device="cuda", dtype=dtype), {"by": 2})
        gradients_of(batch)  # cuBLAS has its memory for ordinary work
        before = torch.cuda.memory_allocated()
        for _ in range(3):
            gradients_of(batch)
        assert any(gradients_of._known.values())
        gradients_of.forget()
        gradients_of(batch)
        assert torch.cuda.memory_allocated() <= before + 2**20

    @pytest.mark.parametrize("kind", ["blocks", "full"])
    def test_a_finish_gives_the_same_with_graphs_and_without(self, dtype, kind, monkeypatch, caplog):
        caplog.set_level(logging.INFO)
        rows = list(torch.randint(4, 128, (40, 24), generator=torch.Generator().manual_seed(0)))
        model = tiny_llama(initializer_range=0.2).to("cuda", dtype)
        twin, quantizer = copy.deepcopy(model), QuantizeModule(bits=2, group_size=32, nsamples=32)
        quantizer.quantize(model, rows)
        other = copy.deepcopy(model)
        options = {"steps": 8, "learning_rate": 0.01, "tokens_per_step": 200, "held_out": 8, "judgements": 2}
        finish = Finish(kind, **options, block_steps=20, block_learning_rate=3e-3, block_code_learning_rate=0.02)
        replays = []
        replay = recorder._Recording.replay
        monkeypatch.setattr(
            recorder._Recording, "replay", lambda self, tensors: replays.append(1) or replay(self, tensors)
        )
        found = quantizer.finish(model, twin, rows, finish)
        assert len(replays) > 40
        assert "without a CUDA graph" not in caplog.text
        monkeypatch.setattr(recorder.Recorder, "_record", lambda *_: None)
        wanted = quantizer.finish(other, twin, rows, finish)
        assert found.kept and wanted.kept
        rel = 1e-3 if dtype == torch.float32 else 0.05
        assert found.after == pytest.approx(wanted.after, rel=rel)
        assert [one.after for one in found.blocks] == pytest.approx([one.after for one in wanted.blocks], rel=rel)
