"""The kernels between which is chosen: the options each can run with."""

from __future__ import annotations

import pytest
import torch
from gptq_plugin.kernels.product.choice import Choice, Gpu
from gptq_plugin.kernels.product.layout import Layout, arrange
from gptq_plugin.kernels.product.registry import KERNELS, fits, run
from gptq_plugin.kernels.product.workspace import workspace_of

from gpus import A100, H100, L4
from kernel_cases import NAN, assert_product, gpu

LAYOUT = Layout.of(4, 128, 4096, 4096, True)


def right(text, layout=LAYOUT, rows=16, dtype=torch.float16, on=H100):
    return fits(Choice.parse(text), layout, rows, dtype, on)


def test_every_kernel_has_options_with_defaults():
    own = {"BN": 64, "BM": 16, "SPLIT": 1, "STAGES": 3, "warps": 2, "EARLY": 0, "HALF": 0, "JOINED": 1}
    assert KERNELS["few_rows"].options == own
    own = {"GROUPS": 2, "BN": 64, "BM": 256, "STAGES": 5, "JOINED": 1, "AHEAD": 2, "WIDTH": 2, "SPLIT": 1, "EARLY": 0}
    assert KERNELS["many_rows"].options == own
    assert set(KERNELS["by_warps"].options) == {"BN", "BM", "WAYS", "STAGES", "EARLY", "HALF"}
    assert KERNELS["by_bytes"].options == {"BN": 64, "SPLIT": 1, "STAGES": 3, "warps": 2}
    assert KERNELS["dense"].options == {}
    assert all(type(value) is int for kernel in KERNELS.values() for value in kernel.options.values())


def test_options_left_out_are_the_kernels_own():
    assert right("few_rows") and right("many_rows") and right("dense") and right("few_rows BN=32 BM=8")


@pytest.mark.parametrize(
    "text",
    [
        "no_such_kernel", "run", "dense BN=64", "few_rows WIDTH=2", "few_rows BN=64 BN=64", "few_rows BN=48",
        "few_rows BN=256", "few_rows BM=4", "few_rows BM=24", "few_rows SPLIT=0", "few_rows SPLIT=17",
        "few_rows STAGES=0", "few_rows STAGES=9", "few_rows warps=3", "few_rows BM=128 STAGES=4",
        "many_rows BN=32", "many_rows BN=128", "many_rows BN=128 BM=128", "many_rows BM=64 JOINED=2",
        "many_rows BM=64 STAGES=4 JOINED=4 AHEAD=3",
        "many_rows GROUPS=3 BM=64", "many_rows GROUPS=4 BM=128 STAGES=4", "many_rows GROUPS=4 BN=128 BM=64 STAGES=3",
        "many_rows BM=512", "many_rows BM=24", "many_rows STAGES=6", "many_rows STAGES=1", "many_rows AHEAD=1",
        "many_rows BM=64 STAGES=2",
        "many_rows AHEAD=5", "many_rows WIDTH=0", "many_rows SPLIT=65", "many_rows EARLY=2", "few_rows EARLY=5",
        "by_warps SPLIT=2", "by_warps BN=48", "by_warps BM=64", "by_warps WAYS=3", "by_warps WAYS=16",
        "by_bytes", "by_warps STAGES=0", "by_warps BN=64 WAYS=8 STAGES=4", "by_warps EARLY=5",
    ],
)  # fmt: skip
def test_options_that_a_kernel_cannot_run_with_do_not_fit(text):
    assert not right(text)


def test_what_fits_depends_on_layout_rows_dtype_and_gpu():
    assert not right("few_rows BN=128", Layout.of(4, 128, 4096, 4100, True)) and right("few_rows BN=128")
    assert not right("few_rows", rows=1024) and not right("many_rows SPLIT=2", rows=1024)
    assert right("many_rows SPLIT=2", rows=256) and right("many_rows", rows=1024)
    assert right("few_rows EARLY=1") and not right("few_rows EARLY=1", on=A100)
    assert right("one_row EARLY=1", rows=1) and not right("one_row EARLY=1", rows=1, on=A100)
    assert right("by_warps") and right("by_warps", on=A100) and not right("by_warps EARLY=1", on=A100)
    assert not right("by_warps", dtype=torch.float32) and not right("by_warps", rows=128)
    two = Layout.of(2, 128, 4096, 4096, True)
    assert right("by_bytes", two, 1) and right("by_bytes BN=32 SPLIT=8 STAGES=4 warps=1", two, 1, on=A100)
    assert not right("by_bytes", two, 2) and not right("by_bytes", two, 1, torch.float32)
    assert not right("by_bytes", Layout.of(2, 128, 2**20 + 128, 1024, True), 1)
    assert not right("by_bytes SPLIT=9", two, 1) and not right("by_bytes BN=16", two, 1)
    assert right("by_bytes BN=128 STAGES=6", two, 1) and not right("by_bytes BN=128 STAGES=6", two, 1, on=L4)
    for other in (LAYOUT, Layout.of(2, 64, 4096, 4096, True), Layout.of(2, 128, 4096, 4096, False)):
        assert not right("by_bytes", other, 1)
    assert not right("many_rows", on=A100) and not right("many_rows", dtype=torch.float32)
    three, two = Layout.of(3, 128, 4096, 4096, True), Layout.of(2, 128, 4096, 4096, True)
    for text in ("few_rows HALF=1", "by_warps HALF=1"):
        assert right(text, three) and right(text, two) and not right(text)
        assert not right(text, Layout.of(2, 32, 4096, 4096, True))  # whose steps have 256 channels
    joined = "few_rows BM=64 warps=4 HALF=1 JOINED=2"
    assert right(joined, three) and right(joined, two) and not right(joined, three, on=A100)
    assert right("few_rows warps=4 JOINED=2") and not right(
        "few_rows warps=4 JOINED=2", Layout.of(4, 64, 4096, 4096, True)
    )
    assert not right("few_rows BM=8 warps=4 JOINED=2", Layout.of(8, 128, 4096, 4096, True))
    assert not right("few_rows BM=8 warps=4 JOINED=2", dtype=torch.float32)
    assert not right("few_rows BM=8 JOINED=2", three) and not right("few_rows BM=8 warps=4 JOINED=3", three)
    assert not right("few_rows BM=8 warps=4 JOINED=2", Layout.of(3, 32, 4096, 4096, True))
    four = "many_rows GROUPS=4 BM=64 STAGES=3 JOINED=4 AHEAD=3"
    assert right(four) and not right(f"{four} SPLIT=2")
    assert right("many_rows BM=64 STAGES=3") and right("many_rows BM=64 STAGES=2 JOINED=4")
    assert right("few_rows BM=64 STAGES=4 HALF=1", two) and not right("few_rows BM=64 STAGES=4", two)
    assert right("many_rows", three) and right("many_rows", two)
    assert not right("many_rows", Layout.of(3, 64, 4096, 4096, True))
    assert not right("few_rows BM=64 STAGES=4", on=L4) and right("few_rows BM=64 STAGES=4", on=A100)
    assert not right("few_rows BM=64 STAGES=4", dtype=torch.float32, on=A100)


@gpu
def test_every_kernel_runs_by_its_name_and_x_at_an_odd_address_is_multiplied_too():
    codes = torch.randint(0, 16, (1024, 192), dtype=torch.uint8)
    scales, zeros = torch.rand(8, 192).half() + 0.1, torch.full((8, 192), 8, dtype=torch.uint8)
    layout = Layout.of(4, 128, 1024, 192, True)
    arranged = arrange(layout, codes.cuda(), scales.cuda(), zeros.cuda())
    weight = (codes.double() - 8) * scales.double().repeat_interleave(128, 0)
    held = torch.randn(33 * 1024 + 1, dtype=torch.float16, device="cuda")
    for x in (held[:-1].view(33, 1024), held[1:].view(33, 1024)):
        for name in KERNELS:
            if fits(Choice(name), layout, 64, x.dtype, Gpu.of(x.device)):
                out = torch.full((33, 192), NAN, dtype=x.dtype, device="cuda")
                run(Choice(name), x, layout, arranged, None, out, workspace_of(x.device))
                assert_product(out, x, weight.t(), None)
