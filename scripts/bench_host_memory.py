"""Host memory of a quantization from files to files: the model is mapped, and exported while it is quantized.

    python scripts/bench_host_memory.py --blocks 4 16 32
    python scripts/bench_host_memory.py --blocks 16 32 64 --hidden 4096 --dtype bfloat16 --device cuda --tokens 2048

The largest model is made once, a file a block; of it a smaller one has the first blocks. Each is loaded (mapped) and
quantized in a process of its own. Pages of mapped files do not count: the system takes them back when it needs them.
What counts is the rest: ``RssAnon`` and ``RssShmem`` of /proc/self/status (which of them pinned memory is in depends on
the driver). ``--every 4`` also shows what it is made of behind every fourth block, ``--cycles 1`` what Python would
free behind the last one: objects that only cycles refer to.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import safetensors
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from gptq_plugin import QuantizeModule
from gptq_plugin.device import memory

MIB = 2**20
_HEAD = (
    "| blocks | model, MiB | before | after the first block | after the last | most | seconds |",
    "|---|---|---|---|---|---|---|",
)
_FIRST = "model.layers.0."


class MallInfo(ctypes.Structure):
    """What glibc's mallinfo2 returns."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            "arena",
            "ordblks",
            "smblks",
            "hblks",
            "hblkhd",
            "usmblks",
            "fsmblks",
            "uordblks",
            "fordblks",
            "keep",
        )
    ]


def status(*names: str) -> float:
    """MiB of this process, by their names in its status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.split(":")[0] in names) / 1024


def unmapped() -> float:
    """MiB of memory that is no mapped file."""
    return status("RssAnon", "RssShmem")


def parts() -> str:
    """What that memory is made of, in MiB: by its kind, in the C library, in PyTorch's pinned memory, in the cgroup."""
    shown = {"anonymous": status("RssAnon"), "shared": status("RssShmem"), "mapped files": status("RssFile")}
    with contextlib.suppress(AttributeError):
        read = ctypes.CDLL(None).mallinfo2
        read.restype = MallInfo
        found = read()
        shown |= {"malloc": (found.hblkhd + found.uordblks) / MIB, "freed in malloc": found.fordblks / MIB}
    if torch.cuda.is_available():
        stats = torch.cuda.host_memory_stats()
        shown |= {"pinned": stats.get("allocated_bytes.current", 0) / MIB}
    with contextlib.suppress(OSError):
        group = Path("/sys/fs/cgroup") / Path("/proc/self/cgroup").read_text().partition("::")[2].strip().lstrip("/")
        lines = [line.split() for line in (group / "memory.stat").read_text().splitlines()]
        shown |= {f"cgroup's {name}": int(size) / MIB for name, size in lines if name in ("anon", "shmem", "kernel")}
    return ", ".join(f"{name} {size:.0f}" for name, size in shown.items())


def make(options: argparse.Namespace) -> None:
    """Writes the blocks of the largest model, each in its own file, and the rest of it in another."""
    folder, dtype = Path(options.folder), getattr(torch, options.dtype)
    folder.mkdir()
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    with ThreadPoolExecutor(4) as pool:
        for number in range(max(options.blocks)):
            with torch.device(options.device):
                one = AutoModelForCausalLM.from_config(config(options, 1)).state_dict()
            block = {name: value.cpu() for name, value in one.items() if name.startswith(_FIRST)}
            named = {name.replace(_FIRST, f"model.layers.{number}."): value for name, value in block.items()}
            pool.submit(save, named, folder / f"{number}.safetensors")
            if number == 0:
                pool.submit(save, {n: v.cpu() for n, v in one.items() if n not in block}, folder / "rest.safetensors")


def save(tensors: dict[str, torch.Tensor], file: Path) -> None:
    """Writes a file, whose pages then leave the system's cache: who reads it is charged for them."""
    save_file(tensors, file, metadata={"format": "pt"})
    uncache(file, written=True)


def uncache(file: Path, written: bool = False) -> None:
    handle = os.open(file, os.O_RDONLY)
    if written:
        os.fsync(handle)
    os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(handle)


def config(options: argparse.Namespace, blocks: int) -> LlamaConfig:
    return LlamaConfig(
        num_hidden_layers=blocks,
        hidden_size=options.hidden,
        intermediate_size=options.hidden * 43 // 16,
        num_attention_heads=max(options.hidden // 64, 1),
        vocab_size=512,
        architectures=["LlamaForCausalLM"],
        dtype=options.dtype,
    )


def first_blocks(options: argparse.Namespace, blocks: int) -> Path:
    """A model's folder with links to the files of its blocks."""
    source, folder = Path(options.folder), Path(f"{options.folder}-{blocks}")
    folder.mkdir()
    config(options, blocks).save_pretrained(folder)
    places = {}
    for name in ["rest", *map(str, range(blocks))]:
        file = folder / f"{name}.safetensors"
        file.hardlink_to(source / file.name)
        uncache(file)
        with safe_open(file, framework="pt") as handle:
            places |= dict.fromkeys(handle.keys(), file.name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return folder


def quantize(options: argparse.Namespace) -> None:
    blocks = options.blocks[0]
    folder = first_blocks(options, blocks)
    model = AutoModelForCausalLM.from_pretrained(folder)
    size = sum(parameter.nbytes for parameter in model.parameters()) / MIB
    torch.manual_seed(0)
    batches = [{"input_ids": torch.randint(0, 512, (1, options.tokens))} for _ in range(options.samples)]
    torch.zeros(1, device=options.device)
    seen: list[float] = []
    most, over = [unmapped()], threading.Event()

    def watch() -> None:
        while not over.wait(0.01):
            most[0] = max(most[0], unmapped())

    def solved(layers: int, *_: object) -> None:
        block, rest = divmod(layers, 7)
        if rest:
            return
        seen.append(unmapped())
        if options.every and (block == 1 or not block % options.every):
            seconds = time.perf_counter() - started
            print(f"> {block} blocks, {seconds:.0f} s, at most {most[0]:.0f}: {parts()}", flush=True)
        if options.cycles and block == blocks:
            memory.trim()
            held, found = unmapped(), gc.collect()
            memory.trim()
            print(f"> {found} objects in cycles, {held - unmapped():.1f} MiB less without", flush=True)

    threading.Thread(target=watch, daemon=True).start()
    quantizer = QuantizeModule(clip_ratios=(1.0,), nsamples=options.samples, offload_weights=options.device != "cpu")
    before, started = unmapped(), time.perf_counter()
    quantizer.quantize(model, batches, device=options.device, export_dir=f"{folder}-out", progress=solved)
    over.set()
    figures = (size, before, seen[0], seen[-1], most[0], time.perf_counter() - started)
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
    parser.add_argument("--every", type=int, default=0, help="blocks from one look at what the memory is to the next")
    parser.add_argument("--cycles", type=int, default=0, help="1 tells what only cycles of objects keep at the end")
    parser.add_argument("--step", choices=("make", "quantize"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.step:
        {"make": make, "quantize": quantize}[options.step](options)
        return
    print(f"torch {torch.__version__}, safetensors {safetensors.__version__}, {torch.get_num_threads()} threads")
    for line in _HEAD:
        print(line, flush=True)
    with tempfile.TemporaryDirectory() as folder:
        run(options, f"{folder}/m", "make", options.blocks)
        for blocks in options.blocks:
            run(options, f"{folder}/m", "quantize", [blocks])
            shutil.rmtree(f"{folder}/m-{blocks}-out")


def run(options: argparse.Namespace, folder: str, step: str, blocks: list[int]) -> None:
    """Does a step in a process of its own, and prints its lines of the table as they come."""
    command = [sys.executable, __file__, "--step", step, "--folder", folder, "--blocks", *map(str, blocks)]
    for name in ("hidden", "dtype", "device", "samples", "tokens", "every", "cycles"):
        command += [f"--{name}", str(getattr(options, name))]
    with limited(options.limit if step == "quantize" else None) as enter, tempfile.TemporaryFile("w+") as errors:
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, preexec_fn=enter) as process:
            assert process.stdout is not None
            for line in process.stdout:
                if line.startswith(("| ", "> ")):
                    print(line, end="", flush=True)
        if process.returncode:
            errors.seek(0)
            sys.exit(f"{step} ended with status {process.returncode}\n{errors.read()[-3000:]}")


if __name__ == "__main__":
    main()
