"""The kernels between which is chosen, each with the options it can run with: `KERNELS`, `run`.

A further kernel is a line in `KERNELS`, and a clause in `rule` if it is to be chosen without having been measured.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from . import rule, waves
from .by_bytes import by_bytes
from .by_bytes import takes as takes_by_bytes
from .by_warps import by_warps
from .choice import Choice, Gpu, Options
from .dense import dense
from .few_rows import few_rows
from .hopper import gluon
from .layout import Arranged, Layout
from .one_row import one_row
from .one_row import takes as takes_one_row
from .workspace import Workspace


@dataclass(frozen=True)
class Kernel:
    """One way to multiply.

    Attributes:
        multiply: Writes x Wᵀ + bias, as `few_rows.few_rows`; its keyword-only arguments are the options.
        fits: (layout, rows, dtype, gpu, options): true if the options, all of them, are right for a layout and so many
            rows at most, and their shared memory is there.
        near: (layout, rows, dtype, gpu): options that are worth a measurement, the likeliest first.
    """

    multiply: Callable[..., None]
    fits: Callable[[Layout, int, torch.dtype, Gpu, Mapping[str, int]], bool]
    near: Callable[[Layout, int, torch.dtype, Gpu], Iterator[Options]]

    @functools.cached_property
    def options(self) -> Options:
        """Names of the options with what they are where they are left out."""
        arguments = inspect.signature(self.multiply).parameters.values()
        return {argument.name: argument.default for argument in arguments if argument.kind is argument.KEYWORD_ONLY}


def run(
    choice: Choice, x: Tensor, layout: Layout, arranged: Arranged, bias: Tensor | None, out: Tensor,
    workspace: Workspace,
) -> None:  # fmt: skip
    """Writes x Wᵀ + bias by the kernel chosen; arguments are those of `few_rows.few_rows`."""
    KERNELS[choice.kernel].multiply(x, layout, arranged, bias, out, workspace, **dict(choice.options))


def fits(choice: Choice, layout: Layout, rows: int, dtype: torch.dtype, gpu: Gpu) -> bool:
    """True if there is such a kernel on the GPU, and it takes the layout and so many rows with these options."""
    kernel = KERNELS.get(choice.kernel)
    if kernel is None:
        return False
    options, given = kernel.options, dict(choice.options)
    if not given.keys() <= options.keys() or len(given) < len(choice.options):
        return False
    return kernel.fits(layout, rows, dtype, gpu, options | given)


def _few_fits(layout: Layout, rows: int, dtype: torch.dtype, gpu: Gpu, options: Mapping[str, int]) -> bool:
    BN, BM, SPLIT, STAGES, warps = (options[name] for name in ("BN", "BM", "SPLIT", "STAGES", "warps"))
    return (
        _early_fits(gpu, options)
        and rows <= waves.SHARED_ROWS
        and BN in (32, 64, 128)
        and layout.outputs % BN == 0
        and BM in (8, 16, 32, 64, 128)
        and 1 <= SPLIT <= layout.steps
        and 1 <= STAGES <= 8
        and warps in (1, 2, 4, 8)
        and options["HALF"] in (0, layout.halves)
        and (options["JOINED"] == 1 or (options["JOINED"] == 2 and _joins(layout, dtype, gpu, BN, warps)))
        and _shared_of_few(layout, dtype, BN, BM, STAGES, options["HALF"], gpu.hopper) <= gpu.shared
    )


def _joins(layout: Layout, dtype: torch.dtype, gpu: Gpu, BN: int, warps: int) -> bool:
    """True if two planes can be multiplied at a time, without a number that moves to another thread."""
    planes = layout.bits < 8 and layout.group >= 2 * layout.lanes
    return gpu.hopper and planes and dtype != torch.float32 and BN >= 64 and warps >= 4


def _early_fits(gpu: Gpu, options: Mapping[str, int]) -> bool:
    return 0 <= options["EARLY"] <= (4 if gpu.hopper else 0)


def _bytes_of_turn(layout: Layout, BN: int, HALF: int) -> int:
    """Bytes of words, scales and zeros of a step, or of a half of it, for which words are read twice."""
    words = BN * layout.step // 4 if HALF else BN * layout.step * layout.bits // 8
    return words + layout.step // (1 + HALF) // layout.group // 2 * BN * 4 * (1 if layout.symmetric else 2)


def _shared_of_few(layout: Layout, dtype: torch.dtype, BN: int, BM: int, STAGES: int, HALF: int, hopper: bool) -> int:
    """About the bytes of shared memory: words, scales, zeros and x of all stages but one; beside them, in float32, a
    plane of weights or x, and, on Hopper, a step of x (Triton 3.7.1). The rule asks for more."""
    x = BM * layout.step // (1 + HALF) * dtype.itemsize
    if dtype == torch.float32:
        beside = max(BN, BM) * layout.lanes * 4
    else:
        beside = x if hopper else 0
    return (STAGES - 1) * (_bytes_of_turn(layout, BN, HALF) + x) + beside


def _near_few(layout: Layout, rows: int, dtype: torch.dtype, gpu: Gpu) -> Iterator[Options]:
    own = rule.few(layout, rows, dtype, gpu)
    BN, BM, SPLIT, STAGES, warps, EARLY = (own[name] for name in ("BN", "BM", "SPLIT", "STAGES", "warps", "EARLY"))
    deeper = {"STAGES": 5 if STAGES == 3 else 3}
    fewest = 4 if layout.bits == 3 and BM > 8 else 2  # two warps of 3 bits and more rows, or with 64 rows, spill
    changes: list[Options] = [
        {}, {"HALF": layout.halves - own.get("HALF", 0)}, {"JOINED": 2, "warps": 4} if BM > 8 else {},
        {"EARLY": 1 - EARLY}, {"SPLIT": 2 * SPLIT}, {"SPLIT": SPLIT // 2, "HALF": 0}, deeper, {"BN": 96 - BN},
        {"BN": 96 - BN, "SPLIT": SPLIT // 2 if BN == 64 else 2 * SPLIT},
        {"warps": fewest if warps == 4 and BM < 64 else 2 * warps}, {"STAGES": 4},
        {"BM": BM // 2, "warps": fewest if BM <= 32 else 4}, {"SPLIT": 3}, {"BN": 128, "warps": 4},
        {"SPLIT": 2 * SPLIT} | deeper, {"BM": 2 * BM, "warps": 4} if rows > BM else {},
    ]  # fmt: skip
    for change in changes:
        yield _without_zero_half(own | change)


def _without_zero_half(options: Options) -> Options:
    """A choice of whole steps does not name HALF."""
    return {name: value for name, value in options.items() if name != "HALF" or value}


def _warps_fits(layout: Layout, rows: int, dtype: torch.dtype, gpu: Gpu, options: Mapping[str, int]) -> bool:
    BN, BM, WAYS, STAGES, HALF = (options[name] for name in ("BN", "BM", "WAYS", "STAGES", "HALF"))
    of_a_warp = _bytes_of_turn(layout, BN, HALF) + BM * layout.step // (1 + HALF) * dtype.itemsize
    return (
        _early_fits(gpu, options)
        and HALF in (0, layout.halves)
        and rows <= rule.FEW_ROWS
        and dtype in (torch.float16, torch.bfloat16)
        and BN in (16, 32, 64)
        and BM in (8, 16, 32)
        and WAYS in (1, 2, 4, 8)
        and 1 <= STAGES <= 8
        and gpu.shared >= max(STAGES - 1, 1) * WAYS * of_a_warp + 4096
    )


def _near_warps(layout: Layout, rows: int, dtype: torch.dtype, gpu: Gpu) -> Iterator[Options]:
    if rows <= 16:
        for half in range(layout.halves, -1, -1):
            for stages in (3, 4):
                yield _without_zero_half(rule.warps(rows, gpu) | {"STAGES": stages, "HALF": half})


def _bytes_fits(layout: Layout, rows: int, dtype: torch.dtype, gpu: Gpu, options: Mapping[str, int]) -> bool:
    BN, SPLIT, STAGES = (options[name] for name in ("BN", "SPLIT", "STAGES"))
    stage = _bytes_of_turn(layout, BN, 0) + 8 * layout.step  # with the digits of x
    return (
        rows == 1
        and takes_by_bytes(layout, dtype)
        and layout.n_in <= 2**20  # a block holds the row
        and BN in (32, 64, 128)
        and layout.outputs % BN == 0
        and 1 <= SPLIT <= layout.steps
        and 1 <= STAGES <= 8
        and options["warps"] in (1, 2, 4)
        and (STAGES - 1) * stage + 8192 <= gpu.shared
    )


def _near_bytes(layout: Layout, rows: int, dtype: torch.dtype, gpu: Gpu) -> Iterator[Options]:
    if rows == 1:
        yield {}


def _many_rows(
    x: Tensor, layout: Layout, arranged: Arranged, bias: Tensor | None, out: Tensor, workspace: Workspace,
    *, GROUPS: int = 2, BN: int = 64, BM: int = 256, STAGES: int = 5, JOINED: int = 1, AHEAD: int = 2, WIDTH: int = 2,
    SPLIT: int = 1, EARLY: int = 0,
) -> None:  # fmt: skip
    """`many_rows`; `few_rows` or `dense` where x lies at an address that the copy engine does not take."""
    if x.data_ptr() % 16:
        other = few_rows if len(x) <= rule.FEW_ROWS else _dense
        return other(x, layout, arranged, bias, out, workspace)
    module = gluon()
    assert module is not None
    module.many_rows(
        x, layout, arranged, bias, out, workspace, GROUPS=GROUPS, BN=BN, BM=BM, STAGES=STAGES,
        JOINED=JOINED, AHEAD=AHEAD, WIDTH=WIDTH, SPLIT=SPLIT, EARLY=EARLY,
    )  # fmt: skip
    return None


def _many_fits(layout: Layout, rows: int, dtype: torch.dtype, gpu: Gpu, options: Mapping[str, int]) -> bool:
    names = ("GROUPS", "BN", "BM", "STAGES", "JOINED", "AHEAD", "WIDTH", "SPLIT")
    GROUPS, BN, BM, STAGES, JOINED, AHEAD, WIDTH, SPLIT = (options[name] for name in names)
    module = gluon() if gpu.hopper else None
    return (
        module is not None
        and _early_fits(gpu, options)
        and options["EARLY"] <= 1
        and module.takes(layout, dtype)
        and BM in (8, 16, 32, 64, 128, 256)
        and {(2, 64): 256, (2, 128): 64, (4, 64): 64}.get((GROUPS, BN), 0) >= BM  # for the registers
        and (JOINED == 1 or (JOINED == 4 and STAGES == AHEAD))
        and (2 if JOINED == 4 else 3) <= STAGES <= 16  # see `many_rows`
        and 2 <= AHEAD <= 4
        and 1 <= WIDTH <= 64
        and (SPLIT == 1 or (1 < SPLIT <= 64 and GROUPS == 2 and rows <= waves.SHARED_ROWS))  # parts take memory
        and shared_of_many(layout.bits, GROUPS, BN, BM, STAGES, JOINED, AHEAD) <= gpu.shared
    )


def shared_of_many(bits: int, GROUPS: int, BN: int, BM: int, STAGES: int, JOINED: int, AHEAD: int) -> int:
    """At least the bytes of shared memory: the rings, and barriers."""
    words = AHEAD * GROUPS * BN * (64 if bits == 2 else 128)
    return STAGES * JOINED * BM * 128 + words + 3072 + 2048 * GROUPS


def _near_many(layout: Layout, rows: int, dtype: torch.dtype, gpu: Gpu) -> Iterator[Options]:
    if rows <= rule.FEW_ROWS:
        wide = rule.wide(rows)
        narrow = wide | {"BN": 64, "STAGES": 4, "AHEAD": 4}
        if rows > 32:
            yield from (wide | {"GROUPS": 4, "BN": 64, "SPLIT": 1}, narrow | {"SPLIT": 1})
        yield from (wide, wide | {"SPLIT": 4}, narrow)
    elif rows <= waves.SHARED_ROWS:
        own = waves.MEDIUM if rows <= 128 else waves.LARGE | {"EARLY": 1}
        yield from (waves.NARROW, own, waves.SHARED, rule.wide(rows), own | {"EARLY": 0})
    else:
        yield waves.MEDIUM
        yield from (waves.LARGE | {"WIDTH": width} for width in (2, 4, 8, 1))


def _dense(
    x: Tensor, layout: Layout, arranged: Arranged, bias: Tensor | None, out: Tensor, workspace: Workspace
) -> None:
    """The vendor's product with the weight made anew."""
    weight = dense(layout, arranged, x.dtype)
    torch.mm(x, weight.t(), out=out) if bias is None else torch.addmm(bias.to(x.dtype), x, weight.t(), out=out)


def _dense_fits(layout: Layout, rows: int, dtype: torch.dtype, gpu: Gpu, options: Mapping[str, int]) -> bool:
    return True


def _near_dense(layout: Layout, rows: int, dtype: torch.dtype, gpu: Gpu) -> Iterator[Options]:
    if rows >= rule.FEW_ROWS // 2:
        yield {}


def _one_row(
    x: Tensor, layout: Layout, arranged: Arranged, bias: Tensor | None, out: Tensor, workspace: Workspace,
    *, CHUNKS: int = 64, EARLY: int = 0,
) -> None:  # fmt: skip
    """`one_row`; `few_rows` where x lies at an address from which two inputs cannot be read at a time."""
    if x.data_ptr() % 4:
        return few_rows(x, layout, arranged, bias, out, workspace, BM=8, EARLY=EARLY)
    return one_row(x, layout, arranged, bias, out, workspace, CHUNKS=CHUNKS, EARLY=EARLY)


def _one_fits(layout: Layout, rows: int, dtype: torch.dtype, gpu: Gpu, options: Mapping[str, int]) -> bool:
    fits = rows == 1 and takes_one_row(layout, dtype) and _early_fits(gpu, options)
    return fits and options["CHUNKS"] in (32, 64, 128, 256)


def _near_one(layout: Layout, rows: int, dtype: torch.dtype, gpu: Gpu) -> Iterator[Options]:
    if rows == 1:
        for chunks in (64, 32, 128):
            yield {"CHUNKS": chunks, "EARLY": 3 if gpu.hopper and chunks == 128 else int(gpu.hopper)}
        yield {"CHUNKS": 64}


KERNELS: dict[str, Kernel] = {
    "one_row": Kernel(_one_row, _one_fits, _near_one),
    "few_rows": Kernel(few_rows, _few_fits, _near_few),
    "by_bytes": Kernel(by_bytes, _bytes_fits, _near_bytes),
    "by_warps": Kernel(by_warps, _warps_fits, _near_warps),
    "many_rows": Kernel(_many_rows, _many_fits, _near_many),
    "dense": Kernel(_dense, _dense_fits, _near_dense),
}
