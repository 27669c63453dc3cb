"""The float model's inputs of the tokens that are routed to an expert: `FloatTokens`.

Tested by tests/quantize/test_asymmetric.py: with both walks.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gptq_plugin.calibration.routed_tokens import block_input, row_hashes
from gptq_plugin.walk.float_walk import running_batch, serves_float


class FloatTokens:
    """Keeps what enters each block of experts in both walks, so that a row that an expert reads finds its token.

    An expert's rows are tokens of the block's input, bit-identical or in the dtype of the experts' weights, in an order
    of the router's. A hash of their bits gives the token, whose input in the float model is at the same place of that
    walk's block input.
    """

    def __init__(self) -> None:
        self._inputs: dict[str, dict[int, Tensor]] = {}  # of the float model, by experts and batch: [tokens, in]
        # By experts, batch and dtype: sorted hashes of the rows, and their tokens.
        self._places: dict[str, dict[int, dict[torch.dtype, tuple[Tensor, Tensor]]]] = {}

    @contextlib.contextmanager
    def watching(self, sources: Mapping[str, nn.Module]) -> Iterator[None]:
        """Takes in what enters the blocks while batches run.

        Args:
            sources: By experts, the module whose input they get.
        """
        with contextlib.ExitStack() as hooks:
            for experts, module in sources.items():
                handle = module.register_forward_pre_hook(partial(self._enter, experts), with_kwargs=True)
                hooks.callback(handle.remove)
            yield

    def of_rows(self, experts: str, batch: int, rows: Tensor) -> Tensor | None:
        """The float model's inputs for rows [rows, in] that experts read; None if they are not known."""
        inputs, places = self._inputs.get(experts, {}).get(batch), self._places.get(experts, {}).get(batch, {})
        if inputs is None or rows.dtype not in places or len(inputs) != len(places[rows.dtype][0]):
            return None
        hashes, tokens = places[rows.dtype]
        wanted = row_hashes(rows)
        found = torch.searchsorted(hashes, wanted).clamp_(max=len(hashes) - 1)
        return inputs[tokens[found]].to(rows.dtype) if bool((hashes[found] == wanted).all()) else None

    def leave(self, experts: str) -> None:
        """Forgets the block."""
        self._inputs.pop(experts, None)
        self._places.pop(experts, None)

    def _enter(self, experts: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        batch = running_batch()
        x = block_input(args, kwargs)
        if batch is None or x is None or not x.numel():
            return
        rows = x.detach().reshape(-1, x.shape[-1])
        if serves_float():
            self._inputs.setdefault(experts, {})[batch] = rows.clone()
        else:
            dtypes = {rows.dtype, *(one.dtype for one in module.parameters() if one.is_floating_point())}
            places = self._places.setdefault(experts, {})[batch] = {}
            for dtype in dtypes:
                hashes, tokens = row_hashes(rows.to(dtype)).sort()
                places[dtype] = hashes, tokens
