"""Lock-step calibration: all batches walk the model together, one forward each, on any architecture.

Every batch's forward runs as a coroutine. A forward pre-hook on each target layer hands the layer's input to
an observer and suspends the batch there. When every batch that can still reach a layer waits at it, its
Hessian is complete, and was computed from inputs that went through the quantized layers before it. The
consumer quantizes the layer and the batches go on through it. So each batch runs once, and the result is
exactly what other tools call `true_sequential`.

Two things are learned from one forward of one batch before the walk: in which order the layers are called,
and which layers read the very same tensor (q, k and v; gate and up). Those share a group: one Hessian, one
factor, one solve.

A coroutine is a thread that runs only while the others wait. PyTorch keeps grad mode, autocast, function
modes and the current device per thread, so a layer that suspends inside `with torch.autocast(...)` leaves
nothing behind in the other batches; on one thread (greenlets) each of these would have to be saved and
restored by hand.
"""

from __future__ import annotations

import contextlib
import contextvars
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import TensorWeakRef

Forward = Callable[[], Any]
Waiting = Callable[[int, str], AbstractContextManager[object]]
END = 2**31 - 1  # the position of a batch (or rank) that has finished


@dataclass(frozen=True)
class Group:
    """Layers that read the very same input in every call, so that they share one Hessian.

    Attributes:
        names: The layers, in the order they are called.
        calls: How often a forward calls each of them; the group is ready at the last call.
    """

    names: tuple[str, ...]
    calls: int = 1


@dataclass
class Stop:
    """A group whose every batch waits at its input.

    Attributes:
        group: The group to quantize before going on.
        inputs: By batch number, the input of those that wait here, [..., in]. Empty once the walk goes on.
    """

    group: Group
    inputs: dict[int, Tensor]


@dataclass
class Walk:
    """What the walk noticed on its way.

    Attributes:
        late: By layer, calls with an input its Hessian does not hold: the layer was already quantized.
    """

    late: dict[str, int] = field(default_factory=dict)


def plan(
    layers: Mapping[str, nn.Module], forward: Forward, waiting: Waiting | None = None, number: int = 0
) -> list[Group]:
    """Runs one forward and groups `layers` by the inputs they read, in the order they are called.

    Layers the forward does not call follow the registered layer before them, in groups of their own:
    another batch may call them.

    Args:
        layers: The layers by name.
        forward: One batch's forward; runs as in `walk`.
        waiting: As in `walk`, entered as waiting(number, layer) and left at once wherever the batch would wait, so
            that what it holds there can be measured.
        number: Of the batch.
    """
    inputs: list[_Input] = []
    calls: dict[str, list[int]] = {}  # by layer, which of `inputs` it read, call by call

    def record(name: str, x: Tensor) -> None:
        known = next((i for i, seen in enumerate(inputs) if seen.is_same(x)), None)
        if known is None:
            known = len(inputs)
            inputs.append(_Input(x))
            with waiting(number, name) if waiting is not None else contextlib.nullcontext():
                pass
        calls.setdefault(name, []).append(known)

    with _Hooks(layers, record):
        _Batch(number, forward).resume()
    together: dict[tuple[int, ...], list[str]] = {}
    for name, read in calls.items():
        together.setdefault(tuple(read), []).append(name)
    groups = list(together.values())
    position = {name: i for i, names in enumerate(groups) for name in names}
    ordered: list[tuple[int, Group]] = [
        (i, Group(tuple(names), len(calls[names[0]]))) for i, names in enumerate(groups)
    ]
    anchor = -1
    for name in layers:
        anchor = position.get(name, anchor)
        if name not in position:
            ordered.append((anchor, Group((name,))))
    return [group for _, group in sorted(ordered, key=lambda pair: pair[0])]


def walk(
    groups: Sequence[Group],
    layers: Mapping[str, nn.Module],
    forwards: Sequence[Forward],
    observe: Callable[[Group, int, Tensor], None],
    agree: Callable[[int], int] = lambda position: position,
    notes: Walk | None = None,
    waiting: Waiting | None = None,
) -> Iterator[Stop]:
    """Runs all forwards in lock-step and yields each group once, when it is ready to be quantized.

    Between two yields the consumer points the layers to other weights; the suspended batches go on through those.
    Closing the iterator, or an exception anywhere, ends all batches and removes all hooks.

    Args:
        groups: From `plan`; the same on every rank.
        layers: The layers by name.
        forwards: One callable a batch. Each runs under no_grad on a thread of its own, with a copy of the
            caller's context variables.
        observe: Called as (group, batch number, input) for every input that belongs in the group's Hessian,
            while its batch is running; the input may be overwritten by the model afterwards.
        agree: Given this rank's next position in `groups` (END when it has finished), returns the next over
            all ranks. The only place where ranks meet, so all yield the same groups in the same order.
        notes: Filled with what deviates.
        waiting: Given a batch's number and a layer's name, a context manager that is entered on the batch's thread
            before it waits at the layer and left when it goes on through it. A batch that is cancelled leaves it
            with an exception.

    Raises:
        Exception: Whatever a forward raised, with the number of its batch in a note.
    """
    notes = notes if notes is not None else Walk()
    steps = _Steps(groups, observe, notes)
    batches = [_Batch(number, forward, waiting) for number, forward in enumerate(forwards)]
    steps.owner = {batch.thread: batch for batch in batches}
    try:
        with _Hooks(layers, steps.arrive):
            for batch in batches:
                batch.resume()
            while True:
                position = agree(min((batch.position for batch in batches), default=END))
                if position == END:
                    break
                here = [batch for batch in batches if batch.position == position]
                stop = Stop(groups[position], {b.number: b.input for b in here if b.input is not None})
                try:
                    yield stop
                finally:
                    stop.inputs.clear()  # the consumer may keep the stop, but not every batch's input
                steps.done.add(position)
                for batch in here:
                    batch.resume()
            # Groups some batch called, but never as often as the planning batch did.
            for position, group in enumerate(groups):
                if position not in steps.done and agree(position if position in steps.observed else END) != END:
                    yield Stop(group, {})
    finally:
        for batch in batches:
            batch.cancel()


class _Steps:
    """Decides, at every call of a target layer, whether its input is counted and whether the batch waits."""

    def __init__(self, groups: Sequence[Group], observe: Callable[[Group, int, Tensor], None], notes: Walk):
        self.groups = groups
        self.position = {name: i for i, group in enumerate(groups) for name in group.names}
        self.observe = observe
        self.notes = notes
        self.done: set[int] = set()
        self.observed: set[int] = set()
        self.owner: dict[threading.Thread, _Batch] = {}

    def arrive(self, name: str, x: Tensor) -> None:
        batch = self.owner.get(threading.current_thread())
        if batch is None:
            return  # a forward somebody else runs on this model
        position = self.position[name]
        seen = batch.seen.setdefault(position, [])
        if any(one.is_same(x) for one in seen):
            return  # another layer of the group, reading the input that was counted
        if position in self.done:
            self.notes.late[name] = self.notes.late.get(name, 0) + 1
            return
        group = self.groups[position]
        self.observe(group, batch.number, x)
        self.observed.add(position)
        seen.append(_Input(x))
        if len(seen) == group.calls:
            batch.wait_at(position, name, x)


class _Input:
    """A tensor a layer read, remembered without keeping it alive.

    Identity holds only while the tensor lives: a reused address is another input, and so is a tensor that was
    changed in place since.
    """

    def __init__(self, x: Tensor):
        self._ref = TensorWeakRef(x)
        self._version = _version(x)

    def is_same(self, x: Tensor) -> bool:
        return self._ref() is x and self._version == _version(x)


def _version(x: Tensor) -> int:
    return -1 if x.is_inference() else x._version


# Process-wide settings that a forward may hold in a context manager while it waits at a layer. A thread does
# not keep them apart, so they are exchanged with the baton.
_SETTINGS: tuple[tuple[Callable[[], Any], Callable[[Any], None]], ...] = (
    (torch.get_default_dtype, torch.set_default_dtype),
    (torch.backends.cuda.flash_sdp_enabled, torch.backends.cuda.enable_flash_sdp),
    (torch.backends.cuda.mem_efficient_sdp_enabled, torch.backends.cuda.enable_mem_efficient_sdp),
    (torch.backends.cuda.math_sdp_enabled, torch.backends.cuda.enable_math_sdp),
    (torch.backends.cuda.cudnn_sdp_enabled, torch.backends.cuda.enable_cudnn_sdp),
)


def _settings() -> list[Any]:
    return [get() for get, _ in _SETTINGS]


def _apply(values: list[Any]) -> None:
    for (get, put), value in zip(_SETTINGS, values, strict=True):
        if get() != value:
            put(value)


class _Cancelled(BaseException):
    """Unwinds a suspended batch; not an Exception, so that the model's own handlers let it pass."""


class _Batch:
    """A forward on a thread that runs only while `resume` waits for it."""

    def __init__(self, number: int, forward: Forward, waiting: Waiting | None = None):
        self.number = number
        self._waiting = waiting
        self.position = -1  # of the group it waits at; END when it has finished
        self.input: Tensor | None = None
        self.seen: dict[int, list[_Input]] = {}
        self._settings: list[Any] | None = None  # the process-wide ones it has set, None before it starts
        self._error: BaseException | None = None
        self._cancelled = False
        self._go = threading.Semaphore(0)
        self._back = threading.Semaphore(0)
        context = contextvars.copy_context()
        self.thread = threading.Thread(
            target=context.run,
            args=(self._run, _as_the_caller(forward)),
            name=f"calibration-batch-{number}",
            daemon=True,
        )

    def resume(self) -> None:
        """Runs the forward up to its next stop, or its end; raises what it raised."""
        self.input = None
        self._run_until_it_waits()
        if self._error is not None:
            error, self._error = self._error, None
            _add_note(error, f"raised in the forward of calibration batch {self.number}")
            raise error

    def wait_at(self, position: int, name: str, x: Tensor) -> None:
        """Called on the batch's own thread: hands the baton back until the next `resume`."""
        with self._waiting(self.number, name) if self._waiting is not None else contextlib.nullcontext():
            self.position, self.input = position, x
            self._back.release()
            self._go.acquire()
            if self._cancelled:
                raise _Cancelled

    def cancel(self) -> None:
        """Ends the forward wherever it waits, and its thread."""
        self.input = None
        if self.thread.ident is None:
            return
        if self.position != END:  # else it hands nothing back any more, even if its thread is still alive
            self._cancelled = True
            self._run_until_it_waits()
        self.thread.join()

    def _run_until_it_waits(self) -> None:
        outside = _settings()
        _apply(self._settings or outside)
        if self.thread.ident is None:
            self.thread.start()
        else:
            self._go.release()
        self._back.acquire()
        self._settings = _settings()
        _apply(outside)

    def _run(self, forward: Forward) -> None:
        try:
            forward()
        except _Cancelled:
            pass
        except BaseException as error:  # noqa: BLE001 - raised again on the caller's thread
            self._error = error
        finally:
            self.position = END
            self.seen.clear()
            self._back.release()


class _Hooks:
    """Forward pre-hooks on all layers while the context is open: `visit(name, input)` at every call."""

    def __init__(self, layers: Mapping[str, nn.Module], visit: Callable[[str, Tensor], None]):
        self._layers = layers
        self._visit = visit
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> None:
        for name, module in self._layers.items():
            self._handles.append(module.register_forward_pre_hook(self._hook(name), with_kwargs=True))

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._visit(name, args[0] if args else next(iter(kwargs.values())))

        return hook


def _as_the_caller(forward: Forward) -> Forward:
    """The forward under no_grad and the caller's device, stream and autocast, which a new thread does not inherit."""
    stream = torch.cuda.current_stream() if torch.cuda.is_initialized() else None
    default = torch.get_default_device()
    autocast = [(kind, torch.get_autocast_dtype(kind)) for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind)]

    def run() -> Any:
        with contextlib.ExitStack() as stack:
            if stream is not None:
                torch.cuda.set_stream(stream)  # and its device
            if default.type != "cpu":
                stack.enter_context(default)
            for kind, dtype in autocast:
                stack.enter_context(torch.autocast(kind, dtype=dtype))
            stack.enter_context(torch.no_grad())
            return forward()

    return run


def _add_note(error: BaseException, note: str) -> None:
    if hasattr(error, "add_note"):  # Python 3.11
        error.add_note(note)
