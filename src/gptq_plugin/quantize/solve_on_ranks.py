"""Divides the rows of a layer among the ranks, in blocks: each solves a share, and all get the whole solution.

Rows are independent, so shares are even whatever the layers' shapes; whole layers would not divide evenly. Every rank
factors the Hessian itself: the result is the same everywhere, and sending it would move as many bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from gptq_plugin import distributed
from gptq_plugin.config import QuantizeConfig
from gptq_plugin.device.memory import with_room
from gptq_plugin.gptq.row_blocks import divided
from gptq_plugin.gptq.solver import Solution, solve, solve_blocks


def solve_shared(
    weight: Tensor,
    hessian: Tensor,
    config: QuantizeConfig,
    drift: Tensor | None = None,
    *,
    in_blocks: bool = True,
    make_room: Callable[[], bool] = lambda: False,
) -> Solution:
    """`solver.solve`, called by all ranks with the same arguments; all get the same solution, which is one rank's.

    Several ranks solve in blocks in any case. A rank without room for its share makes some and solves it again, for
    which the others wait.

    Args:
        weight, hessian, config, drift, in_blocks: As for `solver.solve`.
        make_room: As for `with_room`.

    Raises:
        ValueError: As `solver.solve`, on the ranks that solve the rows concerned.
        torch.OutOfMemoryError: There is no room even then, on this rank.
    """
    size, rank = distributed.world_size(), distributed.rank()
    if size == 1:
        return with_room(lambda: solve(weight, hessian, config, drift, in_blocks=in_blocks), make_room)
    blocks = divided(weight)
    share = -(-len(blocks) // size)
    sharers = -(-len(blocks) // share)  # the first ranks; any others solve the last one's share, and do not send it
    # All send equally many rows, so the last one begins early and solves some blocks of another again.
    starts = [min(one * share, len(blocks) - share) for one in range(sharers)]
    begin = starts[min(rank, sharers - 1)]
    own = blocks[begin : begin + share]
    if drift is not None and len(drift) < drift.shape[1]:
        drift = divided(drift)[begin : begin + share]
    mine = with_room(lambda: solve_blocks(own, hessian, config, drift), make_room)
    w, rows = mine.weight, blocks.shape[1]
    values = [mine.loss, mine.rtn_loss, mine.output_power, w.scales.T, w.codes, w.zeros.T]
    gathered = distributed.gather_rows(values, share * rows, sharers)
    skipped = [(one * share - start) * rows for one, start in enumerate(starts)]
    return with_room(lambda: _whole(mine, gathered, skipped), make_room).first(len(weight))


def _whole(mine: Solution, gathered: Sequence[Sequence[Tensor]], skipped: Sequence[int]) -> Solution:
    """The solution of all rows.

    Args:
        mine: This rank's share.
        gathered: For each part of a solution, every sharer's.
        skipped: Rows at the beginning of each sharer's that are another's too.
    """
    loss, rtn_loss, power, scales, codes, zeros = (
        torch.cat([part[start:] for start, part in zip(skipped, parts, strict=True)]) for parts in gathered
    )
    whole = replace(mine.weight, codes=codes, scales=scales.T.contiguous(), zeros=zeros.T.contiguous())
    return replace(mine, weight=whole, loss=loss, rtn_loss=rtn_loss, output_power=power)
