"""`kill`: the last rank is killed in the middle of a quantization; when, and with what, the others end.

Processes started by hand, which no launcher ends: every other rank has to learn of it by itself. A phase is where the
rank is killed: in a calibration forward; before the all-reduce of a Hessian, which the others are in by then; in the
solve; before the rows are gathered, likewise. Exits with 1 unless all end within 30 seconds and tell the cause.
"""

from __future__ import annotations

import argparse
import os
import signal
import tempfile
import time
from pathlib import Path
from typing import Any, NoReturn

import torch.distributed as dist

from gptq_plugin import QuantizeModule, distributed
from gptq_plugin.quantize import solve_on_ranks
from rank_benches.llamas import add_sizes, begin, join, llama, samples, started

PHASES = ("calibration", "reduction", "solve", "rows")
SECONDS, CAUSE = 30, "cannot reach the others"


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--phases", nargs="+", choices=PHASES, default=PHASES)
    add_sizes(parser, width=1024, layers=2, vocab=2048)


def main(options: argparse.Namespace) -> None:
    held = [phase for phase in options.phases if not ends_in_time(phase, options)]
    if held:
        raise SystemExit(f"not within {SECONDS} s, or without the cause: {', '.join(held)}")


def ends_in_time(phase: str, options: argparse.Namespace) -> bool:
    """Runs one case; prints how the ranks ended."""
    with tempfile.TemporaryDirectory() as name:
        folder, begun = Path(name), time.time()
        processes = started(work, options.ranks, folder, phase, options)
        while not (folder / "killed").exists() and any(process.is_alive() for process in processes):
            time.sleep(0.01)
        if not (folder / "killed").exists():
            print(f"{phase}: no rank was killed: {[process.exitcode for process in processes]}", flush=True)
            return False
        killed, ended = time.time(), {}
        while len(ended) < options.ranks and time.time() < killed + SECONDS + 30:
            for rank, process in enumerate(processes):
                if rank not in ended and not process.is_alive():
                    ended[rank] = time.time() - killed
            time.sleep(0.01)
        for process in processes:
            process.kill()
        told = {rank: file.read_text() for rank in range(options.ranks) if (file := folder / f"{rank}.txt").exists()}
    others = range(options.ranks - 1)
    print(f"{phase}: killed {killed - begun:.1f} s after the start", flush=True)
    for rank in others:
        print(
            f"  rank {rank} ended after {ended.get(rank, float('inf')):.2f} s: {told.get(rank, 'nothing told')[:300]}"
        )
    print(flush=True)
    return all(ended.get(rank, SECONDS) < SECONDS and CAUSE in told.get(rank, "") for rank in others)


def work(rank: int, folder: Path, phase: str, options: argparse.Namespace) -> None:
    device = begin(rank)
    join(rank, options.ranks, folder)
    model = llama(options, device)
    quantizer = QuantizeModule(nsamples=options.samples, batch_size=options.batch_size)
    if rank == options.ranks - 1:
        arm(model, phase, folder)
    try:
        quantizer.quantize(model, samples(options, options.samples)[rank :: options.ranks])
    except Exception as error:
        (folder / f"{rank}.txt").write_text(f"{type(error).__name__}: {error}")
        raise


def arm(model: Any, phase: str, folder: Path) -> None:
    """From now on this rank is killed at the phase, in the second block."""
    seen = 0

    def dies(*_: Any, **__: Any) -> NoReturn:
        (folder / "killed").touch()
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError("a killed process goes on")

    def after(calls: int, function: Any, then: Any = dies) -> Any:
        def counted(*arguments: Any, **named: Any) -> Any:
            nonlocal seen
            seen += 1
            return (then if seen > calls else function)(*arguments, **named)

        return counted

    gather = distributed.gather_rows

    def dies_inside(*arguments: Any) -> Any:
        distributed._run = dies  # when it is called, all have checked in
        return gather(*arguments)

    if phase == "calibration":
        model.model.layers[-1].mlp.register_forward_pre_hook(after(1, lambda *_: None))
    elif phase == "reduction":
        dist.all_reduce = after(4, dist.all_reduce)
    elif phase == "solve":
        solve_on_ranks.solve_blocks = after(4, solve_on_ranks.solve_blocks)
    else:
        distributed.gather_rows = after(4, gather, dies_inside)
