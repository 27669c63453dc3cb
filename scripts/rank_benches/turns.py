"""`turns`: some ranks of one thread each against one rank of one thread, on CPUs, in turn.

Every round quantizes the same random Llama from the same samples, dealt to the ranks, over gloo. Seconds are those of
the slowest rank from a common start; "cpu" is the compute time of the busiest rank, which is little affected by other
users of the machine but leaves out waiting. The table shows medians, the range of the totals, and the speed relative to
the first number of ranks: by medians, by the fastest rounds, and by "cpu".
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from transformers import LlamaConfig, LlamaForCausalLM

from gptq_plugin import QuantizeModule

PHASES = ("plan", "calibrate", "solve", "total", "cpu")


def llama(width: int, layers: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": width, "intermediate_size": 3 * width, "num_hidden_layers": layers}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=8, num_key_value_heads=8, vocab_size=1024)).eval()


def work(rank: int, world: int, folder: str, options: argparse.Namespace) -> None:
    """Runs one rank of one round; the first writes the seconds into the folder."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    model = llama(options.width, options.layers)
    generator = torch.Generator().manual_seed(0)
    samples = torch.randint(0, 1024, (options.samples, options.tokens), generator=generator)
    quantizer = QuantizeModule(bits=4, group_size=128, nsamples=options.samples, batch_size=options.batch_size)
    dist.barrier()
    started, computed = time.perf_counter(), time.process_time()
    report = quantizer.quantize(model, list(samples[rank::world]))
    done = {"total": time.perf_counter() - started, "cpu": time.process_time() - computed}
    of_all: list[Any] = [None] * world
    dist.all_gather_object(of_all, report.seconds | done)
    if rank == 0:
        torch.save({phase: max(one[phase] for one in of_all) for phase in PHASES}, f"{folder}/seconds.pt")
    dist.destroy_process_group()


def measure(world: int, options: argparse.Namespace) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(work, (world, folder, options), nprocs=world, start_method="fork")
        seconds: dict[str, float] = torch.load(Path(folder) / "seconds.pt")
    return seconds


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=4)


def main(options: argparse.Namespace) -> None:
    torch.set_num_threads(1)  # before the ranks are forked
    seconds: dict[int, list[dict[str, float]]] = {world: [] for world in options.ranks}
    for number in range(options.rounds):
        for world in options.ranks:
            seconds[world].append(measure(world, options))
            print(f"round {number + 1}, {world} ranks: {seconds[world][-1]['total']:.2f} s", flush=True)
    print(f"\n{'ranks':>5}" + "".join(f"{phase:>11}" for phase in PHASES) + f"{'total':>18}{'times as fast':>24}")
    for world, rounds in seconds.items():
        first = seconds[options.ranks[0]]
        medians = [median(rounds, phase) for phase in PHASES]
        totals = [one["total"] for one in rounds]
        times = [median(first, "total") / medians[-2], min(one["total"] for one in first) / min(totals)]
        times.append(median(first, "cpu") / medians[-1])
        print(
            f"{world:>5}"
            + "".join(f"{seconds:>11.2f}" for seconds in medians)
            + f"{f'({min(totals):.2f} to {max(totals):.2f})':>18}"
            + "".join(f"{ratio:>8.2f}" for ratio in times)
        )


def median(rounds: list[dict[str, float]], phase: str) -> float:
    return statistics.median(one[phase] for one in rounds)
