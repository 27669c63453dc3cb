"""Llamas of any width with random weights, their samples, and the ranks that quantize them."""

from __future__ import annotations

import argparse
import logging
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM


def add_sizes(parser: argparse.ArgumentParser, *, width: int, layers: int, vocab: int) -> None:
    """Adds the options for a Llama's size and its samples."""
    parser.add_argument("--width", type=int, default=width, help="4096 is Llama-3-8B's, 8192 Llama-3-70B's")
    parser.add_argument("--layers", type=int, default=layers, help="blocks of the model")
    parser.add_argument("--vocab", type=int, default=vocab)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=2048, help="of each sample")
    parser.add_argument("--batch-size", type=int, default=8)


def llama_config(options: argparse.Namespace) -> LlamaConfig:
    """Llama-3's proportions: an MLP 3.5 times as wide, heads of 128, eight of keys and values."""
    heads = max(4, options.width // 128)
    return LlamaConfig(
        vocab_size=options.vocab,
        hidden_size=options.width,
        intermediate_size=options.width * 7 // 2,
        num_hidden_layers=options.layers,
        num_attention_heads=heads,
        num_key_value_heads=min(8, heads),
        max_position_embeddings=8192,
        rope_theta=500000.0,
    )


def llama(options: argparse.Namespace, device: torch.device) -> LlamaForCausalLM:
    """The same weights on every rank, in bfloat16 on a GPU."""
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with device:
        return LlamaForCausalLM._from_config(llama_config(options), dtype=dtype).eval()


def samples(options: argparse.Namespace, count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return list(torch.randint(0, options.vocab, (count, options.tokens), generator=generator))


def begin(rank: int) -> torch.device:
    """Silences the reports; returns a GPU of the rank's own, or the CPU, with one thread, where there is none."""
    logging.getLogger("gptq_plugin").setLevel(logging.WARNING)
    if torch.cuda.is_available():
        torch.cuda.set_device(rank)
        return torch.device("cuda", rank)
    torch.set_num_threads(1)
    return torch.device("cpu")


def join(rank: int, ranks: int, folder: Path, name: str = "store") -> None:
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, init_method=f"file://{folder}/{name}-{ranks}", rank=rank, world_size=ranks)


def in_groups(rank: int, numbers: Sequence[int], folder: Path) -> Iterator[int]:
    """The numbers of ranks that this one takes part in, each while the process group of so many is up."""
    for ranks in numbers:
        if rank >= ranks:
            continue
        if ranks > 1:
            join(rank, ranks, folder)
        yield ranks
        if ranks > 1:
            dist.destroy_process_group()


def started(work: Callable[..., Any], ranks: int, *arguments: Any) -> list[torch.multiprocessing.Process]:
    """Starts work(rank, *arguments) in processes of their own; a GPU does not survive a fork."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # as torchrun sets it, for the processes
    torch.set_num_threads(1)
    context: Any = torch.multiprocessing.get_context("spawn" if torch.cuda.is_available() else "fork")
    processes = [context.Process(target=work, args=(rank, *arguments)) for rank in range(ranks)]
    for process in processes:
        process.start()
    return processes


def run(work: Callable[..., Any], ranks: int, *arguments: Any) -> None:
    """Runs work(rank, folder, *arguments) on all ranks; exits with 1, and ends the others, if one of them failed."""
    with tempfile.TemporaryDirectory() as folder:
        processes = started(work, ranks, Path(folder), *arguments)
        while any(process.is_alive() for process in processes) and not any(process.exitcode for process in processes):
            time.sleep(0.05)
        codes = [process.exitcode for process in processes]
        for process in processes:
            process.kill()
        if any(codes):
            raise SystemExit(f"a rank failed; exit codes (None: it was ended): {codes}")
