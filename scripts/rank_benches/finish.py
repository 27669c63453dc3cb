"""`finish`: the steps of a finish on several numbers of ranks: seconds a step, and whether all ranks hold the same.

Random weights of Llama-3's proportions, rounded to 4 bits; every rank holds the model and its float copy. A step has
`--step-tokens` for each rank: if exchanging gradients cost nothing, it would take as long as on one rank.
"""

from __future__ import annotations

import argparse
import copy
import time
from pathlib import Path

import torch

from gptq_plugin import Finish, QuantizeModule, distributed
from rank_benches.blocks import digest
from rank_benches.llamas import add_sizes, begin, in_groups, llama, run, samples

ROW = "{:>5} {:>14} {:>12} {:>9} {:>20}  {}"


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--step-tokens", type=int, default=8192, help="of a step on each rank")
    add_sizes(parser, width=4096, layers=4, vocab=8192)


def main(options: argparse.Namespace) -> None:
    print(ROW.format("ranks", "tokens a step", "s a step", "peak GiB", "held-out KL", "same tensors"), flush=True)
    run(work, max(options.ranks), options)


def work(rank: int, folder: Path, options: argparse.Namespace) -> None:
    device = begin(rank)
    for ranks in in_groups(rank, options.ranks, folder):
        measure(rank, ranks, options, device)


def measure(rank: int, ranks: int, options: argparse.Namespace, device: torch.device) -> None:
    """Finishes once; rank 0 prints the line. Timed is the second half of the steps, with a judgement."""
    model = llama(options, device)
    teacher = copy.deepcopy(model)
    quantizer = QuantizeModule(bits=4)
    quantizer.round_to_nearest(model)
    tokens = options.step_tokens * ranks
    count, held_out = max(ranks, options.steps * tokens // options.tokens), 4 * ranks
    finish = Finish(
        steps=options.steps, tokens_per_step=tokens, nsamples=count, held_out=held_out, batch_size=1,
        judgements=2, learning_rate=1e-3,
    )  # fmt: skip
    ends: list[float] = []
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    record = quantizer.finish(
        model, teacher, samples(options, count + held_out)[rank::ranks], finish,
        progress=lambda *_: ends.append(time.perf_counter()),
    )  # fmt: skip
    seconds = (ends[-1] - ends[1]) / (options.steps - options.steps // 2)
    peak = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else 0.0
    of_all = distributed.gather_objects((digest(model), seconds, peak))
    if rank == 0:
        same = "yes, " + of_all[0][0] if len({one[0] for one in of_all}) == 1 else "NO"
        kl = f"{record.before:.5f} to {record.after:.5f}"
        slowest, most = (max(one[place] for one in of_all) for place in (1, 2))
        print(ROW.format(ranks, tokens, f"{slowest:.3f}", f"{most:.1f}", kl, same), flush=True)
