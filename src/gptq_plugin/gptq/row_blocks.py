"""The rows of a matrix in blocks, so that a row's solution does not depend on how many ranks share the rows.

A library chooses a product's kernel, and with it the order of addition, by the shapes. So the solver multiplies a block
of rows at a time, and a rank solves whole blocks. Their size follows from the number of rows alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Rows of a block at least, and blocks at most. More and smaller blocks divide among more ranks; on a GPU they take more
# time than one matrix (16 of 1792 rows: a tenth of a transformer block).
_LEAST, _MOST = {"cuda": 4096, "cpu": 256}, {"cuda": 4, "cpu": 16}
_MULTIPLE = 32  # rows, so that each block's columns begin at the same alignment


def divided(weight: Tensor) -> Tensor:
    """The rows of [out, in] in blocks, [B, rows, in]; copies of the last row fill the last block."""
    rows, kind = len(weight), "cpu" if weight.device.type == "cpu" else "cuda"
    blocks = min(_MOST[kind], max(1, rows // _LEAST[kind]))
    if blocks == 1:
        return weight[None]
    size = -(-rows // blocks // _MULTIPLE) * _MULTIPLE
    blocks = -(-rows // size)
    missing = blocks * size - rows
    return (torch.cat([weight, weight[-1:].expand(missing, -1)]) if missing else weight).unflatten(0, (blocks, size))
