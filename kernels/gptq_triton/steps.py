"""The steps that improve rounded rows, in Triton; `plain_steps` defines them. Columns are contiguous, [B, n, rows]."""

# mypy: disable-error-code="assignment, var-annotated"
from __future__ import annotations

import torch
from torch import Tensor

from . import plain_steps
from .needs_triton import tl, triton

_LANES = 256  # rows of a program of `rounding_errors`, ...
_COLUMNS = 8  # ... and the columns it takes
_TRIED_ROWS, _TRIED = 128, 11  # rows and grids of a program of `grid_errors`
# Of `scale_equations`: rows of a program, channels of a product beside and along its sum (at most the largest power of
# two that divides a group's size), warps, stages of operands on their way, and programs, one after another, that take
# the same group of other rows.
_ROWS, _UPPER, _INNER, _WARPS, _STAGES, _TOGETHER = 128, 64, 128, 8, 3, 8
_LEAST_INNER = 16
_SCALE = 2.0**12  # of a Hessian with a diagonal of at most 4, in float16


@triton.jit
def _rounding_errors_kernel(
    weight, codes, scales, zeros, group, channel, out, n, rows, groups, blocks,
    LANES: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    b = (tl.program_id(0) // blocks).to(tl.int64)
    r = (tl.program_id(0) % blocks) * LANES + tl.arange(0, LANES)
    inside = r < rows
    for i in range(COLUMNS):
        j = tl.program_id(1) * COLUMNS + i
        if j < n:
            mine = tl.load(channel + b * n + j)
            grid = (b * groups + tl.load(group + b * n + mine)) * rows + r
            at = (b * n + mine) * rows + r
            scale = tl.load(scales + grid, mask=inside, other=1.0)
            offset = tl.load(codes + at, mask=inside, other=0).to(tl.float32)
            offset -= tl.load(zeros + grid, mask=inside, other=0.0)
            w = tl.load(weight + at, mask=inside, other=0.0)
            tl.store(out + (b * n + j) * rows + r, w - scale * offset, mask=inside)


def rounding_errors(
    weight: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor, group: Tensor, channel: Tensor
) -> Tensor:
    """`plain_steps.rounding_errors` on a GPU, in one pass; floats are float32, codes uint8, all contiguous.

    Raises:
        ValueError: Wrong dtype, shape or stride.
    """
    (batch, n, rows), groups = weight.shape, scales.shape[1]
    _check(
        ("weight", weight, torch.float32, (batch, n, rows)),
        ("codes", codes, torch.uint8, (batch, n, rows)),
        ("scales", scales, torch.float32, (batch, groups, rows)),
        ("zeros", zeros, torch.float32, (batch, groups, rows)),
        ("group", group, torch.int64, (batch, n)),
        ("channel", channel, torch.int64, (batch, n)),
    )
    out = torch.empty_like(weight)
    if out.numel():
        blocks = triton.cdiv(rows, _LANES)
        _rounding_errors_kernel[(batch * blocks, triton.cdiv(n, _COLUMNS))](
            weight, codes, scales, zeros, group, channel, out, n, rows, groups, blocks, LANES=_LANES, COLUMNS=_COLUMNS
        )
    return out


@triton.jit
def _grid_errors_kernel(
    targets, channel, scales, zeros, gain, out, rows, batch, groups, size, grids, top, blocks,
    ROWS: tl.constexpr, TRIED: tl.constexpr,
):  # fmt: skip
    b = (tl.program_id(0) // blocks).to(tl.int64)
    r = (tl.program_id(0) % blocks) * ROWS + tl.arange(0, ROWS)
    g = tl.program_id(1)
    first = b * groups * size  # of the matrix's channels
    inside = r < rows
    tried, totals = (), ()
    for i in tl.static_range(TRIED):  # a target is read once for all of these
        a = tl.program_id(2) * TRIED + i
        at = ((a * batch + b) * groups + g) * rows + r
        scale = tl.load(scales + at, mask=inside & (a < grids), other=1.0)
        zero = tl.load(zeros + at, mask=inside & (a < grids), other=0.0)
        tried += ((at, scale, zero, 1 / scale),)  # a unit: near enough to compare grids
        totals += (tl.zeros([ROWS], dtype=tl.float32),)
    for i in range(size):
        mine = first + tl.load(channel + first + g * size + i)
        target = tl.load(targets + mine * rows + r, mask=inside, other=0.0)
        share = tl.load(gain + mine)
        sums = ()
        for k in tl.static_range(TRIED):
            _, scale, zero, points = tried[k]
            q = tl.minimum(tl.maximum(target * points + zero, 0.0), top)
            off = target - scale * ((q + 12582912.0) - 12582912.0 - zero)  # half to even, as in solve.py
            sums += (totals[k] + off * off * share,)
        totals = sums
    for i in tl.static_range(TRIED):
        tl.store(out + tried[i][0], totals[i], mask=inside & (tl.program_id(2) * TRIED + i < grids))


def grid_errors(targets: Tensor, channel: Tensor, scales: Tensor, zeros: Tensor, gain: Tensor, bits: int) -> Tensor:
    """`plain_steps.grid_errors` on a GPU; floats are float32, all contiguous.

    Raises:
        ValueError: Wrong dtype, shape or stride.
    """
    (batch, n, rows), (grids, _, groups, _) = targets.shape, scales.shape
    _check(
        ("targets", targets, torch.float32, (batch, n, rows)),
        ("channel", channel, torch.int64, (batch, n)),
        ("scales", scales, torch.float32, (grids, batch, groups, rows)),
        ("zeros", zeros, torch.float32, (grids, batch, groups, rows)),
        ("gain", gain, torch.float32, (batch, n)),
    )
    out = torch.empty_like(scales)
    if out.numel():
        blocks = triton.cdiv(rows, _TRIED_ROWS)
        _grid_errors_kernel[(batch * blocks, groups, triton.cdiv(grids, _TRIED))](
            targets, channel, scales, zeros, gain, out, rows, batch, groups, n // groups, grids, float(2**bits - 1),
            blocks, ROWS=_TRIED_ROWS, TRIED=_TRIED,
        )  # fmt: skip
    return out


def grouped_hessian(hessian: Tensor) -> tuple[Tensor, Tensor]:
    """`plain_steps.grouped_hessian` on a GPU: in float16."""
    exponent = torch.frexp(hessian.diagonal(dim1=1, dim2=2).amax(1)).exponent
    unit = torch.ldexp(torch.ones_like(exponent, dtype=hessian.dtype), exponent.clamp(-100, 100))
    return _narrowed(hessian, (_SCALE / unit)[:, None, None]), unit / _SCALE


@triton.jit
def _scale_matrix_kernel(
    hessian, centred, matrix, n, count, groups,
    SIZE: tl.constexpr, UPPER: tl.constexpr, INNER: tl.constexpr, ROWS: tl.constexpr, TOGETHER: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(1).to(tl.int64)
    hessian += b * n * n
    centred += b * count * n
    matrix += b * count * groups * groups
    # Programs that run at the same time take a few blocks of rows, whose codes stay in the cache, and all groups, those
    # with the most work first.
    wave = tl.program_id(0) // (TOGETHER * groups)
    several = tl.minimum(tl.cdiv(count, ROWS) - wave * TOGETHER, TOGETHER)
    within = tl.program_id(0) % (TOGETHER * groups)
    g = groups - 1 - within // several
    r = (wave * TOGETHER + within % several) * ROWS + tl.arange(0, ROWS)
    there = (r < count)[:, None]
    k = g * SIZE + tl.arange(0, INNER)
    rows = centred + r.to(tl.int64)[:, None] * n
    mine = tl.load(rows + k[None, :], mask=there, other=0.0)
    following = tl.load(rows + tl.arange(0, UPPER)[None, :], mask=there, other=0.0)
    row = matrix + r.to(tl.int64) * groups * groups
    m = tl.zeros([ROWS], dtype=tl.float32)
    STEPS: tl.constexpr = SIZE // UPPER
    for step in range((g + 1) * STEPS):  # one loop, whose operands are on their way before they are wanted
        i = step * UPPER + tl.arange(0, UPPER)
        other = following
        following = tl.load(rows + UPPER + i[None, :], mask=there & (step + 1 < (g + 1) * STEPS), other=0.0)
        if SIZE == INNER:
            product = tl.dot(mine, tl.load(hessian + k.to(tl.int64)[:, None] * n + i[None, :]))
        else:
            product = tl.zeros([ROWS, UPPER], dtype=tl.float32)
            for begin in range(0, SIZE, INNER):
                inner = (k + begin).to(tl.int64)
                some = tl.load(rows + inner[None, :], mask=there, other=0.0)
                product = tl.dot(some, tl.load(hessian + inner[:, None] * n + i[None, :]), acc=product)
        m += tl.sum(product * other.to(tl.float32), axis=1)
        last = (step + 1) % STEPS == 0
        h = step // STEPS
        tl.store(row + g * groups + h, m, mask=(r < count) & last)
        tl.store(row + h * groups + g, m, mask=(r < count) & last)
        m = tl.where(last, 0.0, m)


def scale_equations(
    hessian: tuple[Tensor, Tensor], codes: Tensor, zeros: Tensor, errors: Tensor, channel: Tensor, some: slice
) -> tuple[Tensor, Tensor]:
    """`plain_steps.scale_equations` on a GPU, where groups are of a size that 16 divides: on tensor cores, which take
    codes less their zeros as they are, and the Hessian and errors in float16.

    Half of M is computed, since it is symmetric.

    Returns:
        float32 [B, some, G, G] and [B, some, G].

    Raises:
        ValueError: Wrong dtype, shape or stride.
    """
    (batch, n, rows), groups = errors.shape, zeros.shape[1]
    narrow, unit = hessian
    _check(
        ("hessian", narrow, torch.float16, (batch, n, n)),
        ("codes", codes, torch.uint8, (batch, n, rows)),
        ("zeros", zeros, torch.float32, (batch, groups, rows)),
        ("errors", errors, torch.float32, (batch, n, rows)),
        ("channel", channel, torch.int64, (batch, n)),
    )
    size = n // groups
    tile = min(_INNER, size & -size)
    if tile < _LEAST_INNER:
        whole = narrow.to(errors.dtype).mul_(unit[:, None, None]), torch.ones_like(unit)
        matrix, right = plain_steps.scale_equations(whole, codes, zeros, errors, channel, some)
        return matrix.to(errors.dtype), right.to(errors.dtype)
    count = some.stop - some.start
    centred = plain_steps.taken(codes[:, :, some], channel).half()
    centred.unflatten(1, (groups, size)).sub_(zeros[:, :, None, some])  # exact
    matrix = errors.new_empty(batch, count, groups, groups)
    _scale_matrix_kernel[(triton.cdiv(count, _ROWS) * groups, batch)](
        narrow, centred.mT.contiguous(), matrix, n, count, groups,
        SIZE=size, UPPER=min(_UPPER, tile), INNER=tile, ROWS=_ROWS, TOGETHER=_TOGETHER,
        num_warps=_WARPS, num_stages=_STAGES,
    )  # fmt: skip
    pulled, of_rows = _pulled(narrow, errors[:, :, some])
    right = pulled.mul_(centred).unflatten(1, (groups, size)).sum(2).mul_(of_rows[:, None]).mT
    return matrix.mul_(unit[:, None, None, None]), right.mul_(unit[:, None, None])


def _pulled(hessian: Tensor, errors: Tensor) -> tuple[Tensor, Tensor]:
    """H e for the columns of errors [B, n, rows], in the units of a grouped Hessian and of each row; and these, [B,
    rows]."""
    exponent = torch.frexp(torch.linalg.vector_norm(errors, torch.inf, dim=1)).exponent.clamp(-100, 100)
    unit = torch.ldexp(torch.ones_like(exponent, dtype=errors.dtype), exponent)
    right = _narrowed(errors, (_SCALE / unit)[:, None])
    if right.is_cuda:
        product = torch.bmm(hessian, right, out_dtype=torch.float32)  # type: ignore[call-overload]
    else:
        product = hessian.float() @ right.float()
    return product, unit / _SCALE


def _narrowed(x: Tensor, scale: Tensor) -> Tensor:
    """x · scale in float16."""
    return torch.mul(x, scale, out=torch.empty(x.shape, dtype=torch.float16, device=x.device))


def _check(*tensors: tuple[str, Tensor, torch.dtype, tuple[int, ...]]) -> None:
    for name, tensor, dtype, shape in tensors:
        if tensor.shape != shape or tensor.dtype != dtype or not tensor.is_contiguous():
            raise ValueError(
                f"{name} must be contiguous {dtype} {list(shape)}, got {tensor.dtype} {list(tensor.shape)}"
            )
