"""The plain definitions against the formula in float64. Uninitialised outputs hold NaN (`conftest.poisoned`)."""

from __future__ import annotations

import itertools

import pytest
import torch
from gptq_plugin.kernels import reference

from kernel_cases import CASES, DTYPES, Case, assert_product, make_grids, make_layer


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_plain_definition_is_the_formula(case, bits, dtype):
    layer = make_layer(case, bits)
    assert torch.equal(reference.dequantize(*layer.packed, dtype), layer.weight.to(dtype))
    x, bias = torch.randn(3, case.n_in, dtype=dtype), torch.randn(case.n_out, dtype=dtype)
    assert_product(reference.matmul(x, *layer.packed, bias), x, layer.weight, bias)
    assert_product(reference.matmul(x, *layer.packed), x, layer.weight, None)


@pytest.mark.parametrize("case", [Case(96, 70, 48), Case(99, 130, 11, act_order=True)], ids=str)
def test_the_plain_definition_is_the_same_in_many_tiles(case, monkeypatch):
    layer, x = make_layer(case, 3), torch.randn(4, case.n_in)
    monkeypatch.setattr(reference, "_TILE", 7 * case.n_in)
    assert torch.equal(reference.dequantize(*layer.packed, torch.float64), layer.weight)
    assert_product(reference.matmul(x, *layer.packed), x, layer.weight, None)


@pytest.fixture
def expanded(monkeypatch):
    """The shapes of codes that were expanded, one after the other."""
    shapes, expand = [], reference.expand
    monkeypatch.setattr(
        reference, "expand", lambda words, bits, n: shapes.append((n, words.shape[1])) or expand(words, bits, n)
    )
    return shapes


@pytest.mark.parametrize("tile", [1, 20, 200, 2**20])
@pytest.mark.parametrize(("n", "columns"), [(100, 1), (100, 3), (16, 90)])
def test_every_code_is_expanded_once_and_no_more_at_a_time_than_fit_a_tile(n, columns, tile, expanded, monkeypatch):
    monkeypatch.setattr(reference, "_TILE", tile)
    reference.unpack(torch.zeros(reference.words_for(n, 4), columns, dtype=torch.int32), 4, n)
    at_once = 8 * max(1, tile // (8 * columns))  # whole words
    assert expanded == [(min(at_once, n - start), columns) for start in range(0, n, at_once)]


@pytest.mark.parametrize("tile", [1, 40, 200, 2**20])
@pytest.mark.parametrize(("n_in", "n_out"), [(1, 50), (30, 11), (75, 3)])
def test_every_weight_is_expanded_once_and_no_more_at_a_time_than_fit_a_tile(n_in, n_out, tile, expanded, monkeypatch):
    layer, unpack = make_layer(Case(n_in, n_out, 32), 4), reference.unpack
    monkeypatch.setattr(reference, "_TILE", tile)
    monkeypatch.setattr(reference, "unpack", lambda *args: (unpack(*args), expanded.clear())[0])  # of the zeros
    reference.dequantize(*layer.packed, torch.float32)
    at_once = max(1, tile // n_in)
    assert expanded == [(n_in, min(at_once, n_out - start)) for start in range(0, n_out, at_once)]


def test_a_split_number_is_the_sum_of_two_float16_numbers():
    x = torch.randn(1, 40, 50) * torch.logspace(-4, 0, 50)
    parts = reference.split_to_float16(x, 4096.0, "hl", dim=1)
    assert parts.dtype == torch.float16 and parts.shape == (1, 80, 50)
    high, low = parts[:, :40].double(), parts[:, 40:].double()
    assert torch.equal(parts[:, :40], (x * 4096).half())
    off = ((high + low) / 4096 - x.double()).abs()
    assert (off <= (x.abs().double() * 2.0**-22).clamp(min=2.0**-37)).all()  # float16 alone: 2^-12


def test_a_nearest_error_is_the_distance_to_the_nearest_point_of_the_grid():
    weight = torch.linspace(-1.2, 1.2, 24, dtype=torch.float64).view(2, 12)
    scales, zeros = torch.tensor([[0.1, 0.25], [0.3, 0.2]]).double(), torch.tensor([[4.0, 3.0], [8.0, 0.0]]).double()
    found = reference.nearest_errors(weight, scales, zeros, 3, torch.float64)
    for row, column in itertools.product(range(2), range(12)):
        scale, zero = scales[row, column // 6], zeros[row, column // 6]
        points = scale * (torch.arange(8) - zero)
        off = weight[row, column] - points
        assert found[row, column].abs() == pytest.approx(float(off.abs().min())) and found[row, column] in off


def test_a_grids_cost_is_that_of_targets_a_spread_away_to_either_side():
    grids = make_grids(3, 2, 5, 3, dtype=torch.float64)
    found = reference.clipping_errors(**vars(grids), bits=3)
    for a, row in itertools.product(range(4), range(3)):
        cost = 0.0
        for j in range(10):
            scale, zero = grids.scales[a, row, j // 5], grids.zeros[a, row, j // 5]
            for side in (-1, 1):
                t = grids.weight[row, j] + side * grids.spread[j] * grids.scales[0, row, j // 5]
                q = torch.round(t / scale + zero).clamp(0, 7)
                cost += grids.gain[j] * (t - scale * (q - zero)) ** 2 / 2
        torch.testing.assert_close(found[a, row], cost)


@pytest.mark.parametrize(
    ("which", "change", "message"),
    [
        (0, lambda t: t.long(), r"qweight must be torch\.int32 \[16, 64\].*got torch\.int64"),
        (0, lambda t: t[:-1], r"qweight must be .* for 128 inputs, 64 outputs, 4 groups and 4 bits"),
        (1, lambda t: t[:, :-1], r"qzeros must be torch\.int32 \[4, 8\]"),
        (1, lambda t: t[:-1], r"qzeros must be torch\.int32 \[4, 8\]"),
        (2, lambda t: t.bfloat16(), r"scales must be torch\.float16 \[4, 64\].*got torch\.bfloat16"),
        (3, lambda t: t.long(), r"g_idx must be torch\.int32 \[128\]"),
        (0, lambda t: t[0], r"must have two dimensions and g_idx one; got \[64\], \[4, 64\], \[128\]"),
        (2, lambda t: t[0], r"must have two dimensions and g_idx one; got \[16, 64\], \[64\], \[128\]"),
        (3, lambda t: t[None], r"must have two dimensions and g_idx one; got \[16, 64\], \[4, 64\], \[1, 128\]"),
        (1, lambda t: t.to("meta"), "qzeros is on meta and qweight on cpu"),
        (2, lambda t: t.to("meta"), "scales is on meta and qweight on cpu"),
        (3, lambda t: t.to("meta"), "g_idx is on meta and qweight on cpu"),
        (4, lambda bits: 5, "bits must be one of 2, 3, 4, 8; got 5"),
    ],
)
def test_a_tensor_that_does_not_fit_is_named(which, change, message):
    packed = list(make_layer(Case(128, 64, 32), 4).packed)
    packed[which] = change(packed[which])
    with pytest.raises(ValueError, match=message):
        reference.matmul(torch.zeros(1, 128), *packed)
    with pytest.raises(ValueError, match=message):
        reference.dequantize(*packed, torch.float32)


def test_an_input_or_bias_that_does_not_fit_is_refused():
    packed = make_layer(Case(128, 64, 32), 4).packed
    with pytest.raises(ValueError, match="x must end in 128 input channels"):
        reference.matmul(torch.zeros(1, 64), *packed)
    with pytest.raises(ValueError, match=r"floating dtype, got torch\.int64"):
        reference.matmul(torch.zeros(1, 128, dtype=torch.int64), *packed)
    with pytest.raises(ValueError, match=r"bias must have shape \[64\]"):
        reference.matmul(torch.zeros(1, 128), *packed, torch.zeros(1, 64))
    with pytest.raises(ValueError, match="x is on meta, the weights on cpu"):
        reference.matmul(torch.zeros(1, 128, device="meta"), *packed)
    with pytest.raises(ValueError, match="bias is on meta, the weights on cpu"):
        reference.matmul(torch.zeros(1, 128), *packed, torch.zeros(64, device="meta"))
    with pytest.raises(ValueError, match=r"x must end in 128 input channels, got shape \[\]"):
        reference.matmul(torch.tensor(1.0), *packed)


@pytest.mark.parametrize(("bits", "period"), [(2, (16, 1)), (3, (32, 3)), (4, (8, 1)), (8, (4, 1))])
def test_a_stream_is_aligned_to_a_word_again_after_a_period(bits, period):
    assert reference.stream_period(bits) == period
    codes, words = period
    assert [reference.words_for(n, bits) for n in (0, 1, codes, codes + 1)] == [0, 1, words, words + 1]


@pytest.mark.parametrize("tile", [1, 40, 2**20])
@pytest.mark.parametrize("n", [1, 31, 32, 33, 75])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_code_k_lies_at_bits_k_times_its_width(bits, n, tile, monkeypatch):
    monkeypatch.setattr(reference, "_TILE", tile)
    words = torch.randint(-(2**31), 2**31, (reference.words_for(n, bits), 3), dtype=torch.int64).int()
    codes = reference.unpack(words, bits, n)
    assert codes.dtype == torch.uint8 and codes.is_contiguous() and codes.shape == (n, 3)
    for column in range(3):
        stream = sum((int(word) & 0xFFFFFFFF) << (32 * i) for i, word in enumerate(words[:, column]))
        assert codes[:, column].tolist() == [(stream >> (k * bits)) % 2**bits for k in range(n)]


@pytest.mark.parametrize(
    "words",
    [torch.zeros(3, 2), torch.zeros(3, dtype=torch.int32), torch.zeros(2, 2, dtype=torch.int32),
     torch.zeros(4, 2, dtype=torch.int32)],
)  # fmt: skip
def test_other_words_than_the_codes_need_are_refused(words):
    with pytest.raises(ValueError, match=r"20 codes of 4 bits need int32 words of shape \[3, m\]; got torch"):
        reference.unpack(words, 4, 20)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_a_bias_is_rounded_to_the_inputs_dtype_before_it_is_added(dtype):
    layer = make_layer(Case(40, 9, 64), 4)
    x, bias = torch.randn(2, 5, 40, dtype=dtype), torch.rand(9, dtype=torch.float64) / 3
    plain, biased = reference.matmul(x, *layer.packed), reference.matmul(x, *layer.packed, bias)
    assert torch.equal(biased, plain + bias.to(dtype)) and biased.shape == (2, 5, 9)


@pytest.mark.parametrize("case", [Case(96, 70, 48), Case(99, 130, 11, act_order=True)], ids=str)
def test_nothing_is_computed_on_another_device(case):
    layer = make_layer(case, 3)
    x = torch.randn(4, case.n_in)
    with torch.device("meta"):
        weight, y = reference.dequantize(*layer.packed, torch.float64), reference.matmul(x, *layer.packed)
    assert torch.equal(weight, layer.weight)
    assert_product(y, x, layer.weight, None)


def test_a_permuted_matrix_is_scaled_and_lies_in_one_piece():
    matrices, factors = torch.randn(2, 7, 7, dtype=torch.float64), torch.tensor([0.5, 4.0], dtype=torch.float64)
    order = torch.stack([torch.randperm(7) for _ in range(2)])
    found = reference.permute(matrices, order, factors)
    assert found.is_contiguous() and found.dtype == torch.float64
    for b, i, j in itertools.product(range(2), range(7), range(7)):
        assert found[b, i, j] == factors[b] * matrices[b, order[b, i], order[b, j]]


@pytest.mark.parametrize(("pieces", "dim"), [("lhh", 2), ("hlh", 1), ("hlhh", 1)])
def test_the_parts_of_split_numbers_lie_behind_each_other_as_asked(pieces, dim):
    x = torch.randn(2, 3, 5)
    found = reference.split_to_float16(x, 64.0, pieces, dim)
    high = (x * 64).half()
    parts = {"h": high, "l": (x * 64 - high.float()).half()}
    assert found.is_contiguous() and found.dtype == torch.float16
    assert [torch.equal(one, parts[piece]) for one, piece in zip(found.chunk(len(pieces), dim), pieces)] == [
        True
    ] * len(pieces)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=str)
def test_nearest_errors_are_rounded_to_the_dtype_that_is_asked(dtype):
    weight, scales, zeros = (
        torch.randn(3, 8).double(),
        torch.rand(3, 2).double() + 0.1,
        torch.full((3, 2), 4.0).double(),
    )
    exact = reference.nearest_errors(weight, scales, zeros, 3, torch.float64)
    found = reference.nearest_errors(weight, scales, zeros, 3, dtype)
    assert found.dtype == dtype and torch.equal(found, exact.to(dtype))
