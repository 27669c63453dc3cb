"""Times `method: best` part by part on a block of a Llama-3-8B-shaped model on one GPU, and `gptq` beside it.

    python scripts/bench_best.py             # a minute
    python scripts/bench_best.py --kernels   # and other sizes of tiles of the kernel for scales' equations

Random weights, 128 samples of 2048 tokens, 4 bits, group 128, static act-order, as in `bench_8b.py`. Of each part: the
milliseconds that the device takes from its beginning to its end, and in brackets those in which Python queues it, for
all four groups of layers. Where both are alike, Python is the limit.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
import triton
from bench_8b import BATCH, GIB, LENGTH, SAMPLES, blocks, clear, llama, quantize, samples, seconds
from gptq_plugin.kernels import steps
from torch import Tensor

from gptq_plugin import QuantizeConfig, QuantLinear
from gptq_plugin.gptq import improve, refine, solver
from gptq_plugin.walk.drift import Drift, takes_outputs
from gptq_plugin.walk.hessian import Hessian

SHAPES = {"q, k, v": (6144, 4096), "o": (4096, 4096), "gate, up": (28672, 4096), "down": (4096, 14336)}
TIMED = (  # module, function, what it is in the table; indented if it is within the one above
    (solver, "_beside", "report's comparisons, on a stream beside"),
    (solver, "factorize", "factor"),
    (solver, "asymmetric_target", "asymmetric target"),
    (improve, "Recursion", "begin: forecast of ratios"),
    (improve.Recursion, "visit_in_units", "begin: columns"),
    (refine.Arranged, "of", "arranged Hessians"),
    (refine, "regridded", "rounds of scales"),
    (refine, "_targets", "  targets"),
    (refine, "_picked_grids", "  grids"),
    (refine, "sweep", "  columns, of descent too"),
    (refine, "keep_best", "  better alternative"),
    (refine, "refitted", "refits"),
    (refine, "_solution", "  solutions of equations"),
    (refine, "descended", "descents"),
    (solver, "solution_loss", "loss of the weight, for the report"),
)
TILES = ((128, 64, 8, 2), (128, 64, 8, 3), (128, 128, 8, 2), (128, 64, 4, 3), (64, 64, 4, 3), (128, 32, 8, 4))


class Clock:
    """Sums up, by part, the time between events on the device and the time in Python."""

    def __init__(self) -> None:
        self.events: dict[str, list[tuple[Any, Any]]] = defaultdict(list)
        self.host: dict[str, float] = defaultdict(float)

    def timed(self, part: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            started = time.perf_counter()
            start.record()
            try:
                return call(*args, **kwargs)
            finally:
                stop.record()
                self.host[part] += time.perf_counter() - started
                self.events[part].append((start, stop))

        return run

    def device(self, part: str) -> float:
        torch.cuda.synchronize()
        return sum(start.elapsed_time(stop) for start, stop in self.events[part]) / 1000

    @contextmanager
    def watching(self) -> Iterator[None]:
        with ExitStack() as stack:
            for owner, name, part in TIMED:
                call = self.timed(part, getattr(owner, name))
                kept = staticmethod(call) if (owner, name) == (refine.Arranged, "of") else call
                stack.enter_context(mock.patch.object(owner, name, kept))
            yield


def problem(rows: int, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """A weight, a Hessian with eigenvalues of very different sizes, and a drift, of outputs as a walk has it."""
    torch.manual_seed(0)
    x = torch.randn(2 * n, n, device="cuda") * torch.logspace(-1, 1, n, device="cuda")
    hessian = x.T @ x / len(x)
    drift = 0.02 * hessian + 0.01 * hessian.diagonal().mean() * torch.randn(n, n, device="cuda") / n**0.5
    weight = torch.randn(rows, n, device="cuda", dtype=torch.bfloat16) * 0.02
    return weight, hessian, weight.float() @ drift if takes_outputs(rows, n) else drift


def solve_parts() -> None:
    """Prints the parts of solving the four groups of layers, once with each method."""
    clocks = {method: Clock() for method in ("gptq", "best")}
    peaks = []
    for rows, n in SHAPES.values():
        clear()
        weight, hessian, drift = problem(rows, n)
        for method, clock in clocks.items():
            config = QuantizeConfig(method=method)
            alone = functools.partial(solver.solve, in_blocks=False)  # as one GPU does
            alone(weight, hessian, config, drift)  # compiles
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            whole = clock.timed("all", alone)
            if method == "best":
                whole(weight, hessian, config, drift)  # by itself, then part by part
                torch.cuda.synchronize()
                with clock.watching():
                    solution = alone(weight, hessian, config, drift)
                peaks.append((torch.cuda.max_memory_allocated() - before) / GIB)
            else:
                solution = whole(weight, hessian, config, drift)
            clock.timed("pack", QuantLinear.from_quantized)(solution.weight)
            torch.cuda.synchronize()
    for method, clock in clocks.items():
        print(f"solving a block's layers with {method}, milliseconds of the device (of Python):")
        for part in dict.fromkeys((*(part for _, _, part in TIMED), "pack", "all")):
            if part in clock.events:
                print(f"  {part}: {clock.device(part) * 1e3:.1f} ({clock.host[part] * 1e3:.1f})")
    print("  peak GiB of a solve: " + ", ".join(f"{name} {peak:.1f}" for name, peak in zip(SHAPES, peaks, strict=True)))


def calibration_parts() -> None:
    """Prints what a block's forward, Hessians and drifts take."""
    model, rows = llama(2), torch.stack(samples(4 * BATCH)).cuda().split(BATCH)

    @torch.no_grad()
    def forward() -> None:
        for ids in rows:
            model.model(input_ids=ids, use_cache=False)

    parts = {"a forward (best has two)": seconds(forward) / 2 * SAMPLES / (4 * BATCH)}
    model.to("meta")
    clear()
    for n, times, rows_of in ((4096, 3, 0), (14336, 1, 4096)):
        weight = torch.randn(rows_of, n, device="cuda", dtype=torch.bfloat16) if rows_of else None
        x = torch.randn(BATCH * LENGTH, n, device="cuda", dtype=torch.bfloat16)
        seen = x + 0.01 * torch.randn_like(x)
        hessian, drift = Hessian(n, "cuda", exact=False), Drift(n, "cuda", exact=False, rows=rows_of)
        of_block = SAMPLES / BATCH * times
        parts[f"Hessians of {n} inputs"] = seconds(lambda: hessian.add(seen)) * of_block  # noqa: B023
        parts[f"drifts of {n} inputs"] = seconds(lambda: drift.add(x, seen, weight)) * of_block  # noqa: B023
    print("calibrating a block, milliseconds: " + ", ".join(f"{k} {v * 1e3:.1f}" for k, v in parts.items()))


def whole_blocks() -> None:
    """Prints the seconds of a block in whole runs: five with each method, of which the last four count."""
    for method in ("gptq", "best"):
        clear()
        _, each = blocks(5, method=method)
        median, peak = statistics.median(each), torch.cuda.max_memory_allocated() / GIB
        print(f"{method}: {median:.3f} s a block ({min(each):.3f} to {max(each):.3f}), peak {peak:.1f} GiB", flush=True)


def kernels() -> None:
    """Prints what scales' equations take with other tiles, for gate and up and for down."""
    for rows, upper, warps, stages in TILES:
        with (
            mock.patch.object(steps, "_ROWS", rows),
            mock.patch.object(steps, "_UPPER", upper),
            mock.patch.object(steps, "_WARPS", warps),
            mock.patch.object(steps, "_STAGES", stages),
        ):
            took: list[str] = []
            for count, n in ((12288, 4096), (2656, 14336)):
                clear()
                channel = torch.arange(n, device="cuda")[None]
                _, hessian, _ = problem(1, n)
                grouped = steps.grouped_hessian(hessian[None])
                codes = torch.randint(0, 16, (1, n, count), device="cuda", dtype=torch.uint8)
                zeros = torch.full((1, n // 128, count), 8.0, device="cuda")
                errors = torch.randn(1, n, count, device="cuda")
                call = (grouped, codes, zeros, errors, channel, slice(0, count))
                try:
                    took.append(f"{seconds(lambda: steps.scale_equations(*call)) * 1e3:.2f} ms")  # noqa: B023
                except triton.runtime.errors.OutOfResources as error:
                    took.append(type(error).__name__)
        print(f"equations, rows={rows} upper={upper} warps={warps} stages={stages}: {', '.join(took)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernels", action="store_true", help="try other tiles of the kernel for scales' equations")
    arguments = parser.parse_args()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}", flush=True)
    started = time.perf_counter()
    for method in ("gptq", "best"):
        quantize(llama(1), samples(16), method=method)  # compiles the kernels
    print(f"warm after {time.perf_counter() - started:.0f} s", flush=True)
    whole_blocks()
    solve_parts()
    calibration_parts()
    if arguments.kernels:
        kernels()
    print(f"{time.perf_counter() - started:.0f} s in all")


if __name__ == "__main__":
    main()
