"""The layout on disk, against an independent definition: the whole stream as one Python integer."""

from __future__ import annotations

import pytest
import torch
from gptq_plugin.kernels import reference

from gptq_plugin.layers import packing

pytest.importorskip("hypothesis")
from hypothesis import given, settings
from hypothesis import strategies as st

widths = st.sampled_from([2, 3, 4, 8])
sizes = st.integers(1, 100)
seeds = st.integers(0, 2**31)
quick = settings(max_examples=60, deadline=None)


def random_codes(n: int, m: int, bits: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2**bits, (n, m), generator=generator, dtype=torch.uint8)


def stream(codes: list[int], bits: int) -> list[int]:
    """The words of one column: code k at bits [k * bits, (k + 1) * bits) of one long integer."""
    whole = sum(code << (k * bits) for k, code in enumerate(codes))
    return [(whole >> (32 * w)) & 0xFFFFFFFF for w in range(-(-len(codes) * bits // 32))]


def unsigned(words: torch.Tensor) -> list[list[int]]:
    return [[int(word) & 0xFFFFFFFF for word in row] for row in words.tolist()]


@quick
@given(widths, sizes, st.integers(1, 5), seeds)
def test_codes_of_every_width_and_length_lie_in_one_little_endian_bit_stream(bits, n, m, seed):
    codes = random_codes(n, m, bits, seed)
    columns = [stream(column, bits) for column in codes.t().tolist()]
    assert unsigned(packing.pack(codes, bits).t()) == columns


@quick
@given(widths, sizes, sizes, seeds)
def test_packing_and_unpacking_a_weight_gives_it_back(bits, n_in, n_out, seed):
    codes = random_codes(n_out, n_in, bits, seed)
    qweight = packing.pack_weight(codes, bits)
    assert qweight.dtype == torch.int32 and qweight.is_contiguous()
    assert qweight.shape == (-(-n_in * bits // 32), n_out)
    assert torch.equal(packing.unpack_weight(qweight, bits, n_in), codes)


@quick
@given(widths, sizes, sizes, seeds)
def test_packing_and_unpacking_zeros_gives_them_back(bits, groups, n_out, seed):
    zeros = random_codes(groups, n_out, bits, seed)
    qzeros = packing.pack_zeros(zeros, bits)
    assert qzeros.shape == (groups, -(-n_out * bits // 32)) and qzeros.is_contiguous()
    assert torch.equal(packing.unpack_zeros(qzeros, bits, n_out), zeros)


@quick
@given(widths, st.integers(1, 40), st.integers(1, 5), seeds)
def test_unpacking_ignores_strides_and_the_unused_bits_of_the_last_word(bits, n, m, seed):
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(-(2**31), 2**31 - 1, (m, -(-n * bits // 32)), generator=generator, dtype=torch.int32).t()
    codes = reference.unpack(words, bits, n)
    assert codes.is_contiguous()
    for column, packed in zip(codes.t().tolist(), unsigned(words.t()), strict=True):
        whole = sum(word << (32 * w) for w, word in enumerate(packed))
        assert column == [(whole >> (k * bits)) & (2**bits - 1) for k in range(n)]


@pytest.mark.parametrize(
    ("bits", "codes", "words"),
    [
        (4, [8] * 8, [0x88888888]),
        (4, [1, 2, 3, 4, 5, 6, 7, 8], [0x87654321]),
        (4, [15, 1, 2], [0x21F]),  # an unfilled word ends in zeros
        (2, [3] + [0] * 14 + [2], [0x80000003]),
        (8, [0xEF, 0xBE, 0xAD, 0xDE], [0xDEADBEEF]),
        (3, [0] * 10 + [0b110, 0b101], [0x80000000, 0b1011]),  # code 10 lies in both words
        (3, [0] * 21 + [0b101, 0b111], [0, 0x80000000, 0b11110]),  # so does code 21
    ],
)
def test_hand_written_words(bits, codes, words):
    assert unsigned(packing.pack(torch.tensor(codes, dtype=torch.uint8)[:, None], bits)) == [[w] for w in words]


def test_a_code_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="a code of 8 does not fit in 3 bits"):
        packing.pack(torch.tensor([[1], [8]], dtype=torch.uint8), 3)


def test_wrong_shapes_widths_and_dtypes_are_refused():
    with pytest.raises(ValueError, match="bits must be one of 2, 3, 4, 8; got 5"):
        packing.pack(torch.zeros(4, 4, dtype=torch.uint8), 5)
    with pytest.raises(ValueError, match="codes must be uint8 with two dimensions"):
        packing.pack(torch.zeros(4, 4), 4)
    with pytest.raises(ValueError, match=r"33 codes of 3 bits need int32 words of shape \[4, m\]"):
        reference.unpack(torch.zeros(3, 4, dtype=torch.int32), 3, 33)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_weight_of_more_than_one_tile_is_unpacked_whole(bits, monkeypatch):
    monkeypatch.setattr(reference, "_TILE", 500)
    codes = random_codes(37, 203, bits, seed=bits)
    assert torch.equal(packing.unpack_weight(packing.pack_weight(codes, bits), bits, 203), codes)


def test_words_are_made_where_the_codes_are():
    codes = random_codes(5, 7, 3, seed=0)
    with torch.device("meta"):
        packed = packing.pack_weight(codes, 3)
        unpacked = packing.unpack_weight(packed, 3, 7)
    assert torch.equal(packed, packing.pack_weight(codes, 3)) and torch.equal(unpacked, codes)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_gpu_packs_the_same_words(bits):
    codes = random_codes(37, 75, bits, seed=bits)
    on_gpu = packing.pack_weight(codes.cuda(), bits)
    assert torch.equal(on_gpu.cpu(), packing.pack_weight(codes, bits))
    assert torch.equal(packing.unpack_weight(on_gpu, bits, 75).cpu(), codes)


@quick
@given(widths, sizes, st.integers(1, 40), seeds)
def test_a_weight_is_dequantized_to_the_same_values_where_it_is_traced(bits, n, m, seed):
    generator = torch.Generator().manual_seed(seed)
    groups = 1 + seed % 3
    packed = (
        packing.pack_weight(random_codes(m, n, bits, seed), bits),
        packing.pack_zeros(random_codes(groups, m, bits, seed + 1), bits),
        torch.rand(groups, m, generator=generator).half(),
        torch.randint(0, groups, (n,), dtype=torch.int32, generator=generator),
        bits,
    )
    assert torch.equal(packing.traceable_weight(*packed), reference.dequantize(*packed, torch.float32))


@quick
@given(widths, st.integers(1, 40), seeds, st.sampled_from([-1, 0, 1, 2]))
def test_a_number_is_added_to_packed_zeros_as_to_each(bits, m, seed, number):
    zeros = random_codes(3, m, bits, seed)
    for own in (zeros, torch.zeros_like(zeros), torch.full_like(zeros, 2**bits - 1)):
        wanted = packing.pack_zeros((own.int() + number).remainder(2**bits).to(torch.uint8), bits)
        assert torch.equal(packing.add_to_zeros(packing.pack_zeros(own, bits), number, bits, m), wanted)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("m", [32, 33])
def test_zeros_are_all_one_only_if_each_is(bits, m):
    zeros = torch.full((2, m), 2 ** (bits - 1), dtype=torch.uint8)
    assert packing.are_symmetric(packing.pack_zeros(zeros, bits), bits, m)
    assert not packing.are_all(packing.pack_zeros(zeros, bits), 1, bits, m)
    zeros[1, m - 1] -= 1
    assert not packing.are_symmetric(packing.pack_zeros(zeros, bits), bits, m)
