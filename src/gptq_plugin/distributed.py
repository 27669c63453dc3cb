"""Collective operations of all ranks. With one process every function is the identity.

Every operation begins with a check-in over a separate group: each rank sends which call it has come to, and a number. A
rank that has failed (`ending_together`) sends its error instead, and the others raise that at their next operation. So
no rank waits for one that will not come, and none reduces while another broadcasts. The error also stands in the
process group's store, where ranks find it that wait for a third one, or come when the failed one is gone.

Gloo's threads hold the tensors of an operation a little longer than it takes. One that lets go of a tensor while the
interpreter ends aborts the process, so what runs on gloo runs on the separate group, which is closed before that.

Tested by tests/ranks/test_distributed.py: with all tests that start several ranks.
"""

from __future__ import annotations

import atexit
import contextlib
import itertools
import time
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gptq_plugin.errors import RankError

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
        group: Separate, so that check-ins never mix with the user's messages. None until all ranks have met.
        sent: The operation of the last check-in.
    """

    world: Any
    store: Any
    key: str
    group: Any = None
    sent: Any = None

    def __post_init__(self) -> None:
        atexit.register(self.close)

    @property
    def waits(self) -> bool:
        """True from when a check-in is sent to when all ranks' have come."""
        return self.sent is not None and not self.sent.is_completed()

    def close(self) -> None:
        """Destroys the group, which waits for gloo's threads; leaves it if one of them waits for another rank.

        `atexit` then keeps the operation, so that the thread is not the last to hold its tensors.
        """
        if self.waits:
            return
        atexit.unregister(self.close)
        with contextlib.suppress(ValueError):  # all groups are destroyed already
            if self.group is not None:
                dist.destroy_process_group(self.group)
        self.group = self.sent = None


_check_ins: _CheckIns | None = None
_made = itertools.count()  # groups for check-ins, the same number on every rank
_depth = 0  # of nested `ending_together`


def active() -> bool:
    """True if a process group of more than one rank is up."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def rank() -> int:
    return dist.get_rank() if active() else 0


def world_size() -> int:
    return dist.get_world_size() if active() else 1


@contextlib.contextmanager
def ending_together() -> Iterator[None]:
    """Ends the block on all ranks when an error ends it on one: the others raise RankError with its message.

    They do so at their next operation, at the latest at the end of the block, which is one. An error is an interruption
    (Ctrl-C) or an exit too. The rank that failed waits some seconds for the others, then raises its error.

    Raises:
        RankError: Another rank failed in the block, or did not come to the first one.
    """
    global _depth
    _depth += 1
    try:
        if _depth == 1 and active():
            _open()  # while all are still there
        yield
        if _depth == 1 and active():
            _check_in("the end")
    except BaseException as error:
        if _depth == 1 and active() and not isinstance(error, GeneratorExit):
            if _check_ins is not None and not isinstance(error, RankError):
                _tell(_check_ins, error)
            _close()  # some ranks may have left in the middle of a check-in
        raise
    finally:
        _depth -= 1


def sum_(tensor: Tensor, count: int = 0) -> int:
    """Adds the tensor up over all ranks, in place on every rank.

    Returns:
        The sum of all ranks' counts.
    """
    if not active():
        return count
    counts = _check_in("sum", count)
    with _unreachable_as_rank_error():
        dist.all_reduce(tensor, group=_group(tensor))
    return sum(counts)


def maximum_(tensor: Tensor) -> None:
    """Replaces each element by the largest of all ranks, in place on every rank."""
    if not active():
        return
    _check_in("maximum")
    with _unreachable_as_rank_error():
        dist.all_reduce(tensor, dist.ReduceOp.MAX, group=_group(tensor))


def from_first_(tensor: Tensor) -> None:
    """Replaces the tensor's values by rank 0's, in place on every rank."""
    if not active():
        return
    values = tensor.detach().contiguous()
    _check_in("from_first")
    with _unreachable_as_rank_error():
        dist.broadcast(values.reshape(-1).view(torch.uint8), src=0, group=_group(values))
    tensor.detach().copy_(values)


def minimum(value: int) -> int:
    """The smallest of all ranks' values."""
    return min(_check_in("minimum", value)) if active() else value


def gather_rows(parts: Sequence[Tensor], rows: int) -> list[list[Tensor]]:
    """All ranks' tensors on every rank, as one message.

    Args:
        parts: Tensors [rows, ...] of the same shapes on every rank, the wider dtypes first.
        rows: The same on every rank.

    Returns:
        For each part, a list of every rank's, in the order of ranks.
    """
    if not active():
        return [[part] for part in parts]
    mine = torch.cat([part.flatten().view(torch.uint8) for part in parts])
    everyones = [torch.empty_like(mine) for _ in range(world_size())]  # a rank without room for it does not check in
    _check_in("gather_rows", rows)
    with _unreachable_as_rank_error():
        dist.all_gather(everyones, mine, group=_group(mine))
    gathered, start = [], 0
    for part in parts:
        stop = start + part.nbytes
        gathered.append([message[start:stop].view(part.dtype).view(part.shape) for message in everyones])
        start = stop
    return gathered


def object_from_first(value: Any) -> Any:
    """Rank 0's value on every rank. It is pickled, so keep it small."""
    if not active():
        return value
    values = [value]
    _check_in("object_from_first")
    with _unreachable_as_rank_error():
        dist.broadcast_object_list(values, src=0, group=_open().group)
    return values[0]


def gather_objects(value: Any) -> list[Any]:
    """Every rank's value, in the order of ranks, on every rank. They are pickled, so keep them small."""
    if not active():
        return [value]
    values: list[Any] = [None] * world_size()
    _check_in("gather_objects")
    with _unreachable_as_rank_error():
        dist.all_gather_object(values, value, group=_open().group)
    return values


def _check_in(call: str, number: int = 0) -> list[int]:
    """Waits until all ranks have come to this call; returns their numbers."""
    return _exchange(zlib.crc32(call.encode()) << 1 | _FINE, number, call)


def _exchange(code: int, number: int, text: str, timeout: timedelta | None = None) -> list[int]:
    """Every rank's number.

    Args:
        code: Code of the call; odd after a failure.
        number: This rank's.
        text: The call's name, or the failure.
        timeout: How long to wait for the others; None is the group's timeout.

    Raises:
        RankError: A rank failed, came to another call, or cannot be reached.
    """
    mine = torch.tensor([code, number], device="cpu")
    everyones = [torch.empty_like(mine) for _ in range(world_size())]
    with _unreachable_as_rank_error():
        check_ins = _open()
        check_ins.sent = dist.all_gather(everyones, mine, group=check_ins.group, async_op=True)
        _wait(check_ins.sent, timeout)
    if all(int(theirs[0]) == code and code & 1 == _FINE for theirs in everyones):
        return [int(theirs[1]) for theirs in everyones]
    texts: list[Any] = [None] * world_size()
    with _unreachable_as_rank_error():
        dist.all_gather_object(texts, text, group=_open().group)
    failed = [n for n, theirs in enumerate(everyones) if int(theirs[0]) & 1 == _FAILED]
    if failed:
        raise RankError("; ".join(f"rank {n} failed: {texts[n]}" for n in failed))
    calls = ", ".join(f"rank {n} came to {text}" for n, text in enumerate(texts))
    raise RankError(f"the ranks do different things ({calls}): give all the same model, configuration and calls")


def _wait(work: Any, timeout: timedelta | None) -> None:
    """Waits for a check-in; without a timeout also for news of a rank that failed."""
    deadline = None if timeout is None else time.monotonic() + timeout.total_seconds()
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


def _tell(check_ins: _CheckIns, error: BaseException) -> None:
    """Tells the other ranks why this one failed, also those that are still to come to the first meeting."""
    text = f"{type(error).__name__}: {error}"
    with contextlib.suppress(RuntimeError):
        check_ins.store.set(check_ins.key, f"rank {rank()} failed: {text}")
        if check_ins.group is not None and not check_ins.waits:  # else its last check-in is still on its way
            _exchange(_FAILED, 0, text, _GRACE)


def _raise_failure() -> None:
    """Raises the error that a failed rank left in the store, if it can be read."""
    failure = ""
    with contextlib.suppress(RuntimeError):
        if _check_ins is not None and _check_ins.store.check([_check_ins.key]):
            failure = _check_ins.store.get(_check_ins.key).decode()
    if failure:
        raise RankError(failure)


@contextlib.contextmanager
def _unreachable_as_rank_error() -> Iterator[None]:
    try:
        yield
    except RankError:
        raise
    except RuntimeError as error:
        _raise_failure()
        raise RankError(
            f"rank {rank()} cannot reach the others: one was killed (out of memory?), ended, or took longer than the "
            f"process group's timeout of {_timeout()}. See its output for the cause ({str(error).splitlines()[0]})"
        ) from error


def _group(tensor: Tensor) -> Any:
    """The group for check-ins; for a GPU's tensors the default group, unless that runs on gloo too."""
    on_gloo = not tensor.is_cuda or "cuda:gloo" in dist.get_backend_config()
    return _open().group if on_gloo else dist.group.WORLD


def _open() -> _CheckIns:
    """The check-ins beside the default group. The first call of every rank makes their group, when all have come."""
    global _check_ins
    world = dist.group.WORLD
    if _check_ins is None or _check_ins.world is not world or _check_ins.group is None:
        _close()
        store, name = dist.distributed_c10d._get_default_store(), f"gptq_plugin/{next(_made)}"
        _check_ins = _CheckIns(world, store, f"{name}/failed")
        _meet(store, name)
        with _unreachable_as_rank_error():
            _check_ins.group = dist.new_group(backend="gloo", timeout=_timeout())
    return _check_ins


def _close() -> None:
    global _check_ins
    if _check_ins is not None:
        _check_ins.close()
    _check_ins = None


def _meet(store: Any, name: str) -> None:
    """Waits until all ranks have come here, so that making a group, which nothing can interrupt, takes no time.

    Raises:
        RankError: One failed on its way, or did not come within the process group's timeout.
    """
    ranks = [f"{name}/{number}" for number in range(world_size())]
    with _unreachable_as_rank_error():
        store.set(ranks[rank()], "here")
        deadline, pause = time.monotonic() + _timeout().total_seconds(), 0.001
        while not store.check(ranks):
            _raise_failure()
            if time.monotonic() > deadline:
                missing = ", ".join(str(number) for number, key in enumerate(ranks) if not store.check([key]))
                raise RankError(
                    f"rank {rank()} waited {_timeout()}, the process group's timeout, and these did not come: rank "
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
