"""What ranks do together. With one process every function is the identity.

Every meeting begins with a word from each rank over a group of its own: which call it has come to, and a number. A rank
that has failed (`ending_together`) says that instead, and the others raise what it says at their next meeting. So no
rank waits for one that will not come, and none reduces what another broadcasts.
"""

from __future__ import annotations

import contextlib
import logging
import zlib
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gptq_plugin.errors import RankError

log = logging.getLogger(__name__)

_LAST_WORD = timedelta(seconds=15)  # how long a rank that failed waits for the others to hear why
_FINE, _FAILED = 0, 1

_words: tuple[Any, Any] | None = None  # the default group, and the one beside it for words
_depth = 0  # of `ending_together`


def active() -> bool:
    """Whether a process group of more than one rank is up."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def rank() -> int:
    return dist.get_rank() if active() else 0


def world_size() -> int:
    return dist.get_world_size() if active() else 1


@contextlib.contextmanager
def ending_together() -> Iterator[None]:
    """What ends the block on one rank ends it on all: the others raise RankError with its message.

    They do so at their next meeting, at the latest at the end of the block, which is one. The rank that failed waits
    some seconds for that, then goes its way; the others find it gone.
    """
    global _depth
    _depth += 1
    try:
        yield
        if _depth == 1 and active():
            _called("the end")
    except Exception as error:
        if _depth == 1 and active() and not isinstance(error, RankError):
            with contextlib.suppress(RuntimeError):
                _meet(_FAILED, 0, f"{type(error).__name__}: {error}", _LAST_WORD)
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
    counts = _called("sum", count)
    with _reaching():
        dist.all_reduce(tensor, group=_group(tensor))
    return sum(counts)


def maximum_(tensor: Tensor) -> None:
    """Element by element the largest value of all ranks, in place on every rank."""
    if not active():
        return
    _called("maximum")
    with _reaching():
        dist.all_reduce(tensor, dist.ReduceOp.MAX, group=_group(tensor))


def minimum(value: int) -> int:
    """The smallest of all ranks' values."""
    return min(_called("minimum", value)) if active() else value


def gather_rows(parts: Sequence[Tensor], rows: int) -> list[list[Tensor]]:
    """All ranks' tensors on every rank, as one message.

    Args:
        parts: Tensors [rows, ...], the wider dtypes first.
        rows: The same on every rank.

    Returns:
        For each part, that of every rank.
    """
    if not active():
        return [[part] for part in parts]
    mine = torch.cat([part.flatten().view(torch.uint8) for part in parts])
    _called("gather_rows", rows)
    everyones = [torch.empty_like(mine) for _ in range(world_size())]
    with _reaching():
        dist.all_gather(everyones, mine, group=_group(mine))
    gathered, start = [], 0
    for part in parts:
        stop = start + part.nbytes
        gathered.append([message[start:stop].view(part.dtype).view(part.shape) for message in everyones])
        start = stop
    return gathered


def object_from_first(value: Any) -> Any:
    """Rank 0's value on every rank; the value is pickled, so keep it small."""
    if not active():
        return value
    values = [value]
    _called("object_from_first")
    with _reaching():
        dist.broadcast_object_list(values, src=0, group=_word_group())
    return values[0]


def gather_objects(value: Any) -> list[Any]:
    """Every rank's value, in the order of ranks, on every rank; pickled, so keep them small."""
    if not active():
        return [value]
    values: list[Any] = [None] * world_size()
    _called("gather_objects")
    with _reaching():
        dist.all_gather_object(values, value, group=_word_group())
    return values


def _called(call: str, number: int = 0) -> list[int]:
    """Every rank's number, once all have come to this call."""
    return _meet(zlib.crc32(call.encode()) << 1 | _FINE, number, call)


def _meet(word: int, number: int, said: str, at_most: timedelta | None = None) -> list[int]:
    """Every rank's number.

    Args:
        word: Of the call; odd after a failure.
        number: This rank's.
        said: The call's name, or the failure.
        at_most: How long to wait for the others; None is the group's timeout.

    Raises:
        RankError: A rank failed, came to another call, or cannot be reached.
    """
    mine = torch.tensor([word, number])
    everyones = [torch.empty_like(mine) for _ in range(world_size())]
    with _reaching():
        work = dist.all_gather(everyones, mine, group=_word_group(), async_op=True)
        work.wait(at_most) if at_most is not None else work.wait()
    if all(int(theirs[0]) == word and word & 1 == _FINE for theirs in everyones):
        return [int(theirs[1]) for theirs in everyones]
    sentences: list[Any] = [None] * world_size()
    with _reaching():
        dist.all_gather_object(sentences, said, group=_word_group())
    failed = [n for n, theirs in enumerate(everyones) if int(theirs[0]) & 1 == _FAILED]
    if failed:
        raise RankError("; ".join(f"rank {n} failed: {sentences[n]}" for n in failed))
    calls = ", ".join(f"rank {n} to {sentence}" for n, sentence in enumerate(sentences))
    raise RankError(f"the ranks do not do the same ({calls}): all need the same model, configuration and calls")


@contextlib.contextmanager
def _reaching() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise RankError(
            f"rank {rank()} cannot reach the others: one was killed (out of memory?), ended, or took longer than the "
            f"process group's timeout. Its own output says why ({str(error).splitlines()[0]})"
        ) from error


def _group(tensor: Tensor) -> Any:
    """The default group, or the one for words where that has no transport for CPU tensors."""
    serves = tensor.is_cuda or "gloo" in dist.get_backend_config()
    return dist.group.WORLD if serves else _word_group()


def _word_group() -> Any:
    """Made at the first meeting: of its own, so that no word meets what user code exchanges."""
    global _words
    world = dist.group.WORLD
    if _words is None or _words[0] is not world:
        _words = world, dist.new_group(backend="gloo")
    return _words[1]
