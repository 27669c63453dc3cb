"""Host memory of a quantization on a CPU: mapped from its files, exported while it goes on.

    python scripts/bench_host_memory.py --blocks 4 16 32

Each model is made, saved, loaded (mapped) and quantized in a process of its own. Pages of mapped files do not count:
the system takes them back when it needs them. What counts is the rest, ``RssAnon`` of /proc/self/status.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from gptq_plugin import QuantizeModule

MIB = 2**20


def anonymous() -> float:
    """MiB of memory that is no mapped file."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024


def make(blocks: int, hidden: int, dtype: str, folder: str) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        num_hidden_layers=blocks,
        hidden_size=hidden,
        intermediate_size=hidden * 43 // 16,
        num_attention_heads=8,
        vocab_size=512,
    )
    AutoModelForCausalLM.from_config(config).to(getattr(torch, dtype)).save_pretrained(folder)


def quantize(blocks: int, folder: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    size = sum(parameter.nbytes for parameter in model.parameters()) / MIB
    torch.manual_seed(0)
    batches = [{"input_ids": torch.randint(0, 512, (1, 128))} for _ in range(16)]
    seen: list[float] = []
    most, over = [anonymous()], threading.Event()

    def watch() -> None:
        while not over.wait(0.01):
            most.append(max(most.pop(), anonymous()))

    threading.Thread(target=watch, daemon=True).start()
    quantizer = QuantizeModule(clip_ratios=(1.0,), nsamples=16)
    started = time.perf_counter()
    quantizer.quantize(model, batches, export_dir=f"{folder}-out", progress=lambda *_: seen.append(anonymous()))
    over.set()
    seconds = time.perf_counter() - started
    print(f"| {blocks} | {size:.0f} | {seen[6]:.0f} | {seen[-1]:.0f} | {most[0]:.0f} | {seconds:.0f} |", flush=True)


@contextlib.contextmanager
def limited(mib: int | None) -> Iterator[Callable[[], None] | None]:
    """What a new process calls to be in a memory cgroup (version 1, for root) of that size. Mapped files count."""
    if mib is None:
        yield None
        return
    group = Path(f"/sys/fs/cgroup/memory/bench-host-memory-{os.getpid()}")
    group.mkdir()
    try:
        (group / "memory.limit_in_bytes").write_text(f"{mib}M")
        yield lambda: (group / "cgroup.procs").write_text(str(os.getpid()))  # type: ignore[func-returns-value]
    finally:
        group.rmdir()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, nargs="+", default=[4, 16, 32])
    parser.add_argument("--hidden", type=int, default=512, help="channels")
    parser.add_argument("--dtype", default="float32", help="of the model")
    parser.add_argument("--limit", type=int, help="MiB of memory for the quantization, pages of mapped files included")
    parser.add_argument("--step", choices=("make", "quantize"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.step:
        if options.step == "make":
            make(options.blocks[0], options.hidden, options.dtype, options.folder)
        else:
            quantize(options.blocks[0], options.folder)
        return
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    print(
        "| blocks | model, MiB | after the first block | after the last | most | seconds |\n|---|---|---|---|---|---|"
    )
    for blocks in options.blocks:
        with tempfile.TemporaryDirectory() as folder:
            for step in ("make", "quantize"):
                command = [sys.executable, __file__, "--step", step, "--folder", f"{folder}/m"]
                command += ["--blocks", str(blocks), "--hidden", str(options.hidden), "--dtype", options.dtype]
                with limited(options.limit if step == "quantize" else None) as enter:
                    done = subprocess.run(command, capture_output=True, text=True, preexec_fn=enter)
                if done.returncode:
                    sys.exit(done.stderr)
                print("\n".join(line for line in done.stdout.splitlines() if line.startswith("| ")), end="")
        print()


if __name__ == "__main__":
    main()
