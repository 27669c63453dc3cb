"""The rows of a layer, dealt to the ranks in blocks: each solves its own share, and all get the whole.

Rows do not know each other, so shares of rows are even whatever the shapes of layers are, where whole layers are not.
The factor of the Hessian is made by every rank anew: it is the same everywhere, and as large as what would be sent.
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
        ValueError: As `solver.solve`, on the rank whose rows it concerns.
    """
    size, rank = distributed.world_size(), distributed.rank()
    if size == 1:
        return solve(weight, hessian, config, in_blocks=in_blocks)
    blocks = divided(weight)
    share = -(-len(blocks) // size)
    # One message holds a full share of every rank, so the last ones begin early and solve blocks of others too.
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
