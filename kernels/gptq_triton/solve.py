"""GPTQ's recursion over a span of columns in Triton, one launch for every 128; `plain_solve` defines it.

Rows are independent, and each program takes some. It visits the columns in chunks, from the last to the first. One
small product gives what the columns after a chunk push to it; within the chunk each column is rounded in its turn,
with one thread for a row, which holds the row's errors so far in registers.
"""

# mypy: disable-error-code="assignment"
from __future__ import annotations

import torch
from torch import Tensor

from .needs_triton import tl, triton

_ROWS = 32  # per program: fastest of 16, 32 and 64 with 1, 2 and 4 warps, for 4096 to 57344 rows on an H200
_WARPS = 1
_CHUNK = 16  # columns in registers at a time
_ROUGH_DEEP = 32  # later columns in a product of numbers in TF32
BLOCK = 128  # columns per launch


@triton.jit
def _push_later(
    pushed, weight, factor, channel, errors, columns, width, factor_stride, first, r, row, inside, rows,
    CHUNK: tl.constexpr, DEEP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # In place of a chunk's errors, its targets as far as later chunks go.
    at = first + tl.arange(0, CHUNK)
    there = at < columns
    both = there[:, None] & inside[None, :]
    natural = tl.load(channel + at, mask=there, other=0).to(tl.int64)
    t = tl.load(weight + natural[:, None] * rows + row[None, :], mask=both, other=0.0)
    t += tl.load(pushed + at[:, None] * width + r[None, :], mask=both, other=0.0)
    for later in range(first + CHUNK, columns, DEEP):
        k = later + tl.arange(0, DEEP)
        known = k < columns
        a = tl.load(factor + at[:, None] * factor_stride + k[None, :], mask=known[None, :], other=0.0)
        e = tl.load(errors + k[:, None] * width + r[None, :], mask=known[:, None] & inside[None, :], other=0.0)
        t = tl.dot(a, e, acc=t, input_precision=PRECISION)
    tl.store(errors + at[:, None] * width + r[None, :], t, mask=both)


@triton.jit
def _load_columns(
    weight, factor, scales, zeros, group, channel, gain, damping, codes, errors,
    columns, width, factor_stride, first, r, row, inside, rows, CHUNK: tl.constexpr, CHANGES: tl.constexpr,
):  # fmt: skip
    # Of each column, the last one first, what its rounding reads, and what a column before it takes of its errors.
    loaded, shares = (), ()
    for i in tl.static_range(CHUNK):
        j = first + CHUNK - 1 - i
        known = j < columns
        mask = inside & known
        mine = tl.load(channel + j, mask=known, other=0).to(tl.int64)
        grid = tl.load(group + j, mask=known, other=0) * width + r
        w = tl.load(weight + mine * rows + row, mask=mask, other=0.0)
        scale = tl.load(scales + grid, mask=mask, other=1.0)
        zero = tl.load(zeros + grid, mask=mask, other=0.0)
        target = tl.load(errors + j * width + r, mask=mask, other=0.0)
        d = tl.load(gain + j, mask=known, other=0.0)
        damped = tl.load(damping + j, mask=known, other=0.0)
        code = tl.load(codes + mine * width + r, mask=mask & CHANGES, other=0).to(tl.float32)
        loaded += ((mine, w, scale, zero, target, d, damped, code),)
        for m in tl.static_range(i):
            later = first + CHUNK - 1 - m
            shares += (tl.load(factor + j * factor_stride + later, mask=later < columns, other=0.0),)
    return loaded, shares


@triton.jit
def _solve_block_kernel(
    pushed, weight, factor, scales, zeros, group, channel, gain, damping, codes, errors, loss,
    columns, width, rows, groups, n, factor_stride, error_batch, push_batch, factor_batch, group_batch, column_batch,
    top, CHUNK: tl.constexpr, ROWS: tl.constexpr, CHANGES: tl.constexpr,
    DEEP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(1).to(tl.int64)
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = r < width
    row = r % rows
    pushed += b * push_batch
    factor, group, channel = factor + b * factor_batch, group + b * group_batch, channel + b * column_batch
    gain, damping = gain + b * column_batch, damping + b * column_batch
    weight += b * n * rows
    scales += b * groups * width
    zeros += b * groups * width
    codes += b * n * width
    errors += b * error_batch
    loss += b * width
    total = tl.zeros([ROWS], dtype=tl.float32)
    chunks = tl.cdiv(columns, CHUNK)
    for chunk in range(chunks):
        first = (chunks - 1 - chunk) * CHUNK
        # By way of memory every thread gets the targets of its own rows. From here to the stores it needs no other
        # thread, and nothing stands between the loads: they wait together, not one after the other.
        _push_later(
            pushed, weight, factor, channel, errors, columns, width, factor_stride, first, r, row, inside, rows,
            CHUNK, DEEP, PRECISION,
        )  # fmt: skip
        tl.debug_barrier()
        loaded, shares = _load_columns(
            weight, factor, scales, zeros, group, channel, gain, damping, codes, errors,
            columns, width, factor_stride, first, r, row, inside, rows, CHUNK, CHANGES,
        )  # fmt: skip
        done = ()
        for i in tl.static_range(CHUNK):
            _, w, scale, zero, target, d, damped, code = loaded[i]
            for m in tl.static_range(i):
                target += shares[i * (i - 1) // 2 + m] * done[m][1]
            # Half to even, as torch.round: at 1.5·2^23 the spacing of float32 is 1.
            x = tl.minimum(tl.maximum(tl.div_rn(target, scale) + zero, 0.0), top)
            q = (x + 12582912.0) - 12582912.0
            rounded = scale * (q - zero)
            e = w - rounded
            off = target - rounded
            if CHANGES:
                moved = scale * (q - code)
                total -= moved * (d * (2 * off + moved) - damped * (2 * e + moved))
            else:
                total += d * off * off - damped * e * e
            done += ((q, e),)
        for i in tl.static_range(CHUNK):
            j = first + CHUNK - 1 - i
            mask = inside & (j < columns)
            tl.store(codes + loaded[i][0] * width + r, done[i][0].to(tl.uint8), mask=mask)
            tl.store(errors + j * width + r, done[i][1], mask=mask)
        tl.debug_barrier()  # the next chunk reads these errors, in other threads
    tl.store(loss + r, tl.load(loss + r, mask=inside, other=0.0) + total, mask=inside)


def solve_span(
    pushed: Tensor,
    weight: Tensor,
    factor: Tensor,
    scales: Tensor,
    zeros: Tensor,
    group: Tensor,
    channel: Tensor,
    gain: Tensor,
    damping: Tensor,
    codes: Tensor,
    errors: Tensor,
    loss: Tensor,
    bits: int,
    changes: bool = False,
    rough: bool = False,
) -> None:
    """`plain_solve.solve_span` on a GPU: for every 128 columns a product that pushes later errors to them, and a
    launch; in all one launch if it may be rough.

    Where blocks share a Hessian, a product is of one of them: a library may choose another kernel for another number of
    blocks. The launch is of all blocks, which programs share without a sum of theirs.

    Args:
        weight, scales, zeros, codes, loss: As there, contiguous; floats are float32.
        pushed, errors: As there, float32; the columns of each matrix are contiguous, one after the other.
        factor: As there, float32; its last stride is 1.
        group, channel, gain, damping: As there, the last stride 1; floats are float32.
        bits: Width of a code.
        changes: As there.
        rough: Errors may be pushed in TF32, on tensor cores.

    Raises:
        ValueError: Wrong dtype, shape or stride; the message names the tensor.
    """
    batch, columns, width = pushed.shape
    (_, n, rows), groups = weight.shape, scales.shape[1]
    whole = (n * width, width, 1)
    of_blocks = (batch,) if factor.dim() == 3 else ()
    of_groups = (batch,) if group.dim() == 2 else ()
    column = channel.stride(0) if of_blocks else 0
    _check(
        ("pushed", pushed, (batch, columns, width), torch.float32, (pushed.stride(0), width, 1)),
        ("weight", weight, (batch, n, rows), torch.float32, (n * rows, rows, 1)),
        ("factor", factor, (*of_blocks, columns, columns), torch.float32, (*factor.stride()[:-1], 1)),
        ("scales", scales, (batch, groups, width), torch.float32, (groups * width, width, 1)),
        ("zeros", zeros, (batch, groups, width), torch.float32, (groups * width, width, 1)),
        ("group", group, (*of_groups, columns), torch.int32, (*group.stride()[:-1], 1)),
        ("channel", channel, (*of_blocks, columns), torch.int32, (*channel.stride()[:-1], 1)),
        ("gain", gain, (*of_blocks, columns), torch.float32, (column, 1)[-channel.dim() :]),
        ("damping", damping, (*of_blocks, columns), torch.float32, (column, 1)[-channel.dim() :]),
        ("codes", codes, (batch, n, width), torch.uint8, whole),
        ("errors", errors, (batch, columns, width), torch.float32, (errors.stride(0), width, 1)),
        ("loss", loss, (batch, width), torch.float32, (width, 1)),
    )
    if width % max(1, rows):
        raise ValueError(f"pushed has {width} values per column, which is not a multiple of the weight's {rows} rows")
    if not width:
        return
    block = columns if rough else BLOCK
    for stop in range(columns, 0, -block):
        start = max(stop - block, 0)
        here, offset = slice(start, stop), pushed[:, start:stop]
        if stop < columns:
            later, offset = factor[..., here, stop:], torch.empty_like(offset, memory_format=torch.contiguous_format)
            if of_blocks:
                torch.baddbmm(pushed[:, here], later, errors[:, stop:], out=offset)
            else:
                for b in range(batch):
                    torch.baddbmm(pushed[b : b + 1, here], later[None], errors[b : b + 1, stop:], out=offset[b : b + 1])
        _solve_block_kernel[(triton.cdiv(width, _ROWS), batch)](
            offset, weight, factor[..., here, here], scales, zeros, group[..., here], channel[..., here],
            gain[..., here], damping[..., here], codes, errors[:, here], loss,
            stop - start, width, rows, groups, n, factor.stride(-2), errors.stride(0), offset.stride(0),
            factor.stride(0) if of_blocks else 0, group.stride(0) if of_groups else 0, column,
            float(2**bits - 1), CHUNK=_CHUNK, ROWS=_ROWS, CHANGES=changes,
            DEEP=_ROUGH_DEEP if rough else _CHUNK, PRECISION="tf32" if rough else "ieee", num_warps=_WARPS,
        )  # fmt: skip


def _check(*tensors: tuple[str, Tensor, tuple[int, ...], torch.dtype, tuple[int, ...]]) -> None:
    """Refuses another shape, dtype or strides than the given ones, which follow the name and the tensor."""
    for name, tensor, shape, dtype, strides in tensors:
        # The stride of a dimension of size 1 is arbitrary.
        laid = tensor.stride() == strides or all(
            size == 1 or a == b for size, a, b in zip(tensor.shape, tensor.stride(), strides, strict=False)
        )
        if tensor.shape != shape or tensor.dtype != dtype or not laid:
            raise ValueError(
                f"{name} must be {dtype} {list(shape)} with strides {list(strides)}, got {tensor.dtype} "
                f"{list(tensor.shape)} with strides {list(tensor.stride())}"
            )
