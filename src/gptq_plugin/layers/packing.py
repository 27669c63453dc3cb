"""Packs codes into int32 words, and converts the zeros of GPTQ's two file formats.

Words form one little-endian bit stream along the packed dimension: code k of width b occupies bits
[k * b, (k + 1) * b). This holds for every width; 3-bit codes straddle words (32 codes in 3 words). A last word that is
not full is padded with zero bits.

``gptq_v2`` stores true zeros, ``gptq`` (v1, the first AutoGPTQ's) stores zero - 1. In memory zeros are always true:
only `zeros_to_disk` and `zeros_from_disk` deal with the -1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gptq_plugin.errors import ExportError
from gptq_plugin.kernels.reference import stream_period, unpack, words_for


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


def zeros_to_disk(qzeros: Tensor, bits: int, out_features: int, checkpoint_format: str) -> Tensor:
    """Converts packed true zeros to those stored in a file of `checkpoint_format`.

    Args:
        qzeros: int32 [G, ceil(out_features * bits / 32)], true zeros.
        bits: Width of a code: 2, 3, 4 or 8.
        out_features: Zeros per group.
        checkpoint_format: ``"gptq"`` (v1) or ``"gptq_v2"``.

    Returns:
        int32, the shape of `qzeros`.

    Raises:
        ExportError: A zero is 0, which v1 cannot hold: readers treat the -1 differently, and some corrupt neighbours.
    """
    if not _stores_minus_one(checkpoint_format):
        return qzeros
    zeros = unpack_zeros(qzeros, bits, out_features)
    empty = int((zeros == 0).sum())
    if empty:
        raise ExportError(
            f"{empty} of {zeros.numel()} zeros are 0, and checkpoint_format='gptq' (v1) stores zero - 1, "
            "which tools read differently: export with checkpoint_format='gptq_v2' or quantize with sym=True"
        )
    return pack_zeros(zeros - 1, bits)


def zeros_from_disk(stored: Tensor, bits: int, out_features: int, checkpoint_format: str) -> Tensor:
    """The inverse of `zeros_to_disk`; a v1 value of 2^bits - 1 is read as a zero of 0 (-1 in `bits` bits)."""
    if not _stores_minus_one(checkpoint_format):
        return stored
    return pack_zeros((unpack_zeros(stored, bits, out_features) + 1) & (2**bits - 1), bits)


def _stores_minus_one(checkpoint_format: str) -> bool:
    if checkpoint_format not in ("gptq", "gptq_v2"):
        raise ValueError(f"checkpoint_format must be 'gptq' or 'gptq_v2', got {checkpoint_format!r}")
    return checkpoint_format == "gptq"
