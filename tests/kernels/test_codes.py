"""The PTX that expands words, run on numbers: every plane of every width, in float16 and bfloat16."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

pytest.importorskip("triton")

from gptq_plugin.kernels.product.codes import ptx, start
from gptq_plugin.kernels.product.layout import pieces


def halves(bits: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.tensor([bits & 0xFFFF, bits >> 16], dtype=torch.int32).to(torch.int16).view(dtype)


def bits_of(values: torch.Tensor) -> int:
    low, high = (int(value) & 0xFFFF for value in values.view(torch.int16))
    return low | high << 16


def run(code: str, operands: list[int], dtype: torch.dtype) -> list[float]:
    """$0 of code in the few operations that `ptx` uses; $1 and so on are the operands."""
    known = {f"${i}": value for i, value in enumerate(operands, 1)}

    def value(name: str) -> int:
        return known[name] if name in known else int(name, 0)

    for line in filter(None, map(str.strip, code.strip("{}").split(";"))):
        operation, arguments = line.split(" ", 1)
        to, *names = map(str.strip, arguments.split(","))
        if operation == "mov.b32":
            known[to] = value(*names)
        elif operation == "shr.u32":
            known[to] = value(names[0]) >> int(names[1])
        elif operation == "lop3.b32":
            assert names[3] == "0xea"
            known[to] = value(names[0]) & value(names[1]) | value(names[2])
        elif operation != ".reg":
            floats = [halves(value(name), dtype).double() for name in names]
            exact = floats[0] + floats[1] if operation == "add.rn.f16x2" else floats[0] * floats[1] + floats[2]
            assert operation in ("add.rn.f16x2", "fma.rn.f16x2", "fma.rn.bf16x2")
            known[to] = bits_of(exact.to(dtype))
    found: list[float] = halves(known["$0"], dtype).tolist()
    return found


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_every_plane_is_its_codes_less_their_zero(bits, dtype, symmetric):
    draw = random.Random(bits)
    bfloat16 = dtype == torch.bfloat16
    for plane, _ in itertools.product(range(16 if bits == 3 else 16 // bits), range(20)):
        words, zero = [draw.getrandbits(32) for _ in range(3)], draw.randrange(2**bits)
        parts = pieces(bits, plane)
        operands = [words[word] for word, *_ in parts]
        if symmetric:
            zero = 2 ** (bits - 1)
        else:
            base, shift = start(plane, bits, bfloat16)
            first = base + ((zero >> 4 if bits == 8 and bfloat16 else zero) << shift)
            operands.append(first & 0xFFFF | (first & 0xFFFF) << 16)
            if bits == 8 and bfloat16:
                operands.append(bits_of(torch.full((2,), -(zero & 15), dtype=dtype)))
        codes = [
            sum((words[word] >> half + place & 2**number - 1) << low for word, place, low, number in parts)
            for half in (0, 16)
        ]
        assert run(ptx(plane, bits, bfloat16, symmetric), operands, dtype) == [code - zero for code in codes]
