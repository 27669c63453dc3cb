"""`words`: how long ranks on CPUs take to check in with each other, by the number of ranks, over gloo.

Beside `gptq_plugin.distributed`'s own exchange, a ring (torch's all-gather) of the same words, in turn with it.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from gptq_plugin import distributed


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4, 8, 16])
    parser.add_argument("--words", type=int, default=100, help="of a round")
    parser.add_argument("--rounds", type=int, default=5)


def main(options: argparse.Namespace) -> None:
    for ranks in options.ranks:
        with tempfile.TemporaryDirectory() as folder:
            torch.set_num_threads(1)  # before the ranks are forked
            mp.start_processes(work, (ranks, Path(folder), options), nprocs=ranks, start_method="fork")


def work(rank: int, ranks: int, folder: Path, options: argparse.Namespace) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    word = torch.tensor([rank, 0])

    def ring() -> None:
        everyones = [torch.empty_like(word) for _ in range(ranks)]
        dist.all_gather(everyones, word, async_op=True).wait()

    ways: dict[str, Callable[[], Any]] = {"check-in": lambda: distributed.minimum(rank), "ring": ring}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(options.rounds + 1):
        for name, call in ways.items():
            distributed.minimum(0)
            begun = time.perf_counter()
            for _ in range(options.words):
                call()
            if number:  # the first round warms up
                seconds[name].append((time.perf_counter() - begun) / options.words * 1e6)
    if rank == 0:
        for name, each in seconds.items():
            figures = f"{statistics.median(each):.0f} us ({min(each):.0f} to {max(each):.0f})"
            print(f"{ranks} ranks, {name}: {figures}", flush=True)
    distributed.minimum(0)
    dist.destroy_process_group()
