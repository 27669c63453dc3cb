"""Measures which kernels multiply fastest on a GPU, and keeps it: `autotune`.

Only when it is called, which loading a checkpoint does: a product never measures.
"""

from __future__ import annotations

import functools
import logging
import os
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ..needs_triton import triton
from . import products
from .candidates import candidates
from .choice import ROWS, Choice, Gpu
from .layout import Layout
from .table import Key, Table, shipped
from .timing import measure
from .tuned import file_of, read, tuned, write

log = logging.getLogger(__name__)

SECONDS = 1.0  # for a layout and a range of rows, on average; what is compiled counts
SMALL = 1 << 20  # bytes of words, below which every kernel takes little more than its launch
_FASTER = 0.97  # another choice takes at most this part of the time of the rule's: less is chance

# (layout, rows, dtype, choices, deadline): seconds by choice; see `timing.measure`, whose first argument it lacks.
Timer = Callable[[Layout, int, torch.dtype, Sequence[Choice], float], dict[Choice, float]]

_one_at_a_time = threading.Lock()


def autotune(
    wanted: Iterable[tuple[Layout, torch.dtype]],
    device: torch.device,
    *,
    always: bool = False,
    folder: str | os.PathLike[str] | None = None,
    seconds: float = SECONDS,
) -> None:
    """Finds the fastest kernels for products on a GPU without a table of this package's.

    What a file knows is read from it, the rest measured and added. Waits for the GPU; takes memory for the time being,
    and does nothing for a product where that is short. While a CUDA graph is captured or a compiler traces, nothing is
    done at all.

    Args:
        wanted: Layouts, and the dtype of x.
        device: The GPU.
        always: On a GPU with a table too, for what is not in it.
        folder: Where the file is; see `tuned.file_of`.
        seconds: At most, on average, for each layout and range of rows.
    """
    if torch.compiler.is_compiling() or torch.cuda.is_current_stream_capturing():
        log.warning("kernels are not measured while a CUDA graph is captured or a compiler traces: call it before")
        return
    try:
        gpu = Gpu.of(device)
        if not always and shipped(gpu) is not None:
            log.debug("kernels are not measured: %s has a table", gpu.name)
            return
        with _one_at_a_time:
            timer = functools.partial(measure, device)
            if tune(dict.fromkeys(wanted), gpu, file_of(gpu, folder), timer, seconds):
                torch.cuda.empty_cache()
            products.choose.cache_clear()
    except torch.AcceleratorError:  # the GPU is lost to this process
        raise
    except (triton.TritonError, RuntimeError) as error:  # Triton finds no compiler: products will tell
        log.warning("kernels are not measured, a rule chooses: %s", error)


def tune(
    wanted: Collection[tuple[Layout, torch.dtype]], gpu: Gpu, file: Path, timer: Timer, seconds: float = SECONDS
) -> int:
    """Adds the fastest choices to those of this process (`tuned.tuned`), and to a file.

    Returns:
        How many products were measured.
    """
    known, table = tuned(gpu), shipped(gpu)
    on_disk = read(file, gpu)
    known.choices.update({key: choice for key, choice in on_disk.items() if key not in known.choices})
    # One row of all layouts first: what is compiled for one serves the others.
    products_of = {Key.of(layout, rows, dtype): (layout, dtype) for rows in ROWS for layout, dtype in wanted}
    missing = {
        key: (layout, dtype)
        for key, (layout, dtype) in products_of.items()
        if known.find(layout, key.rows, dtype, gpu) is None
        and (table is None or table.find(layout, key.rows, dtype, gpu) is None)
        and layout.n_in * layout.n_out * layout.bits >= 8 * SMALL
        and len(candidates(layout, key.rows, dtype, gpu)) > 1
    }
    log.info("%s: kernels of %d products to be measured, %d in %s", gpu.name, len(missing), len(on_disk), file)
    begun, kept = time.perf_counter(), Table(gpu.name, gpu.processors, versions())
    lines: dict[Key, list[str]] = {}
    for found in search(missing, gpu, timer, seconds):
        known.choices[found.key] = found.choice
        if found.complete:
            kept.choices[found.key] = found.choice
        lines.setdefault(found.key._replace(rows=0), []).append(str(found))
    if kept.choices:
        write(file, kept, gpu)
    for of, told in lines.items():
        zeros = "symmetric" if of.symmetric else "zero-points"
        size = f"{of.n_in}×{of.n_out} {of.dtype}, {of.bits} bits, groups of {of.group}, {zeros}"
        log.info("%s: %s", size, "; ".join(told))
    measured = sum(map(len, lines.values()))
    if missing:
        took, left = time.perf_counter() - begun, len(missing) - measured
        log.info("%d products measured in %.1f s, %d left to the rule; kept in %s", measured, took, left, file)
    return measured


@dataclass(frozen=True)
class Found:
    """A product that was measured.

    Attributes:
        key: What it is.
        choice: The fastest kernel, or the rule's where that is as fast.
        times: Seconds by choice, of those that ran; the rule's is the first of them.
        complete: No choice was left out for want of time.
    """

    key: Key
    choice: Choice
    times: Mapping[Choice, float]
    complete: bool

    def __str__(self) -> str:
        return f"{self.key.rows} rows {self.choice} {self.times[self.choice] * 1e6:.1f} µs"


def search(
    wanted: Mapping[Key, tuple[Layout, torch.dtype]], gpu: Gpu, timer: Timer, seconds: float = SECONDS
) -> Iterator[Found]:
    """Measures one product after the other, until the time for all of them is over."""
    deadline = time.perf_counter() + seconds * len(wanted)
    for key, (layout, dtype) in wanted.items():
        if time.perf_counter() > deadline:
            return
        choices = candidates(layout, key.rows, dtype, gpu)
        times = timer(layout, key.rows, dtype, choices, deadline)
        if times:
            best, ruled = min(times, key=lambda choice: times[choice]), choices[0]
            if ruled in times and times[best] > _FASTER * times[ruled]:
                best = ruled
            yield Found(key, best, times, time.perf_counter() <= deadline)


def versions() -> str:
    """What measurements depend on beside the kernels."""
    return f"measured with torch {torch.__version__}, Triton {triton.__version__}"
