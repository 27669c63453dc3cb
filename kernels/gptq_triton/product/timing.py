"""Seconds of a product by each of several choices, on a GPU: `measure`.

A choice is captured in a CUDA graph, product after product over copies of the words that together exceed the L2 cache,
as the layers of a model do, and the graph is replayed. Before that its result is compared with the vendor's product of
the dequantized weight: what a compiler makes wrong is not chosen. What stays in memory afterwards is the vendor's
workspace of the stream that captures (8 to 32 MB).

Tested by tests/kernels/test_autotune.py: needs a GPU.
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..needs_triton import triton
from .choice import Choice, Gpu
from .dense import dense
from .layout import Arranged, Layout
from .registry import run
from .workspace import Workspace

log = logging.getLogger(__name__)

_COPIES = 512  # at most, of a small layer's words
_REPLAY = 5e-3  # seconds of a replay, about: as many products as they take
_REPLAYS = 6  # the first is left out
# Relative, of two products, one of which may add parts in 16 bits or multiply in TF32; a wrong one is far beyond.
_ERROR = {torch.float16: 5e-3, torch.bfloat16: 4e-2, torch.float32: 5e-3}


class _OneStream(Workspace):
    """The same counters for captured products, whose graphs here are replayed one after the other."""

    def of(self, tiles: int, floats: int) -> tuple[Tensor, Tensor]:
        return torch.empty(floats, dtype=torch.float32, device=self._device), self.counters(tiles)


def bytes_needed(layout: Layout, rows: int, dtype: torch.dtype, gpu: Gpu) -> int:
    """Memory that a measurement takes: words past the cache, the dequantized weight (the reference's, and in a
    graph), inputs and outputs, scales, and parts of programs that share a tile (at most eight)."""
    channels = layout.steps * layout.step
    weight = layout.outputs * channels
    return (
        _length(layout, gpu) * (weight * layout.bits // 8)
        + (2 * weight + rows * (layout.n_in + 3 * layout.outputs)) * dtype.itemsize
        + weight // layout.group * 8
        + min(rows, 256) * layout.outputs * 4 * 8
    )


def measure(
    device: torch.device, layout: Layout, rows: int, dtype: torch.dtype, choices: Sequence[Choice], deadline: float
) -> dict[Choice, float]:
    """Times choices for a product; waits for the GPU.

    Args:
        device: The GPU.
        layout: The weight's sizes; its values are made up.
        rows, dtype: Of x.
        choices: The first that runs is timed in any case.
        deadline: Time of `time.perf_counter` after which no further choice is begun.

    Returns:
        Seconds by choice, without those that do not compile, find no memory or compute something else. Empty, with a
        line in the log, where memory is short.
    """
    gpu = Gpu.of(device)
    needed, free = bytes_needed(layout, rows, dtype, gpu), _free_bytes(device)
    if needed > free // 2:
        log.info("%s rows of %s need %.1f GB, more than half of what is free: not measured", rows, layout, needed / 1e9)
        return {}
    try:
        return _times(layout, _length(layout, gpu), rows, dtype, choices, device, deadline)
    except torch.OutOfMemoryError as error:
        log.info("%s rows of %s are not measured: %s", rows, layout, error)
        return {}


def _times(
    layout: Layout, length: int, rows: int, dtype: torch.dtype, choices: Sequence[Choice], device: torch.device,
    deadline: float,
) -> dict[Choice, float]:  # fmt: skip
    """Seconds by choice, over so many copies of the words."""
    stream = _stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    found: dict[Choice, float] = {}
    with torch.cuda.stream(stream), torch.no_grad(), torch.autocast("cuda", enabled=False):
        copies = _copies(layout, length, device)
        x = torch.randn(rows, layout.n_in, dtype=dtype, device=device, generator=_generator(device))
        expected = torch.mm(x, dense(layout, copies[0], dtype).t())
        workspace = _OneStream(device)
        for choice in choices:
            if found and time.perf_counter() > deadline:
                break
            seconds = _seconds(choice, x, layout, copies, expected, workspace)
            if seconds is None:
                workspace = _OneStream(device)  # who knows how it left the counters
            else:
                found[choice] = seconds
        stream.synchronize()  # what is freed now may be used by other streams
    return found


def _seconds(
    choice: Choice, x: Tensor, layout: Layout, copies: list[Arranged], expected: Tensor, workspace: Workspace
) -> float | None:
    """Seconds of a product by one choice; None where it is left out."""
    out = torch.full_like(expected, torch.nan)

    def multiply(arranged: Arranged) -> None:
        run(choice, x, layout, arranged, None, out, workspace)

    try:
        multiply(copies[0])
        norm = torch.linalg.vector_norm
        differs = float(norm(out - expected, dtype=torch.float32) / norm(expected, dtype=torch.float32))
        if not differs < _ERROR[x.dtype]:
            log.warning("%s is left out for %s rows of %s: its error is %.1e", choice, len(x), layout, differs)
            return None
        used = copies[: max(1, int(_REPLAY / _elapsed(lambda: multiply(copies[0]))))]
        graph = _captured([functools.partial(multiply, arranged) for arranged in used])
    except torch.AcceleratorError:  # the GPU is lost to this process
        raise
    except (triton.TritonError, torch.OutOfMemoryError, RuntimeError) as error:
        log.debug("%s is left out for %s: %s", choice, layout, error)
        return None
    times = sorted([_elapsed(graph.replay) for _ in range(_REPLAYS)][1:])
    return times[len(times) // 2] / len(used)


def _captured(calls: Sequence[Callable[[], object]]) -> torch.cuda.CUDAGraph:
    """A graph of what calls queue on the current stream (`torch.cuda.graph` collects garbage every time)."""
    graph = torch.cuda.CUDAGraph()
    graph.capture_begin(capture_error_mode="thread_local")
    try:
        for call in calls:
            call()
    finally:
        graph.capture_end()
    return graph


def _elapsed(call: Callable[[], object]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return max(1e-9, start.elapsed_time(end) * 1e-3)


def _length(layout: Layout, gpu: Gpu) -> int:
    """Copies of the words that together take twice the cache."""
    size = layout.steps * layout.step * layout.outputs * layout.bits // 8
    return min(_COPIES, 2 * gpu.cache // size + 2)


def _copies(layout: Layout, length: int, device: torch.device) -> list[Arranged]:
    """Weights of made-up words that share their scales."""
    generator = _generator(device)
    tiles = layout.steps * layout.blocks_a_step * layout.words_a_block
    shape = (length, tiles, layout.outputs, layout.lanes)
    words = torch.randint(-(1 << 15), 1 << 15, shape, dtype=torch.int16, device=device, generator=generator)
    pairs = (layout.steps, layout.step // layout.group // 2, layout.outputs)
    scale = int(torch.tensor(0.01, dtype=torch.float16, device="cpu").view(torch.int16)) * 0x10001
    scales = torch.full(pairs, scale, dtype=torch.int32, device=device)
    zeros = None
    if not layout.symmetric:
        zeros = torch.full(pairs, 2 ** (layout.bits - 1) * 0x10001, dtype=torch.int32, device=device)
    return [Arranged(words[i], scales, zeros) for i in range(length)]


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """The one that captures: the default stream cannot."""
    return torch.cuda.Stream(device)


def _generator(device: torch.device) -> torch.Generator:
    """Random numbers of its own: the program's are left alone."""
    return torch.Generator(device).manual_seed(0)


def _free_bytes(device: torch.device) -> int:
    """What the driver has, and what PyTorch holds without use."""
    return torch.cuda.mem_get_info(device)[0] + (
        torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    )
