"""Maps an expert's input rows back to tokens, so that padding can be left out.

A router passes each expert some rows of the block's input, in its own order. The rows are bit-identical, so a hash of
their bits identifies them; later layers of the expert keep their order.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gptq_plugin.device.modules import modules_of
from gptq_plugin.model.experts import experts_of
from gptq_plugin.model.targets import is_linear


class _EveryRow:
    """Stands for a mask that is all true."""


EVERY_ROW = _EveryRow()
_NOTHING = torch.empty(0, dtype=torch.int64, device="cpu")
Mask = Tensor | _EveryRow | None
_AROUND = 3  # modules around an expert whose inputs are hashed: the experts, their block, and the block's caller
_AT_ONCE = 2**24  # elements hashed at a time, which take eight bytes each


@dataclass
class _Block:
    """The input of the block of experts that a batch is in.

    Attributes:
        everything: All rows count.
        counted, all: Hashes of the rows that count, and of all rows, in each dtype in which experts may get them.
        kept: By the expert's number, the mask of its rows that count.
    """

    everything: bool
    counted: Tensor
    all: Tensor
    kept: dict[str, Tensor] = field(default_factory=dict)


class RoutedTokens:
    """Finds the tokens routed to each expert.

    Args:
        model: A model with or without experts.

    Attributes:
        around: The modules whose inputs are hashed, by name.
    """

    def __init__(self, model: nn.Module) -> None:
        # A kind is the name of the experts and a layer's name within one of them.
        self._numbers: dict[str, str] = {}  # an expert's number by layer
        self._kinds: dict[str, tuple[str, str]] = {}  # by layer
        self._kinds_of: dict[str, set[tuple[str, str]]] = {}  # by experts
        self.around: dict[str, nn.Module] = {}
        self._around: dict[str, list[str]] = {}  # watched modules, with the experts they pass their input to
        self._dtypes: dict[str, set[torch.dtype]] = {}  # likewise, with those of the weights of experts in them
        self._blocks: dict[int, _Block] = {}  # by batch
        self._reads_tokens: dict[tuple[str, str], bool] = {}  # by kind, once known
        modules: dict[str, Any] = modules_of(model)
        names: dict[str, set[torch.dtype]] = {}
        for name, module in modules.items():
            experts = experts_of(name, module) if is_linear(module) else None
            if experts is not None:
                number, _, own = name[len(experts) + 1 :].partition(".")
                self._numbers[name] = number
                self._kinds[name] = experts, own
                self._kinds_of.setdefault(experts, set()).add((experts, own))
                names.setdefault(experts, set()).add(module.weight.dtype)
        for experts in sorted(names):
            source = experts
            if isinstance(modules[experts], nn.ModuleList):  # never called
                source = experts.rpartition(".")[0]
            around = experts
            for _ in range(_AROUND):
                self.around[around] = modules[around]
                self._around.setdefault(around, []).extend([experts] if around == source else [])
                self._dtypes.setdefault(around, set()).update(names[experts])
                around = around.rpartition(".")[0]

    def sources(self) -> dict[str, nn.Module]:
        """By experts, the module whose input is the tokens that they are given."""
        return {experts: self.around[name] for name, passed in self._around.items() for experts in passed}

    @contextlib.contextmanager
    def watching(
        self,
        running: Callable[[], int | None],
        mask_of: Callable[[int, str, Tensor], Mask],
        entered: Callable[[str, Tensor], None],
    ) -> Iterator[None]:
        """Hashes the inputs of blocks while batches run.

        Args:
            running: Returns the number of the batch that runs on this thread.
            mask_of: Called as (batch, module's name, its input [..., in]); returns the mask of rows that count, bool
                [rows] or `EVERY_ROW`, or None if unknown.
            entered: Called as (experts, rows) with the rows of the experts' input that count, [rows, in].
        """

        def watch(name: str, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            number = running()
            x = block_input(args, kwargs)
            if number is None or x is None:
                return
            rows, mask = x.reshape(-1, x.shape[-1]), mask_of(number, name, x)
            if mask is EVERY_ROW:
                known = self._knows(self._around[name])
                hashes = _NOTHING if known else torch.cat(self._hashes(name, rows))
                self._blocks[number] = _Block(True, hashes, hashes)
                for experts in self._around[name]:
                    entered(experts, rows)
                return
            if isinstance(mask, Tensor):
                each = self._hashes(name, rows)
                self._blocks[number] = _Block(False, torch.cat([one[mask] for one in each]), torch.cat(each))
            else:
                mask = self._among(number, row_hashes(rows))
            if mask is not None:
                for experts in self._around[name]:
                    entered(experts, rows[mask])

        handles = [
            module.register_forward_pre_hook(partial(watch, name), with_kwargs=True)
            for name, module in self.around.items()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            self._blocks.clear()

    def is_expert(self, layer: str) -> bool:
        return layer in self._numbers

    def counted(self, number: int, layer: str, rows: Tensor) -> tuple[Mask, bool]:
        """The rows of an expert's input that count.

        Args:
            number: The batch's number.
            layer: The expert's layer.
            rows: Its input, [rows, in].

        Returns:
            bool [rows] or `EVERY_ROW`, or None if the rows are neither tokens of the block's input nor computed from
            them; and True if they are such tokens.
        """
        block, expert, kind = self._blocks.get(number), self._numbers[layer], self._kinds[layer]
        if block is None or not len(rows):
            return None, False
        if block.everything and kind in self._reads_tokens:
            return EVERY_ROW, self._reads_tokens[kind]
        tokens = self._among(number, row_hashes(rows))
        self._reads_tokens[kind] = tokens is not None
        if tokens is not None:
            block.kept[expert] = tokens
            return tokens, True
        known = block.kept.get(expert)
        return (known if known is not None and len(known) == len(rows) else None), False

    def share_input(self, layers: Sequence[str]) -> None:
        """Told of layers that read the same input: what is known of the first one holds for all."""
        first = self._kinds.get(layers[0])
        if first in self._reads_tokens:
            self._reads_tokens.update({self._kinds[name]: self._reads_tokens[first] for name in layers[1:]})

    def _knows(self, names: list[str]) -> bool:
        """True once it is known of all layers of these experts whether they read tokens."""
        return all(kind in self._reads_tokens for name in names for kind in self._kinds_of[name])

    def _hashes(self, name: str, rows: Tensor) -> list[Tensor]:
        """Hashes of a watched module's input as it is, and as grouped products get it: in the weights' dtype."""
        dtypes = {rows.dtype: None} | dict.fromkeys(self._dtypes[name])
        return [row_hashes(rows.to(dtype)) for dtype in dtypes]

    def _among(self, number: int, hashes: Tensor) -> Tensor | None:
        """The rows that count, bool [rows]; None unless all are rows of the block's input."""
        block = self._blocks.get(number)
        if block is None or not len(hashes) or not bool(torch.isin(hashes, block.all).all()):
            return None
        return torch.isin(hashes, block.counted)


def block_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """What a block of experts is called with: the first floating-point tensor among the arguments, if any."""
    tensors = (value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
    return next((tensor for tensor in tensors if tensor.is_floating_point()), None)


def row_hashes(rows: Tensor) -> Tensor:
    """Hashes of the rows' bits, int64 [rows]."""
    rows, size = rows.detach().contiguous(), rows.element_size()
    if rows.storage_offset() * size % 8:
        rows = rows.clone()
    words = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    bits = rows.view(words[size if rows.shape[1] * size % 8 else 8])  # the fewer words, the less work
    factors = _factors(bits.shape[1], bits.device)
    parts = bits.split(max(1, _AT_ONCE // max(1, bits.shape[1])))
    return torch.cat([(part.long() * factors).sum(-1) for part in parts])


@functools.lru_cache(maxsize=16)
def _factors(count: int, device: torch.device) -> Tensor:
    """Kept, since each copy to a GPU would wait for it."""
    generator = torch.Generator("cpu").manual_seed(0)
    with torch.inference_mode(False):
        return torch.randint(-(2**62), 2**62, (count,), generator=generator, device="cpu").to(device)
