"""Products of bytes: every code of a step is in one of them, where it is said to be, and the kernel is the formula."""

from __future__ import annotations

import random

import pytest
import torch
from gptq_plugin.kernels.product.layout import Layout, arrange, pieces

from kernel_cases import NAN, gpu, triton_device

pytest.importorskip("triton")

from gptq_plugin.kernels.product.code_bytes import GROUPS, PRODUCTS, ptx, signed


def run(code: str, operands: list[int]) -> int:
    """$0 of code in the few operations that `ptx` uses; $1 and so on are the operands."""
    known = {f"${i}": value for i, value in enumerate(operands, 1)}

    def value(name: str) -> int:
        return known[name] if name in known else int(name, 0)

    for line in filter(None, map(str.strip, code.strip("{}").split(";"))):
        operation, arguments = line.split(" ", 1)
        to, *names = map(str.strip, arguments.split(","))
        if operation == ".reg":
            continue
        a, *more = map(value, names)
        result = {
            "mov.b32": lambda a: a,
            "and.b32": lambda a, b: a & b,
            "shr.u32": lambda a, b: a >> b,
            "shl.b32": lambda a, b: a << b & 0xFFFFFFFF,
            "lop3.b32": lambda a, b, c, table: {0xEA: a & b | c, 0x28: (a ^ b) & c}[table],
        }[operation]
        known[to] = result(a, *more)
    return known["$0"]


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_a_products_codes_are_in_the_bytes_that_it_tells(bits):
    draw = random.Random(bits)
    for index, product in enumerate(PRODUCTS[bits]):
        for _ in range(50):
            words = [draw.getrandbits(32) for _ in range(3 if bits == 3 else 1)]
            found = run(ptx(bits, index), words)
            for byte in range(4):
                plane, place = product.planes[byte % 2], product.places[byte % 2]
                code = 0
                for word, at, low, number in pieces(bits, plane):
                    code |= (words[word] >> 16 * (byte // 2) + at & 2**number - 1) << low
                expected = (code << place) - (128 if signed(bits, index) else 0)
                in_byte = found >> 8 * byte & 255
                assert (in_byte - 256 if in_byte > 127 else in_byte) == expected


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_every_plane_is_multiplied_once_in_a_slot_of_its_group(bits):
    layout = Layout.of(bits, 128, 1024, 64, True)
    planes = [plane for product in PRODUCTS[bits] for plane in product.planes]
    assert sorted(planes) == list(range(layout.planes))
    for product in PRODUCTS[bits]:
        for plane, slot in zip(product.planes, product.slots, strict=True):
            assert GROUPS[bits][product.chain][slot] == plane * layout.lanes // 128
        # A chain's sums stay below 2^22, where floats of 1.5 · 2^23 and more have the integers' bits.
        chain = [other for other in PRODUCTS[bits] if other.chain == product.chain]
        for slot in (0, 1):
            most = sum(
                layout.lanes * 128 * (2 ** (bits - 1) << place)
                for other in chain
                for place, of in zip(other.places, other.slots, strict=True)
                if of == slot
            )
            assert most < 2**22


def weight_and_value(bits, n_in, n_out, group_size, device):
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 2**bits, (n_in, n_out), generator=generator, dtype=torch.uint8)
    scales = (torch.rand(-(-n_in // group_size), n_out, generator=generator) + 0.1).half()
    zeros = torch.full(scales.shape, 2 ** (bits - 1), dtype=torch.uint8)
    value = (codes.double() - 2 ** (bits - 1)) * scales.double()[torch.arange(n_in) // group_size]
    layout = Layout.of(bits, group_size, n_in, n_out, True)
    return layout, arrange(layout, codes.to(device), scales.to(device), zeros.to(device)), value


def multiplied(x, layout, arranged, bias=None, **options):
    from gptq_plugin.kernels.product.by_bytes import by_bytes, takes
    from gptq_plugin.kernels.product.workspace import workspace_of

    assert takes(layout, x.dtype)
    out = torch.full((len(x), layout.n_out), NAN, dtype=x.dtype, device=x.device)
    by_bytes(x, layout, arranged, bias, out, workspace_of(x.device), **options)
    return out


def error(y, x, value, bias=0.0):
    expected = x.double().cpu() @ value + bias
    return float((y.double().cpu() - expected).norm() / expected.norm())


@triton_device
@pytest.mark.parametrize(
    ("size", "rows", "options"),
    [
        ((512, 64, 128), 1, {}), ((1100, 70, 256), 3, {"BM": 4, "SPLIT": 2}),
        ((100, 37, 10**9), 2, {"BM": 2, "BN": 32}),
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_product_of_bytes_is_the_formula(bits, size, rows, options, device):
    layout, arranged, value = weight_and_value(bits, *size, device)
    limits = {torch.float16: 3e-4, torch.bfloat16: 2.4e-3}
    for dtype in limits if device == "cuda" else (torch.float16,):  # the interpreter is wrong in bfloat16
        x = torch.randn(rows, size[0], device=device).to(dtype)
        x[0, 7] = 300  # one much larger than the others
        bias = torch.randn(size[1], device=device) if rows > 1 else None
        y = multiplied(x, layout, arranged, bias, **options)
        assert error(y, x, value, 0.0 if bias is None else bias.double().cpu()) < limits[dtype]


@triton_device
def test_a_row_that_is_no_number_is_none_and_leaves_others_alone(device):
    layout, arranged, value = weight_and_value(2, 512, 64, 128, device)
    x = torch.randn(4, 512, dtype=torch.float16, device=device)
    x[0, 3], x[1, 9], x[2] = float("inf"), NAN, 0
    y = multiplied(x, layout, arranged, BM=4)
    assert y[:2].isnan().all() and (y[2] == 0).all()
    assert error(y[3:], x[3:], value) < 3e-4


@triton_device
def test_some_outputs_out_of_a_larger_weight_are_multiplied_where_they_lie(device):
    for bits in (2, 3):
        layout, arranged, value = weight_and_value(bits, 512, 192, 128, device)
        part = type(arranged)(arranged.words.narrow(1, 64, 64), arranged.scales.narrow(2, 64, 64), None)
        x = torch.randn(1, 512, dtype=torch.float16, device=device)
        y = multiplied(x, Layout.of(bits, 128, 512, 64, True), part)
        assert error(y, x, value[:, 64:128]) < 3e-4


@gpu
def test_a_product_has_the_same_bytes_in_hundreds_of_runs():
    for bits in (2, 3, 4):
        layout, arranged, value = weight_and_value(bits, 4096, 4096, 128, "cuda")
        x = torch.randn(1, 4096, dtype=torch.float16, device="cuda")
        early = int(torch.cuda.get_device_capability()[0] == 9)
        first = multiplied(x, layout, arranged, SPLIT=4, EARLY=early)
        assert error(first, x, value) < 3e-4
        for _ in range(300):
            assert torch.equal(multiplied(x, layout, arranged, SPLIT=4, EARLY=early), first)
