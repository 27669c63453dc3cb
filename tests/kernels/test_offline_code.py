"""The machine code of the product's kernels, compiled without a GPU: Ampere, Ada and Hopper."""

from __future__ import annotations

import itertools
import re
import subprocess
from pathlib import Path

import pytest
import torch
from gptq_plugin.kernels.product.choice import Choice
from gptq_plugin.kernels.product.layout import Layout

from kernel_cases import INTERPRETED

triton = pytest.importorskip("triton")

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def compiled_for(kernel, types, constants, capability, options):
    """What Triton makes of a kernel."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource

    names = kernel.arg_names
    source = (GluonASTSource if kernel.is_gluon() else ASTSource)(
        kernel,
        {name: "constexpr" if name in constants else types[name] for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={
            (i,): [["tt.divisibility", 16]]
            for i, name in enumerate(names)
            if name not in constants
            and (types[name].startswith("*") or name in ("N", "K", "outputs", "stride", "width"))
        },
    )
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def machine_code(kernel, types, constants, capability, options, folder) -> tuple[str, str, str]:
    """The kernel's intermediate code, machine code and use of resources."""
    compiled = compiled_for(kernel, types, constants, capability, options)
    binary = folder / "kernel.cubin"
    binary.write_bytes(compiled.asm["cubin"])
    code, resources = (
        subprocess.run([TOOLS / "cuobjdump", option, binary], capture_output=True, text=True, check=True).stdout
        for option in ("-sass", "-res-usage")
    )
    return compiled.asm["ttgir"], code, f"{resources} DYNAMIC:{compiled.metadata.shared}"


def longest_loop(code: str) -> list[str]:
    """Operations between the target of a backward branch and the branch, of the longest such."""
    lines = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+ )?([A-Z0-9_.]+)([^;]*);", code, re.M)
    longest: list[str] = []
    for address, operation, rest in lines:
        target = re.search(r"0x([0-9a-f]+)", rest)
        if operation.startswith("BRA") and target and int(target[1], 16) < int(address, 16):
            loop = [o for a, o, _ in lines if int(target[1], 16) <= int(a, 16) <= int(address, 16)]
            longest = max(longest, loop, key=len)
    return longest


@pytest.mark.skipif(INTERPRETED, reason="compiles")
@pytest.mark.skipif(not (TOOLS / "cuobjdump").exists(), reason="needs the tools that Triton comes with")
@pytest.mark.parametrize(
    ("capability", "kind", "bits", "block", "warps", "half", "joined"),
    [
        (80, "bf16", 4, 8, 2, 0, 1), (89, "fp16", 4, 64, 4, 0, 1), (90, "fp16", 4, 8, 2, 0, 1),
        (80, "bf16", 3, 8, 2, 1, 1), (90, "fp16", 3, 8, 2, 0, 1), (90, "fp16", 3, 16, 2, 1, 1),
        (90, "fp16", 2, 64, 4, 1, 1), (90, "bf16", 3, 64, 4, 1, 2), (90, "fp16", 3, 64, 4, 1, 2),
        (90, "fp16", 4, 64, 4, 0, 2), (90, "bf16", 2, 64, 4, 1, 2),
    ],
)  # fmt: skip
def test_weights_go_from_memory_to_the_tensor_cores_without_detours(
    capability, kind, bits, block, warps, half, joined, tmp_path
):
    from gptq_plugin.kernels.product.few_rows import _few_rows_kernel

    layout = Layout.of(bits, 128, 8192, 8192, True)
    types = {
        "x": f"*{kind}", "words": "*i16", "scales": "*i32", "out": f"*{kind}", "parts": "*fp32", "counters": "*i32",
        "M": "i32", "N": "i32", "K": "i32", "stride": "i32", "steps": "i32",
    }  # fmt: skip
    sizes = {
        "BITS": bits, "LANES": layout.lanes, "PLANES": layout.planes, "BLOCKS": layout.blocks_a_step, "GROUP": 128,
        "SYMMETRIC": True, "HAS_BIAS": False, "WHOLE": True, "BN": 64, "BM": block,
        "SPLIT": 1, "STAGES": 3, "EARLY": capability == 90, "HALF": half, "JOINED": joined, "zeros": None,
        "bias": None,
    }  # fmt: skip
    options = {"num_warps": warps, "num_stages": 3}
    graph, code, resources = machine_code(_few_rows_kernel, types, sizes, capability, options, tmp_path)
    assert re.search(r"STACK:0\b", resources), "registers are spilled"
    converted = [line for line in graph.splitlines() if "convert_layout" in line]
    assert not [line for line in converted if re.search(r"xi16|64x\d+xb?f16.*dot_op", line)], "weights are moved"
    loop = longest_loop(code)
    # Expansion, product and scales; with 64 rows of x most are products.
    weights = layout.step // (1 + half) * 64 / (32 * warps)
    assert 0 < len(loop) / weights < (2.2 if block < 64 else 4.2)
    if block == 64 and capability == 90:  # every product is waited for
        products = layout.step // (1 + half) // (joined * layout.lanes)
        assert (
            sum(o.startswith("WARPGROUP.DEPBAR") for o in loop) == products == (2 if joined == 2 and bits != 3 else 4)
        )


@pytest.mark.skipif(INTERPRETED, reason="compiles")
@pytest.mark.skipif(not (TOOLS / "cuobjdump").exists(), reason="needs the tools that Triton comes with")
@pytest.mark.parametrize(("capability", "bits", "ways"), [(80, 4, 4), (89, 8, 2), (90, 2, 8)])
def test_weights_of_programs_whose_warps_share_the_channels_are_not_moved_either(capability, bits, ways, tmp_path):
    from gptq_plugin.kernels.product.by_warps import _by_warps_kernel

    layout = Layout.of(bits, 128, 8192, 8192, True)
    types = {
        "x": "*fp16", "words": "*i16", "scales": "*i32", "out": "*fp16", "M": "i32", "N": "i32", "K": "i32",
        "stride": "i32", "steps": "i32",
    }  # fmt: skip
    sizes = {
        "BITS": bits, "LANES": layout.lanes, "PLANES": layout.planes, "BLOCKS": layout.blocks_a_step, "GROUP": 128,
        "SYMMETRIC": True, "HAS_BIAS": False, "WHOLE": True, "BN": 16, "BM": 8, "WAYS": ways, "STAGES": 3,
        "EARLY": 3 if capability == 90 else 0, "HALF": int(layout.halves), "zeros": None, "bias": None,
    }  # fmt: skip
    options = {"num_warps": ways, "num_stages": 3}
    graph, code, resources = machine_code(_by_warps_kernel, types, sizes, capability, options, tmp_path)
    assert re.search(r"STACK:0\b", resources), "registers are spilled"
    converted = [line for line in graph.splitlines() if "convert_layout" in line]
    assert not [line for line in converted if f"{ways}x16x64x" in line], "weights are moved"
    assert ("CCTL" in code) == (capability == 90), "words are announced"


@pytest.mark.skipif(INTERPRETED, reason="compiles")
@pytest.mark.skipif(not (TOOLS / "cuobjdump").exists(), reason="needs the tools that Triton comes with")
@pytest.mark.parametrize(("capability", "kind", "block"), [(80, "bf16", 8), (89, "fp16", 16), (90, "bf16", 16)])
def test_experts_of_3_bits_spill_nothing(capability, kind, block, tmp_path):
    from gptq_plugin.kernels.product.expert_rows import _WARPS, _expert_rows_kernel, halves

    layout = Layout.of(3, 128, 8192, 8192, True)
    types = {
        "x": f"*{kind}", "ends": "*i32", "words": "*i16", "scales": "*i32", "out": f"*{kind}", "experts": "i32",
        "width": "i32", "K": "i32", "stride": "i32", "steps": "i32",
    }  # fmt: skip
    sizes = {
        "BITS": 3, "LANES": layout.lanes, "PLANES": layout.planes, "BLOCKS": layout.blocks_a_step, "GROUP": 128,
        "SYMMETRIC": True, "WHOLE": False, "EXPERTS": 8, "BN": 64, "BM": block, "STAGES": 3,
        "HALF": halves(layout, torch.float16, block), "zeros": None,
    }  # fmt: skip
    options = {"num_warps": _WARPS[block], "num_stages": 3}
    _, _, resources = machine_code(_expert_rows_kernel, types, sizes, capability, options, tmp_path)
    assert re.search(r"STACK:0\b", resources), "registers are spilled"


@pytest.mark.skipif(INTERPRETED, reason="compiles")
@pytest.mark.skipif(not (TOOLS / "cuobjdump").exists(), reason="needs the tools that Triton comes with")
@pytest.mark.parametrize("capability", [80, 89, 90])
def test_a_product_of_bytes_takes_half_of_the_operations(capability, tmp_path):
    from gptq_plugin.kernels.product.by_bytes import _by_bytes_kernel

    types = {
        "digits": "*i8", "shares": "*i32", "unit": "*fp32", "words": "*i8", "scales": "*i32", "out": "*fp16",
        "parts": "*fp32", "counters": "*i32", "N": "i32", "stride": "i32", "steps": "i32",
    }  # fmt: skip
    sizes = {"BN": 64, "SPLIT": 1, "STAGES": 3, "HAS_BIAS": False, "bias": None}
    options = {"num_warps": 2, "num_stages": 3}
    graph, code, resources = machine_code(_by_bytes_kernel, types, sizes, capability, options, tmp_path)
    assert re.search(r"STACK:0\b", resources), "registers are spilled"
    converted = [line for line in graph.splitlines() if "convert_layout" in line]
    assert not [line for line in converted if "xi8" in line or "xi32" in line], "weights are moved"
    assert 0 < len(longest_loop(code)) / (512 * 64 / 64) < 0.8


def many_rows_arguments(bits, options, symmetric):
    """The kernel of many rows with types of its arguments, constants and options of its launch."""
    pytest.importorskip("triton.experimental.gluon.nvidia.hopper")
    from gptq_plugin.kernels.product.many_rows import _many_rows_kernel

    kind = "fp16" if symmetric else "bf16"
    wide, narrow = (f"NVMMASharedLayout(swizzle_byte_width={n}, element_bitwidth=16, rank=2)" for n in (128, 64))
    types = {
        "x": f"tensordesc<{kind}[{options['BM']}, {32 if bits == 2 else 64}],{narrow if bits == 2 else wide}>",
        "words": f"tensordesc<i16[{options['BN']}, 32],{narrow}>",
        "scales": "*i32", "zeros": "*i32", "out": f"*{kind}", "parts": "*fp32", "counters": "*i32",
        "M": "i32", "N": "i32", "outputs": "i32", "stride": "i32", "turns": "i32",
    }  # fmt: skip
    sizes = options | {
        "BITS": bits, "WIDTH": 2, "SHARED": options["BM"] < 256 and options["GROUPS"] == 2, "SYMMETRIC": symmetric,
        "HAS_BIAS": False, "EARLY": 1, "LATE": options["BM"] <= (16 if bits == 2 else 32), "bias": None,
    }  # fmt: skip
    if symmetric:
        sizes["zeros"] = None
    return _many_rows_kernel, types, sizes, 90, {"num_warps": 4, "launch_pdl": True}


@pytest.mark.skipif(INTERPRETED, reason="compiles")
@pytest.mark.skipif(not (TOOLS / "cuobjdump").exists(), reason="needs the tools that Triton comes with")
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    ("bits", "options"),
    [
        (3, "GROUPS=2 BN=128 BM=64 STAGES=3 JOINED=4 AHEAD=3"), (4, "GROUPS=2 BN=64 BM=256 STAGES=5 JOINED=1 AHEAD=2"),
        (3, "GROUPS=2 BN=128 BM=16 STAGES=4 JOINED=4 AHEAD=4"), (2, "GROUPS=2 BN=128 BM=8 STAGES=4 JOINED=4 AHEAD=4"),
    ],
)  # fmt: skip
def test_the_product_of_many_rows_spills_nothing_and_has_the_shared_memory_it_is_said_to(
    bits, options, symmetric, tmp_path
):
    from gptq_plugin.kernels.product.registry import shared_of_many

    chosen = dict(Choice.parse(f"many_rows {options}").options)
    _, code, resources = machine_code(*many_rows_arguments(bits, chosen, symmetric), tmp_path)
    assert re.search(r"STACK:0\b", resources), "registers are spilled"
    taken = int(re.search(r"DYNAMIC:(\d+)", resources)[1])
    assert code.count("HGMMA") and taken <= shared_of_many(bits, **chosen)


@pytest.mark.skipif(INTERPRETED, reason="compiles")
@pytest.mark.skipif(not (TOOLS / "cuobjdump").exists(), reason="needs the tools that Triton comes with")
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_no_barrier_of_four_groups_of_warps_lies_where_other_values_are_kept(bits, tmp_path):
    options = {"GROUPS": 4, "BN": 64, "BM": 64, "STAGES": 3, "JOINED": 4, "AHEAD": 3}
    _, code, _ = machine_code(*many_rows_arguments(bits, options, True), tmp_path)
    barriers = {int(place, 16) for place in re.findall(r"SYNCS\.EXCH\.64 URZ, \[UR\d+\+(0x[0-9a-f]+)\]", code)}
    stored = re.findall(r"(?:STSM[^\[]*|\bSTS(?:\.\d+)? )\[[^\]]*?\+(0x[0-9a-f]+)\]", code)
    assert len(barriers) == 6 and not barriers & {int(place, 16) for place in stored}


@pytest.mark.skipif(INTERPRETED, reason="compiles")
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_words_are_given_back_to_the_copy_engine_only_after_products_of_them(bits):
    """A barrier of threads does not wait for loads from shared memory, and the copy engine is not in their order: words
    given back right after they were loaded were overwritten in up to all runs (docs/benchmarks/qlinear.md)."""
    options = {"GROUPS": 2, "BN": 128, "BM": 64, "STAGES": 3, "JOINED": 4, "AHEAD": 3}
    code = compiled_for(*many_rows_arguments(bits, options, True)).asm["ttgir"]
    steps = re.findall(r"ttg\.local_load|ttng\.arrive_barrier|ttng\.warp_group_dot_wait", code)
    next_steps = [after for step, after in itertools.pairwise(steps) if step == "ttg.local_load" != after]
    assert next_steps and set(next_steps) == {"ttng.warp_group_dot_wait"}
