"""Collective operations of all ranks. With one process every function is the identity.

Every operation begins with a check-in over a separate group: each rank sends which call it has come to, and a number. A
rank that has failed (`ending_together`) sends its error instead, and the others raise that at their next operation. So
no rank waits for one that will not come, and none reduces while another broadcasts.

Tested by tests/ranks/test_distributed.py: with all tests that start several ranks.
"""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gptq_plugin.errors import RankError

_GRACE = timedelta(seconds=15)  # how long a rank that failed waits for the others to learn why
_FINE, _FAILED = 0, 1

_check_in_groups: tuple[Any, Any] | None = None  # the default group, and the one beside it for check-ins
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

    They do so at their next operation, at the latest at the end of the block, which is one. The rank that failed waits
    some seconds for them, then raises its error; ranks that come later cannot reach it.

    Raises:
        RankError: Another rank failed in the block.
    """
    global _depth
    _depth += 1
    try:
        yield
        if _depth == 1 and active():
            _check_in("the end")
    except Exception as error:
        if _depth == 1 and active() and not isinstance(error, RankError):
            with contextlib.suppress(RuntimeError):
                _exchange(_FAILED, 0, f"{type(error).__name__}: {error}", _GRACE)
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
    _check_in("gather_rows", rows)
    everyones = [torch.empty_like(mine) for _ in range(world_size())]
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
        dist.broadcast_object_list(values, src=0, group=_check_in_group())
    return values[0]


def gather_objects(value: Any) -> list[Any]:
    """Every rank's value, in the order of ranks, on every rank. They are pickled, so keep them small."""
    if not active():
        return [value]
    values: list[Any] = [None] * world_size()
    _check_in("gather_objects")
    with _unreachable_as_rank_error():
        dist.all_gather_object(values, value, group=_check_in_group())
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
    mine = torch.tensor([code, number])
    everyones = [torch.empty_like(mine) for _ in range(world_size())]
    with _unreachable_as_rank_error():
        work = dist.all_gather(everyones, mine, group=_check_in_group(), async_op=True)
        work.wait(timeout) if timeout is not None else work.wait()
    if all(int(theirs[0]) == code and code & 1 == _FINE for theirs in everyones):
        return [int(theirs[1]) for theirs in everyones]
    texts: list[Any] = [None] * world_size()
    with _unreachable_as_rank_error():
        dist.all_gather_object(texts, text, group=_check_in_group())
    failed = [n for n, theirs in enumerate(everyones) if int(theirs[0]) & 1 == _FAILED]
    if failed:
        raise RankError("; ".join(f"rank {n} failed: {texts[n]}" for n in failed))
    calls = ", ".join(f"rank {n} came to {text}" for n, text in enumerate(texts))
    raise RankError(f"the ranks do different things ({calls}): give all the same model, configuration and calls")


@contextlib.contextmanager
def _unreachable_as_rank_error() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise RankError(
            f"rank {rank()} cannot reach the others: one was killed (out of memory?), ended, or took longer than the "
            f"process group's timeout. See its output for the cause ({str(error).splitlines()[0]})"
        ) from error


def _group(tensor: Tensor) -> Any:
    """The default group; the one for check-ins if the tensor is on a CPU and the default has no transport for it."""
    serves = tensor.is_cuda or "gloo" in dist.get_backend_config()
    return dist.group.WORLD if serves else _check_in_group()


def _check_in_group() -> Any:
    """The group for check-ins, made by the first one: separate, so that they never mix with the user's messages."""
    global _check_in_groups
    world = dist.group.WORLD
    if _check_in_groups is None or _check_in_groups[0] is not world:
        _check_in_groups = world, dist.new_group(backend="gloo")
    return _check_in_groups[1]
