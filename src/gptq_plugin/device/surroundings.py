"""Settings of PyTorch that callers may have changed: `plain_defaults`, `same_random_numbers`, `alone`."""

from __future__ import annotations

import contextlib
import contextvars
import logging
import os
import threading
from collections.abc import Iterator

import torch

from gptq_plugin.device.finite import has_values

log = logging.getLogger(__name__)

_AUTOCAST = ("cpu", "cuda")
_turns: dict[int, threading.Lock] = {}  # by process: one that was forked has a lock of its own
_has_turn = contextvars.ContextVar("has_turn", default=False)


def without_values() -> str:
    """Tells where the caller is, if tensors that are made there have no values: "inside ..."; else empty."""
    if torch.get_default_device().type == "meta":
        return (
            "where tensors are made on the meta device (torch.set_default_device, or a with block): those that the "
            "forward makes would have no values"
        )
    return (
        ""
        if has_values(torch.zeros(1, device="cpu"))
        else "inside PyTorch's FakeTensorMode, where tensors have no values"
    )


@contextlib.contextmanager
def plain_defaults() -> Iterator[None]:
    """Inside the block new tensors are on the CPU and autocast changes no dtype, as what reads and writes files needs.

    Both settings are a thread's own.

    Raises:
        ValueError: Inside FakeTensorMode.
    """
    if not has_values(torch.zeros(1, device="cpu")):
        raise ValueError(
            "files of checkpoints are read and written outside of PyTorch's FakeTensorMode, where tensors have no "
            "values: leave its block before"
        )
    with contextlib.ExitStack() as stack:
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        for kind in _AUTOCAST:
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield


@contextlib.contextmanager
def same_random_numbers() -> Iterator[None]:
    """What comes after the block draws the random numbers it would have drawn without it."""
    gpus = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(list(gpus)):
        yield


@contextlib.contextmanager
def alone(what: str) -> Iterator[None]:
    """Lets one thread of the process at a time into such blocks; another waits, and logs that.

    The precision of products and the default dtype are the process's: of two threads that set and restore them, one
    computes with the other's, and the later one restores what the other had set. transformers sets the default dtype,
    and replaces functions of torch.nn.init, while it builds a model to load.

    A block inside a block is entered at once, also on threads that were given its context (contextvars).

    Args:
        what: For the log, such as "loading".
    """
    if _has_turn.get():
        yield
        return
    turn = _turns.setdefault(os.getpid(), threading.Lock())
    if not turn.acquire(blocking=False):
        log.info("%s waits until another thread of this process has quantized or loaded a model", what)
        turn.acquire()
    _has_turn.set(True)
    try:
        yield
    finally:
        _has_turn.set(False)
        turn.release()
