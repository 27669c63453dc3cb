"""x Wᵀ from the kernels' layout: `product` chooses a kernel by rows, sizes and GPU, `weight` gives the matrix."""

from __future__ import annotations

import functools
import logging
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..needs_triton import triton
from .dense import dense
from .few_rows import few_rows
from .layout import OUTPUTS, Arranged, Layout
from .workspace import workspace_of

log = logging.getLogger(__name__)

FEW_ROWS = 64  # up to which the weights' bytes, not arithmetic, take the time
_FEW_ROWS_TILED = 256  # up to which tiles of 64 rows are faster where outputs are too few for larger ones
_PROGRAMS = 1.6  # for every multiprocessor: as many share the channels of a tile as it takes to have these


@dataclass(frozen=True)
class Choice:
    """A kernel, "few_rows", "many_rows" or "dense" (the vendor's product of the weight made anew), and its options."""

    kernel: str
    options: tuple[tuple[str, Any], ...] = ()

    def __str__(self) -> str:
        return self.kernel + "".join(f" {name}={value}" for name, value in self.options)


@functools.cache
def choose(layout: Layout, rows: int, dtype: torch.dtype, device: torch.device) -> Choice:
    """The kernel for so many rows; the log tells once which."""
    choice = _chosen(layout, rows, dtype, _Gpu.of(device))
    log.debug("%s rows of %s by %s: %s", rows, dtype, layout, choice)
    return choice


def described(layout: Layout, device: torch.device) -> str:
    """The kernels for one row and for many, in words."""
    few, many = (choose(layout, rows, torch.float16, device) for rows in (1, 2048))
    return f"1 row: {few}; 2048: {many}"


def check(x: Tensor, layout: Layout, arranged: Arranged, bias: Tensor | None) -> None:
    """Raises ValueError for an input that `product` does not take."""
    if x.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise ValueError(f"the Triton kernels compute in float16, bfloat16 or float32, not {x.dtype}: cast x")
    if x.dim() == 0 or x.shape[-1] != layout.n_in:
        raise ValueError(f"x must end in {layout.n_in} input channels, got shape {list(x.shape)}")
    if bias is not None and list(bias.shape) != [layout.n_out]:
        raise ValueError(f"bias must have shape [{layout.n_out}], got {list(bias.shape)}")
    for name, tensor in (("x", x), ("bias", bias)):
        if tensor is not None and tensor.device != arranged.words.device:
            raise ValueError(f"{name} is on {tensor.device}, the weights on {arranged.words.device}: move one of them")


def product(x: Tensor, layout: Layout, arranged: Arranged, bias: Tensor | None, order: Tensor | None = None) -> Tensor:
    """x Wᵀ + bias, accumulated in float32. Nothing waits for the GPU; may be captured in a CUDA graph.

    Args:
        x: float16, bfloat16 or float32 [..., in].
        layout, arranged: The weight.
        bias: [out], any floating dtype, or None.
        order: int64 [in], the channels of x in the weight's order; None if they are.

    Returns:
        [..., out] in x's dtype, contiguous.
    """
    out = x.new_empty(*x.shape[:-1], layout.n_out)
    if not out.numel():
        return out
    rows = x.reshape(-1, layout.n_in)
    rows = rows.contiguous() if order is None else rows.index_select(1, order)
    number = len(rows)
    choice = choose(layout, number if number <= FEW_ROWS else -(-number // FEW_ROWS) * FEW_ROWS, x.dtype, x.device)
    options = dict(choice.options)
    y = out.view(number, layout.n_out)
    if bias is not None:
        bias = bias.contiguous()
    with torch.cuda.device(x.device):
        if choice.kernel == "few_rows":
            few_rows(rows, layout, arranged, bias, y, workspace_of(x.device), **options)
        elif choice.kernel == "many_rows" and rows.data_ptr() % 16 == 0:
            gluon = _gluon()
            assert gluon is not None
            gluon.many_rows(rows, layout, arranged, bias, y, workspace_of(x.device), **options)
        else:
            weight = dense(layout, arranged, x.dtype)
            torch.mm(rows, weight.t(), out=y) if bias is None else torch.addmm(
                bias.to(x.dtype), rows, weight.t(), out=y
            )
    return out


def weight(layout: Layout, arranged: Arranged, dtype: torch.dtype, order: Tensor | None = None) -> Tensor:
    """The weight, [out, in] in `dtype`, every number rounded once; channels are those of x."""
    with torch.cuda.device(arranged.words.device):
        made = dense(layout, arranged, dtype)
    if order is None:
        return made
    return torch.empty_like(made).index_copy_(1, order, made)


@dataclass(frozen=True)
class _Gpu:
    processors: int
    hopper: bool
    shared: int  # bytes of a multiprocessor's shared memory that one program may take

    @classmethod
    def of(cls, device: torch.device) -> _Gpu:
        index = torch.cuda.current_device() if device.index is None else device.index
        found = triton.runtime.driver.active.utils.get_device_properties(index)
        major, _ = torch.cuda.get_device_capability(device)
        return cls(found["multiprocessor_count"], major == 9, found["max_shared_mem"])


def _chosen(layout: Layout, rows: int, dtype: torch.dtype, gpu: _Gpu) -> Choice:
    if rows <= FEW_ROWS:
        return _few(layout, rows, dtype, gpu)
    gluon = _gluon() if gpu.hopper else None
    if gluon is None or not gluon.takes(layout, dtype):
        return Choice("dense")
    tiles = layout.outputs // 128 * triton.cdiv(rows, 256)
    if rows <= _FEW_ROWS_TILED and tiles * 2 < gpu.processors:
        return _few(layout, rows, dtype, gpu)
    return Choice("many_rows", (("BN", 64), ("BM", 256), ("STAGES", 3), ("WIDTH", 2 if rows > 1024 else 4)))


def _few(layout: Layout, rows: int, dtype: torch.dtype, gpu: _Gpu) -> Choice:
    """Fits what was fastest on an H100 (scripts/bench_qlinear.py) for weights of 4096 to 28672 outputs."""
    block = min(64, max(8, triton.next_power_of_2(rows)))
    stages = 3
    while block > 8 and _shared(layout, block, dtype, 2) > gpu.shared:
        block //= 2
    tiles = layout.outputs // OUTPUTS * triton.cdiv(rows, block)
    split = next((n for n in (1, 2, 4) if tiles * n >= _PROGRAMS * gpu.processors), 4)
    split = min(split, layout.steps)
    narrow = split == 4 and block == 8 and layout.bits != 3
    if layout.steps // split >= 8 and tiles * split < 3 * gpu.processors and block <= 16 and not narrow:
        stages = 5
    while stages > 1 and _shared(layout, block, dtype, stages) > gpu.shared:
        stages -= 1
    options = {
        "BN": OUTPUTS // 2 if narrow else OUTPUTS,
        "BM": block,
        "SPLIT": split,
        "STAGES": stages,
        "warps": 2 if block <= 16 and layout.bits != 3 else 4,  # of 3 bits a step has too many codes for two
    }
    return Choice("few_rows", tuple(options.items()))


def _shared(layout: Layout, block: int, dtype: torch.dtype, stages: int) -> int:
    """Bytes of shared memory that so many steps' words and rows of x take."""
    return stages * layout.step * (OUTPUTS * layout.bits // 8 + block * dtype.itemsize) + 4096


@functools.cache
def _gluon() -> ModuleType | None:
    """The kernel in Gluon; None where this Triton has none that it compiles with."""
    try:
        from . import many_rows
    except (ImportError, AttributeError) as error:
        log.info("products of many rows are made of a dequantized weight: Triton %s: %s", triton.__version__, error)
        return None
    return many_rows
