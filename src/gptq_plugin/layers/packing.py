"""Packs codes and zeros into int32 words.

Words form one little-endian bit stream along the packed dimension: code k of width b occupies bits
[k * b, (k + 1) * b). This holds for every width; 3-bit codes straddle words (32 codes in 3 words). A last word that is
not full is padded with zero bits. In memory zeros are true ones; formats may store others (`checkpoint.formats`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from gptq_plugin.kernels.reference import expand, stream_period, unpack, words_for


def pack(codes: Tensor, bits: int) -> Tensor:
    """Packs each column's codes into a bit stream; the inverse of `kernels.reference.unpack`.

    Args:
        codes: uint8 [n, m], every code below 2^bits.
        bits: Width of a code: 2, 3, 4 or 8.

    Returns:
        int32 [ceil(n * bits / 32), m], contiguous.

    Raises:
        ValueError: Wrong dtype or number of dimensions, or a code that does not fit; codes on a GPU are not checked,
            which would synchronize.
    """
    period, period_words = stream_period(bits)
    if codes.dtype != torch.uint8 or codes.dim() != 2:
        raise ValueError(f"codes must be uint8 with two dimensions, got {codes.dtype} {list(codes.shape)}")
    if codes.numel() and not codes.is_cuda and int(codes.max()) >= 2**bits:
        raise ValueError(f"a code of {int(codes.max())} does not fit in {bits} bits")
    n, columns = codes.shape
    blocks = -(-n // period)
    if blocks * period != n:
        codes = torch.cat([codes, codes.new_zeros(blocks * period - n, columns)])
    codes = codes.reshape(blocks, period, columns)
    if period_words == 1 and codes.is_cuda:  # a loop would keep the GPU waiting for Python
        shifts = torch.arange(0, 32, bits, dtype=torch.int32, device=codes.device)
        return (codes << shifts[:, None]).sum(1, dtype=torch.int32)  # no bits overlap, so the sum is an or
    words = torch.zeros(blocks, period_words, columns, dtype=torch.int32, device=codes.device)
    for k in range(period):
        word, shift = divmod(k * bits, 32)
        code = codes[:, k].int()
        words[:, word] |= code << shift
        if shift + bits > 32:
            words[:, word + 1] |= code >> (32 - shift)
    return words.view(blocks * period_words, columns)[: words_for(n, bits)].contiguous()


def pack_weight(codes: Tensor, bits: int) -> Tensor:
    """Packs a weight's codes, uint8 [out, in], into `qweight`, int32 [ceil(in * bits / 32), out]."""
    return pack(codes.t().contiguous(), bits)


def unpack_weight(qweight: Tensor, bits: int, in_features: int) -> Tensor:
    """The inverse of `pack_weight`: uint8 [out, in], contiguous."""
    return unpack(qweight, bits, in_features).t().contiguous()


def pack_zeros(zeros: Tensor, bits: int) -> Tensor:
    """Packs true zeros, uint8 [G, out], into words, int32 [G, ceil(out * bits / 32)]."""
    return pack(zeros.t(), bits).t().contiguous()


def unpack_zeros(qzeros: Tensor, bits: int, out_features: int) -> Tensor:
    """The inverse of `pack_zeros`: uint8 [G, out], contiguous."""
    return unpack(qzeros.t(), bits, out_features).t().contiguous()


def are_symmetric(qzeros: Tensor, bits: int, out_features: int) -> bool:
    """True if every packed true zero is 2^(bits-1)."""
    return are_all(qzeros, 2 ** (bits - 1), bits, out_features)


def are_all(qzeros: Tensor, zero: int, bits: int, out_features: int) -> bool:
    """True if every packed zero is this one."""
    if fills_words(bits, out_features):
        return bool((qzeros == _repeated(zero, bits)).all())
    return bool((unpack_zeros(qzeros, bits, out_features) == zero).all())


def add_to_zeros(qzeros: Tensor, number: int, bits: int, out_features: int) -> Tensor:
    """Packed zeros to each of which a number is added, modulo 2^bits."""
    if fills_words(bits, out_features):  # in the words: thousands of experts' zeros are packed one by one otherwise
        top = _repeated(2 ** (bits - 1), bits)
        sums = (qzeros & ~top) + _repeated(number % 2 ** (bits - 1), bits)  # of the bits below the highest: no carry
        upper = _repeated(number % 2**bits // 2 ** (bits - 1) * 2 ** (bits - 1), bits)
        return sums ^ (qzeros & top) ^ upper
    return pack_zeros((unpack_zeros(qzeros, bits, out_features) + number) & (2**bits - 1), bits)


def fills_words(bits: int, codes: int) -> bool:
    """True if so many codes fill their words, and none lies in two."""
    return 32 % bits == 0 and codes * bits % 32 == 0


def _repeated(code: int, bits: int) -> int:
    """A word of equal codes, as int32."""
    word = sum(code << at for at in range(0, 32, bits))
    return word - 2**32 if word >= 2**31 else word


def traceable_weight(qweight: Tensor, qzeros: Tensor, scales: Tensor, g_idx: Tensor, bits: int) -> Tensor:
    """W as float32 [out, in], the values of `reference.dequantize`, in operations that do not depend on values, so that
    they can be traced. No checks."""
    codes = expand(qweight, bits, len(g_idx)).float()
    zeros = expand(qzeros.t(), bits, qweight.shape[1]).t().float()
    return ((codes - zeros[g_idx]) * scales.float()[g_idx]).t()
