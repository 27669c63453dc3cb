"""A batch's forward as a coroutine: a thread that runs only while the others wait.

PyTorch keeps grad mode, autocast, function modes and the current device per thread, so a layer that suspends inside
`with torch.autocast(...)` leaves nothing behind in the other batches. On one thread (greenlets) each of these would
have to be saved and restored by hand.
"""

from __future__ import annotations

import contextlib
import contextvars
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from gptq_plugin.walk.kept_state import Values
from gptq_plugin.walk.layer_inputs import SeenInput

Forward = Callable[[], Any]
Waiting = Callable[[int, str], AbstractContextManager[object]]
END = 2**31 - 1  # the position of a batch (or rank) that has finished

# Process-wide settings that a forward may hold in a context manager while it waits at a layer. Threads share them, so
# they change hands with the baton.
_SETTINGS: tuple[tuple[Callable[[], Any], Callable[[Any], None]], ...] = (
    (torch.get_default_dtype, torch.set_default_dtype),
    (torch.backends.cuda.flash_sdp_enabled, torch.backends.cuda.enable_flash_sdp),
    (torch.backends.cuda.mem_efficient_sdp_enabled, torch.backends.cuda.enable_mem_efficient_sdp),
    (torch.backends.cuda.math_sdp_enabled, torch.backends.cuda.enable_math_sdp),
    (torch.backends.cuda.cudnn_sdp_enabled, torch.backends.cuda.enable_cudnn_sdp),
)


class BatchThread:
    """A forward on a thread that runs only while `resume` waits for it.

    The forward runs under no_grad with a copy of the caller's context variables, and with its device, stream and
    autocast.

    Args:
        number: The batch's number.
        forward: Its forward.
        waiting: See `lockstep.walk`.
        kept: What it keeps outside its local variables.

    Attributes:
        position: Of the group it waits at; -1 before the first, END when it has finished.
        input: The input it waits with.
        seen: By position, the inputs of that group's layers so far.
    """

    def __init__(
        self, number: int, forward: Forward, waiting: Waiting | None = None, kept: Values | None = None
    ) -> None:
        self.number = number
        self.position = -1
        self.input: Tensor | None = None
        self.seen: dict[int, list[SeenInput]] = {}
        self._waiting = waiting
        self._kept = kept
        self._settings: list[Any] | None = None  # the process-wide ones it has set; None before it starts
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
        """Runs the forward up to its next wait, or its end; raises what it raised."""
        self.input = None
        self._run_until_it_waits()
        if self._error is not None:
            error, self._error = self._error, None
            add_note(error, f"raised in the forward of calibration batch {self.number}")
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
        if self.position != END:  # a finished forward hands nothing back, even while its thread is still alive
            self._cancelled = True
            self._run_until_it_waits()
        self.thread.join()

    def _run_until_it_waits(self) -> None:
        outside = _settings()
        if self._kept is not None and not self._cancelled:
            self._kept.put()
        _apply(self._settings or outside)
        if self.thread.ident is None:
            self.thread.start()
        else:
            self._go.release()
        self._back.acquire()
        self._settings = _settings()
        _apply(outside)
        if self._kept is not None:
            self._kept.take(at_end=self.position == END)

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


def run_here(forward: Forward, kept: Values) -> None:
    """Runs a forward as `BatchThread` does, on the thread of the caller.

    Args:
        forward: The forward.
        kept: As for `BatchThread`.

    Raises:
        Exception: That of the forward.
    """
    outside = _settings()
    kept.put()
    try:
        _as_the_caller(forward)()
    finally:
        _apply(outside)
        kept.take(at_end=True)


class _Cancelled(BaseException):
    """Unwinds a suspended batch; not an Exception, so that the model's own handlers let it pass."""


def _settings() -> list[Any]:
    return [get() for get, _ in _SETTINGS]


def _apply(values: list[Any]) -> None:
    for (get, put), value in zip(_SETTINGS, values, strict=True):
        if get() != value:
            put(value)


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
            _avoid_plans()
            return forward()

    return run


def _avoid_plans() -> None:
    """Has attention take other kernels than cuDNN's, planned anew on every thread, unless no other is allowed.

    That is one of the settings that change hands with the baton.
    """
    cuda = torch.backends.cuda
    if cuda.flash_sdp_enabled() or cuda.mem_efficient_sdp_enabled():
        cuda.enable_cudnn_sdp(False)


def add_note(error: BaseException, note: str) -> None:
    """Adds a note to an error, where Python has them."""
    if hasattr(error, "add_note"):  # Python 3.11
        error.add_note(note)
