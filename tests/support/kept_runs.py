"""Quantizes the same samples on ranks with `cache_dir`, as a script: kept_runs.py FOLDER SCENE RANKS...

The last run is on as many ranks as the one before, of which the second has another folder. Each rank saves its state,
its report's lines and what it took as FOLDER/kept-RUN-RANK.pt; run 0 is of one rank without a folder.
"""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from gptq_plugin import QuantizeModule

from rank_runs import SCENES


def work(rank: int, ranks: int, folder: str, scene: str, run: int, apart: bool) -> None:
    torch.set_num_threads(1)
    if ranks > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/{run}.store", rank=rank, world_size=ranks)
    model, data, options = SCENES[scene]()
    kept = None if run == 0 else f"{folder}/{'other' if apart and rank else 'cache'}"
    quantizer = QuantizeModule(nsamples=33, exact_sums=True, cache_dir=kept, **options)
    report = quantizer.quantize(model.eval(), data[rank::ranks])
    lines = [(one.name, one.method, one.loss, one.max_input, one.max_output, one.tokens) for one in report.modules]
    torch.save((model.state_dict(), lines, report.cache, report.deviations), f"{folder}/kept-{run}-{rank}.pt")
    if ranks > 1:
        dist.destroy_process_group()


def main() -> None:
    folder, scene, *numbers = sys.argv[1:]
    torch.set_num_threads(1)
    runs = [1, *map(int, numbers), int(numbers[-1])]
    for run, ranks in enumerate(runs):
        arguments = (ranks, folder, scene, run, run == len(runs) - 1)
        mp.start_processes(work, arguments, nprocs=ranks, start_method="fork")


if __name__ == "__main__":
    main()
