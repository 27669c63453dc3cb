"""Finished layers move to their model's device while the walk goes on, and to a store that takes their memory over.

A model on the meta device stands for one on a GPU: layers are quantized on the CPU and have to move.
"""

from __future__ import annotations

import contextlib
import threading

import pytest
import torch
from torch import nn

from gptq_plugin import QuantizeConfig
from gptq_plugin.memory.finished_layers import FinishedLayers
from gptq_plugin.model.structure import Structure
from gptq_plugin.model.targets import find_targets

from module_tensors import rounded

CPU, META = torch.device("cpu"), torch.device("meta")


def layer(seed=0):
    torch.manual_seed(seed)
    return rounded(find_targets(Structure.of(nn.Sequential(nn.Linear(32, 32))), QuantizeConfig(group_size=32))[0][0])


class Store:
    """Takes layers at once and has their files when it is told to."""

    def __init__(self):
        self.added = []
        self.files = {}
        self.moving = False  # True if what it has is not the layers' last file

    def add(self, name, layer):
        assert not self.added or self.added[-1][0] != name
        self.added.append((name, layer.qweight.device.type))

    def written(self, name):
        return self.files.get(name)

    def lasts(self, name):
        return not self.moving


@contextlib.contextmanager
def finished(device, store=None):
    layers = FinishedLayers(device, store)
    with contextlib.closing(layers):
        yield layers
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("finished-layers")]


def buffers(layer):
    return {name: (buffer.data_ptr(), buffer.device.type) for name, buffer in layer.named_buffers()}


def test_a_layer_on_the_models_device_keeps_its_tensors():
    one = layer()
    before = buffers(one)
    with finished(CPU) as layers:
        layers.add("a", one)
        layers.take_home(wait=True)
    assert layers.layers == {"a": one} and buffers(one) == before


def test_a_layer_moves_while_it_can_still_be_run_and_changes_only_when_it_is_taken_home():
    one, x = layer(), torch.randn(3, 32)
    plain = one(x)
    with finished(META) as layers:
        layers.add("a", one)
        layers._moving["a"].result(10)
        assert torch.equal(one(x), plain)
        layers.take_home()
        assert all(device == "meta" for _, device in buffers(one).values())


def test_only_layers_that_have_arrived_are_taken_home_unless_all_are_waited_for():
    first, second, go = layer(0), layer(1), threading.Event()
    with finished(META) as layers:
        layers.add("first", first)
        layers._moving["first"].result(10)
        layers._worker.submit(go.wait, 10)
        layers.add("second", second)
        layers.take_home()
        assert (first.qweight.is_meta, second.qweight.is_meta) == (True, False)
        threading.Timer(0.1, go.set).start()
        layers.take_home(wait=True)
        assert second.qweight.is_meta


def test_a_store_gets_each_layer_once_and_on_the_models_device():
    store = Store()
    with finished(META, store) as layers:
        layers.add("a", layer())
        assert store.added == []
        layers.take_home(wait=True)
        layers.take_home(wait=True)
    assert store.added == [("a", "meta")]
    store = Store()
    with finished(CPU, store) as layers:
        layers.add("a", layer())
        assert store.added == [("a", "cpu")]


def test_a_layer_on_the_cpu_runs_from_its_file_once_that_is_written():
    store, one, x = Store(), layer(), torch.randn(3, 32)
    plain, before = one(x), buffers(one)
    with finished(CPU, store) as layers:
        layers.add("a", one)
        layers.take_home()
        assert buffers(one) == before
        store.files["a"] = {name: buffer.clone() for name, buffer in one.named_buffers()}
        layers.take_home()
        assert {name: buffer.data_ptr() for name, buffer in store.files["a"].items()} == {
            name: address for name, (address, _) in buffers(one).items()
        }
        assert torch.equal(one(x), plain)
        mapped = buffers(one)
        store.files["a"] = {name: buffer.clone() for name, buffer in one.named_buffers()}  # not asked for again
        layers.take_home()
        assert buffers(one) == mapped


def test_a_layer_that_waited_in_one_file_runs_from_its_last_one_and_looks_for_no_other():
    store, one = Store(), layer()
    store.moving = True
    with finished(CPU, store) as layers:
        layers.add("a", one)
        seen = []
        for moving in (True, True, False, False):
            store.moving = moving
            store.files["a"] = {name: buffer.clone() for name, buffer in one.named_buffers()}
            layers.take_home()
            seen.append(one.qweight is store.files["a"]["qweight"])
    assert seen == [True, False, True, False]


def test_a_failed_move_is_raised_when_layers_are_taken_home():
    one = layer()
    with finished(torch.device("cuda", 1000)) as layers:
        layers.add("a", one)
        with pytest.raises((RuntimeError, AssertionError)):
            layers.take_home(wait=True)


@pytest.mark.gpu
def test_a_layer_comes_from_the_gpu_with_the_values_of_the_work_queued_before_it():
    one = layer().cuda()
    expected = {name: buffer.cpu() for name, buffer in one.named_buffers()}
    with finished(CPU) as layers:
        expected["qweight"] += 1
        torch.cuda._sleep(200_000_000)
        one.qweight += 1
        layers.add("a", one)
        assert not torch.cuda.current_stream().query()  # adding did not wait
        layers.take_home()
        assert one.qweight.is_cuda
        layers.take_home(wait=True)
    assert all(torch.equal(buffer, expected[name]) for name, buffer in one.named_buffers())


def test_layers_behind_one_that_is_in_no_file_are_not_asked_about(monkeypatch):
    """Thousands of experts wait for a file."""
    store, asked = Store(), []
    monkeypatch.setattr(Store, "written", lambda self, name: asked.append(name) or self.files.get(name))
    monkeypatch.setattr(Store, "lasts", lambda self, name: asked.append(name) or not self.moving)
    with finished(CPU, store) as layers:
        for name in "abcde":
            layers.add(name, layer())
        layers.take_home()
        assert asked == ["a"]
        store.moving, store.files["a"], store.files["b"] = True, {}, {}
        layers.take_home()
        asked.clear()
        layers.take_home()
        assert asked == ["a", "c"]  # it waits for its last file, and the first one in none
        store.moving = False
        layers.take_home()
        asked.clear()
        layers.take_home()
        assert asked == ["c"]
