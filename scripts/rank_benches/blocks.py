"""`blocks`: one model on several numbers of ranks: seconds a block by phase, and whether all bytes are the same.

The processes are started once, for the largest number of ranks. For each number they form a process group, compile the
kernels on one block, and quantize the model: its samples, and as many times more as there are ranks. One rank runs with
`exact_sums`, as several do, and without. At the end the collectives of a block are timed alone, with the messages of
scripts/cost_of_ranks.py.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import statistics
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import cost_of_ranks as cost
import torch
import torch.distributed as dist

from gptq_plugin import QuantizeModule, distributed
from rank_benches.llamas import add_sizes, begin, in_groups, llama, run, samples

PHASES = ("plan", "calibrate", "solve", "total")
ROW = "{:>5} {:>7} {:>6} {:>9} {:>18} {:>8} {:>9} {:>8} {:>8} {:>9}  {}"


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    add_sizes(parser, width=4096, layers=6, vocab=2048)
    parser.add_argument("--more", action="store_true", help="also with as many times the samples as there are ranks")


def main(options: argparse.Namespace) -> None:
    print(
        ROW.format(
            "ranks", "samples", "exact", "s a block", "(range)", "plan", "calibrate", "solve", "total", "peak GiB", ""
        ),
        flush=True,
    )
    run(work, max(options.ranks), options)


def work(rank: int, folder: Path, options: argparse.Namespace) -> None:
    device = begin(rank)
    for ranks in in_groups(rank, options.ranks, folder):
        warm_up(rank, ranks, options, device)
        for exact in (False, True) if ranks == 1 else (True,):
            measure(rank, ranks, options, device, options.samples, exact)
        if ranks > 1:
            if options.more:
                measure(rank, ranks, options, device, options.samples * ranks, True)
            time_collectives(ranks, options, device)


def warm_up(rank: int, ranks: int, options: argparse.Namespace, device: torch.device) -> None:
    small = copy.copy(options)
    small.layers, count = 1, options.batch_size * ranks
    quantizer = QuantizeModule(nsamples=count, batch_size=options.batch_size, exact_sums=True)
    quantizer.quantize(llama(small, device), samples(small, count)[rank::ranks])


def measure(rank: int, ranks: int, options: argparse.Namespace, device: torch.device, count: int, exact: bool) -> None:
    """Quantizes once; rank 0 prints the line."""
    model, mine, done = llama(options, device), samples(options, count)[rank::ranks], [time.perf_counter()]

    def progress(_: int, __: int, what: str) -> None:
        if "down_proj" in what:
            done.append(time.perf_counter())

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    distributed.minimum(0)
    quantizer = QuantizeModule(nsamples=count, batch_size=options.batch_size, exact_sums=exact)
    report = quantizer.quantize(model, mine, progress=progress)
    each = [after - before for before, after in pairwise(done[1:])] or [done[-1] - done[0]]
    peak = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else 0.0
    own = {phase: report.seconds[phase] for phase in PHASES} | {"peak": peak, "digest": digest(model)}
    of_all = distributed.gather_objects(own)
    if rank == 0:
        slowest = {key: max(one[key] for one in of_all) for key in (*PHASES, "peak")}
        digests = sorted({one["digest"] for one in of_all})
        figures = [f"{slowest[phase]:.2f}" for phase in PHASES] + [f"{slowest['peak']:.1f}"]
        spread = f"({min(each):.3f} to {max(each):.3f})"
        line = ROW.format(ranks, count, str(exact), f"{statistics.median(each):.3f}", spread, *figures, digests)
        print(line, flush=True)


def digest(model: torch.nn.Module) -> str:
    """SHA-256 of every tensor of the quantized model, its first 12 digits."""
    found = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        found.update(name.encode())
        found.update(tensor.cpu().contiguous().view(torch.uint8).numpy())
    return found.hexdigest()[:12]


def time_collectives(ranks: int, options: argparse.Namespace, device: torch.device) -> None:
    """Times what the ranks exchange for one block, nothing else running, as `distributed` sends it."""
    if device.type != "cuda":
        cost.STRIP, cost.LEAST_ROWS, cost.MOST_BLOCKS = 256, 256, 16
    shape = cost.Shape("", options.width, options.width * 7 // 2, min(8, max(4, options.width // 128)) * 128)
    groups = shape.groups()
    sums = [torch.zeros(cost.hessian_bytes(n) // 8, dtype=torch.float64, device=device) for n, _ in groups]
    sizes = [cost.share(rows, ranks) * cost.row_bytes(n) for n, rows in groups]
    sharers = [cost.sharers(rows, ranks) for _, rows in groups]
    rows = [(torch.zeros(size, dtype=torch.uint8, device=device), of) for size, of in zip(sizes, sharers, strict=True)]
    parts: list[tuple[str, Callable[[], Any], float]] = [
        (
            "sums",
            lambda: [distributed.sum_(one) for one in sums],
            2 * (ranks - 1) / ranks * sum(t.nbytes for t in sums),
        ),
        (
            "rows",
            lambda: [distributed.gather_rows([one], len(one), of) for one, of in rows],
            sum(cost.passed_on(n, rows, ranks) for n, rows in groups),
        ),
        ("words", lambda: [distributed.minimum(0) for _ in range(cost.MEETINGS * len(groups))], 0.0),
    ]
    for name, call, sent in parts:
        seconds = timed(call, device)
        if dist.get_rank() == 0:
            rate = f", {sent / statistics.median(seconds) / 1e9:.0f} GB/s sent by each" if sent else ""
            print(f"      {name} of a block alone: {spread(seconds)} ms{rate}", flush=True)


def timed(call: Callable[[], Any], device: torch.device, repeats: int = 7) -> list[float]:
    """Seconds of each call but the first two."""
    seconds = []
    for _ in range(repeats + 2):
        distributed.minimum(0)
        if device.type == "cuda":
            torch.cuda.synchronize()
        begun = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begun)
    return seconds[2:]


def spread(seconds: Sequence[float]) -> str:
    of = [1e3 * one for one in seconds]
    return f"{statistics.median(of):.2f} ({min(of):.2f} to {max(of):.2f})"
