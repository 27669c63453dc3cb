"""The grids that weights are rounded to."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from gptq_plugin.config import QuantizeConfig
from gptq_plugin.gptq.grid import (
    COARSE_SCALE,
    QuantizedWeight,
    coarse_scales,
    grid,
    grids,
    group_width,
    nearest_errors,
    round_to_nearest,
)

from plain_gptq import plain, plain_grid

FORMATS = pytest.mark.parametrize(
    ("sym", "checkpoint_format"), [(True, "gptq"), (False, "gptq"), (False, "gptq_v2")], ids=["sym", "v1", "v2"]
)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 0.05


def some_weight():
    """Codes, scales and zeros without order in them: groups are permuted, and no product is a round number."""
    generator = torch.Generator().manual_seed(0)
    return QuantizedWeight(
        codes=torch.randint(0, 16, (5, 12), generator=generator, dtype=torch.uint8),
        scales=torch.rand(3, 5, generator=generator).half(),
        zeros=torch.randint(0, 16, (3, 5), generator=generator, dtype=torch.uint8),
        g_idx=torch.randperm(12, generator=generator).int() % 3,
        bits=4,
        group_size=4,
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_a_quantized_weight_stands_for_scales_times_codes_less_zeros_rounded_once(dtype):
    weight = some_weight()
    expected = torch.tensor(
        [
            [
                float(weight.scales[g, row]) * (int(weight.codes[row, column]) - int(weight.zeros[g, row]))
                for column, g in enumerate(weight.g_idx.tolist())
            ]
            for row in range(5)
        ],
        dtype=torch.float64,
    )
    found = weight.dequantize(dtype)
    assert found.dtype == dtype and torch.equal(found, expected.to(dtype))


def test_rows_of_a_quantized_weight_are_a_quantized_weight():
    weight = some_weight()
    part = weight.rows(1, 4)
    assert torch.equal(part.dequantize(), weight.dequantize()[1:4])
    assert part.codes.shape == (3, 12) and part.scales.shape == part.zeros.shape == (3, 3)
    assert part.scales.is_contiguous() and part.zeros.is_contiguous()  # as files store them


@pytest.mark.parametrize(("group_size", "width"), [(-1, 96), (1, 1), (32, 32)])
def test_a_group_is_as_wide_as_configured_or_the_whole_row(group_size, width):
    assert group_width(96, plain(group_size=group_size)) == width


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@FORMATS
def test_a_grid_reaches_from_a_groups_least_weight_to_its_largest(sym, checkpoint_format, bits, dtype):
    values = normal(4, 6, 7).to(dtype)
    values[0], values[1] = values[0].abs(), -values[1].abs()  # of one sign: a grid holds 0 all the same
    config = plain(bits=bits, sym=sym, checkpoint_format=checkpoint_format)
    scales, zeros = grid(values, config)
    assert scales.dtype == zeros.dtype == dtype and scales.shape == zeros.shape == (4, 6)
    expected = [plain_grid(group, config) for group in values]
    assert torch.equal(scales.double(), torch.stack([scale for scale, _ in expected]))  # float16 numbers
    assert torch.equal(zeros.double(), torch.stack([zero.double() for _, zero in expected]))


def test_a_grid_by_hand():
    group = torch.tensor([[-1.0, 0.5, 2.0]])
    assert [t.tolist() for t in grid(group, plain(bits=2))] == [[torch.tensor(4 / 3).half().item()], [2.0]]
    for checkpoint_format in ("gptq", "gptq_v2"):
        config = plain(bits=2, sym=False, checkpoint_format=checkpoint_format)
        assert [t.tolist() for t in grid(group, config)] == [[1.0], [1.0]]


@pytest.mark.parametrize(("checkpoint_format", "least"), [("gptq", 1), ("gptq_v2", 0)])
def test_a_group_of_zeros_has_a_grid_that_holds_zero_and_that_its_format_can_store(checkpoint_format, least):
    """v1 stores zero - 1, and has no place for a zero of 0."""
    config = plain(sym=False, group_size=4, checkpoint_format=checkpoint_format)
    scales, zeros = grid(torch.zeros(1, 4), config)
    assert scales.item() > 0 and zeros.item() == least
    quantized = round_to_nearest(torch.zeros(1, 4), config)
    assert quantized.zeros.item() == least and bool((quantized.dequantize() == 0).all())


@FORMATS
def test_weights_too_small_for_float16_get_its_smallest_scale(sym, checkpoint_format):
    config = plain(sym=sym, checkpoint_format=checkpoint_format)
    assert grid(torch.tensor([1e-9, -1e-9]), config)[0].item() == 2.0**-24


def test_asymmetric_zeros_stay_above_zero_in_the_v1_format():
    weight = normal(8, 64).abs()  # all positive: the natural zero is 0
    for checkpoint_format, least in (("gptq", 1), ("gptq_v2", 0)):
        config = plain(bits=4, group_size=32, sym=False, checkpoint_format=checkpoint_format)
        quantized = round_to_nearest(weight, config)
        assert int(quantized.zeros.min()) == least
        span = (quantized.dequantize(torch.float64) - weight).abs().max() / quantized.scales.max()
        assert span <= 0.51


@pytest.mark.parametrize(("columns", "group_size"), [(48, 16), (48, -1)])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@FORMATS
def test_round_to_nearest_takes_the_nearest_point_of_each_groups_grid(
    sym, checkpoint_format, bits, columns, group_size
):
    weight = normal(400, columns)
    config = plain(bits=bits, group_size=group_size, sym=sym, checkpoint_format=checkpoint_format)
    quantized = round_to_nearest(weight, config)
    groups = weight.unflatten(1, (-1, columns if group_size == -1 else group_size))
    scales, zeros = grid(groups, config)
    points = scales[..., None] * (torch.arange(2**bits) - zeros[..., None])
    nearest = (groups[..., None] - points[:, :, None]).abs().amin(-1).flatten(1)
    torch.testing.assert_close((weight - quantized.dequantize(torch.float64)).abs(), nearest, rtol=0, atol=1e-12)
    assert torch.equal(quantized.scales.T.double(), scales) and torch.equal(quantized.zeros.T.double(), zeros)
    assert torch.equal(quantized.g_idx, torch.arange(columns, dtype=torch.int32) // groups.shape[2])
    assert (quantized.bits, quantized.group_size) == (bits, group_size)
    dtypes = quantized.codes.dtype, quantized.scales.dtype, quantized.zeros.dtype, quantized.g_idx.dtype
    assert dtypes == (torch.uint8, torch.float16, torch.uint8, torch.int32)
    assert quantized.scales.is_contiguous() and quantized.zeros.is_contiguous()
    errors = nearest_errors(weight, config, torch.float32)
    torch.testing.assert_close(errors, (weight - quantized.dequantize(torch.float64)).float(), rtol=0, atol=1e-9)


def test_16_bit_weights_are_rounded_in_float32():
    weight = normal(8, 32).bfloat16()
    config = plain(group_size=16)
    half, single = (round_to_nearest(w, config) for w in (weight, weight.float()))
    assert torch.equal(half.codes, single.codes) and torch.equal(half.scales, single.scales)


def test_round_to_nearest_leaves_nothing_on_another_device_and_no_gradient():
    weight = normal(2, 8).requires_grad_()
    with torch.device("meta"):
        quantized = round_to_nearest(weight, plain(group_size=4))
    tensors = [value for value in vars(quantized).values() if isinstance(value, torch.Tensor)]
    assert len(tensors) == 4 and all(t.device == weight.device and not t.requires_grad for t in tensors)
    assert torch.equal(quantized.dequantize(), round_to_nearest(weight, plain(group_size=4)).dequantize())


def test_a_weight_without_a_scale_is_refused_with_the_reason():
    weight = normal(2, 8)
    for value, message in (
        (float("nan"), "the weight holds NaN or infinity"),
        (float("-inf"), "the weight holds NaN or infinity"),
        (-1e6, r"a weight of 1e\+06 needs a scale above float16's 65504"),
    ):
        weight[1, 3] = value
        with pytest.raises(ValueError, match=message):
            round_to_nearest(weight, plain(group_size=4))


@FORMATS
def test_alternative_grids_cover_a_part_of_every_rows_range(sym, checkpoint_format):
    weight, spans = normal(5, 12), torch.tensor([[1.0] * 5, [0.9, 0.8, 0.7, 0.6, 0.5]], dtype=torch.float64)
    config = plain(bits=3, group_size=4, sym=sym, checkpoint_format=checkpoint_format)
    scales, zeros = grids(weight, spans, config)
    assert scales.shape == zeros.shape == (2, 5, 3)
    for a in range(2):
        expected = grid((weight * spans[a, :, None]).unflatten(1, (3, 4)), config)
        assert torch.equal(scales[a], expected[0]) and torch.equal(zeros[a], expected[1])
    whole = grids(weight, spans, dataclasses.replace(config, group_size=-1))
    assert torch.equal(whole[0][0, :, 0], grid(weight, config)[0])


def test_scales_too_small_for_float16_are_told() -> None:
    assert coarse_scales(0) == []
    (sentence,) = coarse_scales(3)
    assert sentence.startswith("weights in 3 groups are so small that float16")
    exact = 2.0 * 3e-5 / 15  # above the limit, float16 is off by less than a per cent
    scales, _ = grid(torch.tensor([[3e-5, -3e-5], [1e-6, -1e-6], [1e-9, 0.0], [0.0, 0.0]]), QuantizeConfig(bits=4))
    assert (scales < COARSE_SCALE).tolist() == [False, True, True, False]
    assert abs(float(scales[0]) / exact - 1) < 0.01
