"""Refuses ranks that differ, where they first meet: other weights, another model, configuration or version.

Tested by tests/ranks/test_differing.py: on ranks that differ.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from gptq_plugin import distributed
from gptq_plugin.clients.client import Client
from gptq_plugin.config import QuantizeConfig
from gptq_plugin.errors import RankError
from gptq_plugin.quantize.options import PassOptions

_SAMPLED = 4096  # words of a tensor whose places count


def check_same(model: nn.Module, config: QuantizeConfig, options: PassOptions, client: Client | None) -> None:
    """Compares what all ranks are about to quantize, and how. In a process group every rank calls it.

    Buffers may differ, since training updates some on every rank by itself (BatchNorm's statistics): all get rank 0's,
    which is what DDP does before a forward, and what is exported.

    Raises:
        RankError: Ranks differ; with the values of two of them.
    """
    if not distributed.active():
        return
    parameters, buffers = dict(model.named_parameters()), dict(_saved_buffers(model))
    kinds = {name: f"{_dtype(t)} {list(t.shape)}" for name, t in (parameters | buffers).items()}
    facts = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "the model's class": f"{type(model).__module__}.{type(model).__qualname__}",
        "target": str(client),
        "exact_sums": str(options.exact_sums),
        "the kind of device": (options.where or next(model.parameters(), torch.empty(0, device="cpu")).device).type,
        **{f"the configuration's {name}": repr(value) for name, value in config.to_dict().items()},
    }
    _refuse_other(facts)
    _refuse_other_tensors(kinds, "the model's tensors", "{}")
    _refuse_other_tensors(_digests(parameters), "weights", "values of digest {}")
    everyones = distributed.gather_objects(_digests(buffers))
    for name, buffer in buffers.items():
        if any(theirs[name] != everyones[0][name] for theirs in everyones):
            distributed.from_first_(buffer)


def _refuse_other(facts: Mapping[str, str]) -> None:
    everyones = distributed.gather_objects(dict(facts))
    for number, theirs in enumerate(everyones):
        for what, value in everyones[0].items():
            if theirs.get(what) != value:
                raise _differ(what, number, value, str(theirs.get(what, "nothing")))


def _refuse_other_tensors(values: Mapping[str, str], what: str, shown: str) -> None:
    """Names the first tensor whose value differs. Lists are exchanged only if their digests differ."""
    digests = distributed.gather_objects(hashlib.sha256(repr(list(values.items())).encode()).hexdigest())
    if len(set(digests)) == 1:
        return
    everyones = distributed.gather_objects(dict(values))
    for number, theirs in enumerate(everyones):
        for name in [*everyones[0], *theirs]:
            first, other = everyones[0].get(name), theirs.get(name)
            if first != other:
                has, lacks = f"{name} ({shown})", f"no {name}"
                found = (lacks if value is None else has.format(value) for value in (first, other))
                raise _differ(what, number, *found)
        if list(theirs) != list(everyones[0]):
            raise _differ(what, number, "one order", "another")


def _differ(what: str, number: int, first: str, other: str) -> RankError:
    return RankError(
        f"the ranks differ in {what}: rank 0 has {first}, rank {number} has {other}. Give all ranks the same model, "
        "weights, configuration and versions"
    )


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _saved_buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for prefix, module in model.named_modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                yield f"{prefix}.{name}" if prefix else name, buffer


def _digests(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """A digest of each tensor's bytes, one reading of them where they are; waits for each device once."""
    by_device: dict[torch.device, list[tuple[str, Tensor]]] = {}
    for name, tensor in tensors.items():
        if tensor.device.type != "meta" and tensor.numel():
            by_device.setdefault(tensor.device, []).append((name, _sums(tensor.detach())))
    found = dict.fromkeys(tensors, "")
    for pairs in by_device.values():
        sums: Any = torch.stack([pair for _, pair in pairs]).tolist()
        found.update((name, f"{a % 2**64:016x}{b % 2**64:016x}") for (name, _), (a, b) in zip(pairs, sums, strict=True))
    return found


def _sums(tensor: Tensor) -> Tensor:
    """Sum of the tensor's bytes as integers, int64, and one of some of them, weighted by their places."""
    values = (tensor if tensor.layout is torch.strided else tensor.to_dense()).contiguous().reshape(-1)
    if values.is_complex():
        values = torch.view_as_real(values).reshape(-1)
    width = values.element_size()
    if values.nbytes % 8 == 0 and values.storage_offset() * width % 8 == 0:
        words = values.view(torch.int64)
    else:
        words = values.view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[width])
    some = words[:: max(1, len(words) // _SAMPLED)].long()
    places = torch.arange(1, len(some) + 1, device=some.device)
    return torch.stack([words.sum(dtype=torch.int64), (some * places).sum()])
