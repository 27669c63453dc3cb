"""The rows of a layer, dealt to the ranks: each solves its own share, and all get the whole.

Rows do not know each other, so shares of rows are even whatever the shapes of layers are, where whole layers are not.
The factor of the Hessian is made by every rank anew: it is the same everywhere, and as large as what would be sent.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from gptq_plugin import distributed
from gptq_plugin.config import QuantizeConfig
from gptq_plugin.gptq.solver import Solution, solve


def solve_shared(weight: Tensor, hessian: Tensor, config: QuantizeConfig) -> Solution:
    """`solver.solve`, called by all ranks with the same arguments; all get the same solution.

    Raises:
        ValueError: As `solver.solve`, on the rank whose rows it concerns.
    """
    if not distributed.active():
        return solve(weight, hessian, config)
    rows, size = len(weight), distributed.world_size()
    share = -(-rows // size)
    # One message holds a full share of every rank, so the last ones begin early and solve rows of others too.
    starts = [min(rank * share, rows - share) for rank in range(size)]
    start = starts[distributed.rank()]
    mine = solve(weight[start : start + share], hessian, config)
    w = mine.weight
    gathered = distributed.gather_rows([mine.loss, mine.rtn_loss, w.scales.T, w.codes, w.zeros.T], share)
    loss, rtn_loss, scales, codes, zeros = (
        torch.cat([part[rank * share - first :] for rank, (part, first) in enumerate(zip(parts, starts, strict=True))])
        for parts in gathered
    )
    whole = replace(w, codes=codes, scales=scales.T.contiguous(), zeros=zeros.T.contiguous())
    return replace(mine, weight=whole, loss=loss, rtn_loss=rtn_loss)
