"""Quantizes the same samples on several numbers of ranks, as a script: rank_runs.py FOLDER cpu|cuda SCENE RANKS...

Each rank saves its state and losses as FOLDER/SCENE-RANKS-RANK.pt. On GPUs every rank has one, with NCCL.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from gptq_plugin import QuantizeModule

from paths import REPOSITORY

SHARED = REPOSITORY.parent / "shared"
PYCODE = SHARED / "models" / "pycode-29m"


def trained(layers: int | None, dtype: torch.dtype, length: int) -> tuple[Any, list[Any], dict[str, Any]]:
    """pycode-29m, or its first layers, and 33 samples of its domain."""
    from transformers import AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(PYCODE, dtype=dtype)
    model.model.layers = model.model.layers[:layers]
    tokenizer = AutoTokenizer.from_pretrained(PYCODE)
    with (SHARED / "data" / "pycode" / "calib.jsonl").open(encoding="utf-8") as lines:
        texts = [json.loads(line)["text"] for line in lines]
    rows = [ids[:length] for ids in (tokenizer(text)["input_ids"] for text in texts) if len(ids) >= length]
    return model, rows[:33], {}


def padded() -> tuple[Any, list[Any], dict[str, Any]]:
    """A small Llama on 7 padded batches of a user, of 1 to 5 rows."""
    torch.manual_seed(0)
    config = LlamaConfig(hidden_size=128, intermediate_size=320, num_hidden_layers=2, vocab_size=256,
                         num_attention_heads=4, num_key_value_heads=2, initializer_range=0.1)  # fmt: skip
    batches = []
    for rows in (5, 5, 3, 1, 5, 4, 2):
        lengths = torch.randint(20, 60, (rows, 1))
        mask = (torch.arange(60) < lengths).long()
        batches.append({"input_ids": torch.randint(0, 256, (rows, 60)), "attention_mask": mask})
    return LlamaForCausalLM(config), batches, {"group_size": 64, "desc_act": True, "static_groups": False}


def experts() -> tuple[Any, list[Any], dict[str, Any]]:
    """A small mixture of experts on samples of two lengths: experts get from no tokens to many."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "qwen3_moe", hidden_size=64, intermediate_size=64, moe_intermediate_size=32, num_hidden_layers=2, vocab_size=64,
        num_attention_heads=2, num_key_value_heads=1, num_experts=6, num_experts_per_tok=2, initializer_range=0.2,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    return model, [torch.randint(0, 64, (30 + 10 * (n % 2),)) for n in range(20)], {"group_size": 32, "batch_size": 3}


def best() -> tuple[Any, list[Any], dict[str, Any]]:
    """The padded batches with the best method, whose float walk takes turns with the other."""
    model, batches, _ = padded()
    return model, batches, {"group_size": 64, "method": "best", "bits": 3}


def budget() -> tuple[Any, list[Any], dict[str, Any]]:
    """The padded batches, of which some are on one rank only, with a budget of bits for the layers."""
    model, batches, _ = padded()
    return model, batches, {"group_size": 64, "target_bits": 3.5}


def wide() -> tuple[Any, list[Any], dict[str, Any]]:
    """A block as wide as a real model's, whose rows are many blocks to a GPU's solver."""
    torch.manual_seed(0)
    config = LlamaConfig(hidden_size=2048, intermediate_size=5632, num_hidden_layers=2, vocab_size=2048,
                         num_attention_heads=16, num_key_value_heads=4)  # fmt: skip
    model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
    return model, list(torch.randint(0, 2048, (33, 512))), {}


def gradients() -> tuple[Any, list[Any], dict[str, Any]]:
    """The padded batches, whose tokens are weighted by the loss of the next ones."""
    model, batches, options = padded()
    return model, batches, {**options, "token_weighting": "gradients", "bits": 3}


SCENES: dict[str, Callable[[], tuple[Any, list[Any], dict[str, Any]]]] = {
    "trained": lambda: trained(1, torch.float32, 64),
    "trained-whole": lambda: trained(None, torch.float32, 512),
    "trained-bfloat16": lambda: trained(None, torch.bfloat16, 512),
    "padded": padded,
    "experts": experts,
    "best": best,
    "gradients": gradients,
    "budget": budget,
    "experts-drift": lambda: (*experts()[:2], {**experts()[2], "asymmetric_alpha": 0.5}),
    "wide": wide,
}


def work(rank: int, ranks: int, folder: str, device: str, scene: str) -> None:
    torch.set_num_threads(1)
    if device == "cuda":
        torch.cuda.set_device(rank)
    if ranks > 1:
        backend = "nccl" if device == "cuda" else "gloo"
        store = f"file://{folder}/{scene}-{ranks}.store"
        dist.init_process_group(backend, init_method=store, rank=rank, world_size=ranks)
    model, data, options = SCENES[scene]()
    quantizer = QuantizeModule(nsamples=33, exact_sums=True, **options)
    report = quantizer.quantize(model.eval().to(device), data[rank::ranks])
    state = {name: value.cpu() for name, value in model.state_dict().items()}
    lines = [(one.name, one.method, one.loss, one.rtn_loss, one.tokens, one.deviations) for one in report.modules]
    if report.allocation is not None:
        lines += [dataclasses.astuple(unit) for unit in report.allocation.units]
    torch.save((state, lines), f"{folder}/{scene}-{ranks}-{rank}.pt")
    if ranks > 1:
        dist.destroy_process_group()


def main() -> None:
    folder, device, scene = sys.argv[1:4]
    method = "spawn" if device == "cuda" else "fork"  # a GPU does not survive a fork
    torch.set_num_threads(1)
    for ranks in map(int, sys.argv[4:]):
        mp.start_processes(work, (ranks, folder, device, scene), nprocs=ranks, start_method=method)


def saved(folder: Path, scene: str, ranks: int) -> list[tuple[dict[str, torch.Tensor], list[Any]]]:
    """What each rank saved."""
    return [torch.load(folder / f"{scene}-{ranks}-{rank}.pt") for rank in range(ranks)]


if __name__ == "__main__":
    main()
