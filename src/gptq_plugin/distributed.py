"""Collective operations of all ranks. With one process every function is the identity.

Every operation begins with a check-in (`check_ins`), so that a rank that failed or went astray ends all of them.

Tested by tests/ranks/test_distributed.py: with all tests that start several ranks.
"""

from __future__ import annotations

import contextlib
import io
import pickle
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gptq_plugin import check_ins
from gptq_plugin.check_ins import check_in, unreachable_as_rank_error
from gptq_plugin.device.raw_bytes import raw_bytes
from gptq_plugin.errors import RankError

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
            check_ins.group()  # while all are still there
        yield
        if _depth == 1 and active():
            check_in("the end")
    except BaseException as error:
        if _depth == 1 and active() and not isinstance(error, GeneratorExit):
            if not isinstance(error, RankError):
                check_ins.tell(error)
            check_ins.close()  # some ranks may have left in the middle of a check-in
        raise
    finally:
        _depth -= 1


@contextlib.contextmanager
def failing_together() -> Iterator[None]:
    """Ends the block on all ranks when an error ends it on one, like `ending_together`, and they can go on behind it.

    For errors that are caught, the same way on all ranks, inside of `ending_together`. An error is an Exception, and
    the rank that failed waits until all others know.

    Raises:
        RankError: Another rank failed in the block.
    """
    try:
        yield
        if active():
            check_in("the end of a part")
    except Exception as error:
        if active() and not isinstance(error, RankError):
            check_ins.pass_on(error)
        raise


def first_works(work: Callable[[], None]) -> None:
    """Runs something on rank 0 that may take longer than the process group's timeout; the others wait for its end.

    They do so without an operation, as long as rank 0 is alive.

    Raises:
        RankError: Rank 0 failed, or was lost.
    """
    with ending_together():
        if not active():
            if rank() == 0:
                work()
        elif rank() == 0:
            with check_ins.working():
                work()
        else:
            check_ins.wait_for_first()


def sum_(tensor: Tensor, count: int = 0) -> int:
    """Adds the tensor up over all ranks, in place on every rank.

    Returns:
        The sum of all ranks' counts.
    """
    if not active():
        return count
    counts = check_in("sum", count)
    _run(dist.all_reduce, tensor, tensor)
    return sum(counts)


def sum_each_(tensors: Sequence[Tensor]) -> None:
    """Adds tensors up over all ranks, each in place on every rank, after one check-in."""
    if not active():
        return
    check_in("sum_each", len(tensors))
    for tensor in tensors:
        _run(dist.all_reduce, tensor, tensor)


def maximum_(tensor: Tensor) -> None:
    """Replaces each element by the largest of all ranks, in place on every rank."""
    if not active():
        return
    check_in("maximum")
    _run(dist.all_reduce, tensor, tensor, dist.ReduceOp.MAX)


def from_first_(tensor: Tensor) -> None:
    """Replaces the tensor's values by rank 0's, in place on every rank."""
    if not active():
        return
    values = tensor.detach().contiguous()
    check_in("from_first")
    _run(dist.broadcast, values, raw_bytes(values), src=0)
    tensor.detach().copy_(values)


def minimum(value: int) -> int:
    """The smallest of all ranks' values."""
    return min(check_in("minimum", value)) if active() else value


def gather_rows(parts: Sequence[Tensor], rows: int, sharers: int) -> list[list[Tensor]]:
    """The first ranks' tensors on every rank, as one message of each.

    Args:
        parts: Tensors [rows, ...] of the same shapes and dtypes on every rank.
        rows: The same on every rank.
        sharers: How many ranks' tensors, the same on every rank. Those of the others are not sent.

    Returns:
        For each part, a list of every sharer's, in the order of ranks.
    """
    if not active():
        return [[part] for part in parts]
    order = sorted(range(len(parts)), key=lambda number: -parts[number].element_size())  # each begins at a whole number
    mine = torch.cat([raw_bytes(parts[number]) for number in order])
    messages = [torch.empty_like(mine) for _ in range(sharers)]  # a rank without room for it does not check in
    check_in("gather_rows", rows)
    if sharers == world_size():
        _run(dist.all_gather, mine, messages, mine)
    else:
        for number, message in enumerate(messages):
            _run(dist.broadcast, mine, message.copy_(mine), src=number)
    gathered, start = dict[int, list[Tensor]](), 0
    for number in order:
        part = parts[number]
        stop = start + part.nbytes
        gathered[number] = [message[start:stop].view(part.dtype).view(part.shape) for message in messages]
        start = stop
    return [gathered[number] for number in range(len(parts))]


def object_from_first(value: Any) -> Any:
    """Rank 0's value on every rank. It is pickled, so keep it small."""
    if not active():
        return value
    is_first = rank() == 0
    message = _pickled(value) if is_first else torch.empty(0, dtype=torch.uint8, device="cpu")
    size = check_in("object_from_first", len(message))[0]
    message = message if is_first else message.new_empty(size)
    with unreachable_as_rank_error():
        dist.broadcast(message, src=0, group=check_ins.group())
    return value if is_first else pickle.loads(message.numpy().data)


def gather_objects(value: Any) -> list[Any]:
    """Every rank's value, in the order of ranks, on every rank. They are pickled, so keep them small."""
    if not active():
        return [value]
    mine = _pickled(value)
    sizes = check_in("gather_objects", len(mine))
    padded = torch.zeros(max(sizes), dtype=torch.uint8, device="cpu")
    padded[: len(mine)] = mine
    with unreachable_as_rank_error():
        everyones = check_ins.gathered(padded)
    return [pickle.loads(one[:size].numpy().data) for one, size in zip(everyones, sizes, strict=True)]


class _Pickler(pickle.Pickler):
    """Pickles a tensor's own values, where torch does its whole storage: rows of one tensor would be all of it each."""

    def reducer_override(self, value: Any) -> Any:
        if type(value) is not Tensor or value.layout is not torch.strided:
            return NotImplemented
        if value.untyped_storage().nbytes() <= value.nbytes:
            return NotImplemented
        return value.detach().clone().requires_grad_(value.requires_grad).__reduce_ex__(pickle.DEFAULT_PROTOCOL)


def _pickled(value: Any) -> Tensor:
    """A value's pickle, uint8 on the CPU."""
    buffer = io.BytesIO()
    _Pickler(buffer).dump(value)
    return torch.frombuffer(buffer.getbuffer(), dtype=torch.uint8)


def _run(operation: Callable[..., Any], tensor: Tensor, *arguments: Any, **options: Any) -> None:
    """Runs operation(*arguments, **options), to which all ranks have checked in, on the tensor's device.

    What is on a CPU goes over the group for check-ins; what is on a GPU over the default group, unless that is gloo's.
    """
    on_gloo = not tensor.is_cuda or "cuda:gloo" in dist.get_backend_config()
    with unreachable_as_rank_error():
        operation(*arguments, group=check_ins.group() if on_gloo else dist.group.WORLD, **options)
        if not on_gloo:
            check_ins.queued_on_gpu(tensor.device)
