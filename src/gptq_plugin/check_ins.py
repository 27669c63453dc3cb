"""Check-ins of all ranks before an operation: each sends which call it has come to, and a number.

A rank that has failed (`distributed.ending_together`) sends its error instead, and the others raise that at their next
operation. So no rank waits for one that will not come, and none reduces while another broadcasts. The error also stands
in the process group's store, where ranks find it that wait for a third one, or come when the failed one is gone.

Words go to rank 0, and all of them come back along a tree (gloo's broadcast), so their steps grow with the logarithm of
the ranks; those of an all-gather, which is a ring, grow with the ranks.

Gloo's threads hold the tensors of an operation a little longer than it takes. One that lets go of a tensor while the
interpreter ends aborts the process, so what runs on gloo runs on a separate group, which is closed before that.

Tested by tests/ranks/test_check_ins.py: with all tests that start several ranks, such as test_distributed.py.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import time
import weakref
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gptq_plugin.device.awaited import Awaited
from gptq_plugin.errors import RankError

log = logging.getLogger(__name__)

_GRACE = timedelta(seconds=15)  # how long a rank that failed waits for the others to learn why
_SLICE = timedelta(seconds=1)  # of waiting: between two the rank can be interrupted, and learns who has failed
_FINE, _FAILED = 0, 1


@dataclass
class _CheckIns:
    """The group for check-ins, beside a default group.

    Attributes:
        world: The default group.
        store: The default group's.
        key: Where the first rank that fails leaves its error in the store.
        awaited: The ranks' signs of life, and what they wait for on GPUs.
        group: Separate, so that check-ins never mix with the user's messages. None until all ranks have met.
        sent: The operations of the last check-in.
        is_midway: True from when a check-in is sent to when all ranks' words have come.
        waits: How often the others waited for rank 0's work.
    """

    world: Any
    store: Any
    key: str
    awaited: Awaited
    group: Any = None
    sent: list[Any] = field(default_factory=list)
    is_midway: bool = False
    waits: int = 0

    def __post_init__(self) -> None:
        atexit.register(self.close)

    def close(self) -> None:
        """Destroys the group, which waits for gloo's threads; leaves it if one of them waits for another rank.

        `atexit` then keeps the operations, so that the thread is not the last to hold their tensors.
        """
        self.awaited.stop()
        if not all(work.is_completed() for work in self.sent):
            return
        atexit.unregister(self.close)
        with contextlib.suppress(ValueError):  # all groups are destroyed already
            if self.group is not None:
                dist.destroy_process_group(self.group)
        self.group, self.sent = None, []


_check_ins: _CheckIns | None = None
_of_world: Any = None  # a weak reference to the default group that `_made` counts for
_made = 0  # groups for check-ins beside it, the same number on every rank


def check_in(call: str, number: int = 0) -> list[int]:
    """Waits until all ranks have come to this call; returns their numbers.

    Raises:
        RankError: A rank failed, came to another call, or cannot be reached.
    """
    try:
        return _exchange(zlib.crc32(call.encode()) << 1 | _FINE, number, call)
    except RankError:
        give_up_on_gpu()
        raise


def queued_on_gpu(device: torch.device) -> None:
    """Takes note that an operation of the default group was queued on the device's current stream."""
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(device))
    _open().awaited.queued(event)


def give_up_on_gpu() -> None:
    """Aborts the default group if its last operation on GPUs does not end, since a rank is lost or has failed.

    Its kernel would keep the device until the group's timeout, and with it whoever waits for that, such as the end of
    this process.
    """
    if _check_ins is not None:
        _check_ins.awaited.give_up()


def tell(error: BaseException) -> None:
    """Tells the other ranks why this one failed, also those that are still to come to the first meeting."""
    if _check_ins is None:
        return
    text = f"{type(error).__name__}: {error}"
    with contextlib.suppress(RuntimeError):
        _check_ins.store.set(_check_ins.key, f"rank {dist.get_rank()} failed: {text}")
        if _check_ins.group is not None and not _check_ins.is_midway:
            _exchange(_FAILED, 0, text, _GRACE)


def pass_on(error: Exception) -> None:
    """Has the other ranks raise RankError with this error at their next check-in; all can go on behind it."""
    with contextlib.suppress(RankError):  # of all ranks, this one too; or they cannot be reached
        _exchange(_FAILED, 0, f"{type(error).__name__}: {error}")


@contextlib.contextmanager
def working() -> Iterator[None]:
    """Tells the other ranks when the block is over, for `wait_for_first`. On rank 0."""
    check_ins, done = _next_work()
    check_ins.awaited.live()
    yield
    check_ins.store.set(done, "done")


def wait_for_first() -> None:
    """Waits until rank 0's `working` is over or has failed, however long that takes. On the other ranks.

    Raises:
        RankError: Rank 0 gave no sign of life for as long as the process group's timeout.
    """
    check_ins, done = _next_work()
    seen, since = b"", time.monotonic()
    with unreachable_as_rank_error():
        while not (check_ins.store.check([done]) or check_ins.store.check([check_ins.key])):
            now = check_ins.awaited.sign_of(0)
            if now != seen:
                seen, since = now, time.monotonic()
            elif time.monotonic() - since > _timeout().total_seconds():
                raise RankError(f"rank 0 gave no sign of life for {_timeout()}: it was killed, or hangs")
            time.sleep(0.2)


def _next_work() -> tuple[_CheckIns, str]:
    """The check-ins, and the key of the end of rank 0's next work."""
    check_ins = _open()
    check_ins.waits += 1
    return check_ins, f"{check_ins.key}/work {check_ins.waits}/done"


def group() -> Any:
    """The separate group, on gloo. The first call of every rank makes it, when all have come."""
    return _open().group


def close() -> None:
    global _check_ins
    if _check_ins is not None:
        _check_ins.close()
    _check_ins = None


def gathered(mine: Tensor, timeout: timedelta | None = None) -> Tensor:
    """All ranks' tensors on every rank, [ranks, ...], by way of rank 0.

    Args:
        mine: On the CPU, of the same shape on every rank, and small.
        timeout: How long to wait for the others; None is the group's timeout.
    """
    check_ins, is_first = _open(), dist.get_rank() == 0
    everyones = torch.empty(dist.get_world_size(), *mine.shape, dtype=mine.dtype, device="cpu")
    deadline = None if timeout is None else time.monotonic() + timeout.total_seconds()
    where = {"group": check_ins.group, "async_op": True}
    check_ins.is_midway = True
    check_ins.sent = [dist.gather(mine, list(everyones) if is_first else None, dst=0, **where)]
    if is_first:
        _wait(check_ins.sent[0], deadline)
    check_ins.sent.append(dist.broadcast(everyones, src=0, **where))
    for work in check_ins.sent:
        _wait(work, deadline)
    check_ins.is_midway = False
    return everyones


@contextlib.contextmanager
def unreachable_as_rank_error() -> Iterator[None]:
    """Raises a RuntimeError of the block as RankError: with what a failed rank has left, or that one was lost."""
    try:
        yield
    except RuntimeError as error:
        give_up_on_gpu()
        if isinstance(error, RankError):
            raise
        _raise_failure()
        raise RankError(
            f"rank {dist.get_rank()} cannot reach the others: one was killed (out of memory?), ended, or took longer "
            f"than the process group's timeout of {_timeout()}. See its output for the cause "
            f"({str(error).splitlines()[0]})"
        ) from error


def _exchange(code: int, number: int, text: str, timeout: timedelta | None = None) -> list[int]:
    """Every rank's number.

    Args:
        code: Code of the call; odd after a failure.
        number: This rank's.
        text: The call's name, or the failure.
        timeout: As for `gathered`.
    """
    with unreachable_as_rank_error():
        everyones = gathered(torch.tensor([code, number], device="cpu"), timeout).tolist()
    if all(theirs == code and code & 1 == _FINE for theirs, _ in everyones):
        return [theirs for _, theirs in everyones]
    texts: list[Any] = [None] * len(everyones)
    with unreachable_as_rank_error():
        dist.all_gather_object(texts, text, group=group())
    failed = [n for n, (theirs, _) in enumerate(everyones) if theirs & 1 == _FAILED]
    if failed:
        raise RankError("; ".join(f"rank {n} failed: {texts[n]}" for n in failed))
    calls = ", ".join(f"rank {n} came to {text}" for n, text in enumerate(texts))
    raise RankError(f"the ranks do different things ({calls}): give all the same model, configuration and calls")


def _wait(work: Any, deadline: float | None) -> None:
    """Waits for an operation; without a deadline also for news of a rank that failed."""
    while True:
        try:
            work.wait(_SLICE)
            return
        except RuntimeError:
            if work.is_completed():
                work.wait()  # raises what it failed with
                return
            if deadline is None:
                _raise_failure()
            elif time.monotonic() > deadline:
                raise


def _raise_failure() -> None:
    """Raises the error that a failed rank left in the store, if it can be read."""
    failure = ""
    with contextlib.suppress(RuntimeError):
        if _check_ins is not None and _check_ins.store.check([_check_ins.key]):
            failure = _check_ins.store.get(_check_ins.key).decode()
    if failure:
        raise RankError(failure)


def _open() -> _CheckIns:
    """The check-ins beside the default group. The first call of every rank makes their group, when all have come."""
    global _check_ins, _of_world, _made
    world = dist.group.WORLD
    if _check_ins is None or _check_ins.world is not world or _check_ins.group is None:
        close()
        if _of_world is None or _of_world() is not world:  # a rank may have been in other groups before
            _of_world, _made = weakref.ref(world), 0
        store, name = dist.distributed_c10d._get_default_store(), f"gptq_plugin/{_made}"
        _made += 1
        beats = [f"{name}/beat/{number}" for number in range(dist.get_world_size())]
        awaited = Awaited(store, beats, dist.get_rank(), partial(_abort, world))
        _check_ins = _CheckIns(world, store, f"{name}/failed", awaited)
        _meet(store, name)
        with unreachable_as_rank_error():
            _check_ins.group = dist.new_group(backend="gloo", timeout=_timeout())
    return _check_ins


def _abort(world: Any) -> None:
    world._get_backend(torch.device("cuda")).abort()


def _meet(store: Any, name: str) -> None:
    """Waits until all ranks have come here, so that making a group, which nothing can interrupt, takes no time.

    Raises:
        RankError: One failed on its way, or did not come within the process group's timeout.
    """
    rank, ranks = dist.get_rank(), [f"{name}/{number}" for number in range(dist.get_world_size())]
    with unreachable_as_rank_error():
        store.set(ranks[rank], "here")
        deadline, pause = time.monotonic() + _timeout().total_seconds(), 0.001
        while not store.check(ranks):
            _raise_failure()
            if time.monotonic() > deadline:
                missing = ", ".join(str(number) for number, key in enumerate(ranks) if not store.check([key]))
                raise RankError(
                    f"rank {rank} waited {_timeout()}, the process group's timeout, and these did not come: rank "
                    f"{missing}. Every rank must make the same call; see their output"
                )
            time.sleep(pause)
            pause = min(2 * pause, 0.5)


def _timeout() -> timedelta:
    """The default group's timeout. PyTorch does not tell it, but its backends do."""
    for device in ("cpu", "cuda"):
        with contextlib.suppress(RuntimeError, AttributeError):
            found: timedelta = dist.group.WORLD._get_backend(torch.device(device)).options._timeout  # type: ignore
            return found
    return dist.default_pg_timeout
