"""Quantized weights in plain PyTorch: the definition, the CPU path, the oracle of the Triton kernels.

The tensors of one layer with `in` inputs, `out` outputs and G groups, in memory::

    qweight  int32 [ceil(in * bits / 32), out]   codes q, one bit stream along `in`
    qzeros   int32 [G, ceil(out * bits / 32)]    zeros z, one bit stream along `out`; always the true zeros
    scales   float16 [G, out]                    s
    g_idx    int32 [in]                          group of every input channel, in [0, G)

    W[o, i] = s[g_idx[i], o] * (q[i, o] - z[g_idx[i], o])

In a stream, code k occupies bits [k * bits, (k + 1) * bits), the lowest bit of a word first; 3-bit codes may straddle
two words. The product has at most 11 + 8 significant bits: float32 holds it exactly, and a weight is rounded once, to
the requested dtype.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

BITS = (2, 3, 4, 8)  # widths of a code

# Codes expanded at a time: a tile stays in the CPU's cache, a whole layer would be bound by page faults.
_TILE = 2**20


def stream_period(bits: int) -> tuple[int, int]:
    """(codes, words) after which the bit stream is aligned to a word again."""
    if bits not in BITS:
        raise ValueError(f"bits must be one of 2, 3, 4, 8; got {bits!r}")
    common = math.gcd(bits, 32)
    return 32 // common, bits // common


def words_for(n: int, bits: int) -> int:
    """Number of int32 words that hold n codes."""
    return -(-n * bits // 32)


def unpack(words: Tensor, bits: int, n: int) -> Tensor:
    """Reads n codes from each column's bit stream.

    Args:
        words: int32 [ceil(n * bits / 32), m], any strides; bits after the n-th code are ignored.
        bits: Width of a code: 2, 3, 4 or 8.
        n: Codes in a column.

    Returns:
        uint8 [n, m], contiguous.

    Raises:
        ValueError: Wrong dtype, number of dimensions or number of words.
    """
    period, period_words = stream_period(bits)
    if words.dtype != torch.int32 or words.dim() != 2 or words.shape[0] != words_for(n, bits):
        raise ValueError(
            f"{n} codes of {bits} bits need int32 words of shape [{words_for(n, bits)}, m]; "
            f"got {words.dtype} {list(words.shape)}"
        )
    columns = words.shape[1]
    codes = torch.empty(n, columns, dtype=torch.uint8, device=words.device)
    rows = max(1, _TILE // (period * max(1, columns)))
    for block in range(0, -(-n // period), rows):
        first, last = block * period, min((block + rows) * period, n)
        codes[first:last] = expand(words[block * period_words : (block + rows) * period_words], bits, last - first)
    return codes


def dequantize(qweight: Tensor, qzeros: Tensor, scales: Tensor, g_idx: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    """Dequantizes a weight.

    Args:
        qweight, qzeros, scales, g_idx: As in the module's docstring.
        bits: Width of a code: 2, 3, 4 or 8.
        dtype: Any floating dtype; weights are exact in float32 and rounded once to it.

    Returns:
        [out, in] in `dtype`: the transposed view of a contiguous [in, out].

    Raises:
        ValueError: An argument has the wrong dtype or shape; the message names it.
    """
    check_weight(qweight, qzeros, scales, g_idx, bits)
    weight = torch.empty(len(g_idx), qweight.shape[1], dtype=dtype, device=qweight.device)
    for columns, tile in _tiles(qweight, qzeros, scales, g_idx, bits):
        weight[:, columns] = tile
    return weight.t()


def matmul(
    x: Tensor,
    qweight: Tensor,
    qzeros: Tensor,
    scales: Tensor,
    g_idx: Tensor,
    bits: int,
    bias: Tensor | None = None,
) -> Tensor:
    """Computes x Wᵀ + bias, a tile of outputs at a time, with W rounded to x's dtype.

    Args:
        x: Any floating dtype, [..., in].
        qweight, qzeros, scales, g_idx: As in the module's docstring, on x's device.
        bits: Width of a code: 2, 3, 4 or 8.
        bias: [out], any floating dtype; rounded to x's.

    Returns:
        [..., out] in x's dtype.

    Raises:
        ValueError: An argument has the wrong dtype, shape or device; the message names it.
    """
    check_weight(qweight, qzeros, scales, g_idx, bits)
    check_input(x, qweight, g_idx, bias)
    rows = x.reshape(-1, len(g_idx))
    y = rows.new_empty(rows.shape[0], qweight.shape[1])
    for columns, tile in _tiles(qweight, qzeros, scales, g_idx, bits):
        y[:, columns] = rows @ tile.to(x.dtype)
    if bias is not None:
        y += bias.to(x.dtype)
    return y.view(*x.shape[:-1], qweight.shape[1])


def check_weight(qweight: Tensor, qzeros: Tensor, scales: Tensor, g_idx: Tensor, bits: int) -> None:
    """Raises ValueError, naming the tensor, if dtype, shape or device differ from the module's docstring.

    Does not read the values of g_idx, which would synchronize: readers of files check that they lie in [0, G).
    """
    stream_period(bits)
    if qweight.dim() != 2 or scales.dim() != 2 or g_idx.dim() != 1:
        raise ValueError(
            "qweight and scales must have two dimensions and g_idx one; "
            f"got {list(qweight.shape)}, {list(scales.shape)}, {list(g_idx.shape)}"
        )
    n_in, n_out, groups = len(g_idx), qweight.shape[1], scales.shape[0]
    expected = (
        ("qweight", qweight, torch.int32, [words_for(n_in, bits), n_out]),
        ("qzeros", qzeros, torch.int32, [groups, words_for(n_out, bits)]),
        ("scales", scales, torch.float16, [groups, n_out]),
        ("g_idx", g_idx, torch.int32, [n_in]),
    )
    for name, tensor, dtype, shape in expected:
        if tensor.dtype != dtype or list(tensor.shape) != shape:
            raise ValueError(
                f"{name} must be {dtype} {shape} for {n_in} inputs, {n_out} outputs, {groups} groups and "
                f"{bits} bits; got {tensor.dtype} {list(tensor.shape)}"
            )
        if tensor.device != qweight.device:
            raise ValueError(f"{name} is on {tensor.device} and qweight on {qweight.device}: move the whole layer")


def check_input(x: Tensor, qweight: Tensor, g_idx: Tensor, bias: Tensor | None) -> None:
    """Raises ValueError unless x is floating [..., in] and bias None or [out], both on qweight's device."""
    if not x.is_floating_point():
        raise ValueError(f"x must have a floating dtype, got {x.dtype}")
    if x.dim() == 0 or x.shape[-1] != len(g_idx):
        raise ValueError(f"x must end in {len(g_idx)} input channels, got shape {list(x.shape)}")
    if bias is not None and list(bias.shape) != [qweight.shape[1]]:
        raise ValueError(f"bias must have shape [{qweight.shape[1]}], got {list(bias.shape)}")
    for name, tensor in (("x", x), ("bias", bias)):
        if tensor is not None and tensor.device != qweight.device:
            raise ValueError(f"{name} is on {tensor.device}, the weights on {qweight.device}: move one of them")


def _tiles(qweight: Tensor, qzeros: Tensor, scales: Tensor, g_idx: Tensor, bits: int) -> Iterator[tuple[slice, Tensor]]:
    """Yields (outputs, their weights as float32 [in, len]), tile by tile."""
    n_in, n_out = len(g_idx), qweight.shape[1]
    groups = scales.shape[0]
    zeros = unpack(qzeros.t(), bits, n_out).t().float()
    scales = scales.float()
    # Contiguous groups of equal size broadcast over their channels; others are gathered, in twice the time.
    size = n_in // max(1, groups)
    natural = torch.arange(groups, dtype=torch.int32, device=g_idx.device).repeat_interleave(size)
    contiguous = torch.equal(g_idx, natural)
    width = max(1, _TILE // max(1, n_in))
    for start in range(0, n_out, width):
        columns = slice(start, min(start + width, n_out))
        tile = expand(qweight[:, columns], bits, n_in).float()
        if contiguous:
            grouped = tile.unflatten(0, (groups, size))
            grouped -= zeros[:, None, columns]
            grouped *= scales[:, None, columns]
        else:
            tile -= zeros[:, columns][g_idx]
            tile *= scales[:, columns][g_idx]
        yield columns, tile


def expand(words: Tensor, bits: int, n: int) -> Tensor:
    """`unpack` to int32, without checks."""
    period, period_words = stream_period(bits)
    columns = words.shape[1]
    missing = -len(words) % period_words
    if missing:
        words = torch.cat([words, words.new_zeros(missing, columns)])
    words = words.reshape(len(words) // period_words, period_words, columns)
    bit = torch.arange(period, dtype=torch.int32, device=words.device) * bits
    shift = (bit % 32)[:, None]
    # A word broadcasts to its codes; with several words in a period each code gathers its own.
    codes = (words if period_words == 1 else words[:, bit // 32]) >> shift
    codes &= (1 << (32 - shift).clamp(max=bits)) - 1  # also drops the sign bits shifted in
    for k in range(period):
        word, within = divmod(k * bits, 32)
        if within + bits > 32:
            codes[:, k] |= (words[:, word + 1] << (32 - within)) & ((1 << bits) - 1)
    return codes.reshape(-1, columns)[:n]


def clipping_errors(weight: Tensor, scales: Tensor, zeros: Tensor, spread: Tensor, gain: Tensor, bits: int) -> Tensor:
    """Expected loss of every row on each of A grids, Σ_j gain_j·E[(t_j − Round(t_j))²].

    GPTQ rounds a target t_j that has moved away from the weight: here by `spread` steps of the widest grid, to either
    side.

    Args:
        weight: [rows, in], groups contiguous.
        scales, zeros: [A, rows, G], the grids; the first alternative's are the widest.
        spread: [in], in steps; or [B, in], for the rows of B matrices, one below the other.
        gain: Like `spread`.
        bits: Width of a code.

    Returns:
        [A, rows], in weight's dtype.
    """
    if spread.dim() == 2:
        count = len(spread)
        each = zip(weight.chunk(count), scales.chunk(count, 1), zeros.chunk(count, 1), spread, gain, strict=True)
        return torch.cat([clipping_errors(w, s, z, own, d, bits) for w, s, z, own, d in each], 1)
    alternatives, rows, groups = scales.shape
    w = weight.view(rows, groups, -1)
    moved = spread.view(groups, -1) * scales[0, :, :, None]
    total = weight.new_zeros(alternatives, rows)
    for a in range(alternatives):
        scale, zero = scales[a, :, :, None], zeros[a, :, :, None]
        for target in (w + moved, w - moved):
            q = (target / scale).add_(zero).round_().clamp_(0, 2**bits - 1)
            error = target.sub_(q.sub_(zero).mul_(scale)).square_()
            total[a] += error.view(rows, -1) @ gain
    return total / 2


def nearest_errors(weight: Tensor, scales: Tensor, zeros: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    """Errors w − q of rounding every weight to the nearest point of its grid.

    Args:
        weight: [rows, in], groups contiguous.
        scales, zeros: [rows, G], the grids.
        bits: Width of a code.
        dtype: Of the result.

    Returns:
        [rows, in].
    """
    groups, scale, zero = weight.unflatten(1, (scales.shape[1], -1)), scales[:, :, None], zeros[:, :, None]
    codes = (groups / scale).add_(zero).round_().clamp_(0, 2**bits - 1)
    return torch.sub(groups, codes.sub_(zero).mul_(scale), out=codes).flatten(1).to(dtype)


def permute(matrices: Tensor, order: Tensor, factors: Tensor) -> Tensor:
    """Permutes rows and columns of each matrix and scales it: factor · matrix[order][:, order].

    Args:
        matrices: [B, n, n].
        order: int64 [B, n].
        factors: [B], in the matrices' dtype.

    Returns:
        [B, n, n], contiguous.
    """
    chosen = [matrix[which][:, which] for matrix, which in zip(matrices, order, strict=True)]
    return torch.stack(chosen).mul_(factors[:, None, None])


def split_to_float16(x: Tensor, scale: float, pieces: str, dim: int) -> Tensor:
    """Splits x · scale into a sum of two float16 numbers, high and low, concatenated along a dimension.

    Args:
        x: [B, rows, columns], rows contiguous; |x · scale| must be below 65504.
        scale: A power of two.
        pieces: The order of concatenation, "h" for the high part and "l" for the low one, such as "hlh".
        dim: 1 or 2; becomes len(pieces) times as long.

    Returns:
        float16, contiguous.
    """
    assert x.shape[2] <= 1 or x.stride(2) == 1  # the kernel reads no other rows
    value = x * scale
    parts = {"h": value.half(), "l": (value - value.half()).half()}
    return torch.cat([parts[piece] for piece in pieces], dim)
