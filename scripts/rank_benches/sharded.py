"""`sharded`: a model that no rank holds: from the end of a two-step fit to the verified export.

A Llama with random bfloat16 weights, made in shards on the devices, is trained for two steps of plain SGD by Lightning
under ModelParallelStrategy, by FSDP2 or tensor parallelism, and quantized by GPTQCallback. Lines appear as things end:
seconds of each part, and the peaks of memory and disk since the line before.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils.data import DataLoader
from transformers import LlamaForCausalLM

from gptq_plugin import GPTQCallback, QuantizeModule
from gptq_plugin.export import export
from gptq_plugin.quantize import prepare
from gptq_plugin.training import consolidated
from rank_benches.llamas import add_sizes, llama_config, samples
from rank_benches.peaks import Peaks


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--how", choices=("fsdp", "tp"), default="fsdp")
    add_sizes(parser, width=8192, layers=80, vocab=128256)
    parser.add_argument("--folder", type=Path, help="where the export goes, and the weights meanwhile")


def main(options: argparse.Namespace) -> None:
    logging.getLogger("gptq_plugin").setLevel(logging.WARNING)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        module = Tuned(options)
        watch = Watch(Path(folder))
        size = sum(parameter.numel() for parameter in empty(options).parameters())
        watch.line(
            f"{options.how}, {options.ranks} ranks, {options.layers} blocks of width {options.width}, {size:,} weights"
        )
        quantizer = QuantizeModule(bits=4, nsamples=options.samples, batch_size=options.batch_size)
        callback = GPTQCallback(quantizer, Path(folder, "export"))
        parallel = options.how == "tp"
        trainer = pl.Trainer(
            accelerator="gpu" if torch.cuda.is_available() else "cpu",
            devices=options.ranks,
            strategy=ModelParallelStrategy(
                data_parallel_size=1 if parallel else options.ranks,
                tensor_parallel_size=options.ranks if parallel else 1,
            ),
            max_steps=2,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[watch, callback],
            default_root_dir=folder,
        )
        rows = [{"input_ids": row, "labels": row} for row in samples(options, max(options.samples, 2 * options.ranks))]
        with watch.parts():
            trainer.fit(module, DataLoader(rows, batch_size=1))
        watch.summary(callback)
        trainer.strategy.barrier()  # before rank 0 removes the folder


def empty(options: argparse.Namespace) -> LlamaForCausalLM:
    with torch.device("meta"):
        dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
        return LlamaForCausalLM._from_config(llama_config(options), dtype=dtype)


class Tuned(pl.LightningModule):
    """The Llama; its shards are made on the device, so no rank ever holds the whole model."""

    def __init__(self, options: argparse.Namespace) -> None:
        super().__init__()
        self.options = options
        self.model: Any = None

    def configure_model(self) -> None:
        if self.model is not None:
            return
        device = self.trainer.strategy.root_device
        self.model = empty(self.options)
        mesh: Any = self.device_mesh
        if self.options.how == "tp":
            parallelize(self.model, mesh["tensor_parallel"])
        else:
            for part in (*self.model.model.layers, self.model):
                fully_shard(part, mesh=mesh["data_parallel"])
        self.model.to_empty(device=device)
        rotary = type(self.model.model.rotary_emb)(self.model.config)  # its buffers are computed, and in no checkpoint
        self.model.model.rotary_emb = rotary.to(device)
        self.model.gradient_checkpointing_enable()
        draw(self.model, self.global_rank)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.model(**batch, use_cache=False).loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1e-4, foreach=False)


def parallelize(model: Any, mesh: Any) -> None:
    """Attention by heads, the MLP by its inner channels, embedding and head by the vocabulary."""
    columns, rows = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"), ("o_proj", "down_proj")
    plan: dict[str, Any] = {
        f"{'mlp' if 'gate' in name or 'up' in name or 'down' in name else 'self_attn'}.{name}": kind()
        for kind, names in ((ColwiseParallel, columns), (RowwiseParallel, rows))
        for name in names
    }
    for layer in model.model.layers:
        parallelize_module(layer, mesh, plan)
    parallelize_module(model.model.embed_tokens, mesh, RowwiseParallel(input_layouts=Replicate()))
    parallelize_module(model.lm_head, mesh, ColwiseParallel(output_layouts=Replicate()))


@torch.no_grad()
def draw(model: nn.Module, rank: int) -> None:
    """Random weights, shard by shard; norms are ones, and equal on all ranks where they are whole."""
    torch.manual_seed(rank)
    for name, parameter in model.named_parameters():
        local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        if "norm" in name:
            local.fill_(1.0)
        else:
            local.normal_(0.0, 0.02)


class Watch(pl.Callback):
    """Prints what has taken how long, on rank 0, as soon as it has ended."""

    def __init__(self, folder: Path) -> None:
        self.peaks = Peaks(folder)
        self.begun = self.last = time.perf_counter()
        self.ended_fit = 0.0
        self.trainer: pl.Trainer | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self.trainer = trainer

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.line("start, and the model in shards")

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, number: int) -> None:
        self.line("until the first step: the rehearsal" if number == 0 else "a step")

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.line("a step")
        self.ended_fit = time.perf_counter()

    @contextlib.contextmanager
    def parts(self) -> Iterator[None]:
        """Times functions of the package, by wrapping them."""
        functions = [
            (consolidated, "_write", "weights put together in files"),
            (prepare, "check_same", "ranks compared, every weight read"),
            (export, "verify", "export's files verified"),
        ]
        before = [(module, name, getattr(module, name)) for module, name, _ in functions]
        try:
            for module, name, what in functions:
                setattr(module, name, self._timed(getattr(module, name), what))
            yield
        finally:
            for module, name, function in before:
                setattr(module, name, function)

    def _timed(self, function: Any, what: str) -> Any:
        def timed(*arguments: Any, **named: Any) -> Any:
            self.line(f"  (before: {what})")
            result = function(*arguments, **named)
            self.line(what)
            return result

        return timed

    def line(self, what: str) -> None:
        now = time.perf_counter()
        if self.trainer is None or self.trainer.global_rank == 0:
            print(f"{now - self.begun:8.1f} s  {now - self.last:7.1f} s  {what}; {self.peaks.since_last()}", flush=True)
        self.last = now

    def summary(self, callback: GPTQCallback) -> None:
        assert self.trainer is not None and callback.report is not None and callback.export_dir is not None
        seconds = time.perf_counter() - self.ended_fit
        everyones = self.peaks.of_all_ranks()
        self.line("after the last part")
        if self.trainer.global_rank:
            return
        size = sum(file.stat().st_size for file in callback.export_dir.iterdir())
        phases = ", ".join(f"{name} {value:.1f}" for name, value in callback.report.seconds.items())
        print(f"from the end of the fit to the verified export: {seconds:.1f} s (of which {phases})")
        print(f"peaks: {everyones}; export {size / 1e9:.2f} GB; {len(callback.report.quantized)} layers quantized")
        print(f"free on the disk: {shutil.disk_usage(callback.export_dir).free / 1e9:.0f} GB", flush=True)
