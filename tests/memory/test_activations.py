"""Suspended batches keep no more than their budget on the device, and nothing else changes.

On a CPU the "device" is the CPU as well: bytes go to another buffer and the storages shrink to nothing all the same.
"""

from __future__ import annotations

import gc
import threading
import weakref
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import is_in_torch_dispatch_mode
from transformers import AutoConfig, AutoModelForCausalLM

from gptq_plugin.memory.activations import Activations
from gptq_plugin.model.linears import is_linear
from gptq_plugin.walk import lockstep
from gptq_plugin.walk.groups import find_groups

CPU = torch.device("cpu")


def at_layers(activations):
    """As lock-step asks for it."""
    return lambda number, layer: activations.waiting(number)


def tensors():
    """All tensors that came up in this test and are alive."""
    return [x for x in gc.get_objects() if issubclass(type(x), torch.Tensor)]


def host_buffers():
    return [x for x in tensors() if x.dtype == torch.uint8]  # nothing else in these tests is uint8


@pytest.fixture(autouse=True)
def nothing_is_left_behind():
    gc.collect()
    gc.freeze()  # the tests go through all objects; those that were there before need not be seen
    yield
    gc.collect()
    assert not host_buffers() and not is_in_torch_dispatch_mode()
    assert not [t.name for t in threading.enumerate() if t.name.startswith("calibration-batch")]


def walk(model, activations, calls, at_stop=None):
    """Runs the calls in lock-step under `activations`; returns their outputs."""
    layers = {name: module for name, module in model.named_modules() if is_linear(module)}
    outputs = [None] * len(calls)

    def forward(number):
        def run():
            with activations.running(number):
                outputs[number] = calls[number]()

        return run

    groups = find_groups(layers, calls[0])
    forwards = [forward(number) for number in range(len(calls))]
    steps = lockstep.walk(groups, layers, forwards, lambda *_: None, waiting=at_layers(activations))
    for stop in steps:
        if at_stop:
            at_stop(stop)
        del stop
    return outputs


def llama():
    torch.manual_seed(0)
    config = AutoConfig.for_model("llama", hidden_size=32, intermediate_size=48, num_hidden_layers=3, vocab_size=64,
                                  num_attention_heads=2, num_key_value_heads=1, head_dim=16)  # fmt: skip
    return AutoModelForCausalLM.from_config(config).eval()


def batches(model, count=4, device=CPU):
    """Padded batches of one size, so that each needs its mask, as calls, and their plain outputs."""
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(0, 64, (2, 11), generator=generator).to(device) for _ in range(count)]
    mask = torch.ones(2, 11, dtype=torch.long, device=device)
    mask[1, 7:] = 0
    calls = [lambda x=x: model(input_ids=x, attention_mask=mask, use_cache=False).logits for x in ids]
    with torch.no_grad():
        return calls, [call() for call in calls]


def measured(model, call):
    """The bytes one batch of the model holds at most while it waits."""
    activations = Activations(CPU, None, smallest=1)

    def forward():
        with activations.running(0):
            call()

    layers = {name: module for name, module in model.named_modules() if is_linear(module)}
    find_groups(layers, forward, at_layers(activations))
    return activations.peak_bytes


@pytest.mark.parametrize("share", [0, 0.5, None], ids=["nothing stays", "half stays", "everything stays"])
def test_a_llamas_outputs_are_bit_identical_whatever_the_budget(share):
    model = llama()
    calls, plain = batches(model)
    budget = None if share is None else int(share * len(calls) * measured(model, calls[0]))
    activations = Activations(CPU, budget, smallest=1)
    outputs = walk(model, activations, calls)
    assert all(torch.equal(a, b) for a, b in zip(outputs, plain))
    assert (activations.moved_bytes > 0) == (share is not None)


@pytest.mark.parametrize("share", [0, 0.5, 1])
def test_at_every_stop_what_is_on_the_device_is_within_the_budget(share):
    model = llama()
    calls, _ = batches(model)
    outside = tensors()  # alive throughout the test, so their storages' addresses are not used again
    known = {x.untyped_storage()._cdata for x in outside}
    budget = int(share * len(calls) * measured(model, calls[0]))
    activations = Activations(CPU, budget, smallest=1)
    stops, most, everything = 0, 0, 0

    def check(stop):
        nonlocal stops, most, everything
        stop.inputs.clear()
        there = tensors()
        alive = {x.untyped_storage()._cdata: x.untyped_storage() for x in there if x.dtype != torch.uint8}
        now = sum(storage.nbytes() for key, storage in alive.items() if key not in known)
        assert now <= budget
        most, stops = max(most, now), stops + 1
        everything = max(everything, now + sum(x.nbytes for x in there if x.dtype == torch.uint8))

    walk(model, activations, calls, check)
    assert stops == 13 and activations.peak_bytes == everything
    assert most >= 0.8 * min(budget, activations.peak_bytes)  # the budget is used, too


def test_the_batches_that_suspend_first_stay_and_the_smallest_storages_of_the_next_one():
    class Held(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            small, large = x + 1, torch.ones(100, 4)
            return self.b(self.a(small)) + large.sum()

    model = Held()
    sizes = 2 * 4 * 4 + 100 * 4 * 4
    activations = Activations(CPU, sizes + 50, smallest=1)
    x = torch.ones(2, 4)

    def look(stop):
        if stop.group.names == ("a",):
            kept = [stop.inputs[number].untyped_storage().nbytes() for number in range(3)]
            assert kept == [32, 32, 0] and sum(b.nbytes for b in host_buffers()) == 1600 + 1600 + 32

    walk(model, activations, [lambda: model(x)] * 3, look)


class Steps(nn.Module):
    """Two layers, and between and around them whatever a test puts there."""

    def __init__(self, forward):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.steps = forward
        self.cache = None

    def forward(self, x):
        return self.steps(self, x)


X = torch.arange(8.0).view(2, 4)


def test_tensors_a_batch_has_freed_do_not_count():
    def forward(self, x):
        large = torch.ones(1000, 4)
        x = self.a(x) + large.sum()
        running.append(activations.live_bytes(0))
        del large
        running.append(activations.live_bytes(0))
        return self.b(x)

    activations = Activations(CPU, None, smallest=1)
    live, running = {}, []

    def look(stop):
        live[stop.group.names] = [activations.live_bytes(number) for number in stop.inputs]

    model = Steps(forward)
    walk(model, activations, [lambda: model(X)] * 2, look)
    assert live == {("a",): [16000] * 2, ("b",): [32] * 2}  # b: the sum; a's output has gone
    assert running[2:4] == [16032, 32]  # batch 0's, after the planning forward's
    assert activations.peak_bytes == 32000 and activations.live_bytes(0) == 0


def test_a_storage_at_the_address_of_one_that_died_is_another_one():
    def forward(self, x):
        for _ in range(200):
            held = torch.full((1000,), 7.0)  # the last one is at the address of an earlier one
        return self.b(self.a(x) + held.sum())

    model = Steps(forward)
    activations = Activations(CPU, 0, smallest=1)
    (output,) = walk(
        model, activations, [lambda: model(X)], lambda _: activations.live_bytes(0) in (4000, 4032) or 1 / 0
    )
    with torch.no_grad():
        assert torch.equal(output, model(X))
    assert 8000 <= activations.moved_bytes <= 8064


def test_views_of_one_storage_move_together_and_once():
    def forward(self, x):
        whole = torch.arange(1000.0)
        halves, matrix, transposed = whole.chunk(2), whole.view(10, 100), whole.view(10, 100).t()
        alias = whole.detach()
        x = self.a(x)
        whole.add_(1)
        return x, (*halves, matrix, transposed, alias)

    model = Steps(forward)
    activations = Activations(CPU, 0, smallest=1)
    ((_, views),) = walk(model, activations, [lambda: model(X)])
    assert activations.moved_bytes == 4000
    expected = torch.arange(1000.0) + 1
    assert all(torch.equal(view.sort().values if view.ndim == 1 else view, want) for view, want in zip(
        views, (*expected.chunk(2), expected.view(10, 100), expected.view(10, 100).t(), expected)))  # fmt: skip
    assert len({view.untyped_storage().data_ptr() for view in views}) == 1


def test_parameters_buffers_and_the_batchs_data_are_never_touched():
    def forward(self, x):
        held = [self.a.weight.t(), self.a.weight.data, self.table[1:], x[:1], x.detach(), self.b.bias.view(2, 2)]
        y = self.b(self.a(x)) @ self.a.weight.t()
        return y + sum(float(one.sum()) for one in held)

    model = Steps(forward)
    model.register_buffer("table", torch.randn(50, 4))
    x = X.clone()
    own = [*model.parameters(), model.table, x]
    before = [(tensor.data_ptr(), tensor.detach().clone()) for tensor in own]
    activations = Activations(CPU, 0, smallest=1)
    stops = []

    def look(stop):
        stops.append(stop)
        assert all(p.data_ptr() == at and torch.equal(p, copy) for p, (at, copy) in zip(own, before))

    walk(model, activations, [lambda: model(x)] * 2, look)
    assert len(stops) == 2
    assert activations.moved_bytes == 2 * 32  # at b each batch holds a's output


def cached(model, forward, activations, look):
    """A walk of three batches, the first of which makes the model's cache; their outputs."""
    model.steps, model.cache = forward, torch.arange(100.0)  # the planning forward finds one
    layers = {"a": model.a, "b": model.b}
    groups = find_groups(layers, lambda: model(X))
    model.cache, outputs = None, {}

    def call(number):
        def run():
            with activations.running(number):
                outputs[number] = model(X)

        return run

    for stop in lockstep.walk(
        groups,
        layers,
        [call(n) for n in range(3)],
        lambda *_: None,
        waiting=at_layers(activations),
    ):
        look(stop)
    return outputs


def test_a_mask_one_batch_has_cached_on_a_module_serves_the_others():
    def forward(self, x):
        if self.cache is None:
            self.cache = torch.arange(100.0)
        y = self.a(x) + self.cache.sum()
        return self.b(y) * self.cache[3]

    model = Steps(forward)
    with torch.no_grad():
        plain = model(X)
    activations = Activations(CPU, 0, smallest=1)
    there = []
    outputs = cached(model, forward, activations, lambda _: there.append(model.cache.untyped_storage().nbytes()))
    assert len(outputs) == 3 and all(torch.equal(output, plain) for output in outputs.values())
    # At a only batch 0 has used it. When it goes on and waits at b the mask goes again, until batch 1 reads it.
    assert there == [0, 400] and torch.equal(model.cache, torch.arange(100.0))


def test_a_cached_mask_that_has_come_back_counts_and_stays():
    hosted = []

    def look(stop):
        hosted.append([x.nbytes for x in host_buffers()])
        assert model.cache.untyped_storage().nbytes() == 400

    def forward(self, x):
        if self.cache is None:
            self.cache = torch.arange(100.0)
        own = self.cache[:50] + 1
        y = self.b(self.a(x))
        return y + own.sum()

    model = Steps(forward)
    activations = Activations(CPU, 599, smallest=100)
    outputs = cached(model, forward, activations, look)
    with torch.no_grad():
        assert all(torch.equal(output, model(X)) for output in outputs.values()) and len(outputs) == 3
    # At a batch 0 has 600 bytes, so the mask goes; batch 1 brings it back, so its own 200 and batch 2's go. At b the
    # mask may not go, so each one's own do.
    assert hosted == [[200] * 2, [200] * 3]
    assert activations.moved_bytes == 400 + 5 * 200


def test_the_consumer_can_read_a_waiting_batch_and_its_memory_goes_again():
    model = Steps(lambda self, x: self.b(self.a(x) + 1))
    activations = Activations(CPU, 0, smallest=1)
    seen = []

    def look(stop):
        if stop.group.names == ("b",):
            for number, x in stop.inputs.items():
                with activations.on_device(number):
                    seen.append(x.clone())
                assert x.untyped_storage().nbytes() == 0

    outputs = walk(model, activations, [lambda n=n: model(X + n) for n in range(2)], look)
    with torch.no_grad():
        assert all(torch.equal(seen[n], model.a(X + n) + 1) for n in range(2))
        assert all(torch.equal(outputs[n], model(X + n)) for n in range(2))


def test_what_is_made_untracked_stays():
    activations = Activations(CPU, 0, smallest=1)

    def forward(self, x):
        with activations.untracked():
            self.cache = torch.ones(100)
        return self.b(self.a(x))

    model = Steps(forward)
    walk(model, activations, [lambda: model(X)], lambda _: model.cache.untyped_storage().nbytes() == 400 or 1 / 0)


@torch.library.custom_op("gptq_plugin_tests::foreign", mutates_args=())
def foreign(n: int) -> torch.Tensor:
    return torch.frombuffer(bytearray(4 * n), dtype=torch.float32)


def test_foreign_and_shared_memory_and_what_is_small_stay_where_they_are():
    held = {}

    def forward(self, x):
        held.update(foreign=foreign(1000), shared=torch.ones(1000).share_memory_(), small=torch.ones(249))
        held.update(own=torch.ones(1000))
        return self.b(self.a(x))

    model = Steps(forward)
    activations = Activations(CPU, 0, smallest=1000)
    sizes = []
    walk(model, activations, [lambda: model(X)],
         lambda _: sizes.append({name: x.untyped_storage().nbytes() for name, x in held.items()}))  # fmt: skip
    assert sizes[0] == {"foreign": 4000, "shared": 4000, "small": 996, "own": 0}
    assert all(torch.equal(held[name], torch.ones(len(held[name]))) for name in ("shared", "small", "own"))


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.enable_grad])
def test_inference_tensors_and_tensors_with_gradients_move_as_well(mode):
    def forward(self, x):
        with mode():
            y = self.a(x).relu()
            z = self.b(y)
            return z * y if mode is torch.inference_mode else torch.autograd.grad((z * y).sum(), self.a.weight)[0]

    model = Steps(forward)
    plain = model(X)
    activations = Activations(CPU, 0, smallest=1)
    outputs = walk(model, activations, [lambda: model(X)] * 2)
    assert all(torch.equal(output, plain) for output in outputs) and activations.moved_bytes


def test_a_dispatch_mode_of_the_models_own_sees_what_it_would_see_without_us():
    from torch.utils.flop_counter import FlopCounterMode

    counts = []

    def forward(self, x):
        with FlopCounterMode(display=False) as counter:
            y = self.b(self.a(x))
        counts.append(counter.get_total_flops())
        return y

    model = Steps(forward)
    walk(model, Activations(CPU, 0, smallest=1), [lambda: model(X)] * 2)
    assert counts == [2 * 2 * 2 * 4 * 4] * 3  # the planning forward's, and two


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_runs_as_without_us():
    from torch.nn.attention.flex_attention import flex_attention

    def forward(self, x):
        q = self.a(x).view(1, 1, 2, 4).repeat(1, 2, 64, 4)
        return self.b(flex_attention(q, q, q)[0, 0, :2, :4])

    model = Steps(forward)
    with torch.no_grad():
        plain = model(X)
    outputs = walk(model, Activations(CPU, 0, smallest=1), [lambda: model(X)] * 2)
    assert all(torch.equal(output, plain) for output in outputs)


def cancelled_at(model, activations, calls, layer):
    """A walk that is closed at a layer."""
    layers = {"a": model.a, "b": model.b}
    groups = find_groups(layers, calls[0])

    def forward(number):
        def run():
            with activations.running(number):
                calls[number]()

        return run

    forwards = [forward(number) for number in range(len(calls))]
    steps = lockstep.walk(groups, layers, forwards, lambda *_: None, waiting=at_layers(activations))
    for stop in steps:
        if stop.group.names == (layer,):
            assert host_buffers()
            steps.close()


def test_closing_the_walk_leaves_nothing_behind():
    held = []

    def forward(self, x):
        y = self.a(x)
        held.append(weakref.ref(y.untyped_storage()))
        return self.b(y)

    model = Steps(forward)
    cancelled_at(model, Activations(CPU, 0, smallest=1), [lambda: model(X)] * 3, "b")
    gc.collect()
    assert len(held) == 4 and not any(storage() is not None for storage in held)  # and the fixture counts the buffers


@pytest.mark.parametrize("kept", ["on the module", "in a finally"])
def test_tensors_that_outlive_a_cancelled_batch_have_their_bytes(kept):
    seen = []

    def forward(self, x):
        mine = torch.arange(100.0)
        try:
            if kept == "on the module":
                self.cache = mine
            return self.b(self.a(x))
        finally:
            if kept == "in a finally":
                seen.append(float(mine.sum()))

    model = Steps(forward)
    cancelled_at(model, Activations(CPU, 0, smallest=1), [lambda: model(X)] * 2, "b")
    if kept == "on the module":
        assert torch.equal(model.cache, torch.arange(100.0))
    else:
        assert seen == [4950.0] * 3


def test_the_variables_of_a_cancelled_batch_are_not_brought_back_to_the_device(monkeypatch):
    def forward(self, x):
        large = torch.ones(1000)
        return self.b(self.a(x)) + large.sum()

    model = Steps(forward)
    resized = []
    resize = torch.UntypedStorage.resize_
    monkeypatch.setattr(torch.UntypedStorage, "resize_", lambda s, n: (resized.append(n), resize(s, n))[1])
    cancelled_at(model, Activations(CPU, 0, smallest=1), [lambda: model(X)] * 2, "b")
    assert resized.count(4000) == 2 and resized.count(0) == 2 + 2 * 2  # back once, when the walk went from a to b


def test_an_error_in_a_forward_ends_all_batches_and_frees_the_host():
    def forward(self, x):
        y = self.a(x)
        if x[0, 0] == 2:
            raise RuntimeError("broken sample")
        return self.b(y)

    model = Steps(forward)
    with pytest.raises(RuntimeError, match="broken sample"):
        walk(model, Activations(CPU, 0, smallest=1), [lambda n=n: model(X + n) for n in range(4)])


def test_no_room_on_the_host_is_an_error_of_the_batch(monkeypatch):
    empty = torch.empty

    def full(*size, **options):
        if options.get("device") == "cpu":
            raise torch.OutOfMemoryError("no pinned memory left")
        return empty(*size, **options)

    model = Steps(lambda self, x: self.b(self.a(x)))
    monkeypatch.setattr(torch, "empty", full)
    with pytest.raises(torch.OutOfMemoryError, match="pinned"):
        walk(model, Activations(CPU, 0, smallest=1), [lambda: model(X)] * 2)


def test_planning_measures_the_most_that_a_batch_holds_where_it_waits():
    def forward(self, x):
        large = torch.ones(1000, 4)
        y = self.a(x)
        gone = torch.ones(9000)  # between two layers, where no batch waits
        y = y + large.sum() + gone.sum()
        del large, gone
        return self.b(y)

    model = Steps(forward)
    assert measured(model, lambda: model(X)) == 16000


@pytest.mark.gpu
@pytest.mark.parametrize("side", [False, True], ids=["default stream", "another stream"])
def test_on_a_gpu_the_memory_at_a_stop_is_bounded_and_outputs_are_bit_identical(side):
    device = torch.device("cuda", torch.cuda.current_device())
    torch.manual_seed(0)
    width, rows, count = 1024, 4096, 8  # a residual stream of 16 MiB
    model = nn.Sequential(*(nn.Linear(width, width) for _ in range(6))).to(device)
    data = [torch.randn(rows, width, device=device) for _ in range(count)]

    def call(x):
        def run():
            stream = x * 1  # held through the whole forward, as a residual stream is
            y = stream
            for layer in model:
                y = layer(y) + stream
            return y.sum(0)

        return run

    calls = [call(x) for x in data]
    with torch.cuda.stream(torch.cuda.Stream()) if side else nullcontext():
        torch.cuda.current_stream().wait_stream(torch.cuda.default_stream())
        with torch.no_grad():
            plain = [run() for run in calls]
        walk(model, Activations(device, None), calls)  # cuBLAS keeps a workspace for every thread: let it have them
        budget = 5 * rows * width * 4
        activations = Activations(torch.device("cuda"), budget)
        before, at_stops = torch.cuda.memory_allocated(), []

        def look(stop):
            at_stops.append(torch.cuda.memory_allocated() - before)

        outputs = walk(model, activations, calls, look)
        assert len(at_stops) == 6 and max(at_stops) <= budget + 2**20  # and the planning forward's crumbs
        assert activations.moved_bytes > 0 and activations.peak_bytes >= 2 * (count - 1) * rows * width * 4
        assert all(torch.equal(a, b) for a, b in zip(outputs, plain))
        torch.cuda.synchronize()


@pytest.mark.gpu
def test_on_a_gpu_a_llamas_outputs_are_bit_identical():
    device = torch.device("cuda")
    model = llama().to(device)
    calls, plain = batches(model, device=device)
    activations = Activations(device, 4000, smallest=1)
    outputs = walk(model, activations, calls)
    assert all(torch.equal(a, b) for a, b in zip(outputs, plain)) and activations.moved_bytes
