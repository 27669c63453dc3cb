"""One block of GPTQ's columns in one launch, in Triton; `reference.solve_block` is its definition.

A program keeps the targets of all columns of the block for some of the rows in registers and visits the columns
in order: round, take the error, push it to the columns after. Rows do not know each other, so programs do not
either.
"""

from __future__ import annotations

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError(
        "quantizing on a GPU needs Triton, which is not installed: `pip install triton` (Linux), or move the model "
        "to the CPU"
    ) from error

_ROWS = 16  # rows a program; few, so that a narrow layer still fills the GPU
_MAX_COLUMNS = 128  # the registers that hold a row's targets


@triton.jit
def _solve_block_kernel(
    target, weight, factor, scales, zeros, codes, errors, columns, rows, factor_stride,
    TOP: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    c = tl.arange(0, COLUMNS)
    inside = r < rows
    tile = tl.load(target + c[:, None] * rows + r[None, :], mask=(c < columns)[:, None] & inside[None, :], other=0.0)
    for j in range(columns):
        t = tl.sum(tl.where(c[:, None] == j, tile, 0.0), axis=0)
        at = j * rows + r
        scale = tl.load(scales + at, mask=inside, other=1.0)
        zero = tl.load(zeros + at, mask=inside, other=0.0)
        w = tl.load(weight + at, mask=inside, other=0.0)
        # Half to even, as torch.round: at 1.5·2^23 the spacing of float32 is 1.
        x = tl.minimum(tl.maximum(tl.div_rn(t, scale) + zero, 0.0), TOP)
        q = (x + 12582912.0) - 12582912.0
        e = w - scale * (q - zero)
        tl.store(codes + at, q.to(tl.uint8), mask=inside)
        tl.store(errors + at, e, mask=inside)
        a = tl.load(factor + j * factor_stride + c, mask=(c > j) & (c < columns), other=0.0)
        tile += a[:, None] * e[None, :]


def solve_block(
    target: Tensor, weight: Tensor, factor: Tensor, scales: Tensor, zeros: Tensor, bits: int
) -> tuple[Tensor, Tensor]:
    """`reference.solve_block` on a GPU.

    Args:
        target: float32 [columns, rows], contiguous, at most 128 columns.
        weight, scales, zeros: The same shape, dtype and device, contiguous.
        factor: float32 [columns, columns], unit upper triangular; its last stride is 1.
        bits: Width of a code.

    Returns:
        codes uint8 and errors float32, [columns, rows].

    Raises:
        ValueError: A dtype, shape or stride that the kernel does not take.
    """
    columns, rows = target.shape
    if columns > _MAX_COLUMNS:
        raise ValueError(f"a block has at most {_MAX_COLUMNS} columns, got {columns}")
    for name, tensor in (("target", target), ("weight", weight), ("scales", scales), ("zeros", zeros)):
        if tensor.dtype != torch.float32 or tensor.shape != target.shape or not tensor.is_contiguous():
            raise ValueError(
                f"{name} must be contiguous float32 {list(target.shape)}, got {tensor.dtype} {list(tensor.shape)}"
            )
    if factor.dtype != torch.float32 or factor.shape != (columns, columns) or factor.stride(1) != 1:
        raise ValueError(f"factor must be float32 [{columns}, {columns}] with last stride 1, got {factor.dtype}")
    codes = torch.empty(columns, rows, dtype=torch.uint8, device=target.device)
    errors = torch.empty_like(target)
    if rows:
        _solve_block_kernel[(triton.cdiv(rows, _ROWS),)](
            target, weight, factor, scales, zeros, codes, errors, columns, rows, factor.stride(0),
            TOP=float(2**bits - 1), COLUMNS=max(16, triton.next_power_of_2(columns)), ROWS=_ROWS,
        )  # fmt: skip
    return codes, errors
