"""x Wᵀ for quantized W on a GPU, in Triton; `reference` defines the tensors and the result.

One kernel reads codes, zeros and scales, expands a [BLOCK_K, BLOCK_N] tile of weights in registers and feeds it to
`tl.dot`, accumulating in float32. For many rows, where arithmetic outweighs reading the weights, W is written once to
a scratch buffer for the vendor's matmul. As in `reference`, a weight is exact in float32 and rounded once to x's dtype,
so results differ only in the order of additions.

Every combination works: 2, 3, 4 and 8 bits, any group size, any g_idx, any number of rows, and sizes that fill neither
a tile nor a word.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from .needs_triton import tl, triton
from .reference import check_input, check_weight

DTYPES = (torch.float16, torch.bfloat16, torch.float32)

# Rows from which W is dequantized to scratch and multiplied there: the pass over W is then the smaller part.
SCRATCH_ROWS = 128


@triton.jit
def _load_codes(words, shift, step, mask, BITS: tl.constexpr):
    """The code `shift` bits into the int32 at `words`; it may end in the word `step` elements further on."""
    codes = tl.load(words, mask=mask, other=0).to(tl.uint32, bitcast=True) >> shift
    if 32 % BITS != 0:
        spills = shift > 32 - BITS
        upper = tl.load(words + step, mask=mask & spills, other=0).to(tl.uint32, bitcast=True)
        codes |= (upper << 1) << (31 - shift)  # two steps: a shift by 32 is undefined
    return (codes & ((1 << BITS) - 1)).to(tl.int32)


@triton.jit
def _load_weights(
    qweight,
    qzeros,
    scales,
    g_idx,
    k0,
    n,
    K,
    N,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Weights of input channels k0 and up for outputs n, float32 [BLOCK_K, len(n)].

    GROUP > 0: the tile lies in one group, k0 // GROUP. GROUP == 0: each channel's group is read from g_idx.
    Outside of the matrix values are finite, not always zero; the caller masks x.
    """
    k = k0 + tl.arange(0, BLOCK_K)
    column = n[None, :]
    if 32 % BITS == 0:
        # Load each word once and spread it over its codes.
        PER_WORD: tl.constexpr = 32 // BITS
        word = k0 // PER_WORD + tl.arange(0, BLOCK_K // PER_WORD)
        inside = (word < tl.cdiv(K, PER_WORD))[:, None] & (column < N)
        words = tl.load(qweight + word.to(tl.int64)[:, None] * N + column, mask=inside, other=0)
        shifts = (tl.arange(0, PER_WORD) * BITS)[None, :, None]
        spread = (words.to(tl.uint32, bitcast=True)[:, None, :] >> shifts) & ((1 << BITS) - 1)
        codes = tl.reshape(spread, (BLOCK_K, n.shape[0])).to(tl.int32)
    else:
        bit = k * BITS
        words = qweight + (bit // 32).to(tl.int64)[:, None] * N + column
        codes = _load_codes(words, (bit % 32)[:, None], N, (k < K)[:, None] & (column < N), BITS)

    if GROUP > 0:
        group = tl.zeros((1, 1), tl.int32) + k0 // GROUP
    else:
        group = tl.load(g_idx + k, mask=k < K, other=0)[:, None]
    bit = column * BITS
    zero_words = (N * BITS + 31) // 32
    zeros = _load_codes(qzeros + group * zero_words + bit // 32, bit % 32, 1, column < N, BITS)
    scale = tl.load(scales + group * N + column, mask=column < N, other=0).to(tl.float32)
    return (codes - zeros).to(tl.float32) * scale


@triton.jit
def _matmul_kernel(
    x, qweight, qzeros, scales, g_idx, bias, out, M, N, K,
    BITS: tl.constexpr, GROUP: tl.constexpr, HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    row = m.to(tl.int64)[:, None]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k0 in range(0, K, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        a = tl.load(x + row * K + k[None, :], mask=(m < M)[:, None] & (k < K)[None, :], other=0)
        w = _load_weights(qweight, qzeros, scales, g_idx, k0, n, K, N, BITS, GROUP, BLOCK_K)
        acc = tl.dot(a, w.to(a.dtype), acc, input_precision="ieee")
    if HAS_BIAS:
        acc += tl.load(bias + n, mask=n < N, other=0).to(tl.float32)[None, :]
    mask = (m < M)[:, None] & (n < N)[None, :]
    tl.store(out + row * N + n[None, :], acc.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _dequantize_kernel(
    qweight, qzeros, scales, g_idx, out, N, K,
    BITS: tl.constexpr, GROUP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k0 = tl.program_id(1) * BLOCK_K
    k = k0 + tl.arange(0, BLOCK_K)
    w = _load_weights(qweight, qzeros, scales, g_idx, k0, n, K, N, BITS, GROUP, BLOCK_K)
    mask = (k < K)[:, None] & (n < N)[None, :]
    tl.store(out + k.to(tl.int64)[:, None] * N + n[None, :], w.to(out.dtype.element_ty), mask=mask)


def quant_matmul(
    x: Tensor,
    qweight: Tensor,
    qzeros: Tensor,
    scales: Tensor,
    g_idx: Tensor,
    bits: int,
    bias: Tensor | None = None,
    *,
    group_size: int | None = None,
) -> Tensor:
    """x Wᵀ + bias, accumulated in float32; float32 x is not rounded to TF32.

    All tensors are on one GPU; those of the weight are contiguous. Sizes are free: unused bits of a
    last word are ignored.

    Args:
        x: float16, bfloat16 or float32 [..., in]; copied unless its rows are contiguous.
        qweight: int32 [ceil(in * bits / 32), out], codes packed along `in`.
        qzeros: int32 [G, ceil(out * bits / 32)], true zeros packed along `out`.
        scales: float16 [G, out].
        g_idx: int32 [in], every value in [0, G); others read out of bounds.
        bits: Width of a code: 2, 3, 4 or 8.
        bias: [out], any floating dtype.
        group_size: Promises that g_idx[i] == i // group_size. Groups divisible by 16 are then read once a tile, and
            g_idx is not read. None: read g_idx.

    Returns:
        [..., out] in x's dtype.

    Raises:
        ValueError: An argument has the wrong dtype, shape, device or stride; the message names it.
    """
    check_weight(qweight, qzeros, scales, g_idx, bits)
    check_input(x, qweight, g_idx, bias)
    _check_launch(x.dtype, qweight=qweight, qzeros=qzeros, scales=scales, g_idx=g_idx)
    n_in, n_out = len(g_idx), qweight.shape[1]
    rows = x.reshape(-1, n_in).contiguous()
    if len(rows) >= SCRATCH_ROWS:
        weight = dequantize(qweight, qzeros, scales, g_idx, bits, x.dtype, group_size=group_size)
        y = torch.nn.functional.linear(rows, weight, None if bias is None else bias.to(x.dtype))
    else:
        y = rows.new_empty(len(rows), n_out)
        if y.numel():
            # 128 bytes of a row of x: a float32 tile then fits a small GPU's shared memory too.
            block_k, group = _tile_depth(n_in, group_size, 128 // x.element_size())
            block_m = min(64, max(16, triton.next_power_of_2(len(rows))))
            # With few rows there are too few programs: narrower tiles make more.
            block_n = 32 if block_m == 16 else 64
            with _device(x):
                _matmul_kernel[(triton.cdiv(n_out, block_n), triton.cdiv(len(rows), block_m))](
                    rows, qweight, qzeros, scales, g_idx, None if bias is None else bias.contiguous(), y,
                    len(rows), n_out, n_in, BITS=bits, GROUP=group, HAS_BIAS=bias is not None,
                    BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k, num_warps=4, num_stages=3,
                )  # fmt: skip
    return y.view(*x.shape[:-1], n_out)


def dequantize(
    qweight: Tensor,
    qzeros: Tensor,
    scales: Tensor,
    g_idx: Tensor,
    bits: int,
    dtype: torch.dtype,
    *,
    group_size: int | None = None,
) -> Tensor:
    """Dequantizes the weight; arguments and errors are those of `quant_matmul`.

    Returns:
        [out, in] in `dtype` (float16, bfloat16 or float32): the transposed view of a contiguous [in, out].
    """
    check_weight(qweight, qzeros, scales, g_idx, bits)
    _check_launch(dtype, qweight=qweight, qzeros=qzeros, scales=scales, g_idx=g_idx)
    n_in, n_out = len(g_idx), qweight.shape[1]
    weight = torch.empty(n_in, n_out, dtype=dtype, device=qweight.device)
    if weight.numel():
        block_k, group = _tile_depth(n_in, group_size, 32)
        with _device(qweight):
            _dequantize_kernel[(triton.cdiv(n_out, 128), triton.cdiv(n_in, block_k))](
                qweight, qzeros, scales, g_idx, weight, n_out, n_in, BITS=bits, GROUP=group,
                BLOCK_N=128, BLOCK_K=block_k, num_warps=4,
            )  # fmt: skip
    return weight.t()


def _tile_depth(n_in: int, group_size: int | None, deepest: int) -> tuple[int, int]:
    """(BLOCK_K, GROUP) for the kernels: the deepest tile within a group, or GROUP 0 to read g_idx."""
    if group_size is None:
        return deepest, 0
    if group_size >= n_in:  # one group: no tile can leave it
        return deepest, n_in
    divisor = group_size & -group_size  # its largest power of two
    return (min(deepest, divisor), group_size) if divisor >= 16 else (deepest, 0)


def _check_launch(dtype: torch.dtype, **weight: Tensor) -> None:
    if dtype not in DTYPES:
        raise ValueError(f"the Triton kernels compute in float16, bfloat16 or float32, not {dtype}: cast x")
    for name, tensor in weight.items():
        if not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous, got strides {tensor.stride()}: call .contiguous() once")
    interpreted = not isinstance(_matmul_kernel, triton.JITFunction)
    if interpreted and dtype == torch.bfloat16:
        raise ValueError("Triton's interpreter (TRITON_INTERPRET=1) computes bfloat16 wrongly: use float16 or float32")
    if not interpreted and next(iter(weight.values())).device.type != "cuda":
        raise ValueError("the Triton kernels need CUDA tensors; on other devices use gptq_plugin.kernels.reference")


def _device(tensor: Tensor) -> AbstractContextManager[Any]:
    """Makes the tensor's device current: Triton launches there."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()
