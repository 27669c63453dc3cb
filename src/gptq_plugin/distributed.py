"""The same calls with and without a process group. With one process every function is the identity."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def active() -> bool:
    """Whether a process group of more than one rank is up."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def rank() -> int:
    return dist.get_rank() if active() else 0


def world_size() -> int:
    return dist.get_world_size() if active() else 1


def sum_(tensor: Tensor) -> None:
    """Adds the tensor up over all ranks, in place on every rank."""
    if active():
        dist.all_reduce(tensor)


def minimum(value: int, device: torch.device) -> int:
    """The smallest of all ranks' values."""
    if not active():
        return value
    tensor = torch.tensor(value, dtype=torch.int64, device=device)
    dist.all_reduce(tensor, op=dist.ReduceOp.MIN)
    return int(tensor.item())


def total(value: int, device: torch.device) -> int:
    """The sum of all ranks' values."""
    if not active():
        return value
    tensor = torch.tensor(value, dtype=torch.int64, device=device)
    dist.all_reduce(tensor)
    return int(tensor.item())


def from_first(tensor: Tensor) -> None:
    """Overwrites the tensor with rank 0's, in place on every rank; it is contiguous, or the transpose of what is."""
    if active():
        dist.broadcast(tensor if tensor.is_contiguous() else tensor.mT, src=0)  # NCCL takes contiguous ones only


def object_from_first(value: Any) -> Any:
    """Rank 0's value on every rank; the value is pickled, so keep it small."""
    if not active():
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def gather_objects(value: Any) -> list[Any]:
    """Every rank's value, in the order of ranks, on every rank; pickled, so keep them small."""
    if not active():
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values
