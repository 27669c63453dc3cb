"""Divides the rows of a layer among the ranks, in blocks: each solves a share, and all get the whole solution.

Rows are independent, so shares are even whatever the layers' shapes; whole layers would not divide evenly. Every rank
factors the Hessian itself: the result is the same everywhere, and sending it would move as many bytes.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from gptq_plugin import distributed
from gptq_plugin.config import QuantizeConfig
from gptq_plugin.gptq.row_blocks import divided
from gptq_plugin.gptq.solver import Solution, solve, solve_blocks


def solve_shared(weight: Tensor, hessian: Tensor, config: QuantizeConfig, *, in_blocks: bool = True) -> Solution:
    """`solver.solve`, called by all ranks with the same arguments; all get the same solution, which is one rank's.

    Several ranks solve in blocks in any case.

    Raises:
        ValueError: As `solver.solve`, on the ranks that solve the rows concerned.
    """
    size, rank = distributed.world_size(), distributed.rank()
    if size == 1:
        return solve(weight, hessian, config, in_blocks=in_blocks)
    blocks = divided(weight)
    share = -(-len(blocks) // size)
    # All ranks send equally many rows, so the last ones begin early and solve some blocks of others again.
    starts = [min(one * share, len(blocks) - share) for one in range(size)]
    mine = solve_blocks(blocks[starts[rank] : starts[rank] + share], hessian, config)
    w, rows = mine.weight, blocks.shape[1]
    values = [mine.loss, mine.rtn_loss, mine.output_power, w.scales.T, w.codes, w.zeros.T]
    gathered = distributed.gather_rows(values, share * rows)
    loss, rtn_loss, power, scales, codes, zeros = (
        torch.cat([part[(one * share - starts[one]) * rows :] for one, part in enumerate(parts)]) for parts in gathered
    )
    whole = replace(w, codes=codes, scales=scales.T.contiguous(), zeros=zeros.T.contiguous())
    return replace(mine, weight=whole, loss=loss, rtn_loss=rtn_loss, output_power=power).first(len(weight))
