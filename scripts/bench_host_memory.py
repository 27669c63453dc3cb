"""Host memory of a quantization from files to files: the model is mapped, and exported while it is quantized.

    python scripts/bench_host_memory.py --blocks 4 16 32
    python scripts/bench_host_memory.py --blocks 32 --hidden 4096 --dtype bfloat16 --device cuda --tokens 2048

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


def make(options: argparse.Namespace) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        num_hidden_layers=options.blocks[0],
        hidden_size=options.hidden,
        intermediate_size=options.hidden * 43 // 16,
        num_attention_heads=max(options.hidden // 64, 1),
        vocab_size=512,
    )
    torch.set_default_dtype(getattr(torch, options.dtype))
    with torch.device(options.device):
        AutoModelForCausalLM.from_config(config).save_pretrained(options.folder)
    for file in Path(options.folder).iterdir():  # from the system's cache: who reads it is charged for its pages
        handle = os.open(file, os.O_RDONLY)
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def quantize(options: argparse.Namespace) -> None:
    folder, blocks = options.folder, options.blocks[0]
    model = AutoModelForCausalLM.from_pretrained(folder)
    size = sum(parameter.nbytes for parameter in model.parameters()) / MIB
    torch.manual_seed(0)
    batches = [{"input_ids": torch.randint(0, 512, (1, options.tokens))} for _ in range(options.samples)]
    torch.zeros(1, device=options.device)
    seen: list[float] = []
    most, over = [anonymous()], threading.Event()

    def watch() -> None:
        while not over.wait(0.01):
            most.append(max(most.pop(), anonymous()))

    threading.Thread(target=watch, daemon=True).start()
    quantizer = QuantizeModule(clip_ratios=(1.0,), nsamples=options.samples, offload_weights=options.device != "cpu")
    before, started = anonymous(), time.perf_counter()
    quantizer.quantize(
        model,
        batches,
        device=options.device,
        export_dir=f"{folder}-out",
        progress=lambda *_: seen.append(anonymous()),
    )
    over.set()
    figures = (size, before, seen[6], seen[-1], most[0], time.perf_counter() - started)
    print(f"| {blocks} | {' | '.join(f'{figure:.0f}' for figure in figures)} |", flush=True)


@contextlib.contextmanager
def limited(mib: int | None) -> Iterator[Callable[[], None] | None]:
    """What a new process calls to be in a memory cgroup of that size, made by root. Mapped files count."""
    if mib is None:
        yield None
        return
    groups = Path("/sys/fs/cgroup")
    version1 = (groups / "memory").is_dir()
    group = (groups / "memory" if version1 else groups) / f"bench-host-memory-{os.getpid()}"
    group.mkdir()
    try:
        (group / ("memory.limit_in_bytes" if version1 else "memory.max")).write_text(f"{mib}M")
        yield lambda: (group / "cgroup.procs").write_text(str(os.getpid()))  # type: ignore[func-returns-value]
    finally:
        group.rmdir()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, nargs="+", default=[4, 16, 32])
    parser.add_argument("--hidden", type=int, default=512, help="channels")
    parser.add_argument("--dtype", default="float32", help="of the model")
    parser.add_argument("--device", default="cpu", help="where it is quantized")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=128, help="of a sample")
    parser.add_argument("--limit", type=int, help="MiB of memory for the quantization, pages of mapped files included")
    parser.add_argument("--step", choices=("make", "quantize"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.step:
        {"make": make, "quantize": quantize}[options.step](options)
        return
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    print("| blocks | model, MiB | before | after the first block | after the last | most | seconds |")
    print("|---|---|---|---|---|---|---|", flush=True)
    for blocks in options.blocks:
        with tempfile.TemporaryDirectory() as folder:
            for step in ("make", "quantize"):
                command = [sys.executable, __file__, "--step", step, "--folder", f"{folder}/m"]
                for name in ("hidden", "dtype", "device", "samples", "tokens"):
                    command += [f"--{name}", str(getattr(options, name))]
                command += ["--blocks", str(blocks)]
                with limited(options.limit if step == "quantize" else None) as enter:
                    done = subprocess.run(command, capture_output=True, text=True, preexec_fn=enter)
                if done.returncode:
                    sys.exit(f"{step} ended with status {done.returncode}\n{done.stderr[-3000:]}")
                print("\n".join(line for line in done.stdout.splitlines() if line.startswith("| ")), end="")
        print()


if __name__ == "__main__":
    main()
