"""Batches on threads: one runs at a time, and nothing leaks between them."""

from __future__ import annotations

import contextlib
import contextvars
import threading
import time

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from gptq_plugin.walk import lockstep
from gptq_plugin.walk.batch_thread import END, BatchThread
from gptq_plugin.walk.groups import find_groups

from walks import hooks_left, linears, threads_left, walk


def test_autocast_inside_the_model_does_not_leak_into_other_batches():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.inside, self.outside = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                y = self.inside(x)
            return self.outside(y.float())

    torch.manual_seed(0)
    model = Mixed()
    batches = [torch.randn(3, 8) for _ in range(3)]
    calls = [lambda x=x: model(x) for x in batches]
    with torch.no_grad():
        plain = [call() for call in calls]
    outputs, _, _ = walk(model, calls)
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(outputs, plain))
    assert not torch.is_autocast_enabled("cpu")


def test_grad_mode_dtype_and_modes_set_inside_a_forward_stay_inside_it():
    seen = []

    class Switching(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x, grad):
            seen.append(torch.is_grad_enabled())
            with torch.set_grad_enabled(grad), torch.device("meta" if grad else "cpu"):
                self.a(x)
                where = torch.empty(1).device.type
                assert torch.is_grad_enabled() == grad and where == ("meta" if grad else "cpu")
            seen.append(torch.is_grad_enabled())
            return self.b(x)

    model = Switching()
    walk(model, [lambda: model(torch.ones(1, 4), True), lambda: model(torch.ones(1, 4), False)] * 2)
    assert not any(seen) and torch.is_grad_enabled() and torch.empty(1).device.type == "cpu"


@pytest.mark.parametrize("ends", ["normally", "cancelled"])
def test_the_default_dtype_and_attention_kernels_set_inside_a_forward_stay_inside_it(ends):
    class Switching(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x, wide):
            assert torch.get_default_dtype() == torch.float32
            if wide:
                torch.set_default_dtype(torch.float64)
            try:
                with sdpa_kernel(SDPBackend.MATH if wide else SDPBackend.FLASH_ATTENTION):
                    self.a(x)
                    self.b(x)
                    assert torch.get_default_dtype() == (torch.float64 if wide else torch.float32)
                    assert torch.backends.cuda.math_sdp_enabled() == wide
            finally:
                torch.set_default_dtype(torch.float32)

    model = Switching()
    layers = linears(model)
    calls = [lambda: model(torch.ones(1, 4), True), lambda: model(torch.ones(1, 4), False)] * 2
    before = (torch.backends.cuda.math_sdp_enabled(), torch.backends.cuda.flash_sdp_enabled())
    steps = lockstep.walk(find_groups(layers, calls[0]), layers, calls, lambda *_: None)
    for _ in steps:
        assert torch.get_default_dtype() == torch.float32
        if ends == "cancelled":
            steps.close()
    assert torch.get_default_dtype() == torch.float32
    assert (torch.backends.cuda.math_sdp_enabled(), torch.backends.cuda.flash_sdp_enabled()) == before


def test_the_callers_autocast_and_context_variables_hold_in_every_batch():
    variable: contextvars.ContextVar[int] = contextvars.ContextVar("variable", default=0)
    variable.set(7)
    model = nn.Linear(4, 4)
    dtypes = []

    def call():
        assert variable.get() == 7
        variable.set(8)
        dtypes.append(model(torch.ones(1, 4)).dtype)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        walk(nn.Sequential(model), [call, call])
    assert set(dtypes) == {torch.bfloat16} and variable.get() == 7


def test_a_model_that_swallows_exceptions_is_ended_too():
    class Swallows(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            for layer in (self.a, self.b):
                try:
                    x = layer(x)
                except Exception:
                    x = x + 1
            return x

    model = Swallows()
    layers = linears(model)
    call = lambda: model(torch.ones(1, 4))  # noqa: E731
    steps = lockstep.walk(find_groups(layers, call), layers, [call, call], lambda *_: None)
    next(steps)
    steps.close()
    assert hooks_left(model) == 0 and threads_left() == []


def test_waiting_is_entered_on_the_batchs_thread_before_anybody_sees_it_wait_and_left_when_it_goes_on():
    events, names = [], []

    @contextlib.contextmanager
    def waiting(number, name):
        assert threading.current_thread().name == f"calibration-batch-{number}"
        names.append(name)
        events.append(("enter", number))
        yield
        events.append(("leave", number))

    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    layers = linears(model)
    call = lambda: model(torch.ones(1, 4))  # noqa: E731
    groups = find_groups(layers, call)
    for stop in lockstep.walk(groups, layers, [call, call], lambda *_: None, waiting=waiting):
        events.append(stop.group.names)
    enter, leave = [("enter", 0), ("enter", 1)], [("leave", 0), ("leave", 1)]
    between = [event for pair in zip(leave, enter) for event in pair]
    assert events == [*enter, ("0",), *between, ("1",), *leave]
    assert names == ["0", "0", "1", "1"]


def test_a_cancelled_batch_leaves_waiting_with_an_exception():
    left = []

    @contextlib.contextmanager
    def waiting(number, name):
        try:
            yield
        except BaseException as error:
            left.append((number, isinstance(error, Exception)))
            raise

    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    layers = linears(model)
    call = lambda: model(torch.ones(1, 4))  # noqa: E731
    steps = lockstep.walk(find_groups(layers, call), layers, [call] * 2, lambda *_: None, waiting=waiting)
    next(steps)
    steps.close()
    assert left == [(0, False), (1, False)]


@pytest.mark.parametrize("when", ["entered", "left"])
def test_an_error_in_waiting_is_an_error_of_the_batch(when):
    @contextlib.contextmanager
    def waiting(number, name):
        if (number, when) == (1, "entered"):
            raise MemoryError("no room")
        yield
        if (number, when) == (1, "left"):
            raise MemoryError("no room")

    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    layers = linears(model)
    call = lambda: model(torch.ones(1, 4))  # noqa: E731
    groups = find_groups(layers, call)
    with pytest.raises(MemoryError, match="no room"):
        for _ in lockstep.walk(groups, layers, [call] * 3, lambda *_: None, waiting=waiting):
            pass
    assert hooks_left(model) == 0


@pytest.fixture
def slow_to_end(monkeypatch):
    """Threads that live on for a while after their forward has ended."""
    run = BatchThread._run

    def slow(batch, forward):
        run(batch, forward)
        time.sleep(0.2)

    monkeypatch.setattr(BatchThread, "_run", slow)


@pytest.mark.usefixtures("slow_to_end")
def test_a_thread_that_is_slow_to_end_is_waited_for_once():
    """It handed back for the last time when its forward ended: to wait for more of it would be for ever."""
    model = nn.Sequential(nn.Linear(4, 4))
    walking = threading.Thread(target=walk, args=(model, [lambda: model(torch.ones(2, 4))]), daemon=True)
    walking.start()
    walking.join(20)
    assert not walking.is_alive()
    time.sleep(0.3)  # the thread of the forward that found the groups


def test_a_batch_waits_nowhere_with_nothing_before_it_runs_and_after_it_has_ended():
    batch = BatchThread(3, lambda: batch.wait_at(5, "layer", torch.ones(2)))
    assert (batch.position, batch.input, batch.thread.daemon) == (-1, None, True)
    batch.resume()
    assert batch.position == 5 and torch.equal(batch.input, torch.ones(2))
    batch.seen[5] = []
    batch.resume()
    assert (batch.position, batch.input, batch.seen) == (END, None, {})


@pytest.mark.usefixtures("slow_to_end")
def test_a_batch_is_cancelled_only_when_its_thread_has_ended():
    batch = BatchThread(0, lambda: batch.wait_at(0, "layer", torch.ones(2)))
    batch.resume()
    batch.cancel()
    assert batch.input is None and not batch.thread.is_alive()


@pytest.mark.parametrize("position", [0, 61, 10**6])
def test_a_batch_that_waits_at_any_position_has_not_ended(position):
    batch = BatchThread(0, lambda: batch.wait_at(position, "layer", torch.ones(2)))
    batch.resume()
    assert batch.position == position != END
    batch.resume()
    assert batch.position == END
    batch.thread.join()


def test_a_forward_runs_without_gradients_whatever_its_caller_has():
    seen = []
    with torch.enable_grad():
        BatchThread(0, lambda: seen.append(torch.is_grad_enabled())).resume()
        assert torch.is_grad_enabled()
    assert seen == [False]


def test_what_a_batch_keeps_is_put_before_it_runs_and_taken_when_it_waits_or_ends():
    calls = []

    class Kept:
        def put(self):
            calls.append("put")

        def take(self, *, at_end):
            calls.append("end" if at_end else "taken")

    def forward():
        calls.append("first")
        batch.wait_at(0, "layer", torch.ones(2))
        calls.append("second")

    batch = BatchThread(0, forward, kept=Kept())
    batch.resume()
    assert calls == ["put", "first", "taken"]
    batch.resume()
    assert calls[3:] == ["put", "second", "end"]
    calls.clear()
    batch = BatchThread(0, forward, kept=Kept())
    batch.resume()
    batch.cancel()  # a batch that is ended runs no more of the forward
    assert calls == ["put", "first", "taken", "end"]


@pytest.mark.skipif(not hasattr(BaseException, "add_note"), reason="notes came with Python 3.11")
def test_an_error_tells_in_which_batch_it_was_raised():
    batch = BatchThread(7, lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError) as raised:
        batch.resume()
    assert raised.value.__notes__ == ["raised in the forward of calibration batch 7"]


def test_the_callers_default_device_and_autocasts_dtype_hold_in_the_batch():
    seen = []

    def forward():
        seen.append((torch.empty(1).device.type, torch.get_autocast_dtype("cpu"), torch.is_autocast_enabled("cpu")))

    with torch.device("meta"), torch.autocast("cpu", dtype=torch.float16):
        batch = BatchThread(0, forward)
    batch.resume()
    BatchThread(1, forward).resume()
    assert seen == [("meta", torch.float16, True), ("cpu", torch.bfloat16, False)]


@pytest.mark.gpu
def test_the_callers_cuda_stream_and_device_hold_in_every_batch():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).cuda()
    streams = []

    def call():
        streams.append(torch.cuda.current_stream())
        return model(torch.ones(1, 4, device="cuda"))

    with torch.cuda.stream(torch.cuda.Stream()):
        here = torch.cuda.current_stream()
        walk(model, [call, call])
    assert streams == [here] * 3 and torch.cuda.current_stream() != here


def test_attention_is_not_cudnns_which_plans_anew_on_every_thread_unless_it_alone_is_allowed():
    seen, enabled = [], torch.backends.cuda.cudnn_sdp_enabled

    def forward():
        seen.append(enabled())
        with sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.MATH]):  # what a forward asks for itself
            seen.append(enabled())

    before = enabled()
    BatchThread(0, forward).resume()
    assert seen == [False, True] and enabled() == before
    seen.clear()
    with sdpa_kernel([SDPBackend.CUDNN_ATTENTION]):
        BatchThread(0, forward).resume()
    assert seen[0] and enabled() == before
