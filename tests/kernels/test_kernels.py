"""The kernels against the formula in float64, with every uninitialised output poisoned by NaN.

The Triton tests run on a GPU, and without one in Triton's interpreter: that needs TRITON_INTERPRET=1 before
Triton is imported, so one test runs this file again in a process of its own.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from dataclasses import dataclass

import pytest
import torch
from gptq_plugin.kernels import reference
from torch import Tensor

from gptq_plugin.layers import packing

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# A unit in the last place of the output: one rounding of the product, one of the sum with the bias.
TOLERANCE = {torch.float64: 1e-14, torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}

needs_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
triton_device = pytest.mark.parametrize(
    "device",
    [
        pytest.param("cpu", marks=pytest.mark.skipif(not INTERPRETED, reason="runs in Triton's interpreter")),
        pytest.param("cuda", marks=needs_gpu),
    ],
)


@dataclass(frozen=True)
class Case:
    """A layer: act-order shuffles its g_idx; group_size None is one group."""

    n_in: int
    n_out: int
    group_size: int | None
    act_order: bool = False


# Sizes that fill no tile and no word; groups of every kind the kernel tells apart: deeper than a tile, with a
# power of two inside (96, 48), without (15), as long as in_features, longer, and one cut short (100/32).
CASES = (
    Case(128, 64, 32),
    Case(256, 33, 128),
    Case(192, 45, 96),
    Case(96, 70, 48),
    Case(48, 16, 16),
    Case(75, 37, 15),
    Case(161, 70, None),
    Case(40, 9, 64),
    Case(100, 65, 32),
    Case(128, 37, 32, act_order=True),
    Case(99, 130, 11, act_order=True),
    Case(1, 1, None),
)


@dataclass(frozen=True)
class Layer:
    packed: tuple[Tensor, Tensor, Tensor, Tensor, int]
    weight: Tensor  # float64 [out, in]: the formula, from the codes that were packed
    group_size: int | None  # what a caller may promise


def make_layer(case: Case, bits: int, device: str = "cpu") -> Layer:
    generator = torch.Generator().manual_seed(case.n_in * 31 + bits)
    group_size = case.group_size or case.n_in
    groups = -(-case.n_in // group_size)
    codes = torch.randint(0, 2**bits, (case.n_out, case.n_in), generator=generator, dtype=torch.uint8)
    zeros = torch.randint(0, 2**bits, (groups, case.n_out), generator=generator, dtype=torch.uint8)
    scales = (torch.rand(groups, case.n_out, generator=generator) + 0.1).half()
    g_idx = torch.arange(case.n_in, dtype=torch.int32) // group_size
    if case.act_order:
        g_idx = g_idx[torch.randperm(case.n_in, generator=generator)]
    weight = (codes.double() - zeros.double()[g_idx].t()) * scales.double()[g_idx].t()
    tensors = (packing.pack_weight(codes, bits), packing.pack_zeros(zeros, bits), scales, g_idx)
    qweight, qzeros, scales, g_idx = (t.to(device) for t in tensors)
    return Layer((qweight, qzeros, scales, g_idx, bits), weight, None if case.act_order else group_size)


def assert_product(y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """y = x Wᵀ + bias with W rounded to x's dtype, which is the only rounding before the sum."""
    expected = x.cpu().double() @ weight.to(x.dtype).double().t()
    if bias is not None:
        expected += bias.cpu().double()
    assert y.dtype == x.dtype and y.shape == expected.shape
    error = (y.cpu().double() - expected).norm() / expected.norm()
    assert error < TOLERANCE[x.dtype], f"relative error {error:.1e}"  # NaN is not less than anything


@pytest.fixture(autouse=True)
def poisoned():
    """torch.empty gives NaN, or the largest integer."""
    torch.manual_seed(0)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(before)


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


@triton_device
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_triton_kernels_are_the_formula(case, bits, device):
    from gptq_plugin.kernels import matmul

    layer = make_layer(case, bits, device)
    # The interpreter is slow, and wrong in bfloat16: it takes each dtype and each way to find the group once.
    everything = itertools.product(DTYPES, {None, layer.group_size}, (1, 3, 17))
    a_few = ((torch.float32, None, 3), (torch.float16, layer.group_size, 3))
    for dtype, promise, rows in everything if device == "cuda" else a_few:
        weight = matmul.dequantize(*layer.packed, dtype, group_size=promise)
        assert torch.equal(weight.cpu(), layer.weight.to(dtype))
        x = torch.randn(rows, case.n_in, dtype=dtype, device=device)
        bias = torch.randn(case.n_out, dtype=dtype, device=device)
        assert_product(matmul.quant_matmul(x, *layer.packed, bias, group_size=promise), x, layer.weight, bias)


@triton_device
@pytest.mark.parametrize("rows", [1, 16, 40, 130, 300])
def test_the_triton_kernel_takes_any_number_of_rows_leading_dimension_and_stride(rows, device):
    from gptq_plugin.kernels import matmul

    layer = make_layer(Case(75, 37, 15), 3, device)
    x = torch.randn(75, rows, device=device).t()
    assert_product(matmul.quant_matmul(x, *layer.packed), x, layer.weight, None)
    batched = matmul.quant_matmul(x[None, :, None], *layer.packed)
    assert torch.equal(batched, matmul.quant_matmul(x, *layer.packed)[None, :, None])
    assert matmul.quant_matmul(x[:0], *layer.packed).shape == (0, 37)
    assert matmul.quant_matmul(x[0], *layer.packed).shape == (37,)


@triton_device
def test_the_triton_kernel_does_not_round_float32_to_tf32(device):
    from gptq_plugin.kernels import matmul

    layer = make_layer(Case(256, 33, 128), 8, device)
    x = 1 + torch.rand(5, 256, device=device) * 2**-12  # TF32 keeps 10 bits: it would see ones
    y = matmul.quant_matmul(x, *layer.packed, group_size=128)
    assert_product(y, x, layer.weight, None)


NAN = float("nan")


@dataclass
class Block:
    """The arguments of solve_span; its outputs are poisoned."""

    pushed: Tensor
    weight: Tensor
    factor: Tensor
    scales: Tensor
    zeros: Tensor
    group: Tensor
    channel: Tensor
    gain: Tensor
    damping: Tensor
    codes: Tensor
    errors: Tensor
    loss: Tensor

    def solve(self, by, bits):
        """What `by` makes of a copy."""
        copy = Block(**{name: value.clone() for name, value in vars(self).items()})
        by(**vars(copy), bits=bits)
        return copy


def make_block(columns, rows, bits, device="cpu", dtype=torch.float32, batch=1, alternatives=1):
    """A block of columns, three channels less than there are, with errors that matter to the columns visited later."""
    generator = torch.Generator().manual_seed(columns * 1000 + rows)
    width, n = alternatives * rows, columns + 3

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    values = {
        "pushed": normal(batch, columns, width) * 0.1,
        "weight": normal(batch, n, rows),
        "factor": torch.triu(normal(batch, columns, columns) * 0.1, 1) + torch.eye(columns),
        "scales": normal(batch, 3, width).abs().half().double() * 2 / 2**bits + 0.05,
        "zeros": torch.randint(0, 2**bits, (batch, 3, width), generator=generator).double(),
        "group": torch.randint(0, 3, (batch, columns), generator=generator).int(),
        "channel": torch.stack([torch.randperm(n, generator=generator)[:columns] for _ in range(batch)]).int(),
        "gain": normal(batch, columns).square(),
        "damping": normal(batch, columns).square() * 0.01,
        "codes": torch.full((batch, n, width), 255, dtype=torch.uint8),
        "errors": torch.full((batch, columns, width), NAN, dtype=torch.float64),
        "loss": normal(batch, width).square(),
    }
    return Block(**{k: v.to(device, dtype if v.is_floating_point() else v.dtype) for k, v in values.items()})


@pytest.mark.parametrize("bits", [2, 4])
def test_the_plain_block_is_the_recursion(bits):
    block = make_block(9, 5, bits, dtype=torch.float64, batch=2, alternatives=3)
    found = block.solve(reference.solve_span, bits)
    for b, row in itertools.product(range(2), range(15)):
        loss = block.loss[b, row]
        for j in reversed(range(9)):
            channel, group = block.channel[b, j], block.group[b, j]
            w = block.weight[b, channel, row % 5]
            scale, zero = block.scales[b, group, row], block.zeros[b, group, row]
            t = w + block.pushed[b, j, row]
            t = t + sum(found.errors[b, k, row] * block.factor[b, j, k] for k in range(j + 1, 9))
            q = torch.round(t / scale + zero).clamp(0, 2**bits - 1)
            assert found.codes[b, channel, row] == q
            assert found.errors[b, j, row] == w - scale * (q - zero)
            loss = loss + block.gain[b, j] * (t - scale * (q - zero)) ** 2
            loss = loss - block.damping[b, j] * found.errors[b, j, row] ** 2
        torch.testing.assert_close(found.loss[b, row], loss)


BLOCKS = [(128, 40, 1, 1), (16, 1, 1, 1), (48, 17, 2, 2), (7, 33, 1, 2), (1, 5, 3, 1), (300, 300, 2, 2)]


@triton_device
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("columns", "rows", "batch", "alternatives"), BLOCKS)
def test_the_triton_block_is_the_plain_one(columns, rows, batch, alternatives, bits, device):
    from gptq_plugin.kernels import solve

    if device == "cpu":  # the interpreter is slow
        columns, rows = (131, 2) if columns > 200 else (min(columns, 32), min(rows, 20))
    block = make_block(columns, rows, bits, device, batch=batch, alternatives=alternatives)
    exact = Block(**{k: v.double() if v.is_floating_point() else v for k, v in vars(block).items()})
    found, wanted = block.solve(solve.solve_span, bits), exact.solve(reference.solve_span, bits)
    # A sum in float32 may fall on the other side of a near tie, and its row goes on from there.
    same = (found.codes == wanted.codes).all(dim=1)  # channels of other blocks are as they were in both
    assert same.double().mean() > 0.95
    assert not found.errors.isnan().any()
    together = same[:, None].expand_as(found.errors)
    torch.testing.assert_close(found.errors[together].double(), wanted.errors[together], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.loss[same].double(), wanted.loss[same], atol=1e-4, rtol=1e-4)
    for name in ("pushed", "weight", "factor", "scales", "zeros", "group", "channel", "gain", "damping"):
        assert torch.equal(getattr(found, name), getattr(block, name))  # only outputs are written


@triton_device
def test_the_triton_block_writes_into_runs_of_columns_of_longer_matrices(device):
    from gptq_plugin.kernels import solve

    whole = make_block(40, 6, 4, device, batch=2)
    columns, as_they_are = slice(8, 24), ("weight", "scales", "zeros", "codes", "loss")
    part = Block(
        **{n: v if n in as_they_are else v[:, columns] for n, v in vars(whole).items() if n != "factor"},
        factor=whole.factor[:, columns, columns],
    )
    alone = Block(**{name: value.contiguous().clone() for name, value in vars(part).items()})
    solve.solve_span(**vars(part), bits=4)
    solve.solve_span(**vars(alone), bits=4)
    for name in ("codes", "errors", "loss"):
        assert torch.equal(getattr(part, name), getattr(alone, name))
    outside = [*range(8), *range(24, 40)]
    assert whole.errors[:, outside].isnan().all()
    assert ((whole.codes != 255).all(2).sum(1) == 16).all()  # every column has its channel, and the others keep theirs


@triton_device
def test_the_triton_block_names_what_it_cannot_take(device):
    from gptq_plugin.kernels import solve

    block = make_block(16, 8, 4, device, batch=2)

    def solving(**changes):
        solve.solve_span(**{**vars(block), **changes}, bits=4)

    with pytest.raises(ValueError, match=r"weight must be torch.float32 \[2, 19, 8\]"):
        solving(weight=block.weight.double())
    with pytest.raises(ValueError, match="scales must be"):
        solving(scales=block.scales.mT.contiguous().mT)
    with pytest.raises(ValueError, match=r"factor must be torch.float32 \[2, 16, 16\]"):
        solving(factor=block.factor[:, :8])
    with pytest.raises(ValueError, match=r"codes must be torch.uint8 \[2, 19, 8\] with strides"):
        solving(codes=torch.empty(2, 24, 8, dtype=torch.uint8, device=device)[:, :19])
    with pytest.raises(ValueError, match="group must be torch.int32"):
        solving(group=torch.zeros(2, 40, dtype=torch.int32, device=device)[:, :16])


@triton_device
@pytest.mark.parametrize(("batch", "n"), [(1, 7), (2, 33), (1, 1100)])
def test_the_triton_permutation_is_the_plain_one(batch, n, device):
    from gptq_plugin.kernels import passes

    matrices = torch.randn(batch, n, n, device=device)
    order = torch.stack([torch.randperm(n) for _ in range(batch)]).to(device)
    factors = torch.arange(1.0, batch + 1, device=device) / 4
    for m in (matrices, matrices.mT):
        assert torch.equal(passes.permuted(m, order, factors), reference.permuted(m, order, factors))
    with pytest.raises(ValueError, match="need"):
        passes.permuted(matrices, order[:, 1:], factors)


def test_a_split_number_is_the_sum_of_two_float16_numbers():
    x = torch.randn(1, 40, 50) * torch.logspace(-4, 0, 50)
    parts = reference.split(x, 4096.0, "hl", dim=1)
    assert parts.dtype == torch.float16 and parts.shape == (1, 80, 50)
    high, low = parts[:, :40].double(), parts[:, 40:].double()
    assert torch.equal(parts[:, :40], (x * 4096).half())
    off = ((high + low) / 4096 - x.double()).abs()
    assert (off <= (x.abs().double() * 2.0**-22).clamp(min=2.0**-37)).all()  # float16 alone: 2^-12


@triton_device
@pytest.mark.parametrize(("batch", "rows", "columns"), [(1, 5, 7), (2, 33, 2100)])
@pytest.mark.parametrize(("pieces", "dim"), [("lhh", 2), ("hlh", 1), ("hlhh", 1)])
def test_the_triton_split_is_the_plain_one(batch, rows, columns, pieces, dim, device):
    from gptq_plugin.kernels import passes

    x = torch.randn(batch, rows, columns + 3, device=device)[..., 2:-1]  # rows of a larger matrix
    assert torch.equal(passes.split(x, 64.0, pieces, dim), reference.split(x, 64.0, pieces, dim))


@triton_device
def test_the_triton_split_names_what_it_cannot_take(device):
    from gptq_plugin.kernels import passes

    x = torch.randn(1, 4, 6, device=device)
    with pytest.raises(ValueError, match=r"x must be float32 \[B, rows, columns\] with contiguous rows"):
        passes.split(x.mT, 1.0, "hlh", 1)
    with pytest.raises(ValueError, match="one l"):
        passes.split(x, 1.0, "hh", 1)


@triton_device
@pytest.mark.parametrize(("rows", "groups", "size"), [(1, 1, 7), (9, 3, 32), (5, 2, 1100)])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_triton_nearest_errors_are_the_plain_ones(rows, groups, size, bits, device):
    from gptq_plugin.kernels import passes

    weight = torch.randn(rows, groups * size, device=device)
    scales = torch.rand(rows, groups, device=device).half().float() * 4 / 2**bits + 0.01
    zeros = torch.randint(0, 2**bits, (rows, groups), device=device).float()
    for dtype in (torch.float32, torch.float16):
        found = passes.nearest_errors(weight, scales, zeros, bits, dtype)
        wanted = reference.nearest_errors(weight, scales, zeros, bits, dtype)
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5 if dtype == torch.float32 else 2e-2)
        assert found.dtype == dtype and found.isfinite().all()
    with pytest.raises(ValueError, match="scales must be contiguous float32"):
        passes.nearest_errors(weight, scales[:, :-1].double(), zeros, bits, torch.float32)


def test_a_nearest_error_is_the_distance_to_the_nearest_point_of_the_grid():
    weight = torch.linspace(-1.2, 1.2, 24, dtype=torch.float64).view(2, 12)
    scales, zeros = torch.tensor([[0.1, 0.25], [0.3, 0.2]]).double(), torch.tensor([[4.0, 3.0], [8.0, 0.0]]).double()
    found = reference.nearest_errors(weight, scales, zeros, 3, torch.float64)
    for row, column in itertools.product(range(2), range(12)):
        scale, zero = scales[row, column // 6], zeros[row, column // 6]
        points = scale * (torch.arange(8) - zero)
        off = weight[row, column] - points
        assert found[row, column].abs() == pytest.approx(float(off.abs().min())) and found[row, column] in off


@dataclass
class Grids:
    """The arguments of clipping_errors."""

    weight: Tensor
    scales: Tensor
    zeros: Tensor
    spread: Tensor
    gain: Tensor


def make_grids(rows, groups, size, bits, alternatives=4, device="cpu", dtype=torch.float32):
    generator = torch.Generator().manual_seed(rows)
    weight = torch.randn(rows, groups * size, generator=generator, dtype=torch.float64)
    scales = torch.rand(1, rows, groups, generator=generator, dtype=torch.float64) + 0.5
    scales = scales * torch.linspace(1, 0.5, alternatives, dtype=torch.float64)[:, None, None] * 4 / 2**bits
    zeros = torch.randint(1, 2**bits, scales.shape, generator=generator).double()
    spread, gain = torch.rand(2, groups * size, generator=generator, dtype=torch.float64)
    return Grids(*(t.to(device, dtype).contiguous() for t in (weight, scales, zeros, spread, gain)))


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


@triton_device
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("rows", "groups", "size"), [(33, 2, 128), (5, 3, 48), (1, 1, 300), (17, 4, 15), (16, 1, 1)])
def test_the_triton_forecast_is_the_plain_one(rows, groups, size, bits, device):
    from gptq_plugin.kernels import passes

    grids = make_grids(rows, groups, size, bits, device=device)
    found = passes.clipping_errors(**vars(grids), bits=bits)
    wanted = reference.clipping_errors(**{k: v.double() for k, v in vars(grids).items()}, bits=bits)
    torch.testing.assert_close(found.double(), wanted, atol=1e-4, rtol=1e-4)


@triton_device
def test_the_triton_forecast_names_what_it_cannot_take(device):
    from gptq_plugin.kernels import passes

    grids = make_grids(4, 2, 16, 4, device=device)
    with pytest.raises(ValueError, match=r"weight must be contiguous float32 \[4, 32\]"):
        passes.clipping_errors(**{**vars(grids), "weight": grids.weight.double()}, bits=4)
    with pytest.raises(ValueError, match=r"gain must be contiguous float32 \[32\]"):
        passes.clipping_errors(**{**vars(grids), "gain": grids.gain[:5]}, bits=4)


@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter's process")
def test_the_triton_kernels_pass_in_the_interpreter():
    pytest.importorskip("triton")
    command = [
        sys.executable,
        "-m",
        "pytest",
        __file__,
        "-q",
        "-k",
        "triton and cpu",
        "-p",
        "no:cacheprovider",
    ]
    env = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert run.returncode == 0 and "skipped" not in run.stdout, run.stdout[-3000:] + run.stderr[-3000:]


@pytest.mark.skipif(INTERPRETED, reason="asks about the compiled kernels")
def test_tensors_on_a_cpu_are_sent_to_the_plain_definition():
    pytest.importorskip("triton")
    from gptq_plugin.kernels import matmul

    layer = make_layer(Case(128, 64, 32), 4)
    with pytest.raises(ValueError, match=r"need CUDA tensors.*gptq_plugin\.kernels\.reference"):
        matmul.quant_matmul(torch.zeros(1, 128), *layer.packed)


def test_the_package_imports_without_triton_and_the_kernel_says_what_to_install():
    code = (
        "import sys, torch; sys.modules['triton'] = None\n"
        "import gptq_plugin.kernels.reference, gptq_plugin.layers.qlinear\n"
        "try: import gptq_plugin.kernels.matmul\n"
        "except ImportError as error: print(error)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert "pip install triton" in run.stdout


@pytest.mark.parametrize(
    ("which", "change", "message"),
    [
        (0, lambda t: t.long(), r"qweight must be torch\.int32 \[16, 64\].*got torch\.int64"),
        (0, lambda t: t[:-1], r"qweight must be .* for 128 inputs, 64 outputs, 4 groups and 4 bits"),
        (1, lambda t: t[:, :-1], r"qzeros must be torch\.int32 \[4, 8\]"),
        (1, lambda t: t[:-1], r"qzeros must be torch\.int32 \[4, 8\]"),
        (2, lambda t: t.bfloat16(), r"scales must be torch\.float16 \[4, 64\].*got torch\.bfloat16"),
        (3, lambda t: t.long(), r"g_idx must be torch\.int32 \[128\]"),
        (2, lambda t: t[0], "scales must have two dimensions"),
        (2, lambda t: t.to("meta"), "scales is on meta and qweight on cpu"),
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


@triton_device
def test_the_triton_kernel_names_what_it_cannot_take(device):
    from gptq_plugin.kernels import matmul

    qweight, *rest = make_layer(Case(128, 64, 32), 4, device).packed
    x = torch.zeros(1, 128, device=device)
    with pytest.raises(ValueError, match="qweight must be contiguous"):
        matmul.quant_matmul(x, qweight.t().contiguous().t(), *rest)
    with pytest.raises(ValueError, match=r"not torch\.float64: cast x"):
        matmul.quant_matmul(x.double(), qweight, *rest)
    if device == "cpu":
        with pytest.raises(ValueError, match=r"interpreter .* computes bfloat16 wrongly"):
            matmul.quant_matmul(x.bfloat16(), qweight, *rest)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("rows", [1, 16, 64, 200, 2048])
def test_triton_on_layers_of_a_large_model(rows, bits, dtype):
    from gptq_plugin.kernels import matmul

    torch.manual_seed(0)
    n_in, n_out, groups = 4096, 11009, 32
    random = {"dtype": torch.int32, "device": "cuda"}
    qweight = torch.randint(-(2**31), 2**31 - 1, (n_in * bits // 32, n_out), **random)
    qzeros = torch.randint(-(2**31), 2**31 - 1, (groups, -(-n_out * bits // 32)), **random)
    scales = torch.rand(groups, n_out, device="cuda").half()
    g_idx = torch.arange(n_in, **random) // 128
    x = torch.randn(rows, n_in, dtype=dtype, device="cuda")
    for order, promise in ((g_idx, 128), (g_idx[torch.randperm(n_in, device="cuda")], None)):
        weight = reference.dequantize(qweight, qzeros, scales, order, bits, dtype)
        y = matmul.quant_matmul(x, qweight, qzeros, scales, order, bits, group_size=promise)
        expected = x.double() @ weight.double().t()
        assert (y.double() - expected).norm() / expected.norm() < TOLERANCE[dtype]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_triton_addresses_more_than_two_to_the_31_elements():
    from gptq_plugin.kernels import matmul

    n_in, n_out = 16384, 135_001
    qweight = torch.randint(-(2**31), 2**31 - 1, (n_in // 8, n_out), dtype=torch.int32, device="cuda")
    qzeros = torch.full((1, -(-n_out // 8)), -0x77777778, dtype=torch.int32, device="cuda")  # 0x88888888
    scales = torch.ones(1, n_out, dtype=torch.float16, device="cuda")
    g_idx = torch.zeros(n_in, dtype=torch.int32, device="cuda")
    assert n_in * n_out > 2**31
    weight = matmul.dequantize(qweight, qzeros, scales, g_idx, 4, torch.float16, group_size=n_in)
    expected = reference.unpack(qweight[-2:, -9:], 4, 16).t() - 8.0
    assert torch.equal(weight[-9:, -16:], expected.half())
