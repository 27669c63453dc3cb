"""The blocks of a model as a chain, each of which reads what the one before it gives: `Chain`, `Passage`."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from gptq_plugin import distributed
from gptq_plugin.errors import TargetError
from gptq_plugin.finish.blocks import blocks_of
from gptq_plugin.memory.slots import own_slots
from gptq_plugin.model.hf_models import is_encoder_decoder, transformers_models
from gptq_plugin.model.linears import is_linear

_HIDDEN = "hidden_states"  # transformers' keyword, where they are not the first argument
_REMEDY = "give kind='scales', which trains the model as a whole"
_TOLERANCE = 1e-3  # of a block's outputs that are computed again, as a share of the largest


@dataclass(frozen=True)
class Call:
    """How a block is called, but for the hidden states.

    Attributes:
        args, kwargs: Its other arguments.
        by_keyword: The hidden states are `hidden_states`; else they are the first argument.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    by_keyword: bool

    def run(self, block: nn.Module, hidden: Tensor) -> Tensor:
        """Returns the block's hidden states for others."""
        kwargs = {**self.kwargs, _HIDDEN: hidden} if self.by_keyword else self.kwargs
        given = self.args if self.by_keyword else (hidden, *self.args)
        return _hidden_of(block(*given, **kwargs))


@dataclass(frozen=True)
class Passage:
    """What a batch's forward gives to the blocks.

    Attributes:
        hidden: The first block's hidden states, [samples, positions, width].
        calls: Of the blocks, in order.
        counted: bool [samples * positions], the positions that count; None if all do.
    """

    hidden: Tensor
    calls: tuple[Call, ...]
    counted: Tensor | None = None

    @property
    def positions(self) -> int:
        """Number of positions that count."""
        return self.hidden[..., 0].numel() if self.counted is None else int(self.counted.sum())


class Chain:
    """The blocks of a model.

    Args:
        names: Of the blocks, in the order of their calls.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = list(names)
        self._found: list[tuple[str, Tensor, Call, Tensor]] = []
        self._ordered = False  # as the calls are
        self._first: tuple[Passage, Tensor] | None = None  # and what its last block gave

    @classmethod
    def of(cls, model: nn.Module) -> Chain:
        """The chain of a quantized model.

        Raises:
            TargetError: It has no blocks, or blocks that share modules.
        """
        blocks = dict(blocks_of(model))
        seen: set[nn.Module] = set()
        for name, block in blocks.items():
            modules = {part for part in block.modules() if any(True for _ in own_slots(part))}
            if modules & seen:
                raise TargetError(
                    f"{name} shares modules with a block before it, so that none can be trained alone: {_REMEDY}"
                )
            seen |= modules
        if not blocks:
            raise TargetError(
                f"{type(model).__name__} has no list of blocks with quantized layers to train one by one: {_REMEDY}"
            )
        return cls(list(blocks))

    @staticmethod
    def check(model: nn.Module) -> None:
        """Refuses a float model, before any work, in which there will be no chain.

        Raises:
            TargetError: It is an encoder with a decoder, or has no list of blocks.
        """
        lists = (one for one in model.modules() if isinstance(one, nn.ModuleList))
        if any(is_encoder_decoder(one) for _, one in transformers_models(model)):
            raise TargetError(f"the blocks of an encoder and a decoder are no chain: {_REMEDY}")
        if not any(is_linear(part) for one in lists for part in one.modules()):
            raise TargetError(f"{type(model).__name__} has no list of blocks with linear layers: {_REMEDY}")

    @contextlib.contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """Notes the calls of a model's blocks inside the block."""
        modules = dict(model.named_modules())
        if missing := [name for name in self.names if name not in modules]:
            raise TargetError(
                f"{type(model).__name__}, the float model, has no block {missing[0]}: give a copy that was made before "
                "quantization"
            )
        handles = [self._watch(name, modules[name]) for name in self.names]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            self._found.clear()

    def _watch(self, name: str, block: nn.Module) -> Any:
        def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            by_keyword = not args
            hidden = kwargs.get(_HIDDEN) if by_keyword else args[0]
            rest = {key: value for key, value in kwargs.items() if not (by_keyword and key == _HIDDEN)}
            given = _hidden_of(output)
            if not isinstance(hidden, Tensor) or not isinstance(given, Tensor) or not _is_plain((args[1:], rest)):
                raise TargetError(f"{name} is called with, or gives, more than tensors and plain values: {_REMEDY}")
            self._found.append((name, hidden, Call(args[1:], rest, by_keyword), given))

        return block.register_forward_hook(note, with_kwargs=True)

    def take(self) -> Passage:
        """What the forward gave that has just run inside `watching`.

        Raises:
            TargetError: The blocks were not called once each, in order; or one reads something else than what the one
                before it gives.
        """
        found, self._found = self._found, []
        called = [name for name, *_ in found]
        if (self._ordered and called != self.names) or sorted(called) != sorted(self.names):
            raise TargetError(
                f"a forward does not call every block of {_list_of(self.names)} once, in one order: {_REMEDY}"
            )
        self.names, self._ordered = called, True
        for (_, _, _, given), (name, hidden, _, _) in itertools.pairwise(found):
            if not (given is hidden or (given.shape == hidden.shape and torch.equal(given, hidden))):
                raise TargetError(f"{name} reads something else than what the block before it gives: {_REMEDY}")
        passage = Passage(found[0][1], tuple(call for _, _, call, _ in found))
        self._first = (passage, found[-1][3]) if self._first is None else self._first
        return passage

    def agree(self) -> None:
        """Has all ranks walk the blocks in the order of the first rank that has a batch. Collective."""
        known = [names for ordered, names in distributed.gather_objects((self._ordered, self.names)) if ordered]
        if known and known[0] != self.names and self._ordered:
            raise TargetError(f"ranks call the blocks of {_list_of(self.names)} in different orders: {_REMEDY}")
        self.names = known[0] if known else self.names

    def check_alone(self, model: nn.Module) -> None:
        """Refuses a float model whose blocks give other values when they are called one by one, for the first passage.

        Raises:
            TargetError: They do.
        """
        if self._first is None:
            return
        (passage, last), self._first = self._first, None
        hidden = passage.hidden
        for name, call in zip(self.names, passage.calls, strict=True):
            hidden = call.run(model.get_submodule(name), hidden)
        if not (hidden.float() - last.float()).abs().max() <= _TOLERANCE * last.float().abs().max():
            raise TargetError(f"the blocks give other values when they are called one by one: {_REMEDY}")

    def check_same(self, passage: Passage, other: Passage) -> None:
        """Refuses a model whose first block reads other values than the float model's, or whose blocks are given,
        beside hidden states, what blocks before them computed.

        Args:
            passage, other: Of a batch in the float model and in the quantized one.

        Raises:
            TargetError: The two differ.
        """
        if not same(passage.hidden, other.hidden):
            raise TargetError(
                "the first block reads other values than in the float model, whose dtype or weights before the blocks "
                f"are others, or layers before the blocks are quantized: {_REMEDY}"
            )
        if not same(passage.calls, other.calls):
            raise TargetError(
                f"what blocks are given beside hidden states depends on the blocks before them: {_REMEDY}"
            )


def to_keep(passage: Passage, counted: Tensor | None) -> Passage:
    """The passage with the positions that count, its hidden states on the CPU."""
    return replace(passage, hidden=passage.hidden.cpu(), counted=counted)


def _hidden_of(output: Any) -> Any:
    return output[0] if isinstance(output, (tuple, list)) and output else output


def _is_plain(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(map(_is_plain, value.values()))
    if isinstance(value, (tuple, list)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (Tensor, bool, int, float, str, torch.dtype, torch.device))


def same(one: Any, other: Any) -> bool:
    """True for equal values in the same containers; of tensors on any device, with the same dtype."""
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and _kind(one) == _kind(other) and torch.equal(one, other.to(one.device))
    if isinstance(one, Mapping):
        return isinstance(other, Mapping) and one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, Call):
        return isinstance(other, Call) and same((one.args, one.kwargs), (other.args, other.kwargs))
    if isinstance(one, (tuple, list)):
        return isinstance(other, (tuple, list)) and len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def _kind(value: Tensor) -> tuple[torch.dtype, torch.Size]:
    return value.dtype, value.shape


def _list_of(names: Sequence[str]) -> str:
    return names[0].rpartition(".")[0] or names[0]
