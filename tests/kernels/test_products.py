"""The layout of the GPU's kernels and the products that read it, against the formula in float64."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import pytest
import torch
from gptq_plugin.kernels.product.choice import Choice
from gptq_plugin.kernels.product.layout import Arranged, Layout, arrange, pieces, restore
from torch import Tensor

from kernel_cases import NAN, TOLERANCE, gpu, triton_device

BITS = [2, 3, 4, 8]
# (channels, outputs, group size): ragged, padded and exact; groups that are repeated, and one of all channels.
SIZES = [(1, 1, 10**9), (100, 65, 32), (1000, 37, 64), (96, 70, 96), (1056, 130, 256), (2048, 128, 128), (75, 64, 160)]


hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9, reason="needs a Hopper GPU"
)


@dataclass(frozen=True)
class Weight:
    layout: Layout
    codes: Tensor  # uint8 [in, out]
    scales: Tensor
    zeros: Tensor
    arranged: Arranged
    value: Tensor  # float64 [out, in]: the formula


def make_weight(bits, n_in, n_out, group_size, symmetric, device="cpu") -> Weight:
    generator = torch.Generator().manual_seed(n_in + bits)
    groups = -(-n_in // group_size)
    codes = torch.randint(0, 2**bits, (n_in, n_out), generator=generator, dtype=torch.uint8)
    scales = (torch.rand(groups, n_out, generator=generator) + 0.1).half()
    zeros = torch.randint(0, 2**bits, (groups, n_out), generator=generator, dtype=torch.uint8)
    if symmetric:
        zeros.fill_(2 ** (bits - 1))
    layout = Layout.of(bits, group_size, n_in, n_out, symmetric)
    group = torch.arange(n_in) // group_size
    value = ((codes.double() - zeros.double()[group]) * scales.double()[group]).t()
    tensors = (tensor.to(device) for tensor in (codes, scales, zeros))
    return Weight(layout, codes, scales, zeros, arrange(layout, *tensors), value)


def check(y: Tensor, x: Tensor, weight: Weight, bias: Tensor | None = None) -> None:
    """No worse than a product with the weight rounded to x's dtype, in float64, rounded to y's."""
    expected = x.cpu().double() @ weight.value.t()
    if bias is not None:
        expected += bias.cpu().double()
    error = (y.cpu().double() - expected).norm() / expected.norm()
    assert y.dtype == x.dtype and error < TOLERANCE[x.dtype], f"relative error {error:.1e}"


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_what_is_arranged_is_restored_bit_for_bit(size, bits):
    for symmetric in (True, False):
        weight = make_weight(bits, *size, symmetric)
        codes, scales, zeros = restore(weight.layout, weight.arranged)
        assert torch.equal(codes, weight.codes) and torch.equal(zeros, weight.zeros)
        assert torch.equal(scales, weight.scales) and (weight.arranged.zeros is None) == symmetric


@pytest.mark.parametrize("bits", BITS)
def test_a_code_lies_where_the_layout_says(bits):
    weight = make_weight(bits, 1056, 70, 64, symmetric=False)
    layout, (words, scales, zeros) = weight.layout, weight.arranged
    for channel, output in ((0, 0), (63, 69), (64, 5), (700, 64), (1055, 69)):
        block, within = divmod(channel, layout.planes * layout.lanes)
        plane, lane = divmod(within, layout.lanes)
        code = 0
        for word, place, low, number in pieces(bits, plane):
            code |= (int(words[block * layout.words_a_block + word, output, lane]) >> place & (2**number - 1)) << low
        assert code == weight.codes[channel, output]
        group, step = channel // 64, channel // layout.step
        pair, second = divmod(group - step * layout.step // 64, 2)
        found = int(scales[step, pair, output]) >> (16 * second) & 0xFFFF
        assert found == int(weight.scales.view(torch.int16)[group, output]) & 0xFFFF
        assert int(zeros[step, pair, output]) >> (16 * second) & 0xFFFF == weight.zeros[group, output]


def test_groups_that_are_no_multiple_of_32_have_no_layout():
    for group_size in (1, 15, 16, 48, 100):
        assert Layout.of(4, group_size, 128, 64, True) is None
    assert Layout.of(4, 100, 100, 64, True).group == 128  # one group of all


KERNEL_CASES = [
    (4, (1056, 70, 128), True), (4, (320, 65, 64), False), (4, (100, 37, 32), True), (3, (1100, 64, 128), False),
    (3, (96, 33, 32), True), (2, (600, 70, 10**9), False), (8, (300, 37, 64), True), (8, (200, 64, 32), False),
]  # fmt: skip


@triton_device
@pytest.mark.parametrize(("bits", "size", "symmetric"), KERNEL_CASES, ids=str)
def test_the_triton_kernels_of_the_layout_are_the_formula(bits, size, symmetric, device):
    from gptq_plugin.kernels.product.dense import dense
    from gptq_plugin.kernels.product.few_rows import few_rows
    from gptq_plugin.kernels.product.workspace import workspace_of

    weight = make_weight(bits, *size, symmetric, device)
    # The interpreter is slow, and wrong in bfloat16.
    tiles = ((1, 8, 1), (3, 8, 4), (17, 16, 2), (70, 64, 1), (70, 64, 2))
    everything = [*itertools.product((torch.float16, torch.bfloat16), tiles), (torch.float32, (17, 16, 2))]
    for dtype, (rows, block, split) in everything if device == "cuda" else ((torch.float16, (3, 8, 2)),):
        assert torch.equal(dense(weight.layout, weight.arranged, dtype).cpu(), weight.value.to(dtype))
        x = torch.randn(rows, size[0], dtype=dtype, device=device)
        bias = torch.randn(size[1], device=device) if split > 1 else None
        out = torch.full((rows, size[1]), NAN, dtype=dtype, device=device)
        joined = (
            (1, 2) if bits < 8 and weight.layout.group >= 2 * weight.layout.lanes and dtype != torch.float32 else (1,)
        )
        for half, planes in itertools.product((0, 1) if weight.layout.halves else (0,), joined):
            options = {"BM": block, "SPLIT": split, "HALF": half, "JOINED": planes, "warps": 2 * planes}
            few_rows(x, weight.layout, weight.arranged, bias, out.fill_(NAN), workspace_of(x.device), **options)
            check(out, x, weight, bias)


@triton_device
@pytest.mark.parametrize(("bits", "size", "symmetric"), KERNEL_CASES, ids=str)
def test_the_kernel_whose_warps_share_the_channels_is_the_formula(bits, size, symmetric, device):
    from gptq_plugin.kernels.product.by_warps import by_warps
    from gptq_plugin.kernels.product.workspace import workspace_of

    weight = make_weight(bits, *size, symmetric, device)
    everything = ((torch.float16, 1, 16, 8, 1), (torch.float16, 17, 64, 16, 2), (torch.bfloat16, 9, 32, 8, 8))
    # The interpreter is slow, and wrong in bfloat16.
    for dtype, rows, outputs, block, ways in everything if device == "cuda" else ((torch.float16, 9, 32, 8, 4),):
        x = torch.randn(rows, size[0], dtype=dtype, device=device)
        bias = torch.randn(size[1], device=device) if ways > 1 else None
        out = torch.full((rows, size[1]), NAN, dtype=dtype, device=device)
        for half in (0, 1) if weight.layout.halves else (0,):
            options = {"BN": outputs, "BM": block, "WAYS": ways, "HALF": half}
            by_warps(x, weight.layout, weight.arranged, bias, out.fill_(NAN), workspace_of(x.device), **options)
            check(out, x, weight, bias)


@triton_device
@pytest.mark.parametrize("symmetric", [True, False])
def test_the_kernel_of_one_row_is_the_formula(symmetric, device):
    from gptq_plugin.kernels.product.one_row import one_row, takes
    from gptq_plugin.kernels.product.workspace import workspace_of

    # The interpreter is slow.
    for size in ((1024, 70, 128), (512, 4, 10**9), (4608, 65, 256)) if device == "cuda" else ((2304, 5, 256),):
        weight = make_weight(4, *size, symmetric, device)
        for dtype in (torch.float16, torch.bfloat16) if device == "cuda" else (torch.float16,):
            assert takes(weight.layout, dtype)
            x = torch.randn(1, size[0], dtype=dtype, device=device)
            for bias, chunks in ((None, 64), (torch.randn(size[1], device=device), 128)):
                out = torch.full((1, size[1]), NAN, dtype=dtype, device=device)
                one_row(x, weight.layout, weight.arranged, bias, out, workspace_of(x.device), CHUNKS=chunks)
                check(out, x, weight, bias)


@triton_device
@pytest.mark.parametrize(("bits", "n_in", "group"), [(4, 256, 64), (4, 512, 128), (3, 320, 32)], ids=str)
def test_some_outputs_out_of_a_larger_weight_are_multiplied_where_they_lie(bits, n_in, group, device):
    from gptq_plugin.kernels.product.dense import dense
    from gptq_plugin.kernels.product.few_rows import few_rows
    from gptq_plugin.kernels.product.one_row import one_row, takes
    from gptq_plugin.kernels.product.workspace import workspace_of

    whole = [make_weight(bits, n_in, n_out, group, False, device) for n_out in (70, 37, 64)]
    words, scales, zeros = zip(*(weight.arranged for weight in whole), strict=True)
    stack = (torch.cat(words, 1), torch.cat(scales, 2), torch.cat(zeros, 2))
    for weight, start in zip(whole, (0, 128, 192), strict=True):
        dims = zip(stack, (1, 2, 2), strict=True)
        part = Arranged(*(t if t is None else t.narrow(dim, start, weight.layout.outputs) for t, dim in dims))
        assert part.stride == 256
        assert all(map(torch.equal, restore(weight.layout, part), restore(weight.layout, weight.arranged)))
        for arranged in (part, weight.arranged):
            assert torch.equal(dense(weight.layout, arranged, torch.float32).cpu(), weight.value.float())
            x = torch.randn(1, n_in, dtype=torch.float16, device=device)
            for kernel in (few_rows, one_row) if takes(weight.layout, x.dtype) else (few_rows,):
                out = torch.full((1, weight.layout.n_out), NAN, dtype=x.dtype, device=device)
                kernel(x, weight.layout, arranged, None, out, workspace_of(x.device))
                check(out, x, weight)


@gpu
@hopper
@pytest.mark.parametrize("options", ["BN=128 SPLIT=4", "BN=128 SPLIT=1", "BN=64 SPLIT=4", "GROUPS=4 SPLIT=1"])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_many_rows_have_the_same_bytes_in_hundreds_of_runs(bits, options):
    """Words that were given back to the copy engine before they were read made most of such runs of 3 bits wrong."""
    from gptq_plugin.kernels.product.many_rows import many_rows
    from gptq_plugin.kernels.product.workspace import workspace_of

    weight = make_weight(bits, 14336, 1024, 128, True, "cuda")
    x = torch.randn(64, 14336, dtype=torch.float16, device="cuda")
    chosen = dict(Choice.parse(f"many_rows BM=64 STAGES=3 JOINED=4 AHEAD=3 {options}").options)
    outs = torch.full((300, 64, 1024), NAN, dtype=x.dtype, device="cuda")
    for out in outs:
        many_rows(x, weight.layout, weight.arranged, None, out, workspace_of(x.device), **chosen)
    check(outs[0], x, weight)
    assert torch.equal(outs, outs[:1].expand_as(outs))


@gpu
@hopper
def test_some_outputs_out_of_a_larger_weight_are_multiplied_for_many_rows_too():
    from gptq_plugin.kernels.product.many_rows import many_rows
    from gptq_plugin.kernels.product.workspace import workspace_of

    for bits in (2, 3, 4):
        whole = [make_weight(bits, 1024, n_out, 128, False, "cuda") for n_out in (70, 37, 64)]
        words, scales, zeros = zip(*(weight.arranged for weight in whole), strict=True)
        stack = (torch.cat(words, 1), torch.cat(scales, 2), torch.cat(zeros, 2))
        for weight, start in zip(whole, (0, 128, 192), strict=True):
            dims = zip(stack, (1, 2, 2), strict=True)
            part = Arranged(*(t.narrow(dim, start, weight.layout.outputs) for t, dim in dims))
            x = torch.randn(40, 1024, dtype=torch.float16, device="cuda")
            out = torch.full((40, weight.layout.n_out), NAN, dtype=x.dtype, device="cuda")
            many_rows(x, weight.layout, part, None, out, workspace_of(x.device), BN=128, BM=64, STAGES=8, SPLIT=2)
            check(out, x, weight)


@gpu
@hopper
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_product_of_many_rows_is_the_formula(bits, symmetric, dtype):
    from gptq_plugin.kernels.product.many_rows import many_rows
    from gptq_plugin.kernels.product.workspace import workspace_of

    for (n_in, n_out), rows, options in (
        ((1056, 130), 300, "BM=256"), ((2048, 4096), 1000, "BM=256"), ((256, 128), 1, "BM=256 STAGES=3"),
        ((512, 192), 65, "BM=64 STAGES=12 AHEAD=3 SPLIT=2"), ((1000, 37), 129, "BM=128 STAGES=8 AHEAD=3 SPLIT=2"),
        ((2048, 4096), 65, "BN=128 BM=64 STAGES=3 JOINED=4 AHEAD=3 SPLIT=64"),
        ((1056, 130), 64, "BN=128 BM=64 STAGES=3 JOINED=4 AHEAD=3"),
        ((8192, 1088), 13, "BN=128 BM=16 STAGES=4 JOINED=4 AHEAD=4 SPLIT=64"),
        ((1000, 37), 5, "BN=128 BM=8 STAGES=4 JOINED=4 AHEAD=4 SPLIT=3"),
        ((2048, 4096), 65, "GROUPS=4 BM=64 STAGES=3 JOINED=4 AHEAD=3"),
        ((1056, 130), 64, "GROUPS=4 BM=64 STAGES=3 JOINED=4 AHEAD=3"),
        ((8192, 1088), 13, "GROUPS=4 BM=16 STAGES=4 JOINED=4 AHEAD=4"),
        ((1000, 370), 60, "BM=64 STAGES=4 JOINED=4 AHEAD=4 SPLIT=3"),
    ):  # fmt: skip
        weight = make_weight(bits, n_in, n_out, 128, symmetric, "cuda")
        x = torch.randn(rows, n_in, dtype=dtype, device="cuda")
        bias = torch.randn(n_out, device="cuda") if rows != 1 else None
        outs = torch.full((2, rows, n_out), NAN, dtype=dtype, device="cuda")
        for out in outs:
            chosen = dict(Choice.parse(f"many_rows {options}").options)
            many_rows(x, weight.layout, weight.arranged, bias, out, workspace_of(x.device), **chosen)
        assert torch.equal(*outs)
        check(outs[0], x, weight, bias)


@gpu
@hopper
@pytest.mark.parametrize(
    "choices",
    [
        (1, "one_row CHUNKS=64", "few_rows BM=8", "one_row CHUNKS=128", "few_rows BN=32 BM=8 SPLIT=4", "by_warps"),
        (
            16,
            "few_rows BM=16 STAGES=5",
            "few_rows BM=16 SPLIT=4",
            "few_rows BM=8 SPLIT=2",
            "by_warps BM=16 WAYS=8",
        ),
        (200, "few_rows BM=64 warps=4", "many_rows", "many_rows BM=128 STAGES=8 SPLIT=2", "few_rows BM=64 SPLIT=4"),
        (16, "many_rows BN=128 BM=16 STAGES=4 JOINED=4 AHEAD=4 SPLIT=64", "few_rows BM=16 SPLIT=4"),
    ],
    ids=str,
)
def test_products_of_products_that_begin_early_give_the_same_bytes(choices):
    from gptq_plugin.kernels.product.registry import run
    from gptq_plugin.kernels.product.workspace import prepare, workspace_of

    rows, *kernels = choices
    layout = Layout.of(4, 128, 2048, 2048, True)
    codes = torch.randint(1, 16, (2048, 2048), dtype=torch.uint8, device="cuda")
    scales = torch.full((16, 2048), 1 / (4.32 * 2048**0.5), dtype=torch.float16, device="cuda")  # norms stay
    arranged = arrange(layout, codes, scales, codes[:16])
    x = torch.randn(rows, 2048, dtype=torch.float16, device="cuda")
    prepare(x.device)

    def chain(early, buffers):
        """Every product reads what the one before writes, and writes where that one reads."""
        buffers[0].copy_(x)
        for i in range(60):
            kernel = kernels[i % len(kernels)]
            choice = Choice.parse(f"{kernel} EARLY={min(early, 1) if kernel.startswith('many') else early}")
            run(choice, buffers[i % 2], layout, arranged, None, buffers[1 - i % 2], workspace_of(x.device))

    expected, found = torch.full((2, 2, *x.shape), NAN, dtype=x.dtype, device="cuda")
    chain(0, expected)
    assert expected.isfinite().all() and expected.std() > 1e-2
    for early in (1, 2, 4):
        found.fill_(NAN)
        chain(early, found)
        assert torch.equal(found, expected)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        chain(4, found)
    for _ in range(5):
        found.fill_(NAN)
        graph.replay()
        assert torch.equal(found, expected)


@gpu
@pytest.mark.parametrize("size", [(1056, 70, 128), (4096, 1024, 128), (320, 65, 64), (75, 64, 160)], ids=str)
def test_every_number_of_rows_finds_a_kernel_that_computes_it(size):
    from gptq_plugin.kernels.product import products

    for bits, symmetric in ((4, True), (3, False)):
        weight = make_weight(bits, *size, symmetric, "cuda")
        order = torch.randperm(size[0], device="cuda")
        for rows, dtype in itertools.product((0, 1, 5, 31, 64, 65, 256, 300, 1500), TOLERANCE.keys() - {torch.float64}):
            x = torch.randn(rows, size[0], dtype=dtype, device="cuda")
            bias = torch.randn(size[1], device="cuda", dtype=torch.float32)
            y = products.product(x[None], weight.layout, weight.arranged, bias, order)
            assert y.shape == (1, rows, size[1])
            if rows:
                check(y[0], x[:, order], weight, bias)
        matrix = products.weight(weight.layout, weight.arranged, torch.float32, order).cpu()
        assert torch.equal(matrix[:, order.cpu()].double(), weight.value)


@gpu
def test_programs_that_share_a_tile_give_the_same_bytes_on_streams_and_in_graphs_that_run_side_by_side():
    from gptq_plugin.kernels.product.few_rows import few_rows
    from gptq_plugin.kernels.product.workspace import prepare, workspace_of

    prepare(torch.device("cuda", torch.cuda.current_device()))
    weight = make_weight(4, 4096, 512, 128, True, "cuda")
    x = torch.randn(4, 16, 4096, dtype=torch.float16, device="cuda")

    def multiply(i, out):
        few_rows(x[i], weight.layout, weight.arranged, None, out, workspace_of(x.device), BM=16, SPLIT=4)

    expected = torch.full((4, 16, 512), NAN, dtype=torch.float16, device="cuda")
    for i in range(4):
        multiply(i, expected[i])
    streams = [torch.cuda.Stream() for _ in range(4)]
    outs, graphs = torch.full((4, 16, 512), NAN, dtype=torch.float16, device="cuda"), []
    torch.cuda.synchronize()
    for i, stream in enumerate(streams):
        with torch.cuda.stream(stream):
            for _ in range(20):
                multiply(i, outs[i])
        graphs.append(torch.cuda.CUDAGraph())
        torch.cuda.synchronize()
        with torch.cuda.graph(graphs[i]):
            for _ in range(20):
                multiply(i, outs[i])
    torch.cuda.synchronize()
    assert torch.equal(outs, expected)
    outs.fill_(NAN)
    torch.cuda.synchronize()
    for graph, stream in zip(graphs, streams, strict=True):
        with torch.cuda.stream(stream):
            for _ in range(5):
                graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(outs, expected)


@gpu
@hopper
def test_products_in_two_parts_write_every_row_and_give_the_same_bytes():
    from gptq_plugin.kernels.product import products
    from gptq_plugin.kernels.product.workspace import prepare

    layout = Layout.of(4, 128, 4096, 4096, True)
    codes = torch.randint(1, 16, (4096, 4096), dtype=torch.uint8, device="cuda")
    scales = torch.full((32, 4096), 1 / (4.32 * 4096**0.5), dtype=torch.float16, device="cuda")  # norms stay
    arranged = arrange(layout, codes, scales, codes[:32])
    value = (codes.float().t() - 8) * scales[0, 0].float()
    prepare(codes.device)
    device = codes.device
    in_two = [rows for rows in range(129, 1200) if len(products.parts(layout, rows, torch.float16, device)) == 2]
    for rows in (in_two[0], in_two[len(in_two) // 2], in_two[-1]):
        x = torch.randn(rows, 4096, dtype=torch.float16, device=device)
        expected = (x.double() @ value.double().t()).half()
        assert torch.allclose(products.product(x, layout, arranged, None), expected, rtol=2e-2, atol=1e-2)

        def chain(x=x):
            """Each product reads what the two parts of the one before wrote."""
            for _ in range(20):
                x = products.product(x, layout, arranged, None)
            return x

        expected = chain()
        assert expected.isfinite().all() and expected.std() > 1e-2
        assert all(torch.equal(chain(), expected) for _ in range(20))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = chain()
        for _ in range(5):
            captured.fill_(NAN)
            graph.replay()
            assert torch.equal(captured, expected)
