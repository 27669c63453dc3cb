"""The recursion and the steps of `refine` behind it, in chunks of rows that fit: `Improvement`, `EachImprovement`.

Rows are independent, so a chunk goes through all steps before the next begins. Its size follows from the shapes alone,
so that a row's result does not depend on how many ranks share the rows.

Tested by tests/gptq/test_refine.py: with the steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from gptq_plugin.config import QuantizeConfig
from gptq_plugin.gptq.factor import Factor
from gptq_plugin.gptq.grid import grids
from gptq_plugin.gptq.recursion import Recursion
from gptq_plugin.gptq.refine import Arranged, Rounding, Rows, improved

CHUNK_BYTES = 2**32  # of a chunk's tensors, at most
_BYTES, _BYTES_ALTERNATIVE = 15, 7  # for every weight, and for each of its alternatives; a step has two
_MULTIPLE = 32  # rows, as of blocks


def improves(config: QuantizeConfig) -> bool:
    """True if solving takes more than the recursion with few alternatives."""
    return config.scale_rounds > 0 or config.refit_rounds > 0 or _alternatives(config) > 2


class Improvement:
    """Rounds B blocks of rows as `recursion.Recursion` does, and improves on it.

    Args:
        blocks: [B, rows, in], the targets.
        hessian: [in, in].
        factor: Of the Hessian.
        config: As for `solve`.

    Attributes:
        targets: The blocks, as given.
        fits: bool [], all scales are finite in float16; with static groups known before `visit`.
        codes: uint8 [B, in, rows], after `visit`, as are all others.
        scales, zeros: [B, G, rows].
        loss: [B, rows], of the targets; on a GPU right to a thousandth.
        g_idx: Returns the group of every channel, int32 [in].
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor
    loss: Tensor
    g_idx: Callable[[], Tensor]

    def __init__(self, blocks: Tensor, hessian: Tensor, factor: Factor, config: QuantizeConfig):
        self.targets, self.config = blocks, config
        self._hessian, self._factor = hessian, factor
        self._arranged: Arranged | None = None
        self.fits = torch.ones((), dtype=torch.bool, device=blocks.device)
        if config.static_groups:
            whole = blocks.new_full((1, blocks.shape[1]), max(config.clip_ratios))
            for block in blocks:
                self.fits &= torch.isfinite(grids(block, whole, config)[0]).all()

    def visit(self) -> None:
        """Fills codes, scales, zeros and loss."""
        found = [[self._improved(chunk) for chunk in _chunks(block, self.config)] for block in self.targets]
        for name in Rounding.__annotations__:
            of_blocks = [torch.cat([getattr(part, name) for part in parts], -1) for parts in found]
            setattr(self, name, torch.cat(of_blocks))

    def _improved(self, chunk: Tensor) -> Rounding:
        """The rounding of some rows, [rows, in]; in the weights' units."""
        start = Recursion(chunk[None], self._factor, self.config)
        start.visit_in_units(rough=_has_steps(self.config))
        self.fits &= start.fits
        self.g_idx = start.g_idx
        rows = Rows.of(start, self._hessian[None], self._arranged)
        self._arranged = rows.hessian
        return improved(rows, Rounding.of(start)).in_units_of_weights(rows)


class EachImprovement:
    """`Improvement` for matrices with a Hessian each, all of them together. A GPU is not waited for.

    Args:
        weights: [B, rows, in], the targets.
        hessians: [B, in, in].
        factor: Of each Hessian.
        config: As for `solve`.

    Attributes:
        codes, scales, zeros, loss: As there, after `visit`.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor
    loss: Tensor

    def __init__(self, weights: Tensor, hessians: Tensor, factor: Factor, config: QuantizeConfig):
        self._hessians, self._start = hessians, Recursion(weights, factor, config)

    @property
    def fits_each(self) -> Tensor:
        """bool [B], all scales of a matrix are finite in float16; to be read after `visit`."""
        return self._start.fits_each

    def g_idx(self) -> Tensor:
        """As `Recursion.g_idx`."""
        return self._start.g_idx()

    def visit(self) -> None:
        """Fills codes, scales, zeros and loss."""
        self._start.visit_in_units(rough=_has_steps(self._start.config))
        rows = Rows.of(self._start, self._hessians)
        found = improved(rows, Rounding.of(self._start)).in_units_of_weights(rows)
        for name in Rounding.__annotations__:
            setattr(self, name, getattr(found, name))


def _has_steps(config: QuantizeConfig) -> bool:
    return config.scale_rounds + config.refit_rounds > 0


def _alternatives(config: QuantizeConfig) -> int:
    return min(config.clip_candidates, len(config.clip_ratios))


def chunk_bytes(weights: int, config: QuantizeConfig) -> int:
    """The most bytes that improving so many weights of one matrix takes at a time."""
    return min(weights * bytes_of_weight(config), CHUNK_BYTES)


def bytes_of_weight(config: QuantizeConfig) -> int:
    """The most bytes that a weight takes while it is improved."""
    return _BYTES + _BYTES_ALTERNATIVE * max(2, _alternatives(config))


def _chunks(block: Tensor, config: QuantizeConfig) -> Iterator[Tensor]:
    """Yields the rows [rows, in] in chunks."""
    most = CHUNK_BYTES // bytes_of_weight(config) // block.shape[1]
    yield from block.split(max(_MULTIPLE, most // _MULTIPLE * _MULTIPLE))
