"""A training on two ranks of which one is lost, as a script: rank_run.py KIND PHASE FOLDER.

Lightning's Trainer runs with GPTQCallback. Each rank that ends by an exception writes it to FOLDER/N.txt; the lost one
touches FOLDER/reached before. `start_by_hand` does the same in processes of torch.multiprocessing that call
QuantizeModule.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.utils.data import DataLoader, Dataset

from gptq_plugin import QuantizeModule

RANKS, TIMEOUT = 2, timedelta(seconds=8)


class Loss:
    """How the rank is lost, and where."""

    def __init__(self, kind: str, phase: str, folder: Path) -> None:
        self.kind, self.phase, self.folder = kind, phase, folder
        self.is_armed = False

    def lost_rank(self) -> int:
        return 0 if self.phase == "export" else 1  # only rank 0 writes

    def arm(self, rank: int) -> None:
        """From here on the rank is lost at its phase."""
        if rank != self.lost_rank():
            return
        self.is_armed = True
        from gptq_plugin import check_ins
        from gptq_plugin.export import export
        from gptq_plugin.quantize import solve_on_ranks

        if self.phase == "meeting":
            check_ins._meet = self.happens  # type: ignore[assignment]
        elif self.phase == "reduction":
            dist.all_reduce = self.happens
        elif self.phase == "solve":
            solve_on_ranks.solve_blocks = self.happens  # type: ignore[assignment]
        elif self.phase == "export":
            export.verify = self.happens  # type: ignore[assignment]

    def happens(self, *_: Any, **__: Any) -> Any:
        (self.folder / "reached").touch()
        if self.kind == "raise":
            raise MemoryError("no room")
        if self.kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.kind == "exit":
            sys.exit(3)
        time.sleep(120)  # never calls, or waits for the terminal's Ctrl-C
        raise AssertionError("nothing ended this rank")


class Rows(Dataset[Any]):
    def __init__(self, loss: Loss) -> None:
        self.loss = loss
        self.ids = torch.randint(0, 64, (32, 16), generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if self.loss.is_armed and self.loss.phase == "data":
            self.loss.happens()
        return {"input_ids": self.ids[index], "labels": self.ids[index]}


def model(loss: Loss) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "vocab_size": 64, "num_attention_heads": 2}
    network = LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, **sizes))

    def calibrates(*_: Any) -> None:
        if loss.is_armed and loss.phase == "calibration" and not network.training:
            loss.happens()

    network.model.layers[0].mlp.register_forward_hook(calibrates)
    return network


def fit(loss: Loss) -> None:
    import lightning.pytorch as pl
    from lightning.pytorch.callbacks import ModelCheckpoint
    from lightning.pytorch.strategies import DDPStrategy

    from gptq_plugin import GPTQCallback

    class Tuned(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = model(loss)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self.model(**batch).loss

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=1e-3)

    class Arms(pl.Callback):
        def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
            dist.distributed_c10d._set_pg_timeout(TIMEOUT)  # the processes have found each other, however long it took
            if loss.phase == "meeting":
                loss.arm(trainer.global_rank)

        def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            loss.arm(trainer.global_rank)

    gptq = GPTQCallback(QuantizeModule(group_size=32, nsamples=16, batch_size=4), loss.folder / "export")
    checkpoints = ModelCheckpoint(loss.folder / "checkpoints", save_last=True)
    strategy = DDPStrategy(process_group_backend="gloo")
    trainer = pl.Trainer(
        max_steps=2, accelerator="cpu", devices=RANKS, strategy=strategy, logger=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[Arms(), checkpoints, gptq], default_root_dir=loss.folder,
    )  # fmt: skip
    told(lambda: trainer.fit(Tuned(), DataLoader(Rows(loss), batch_size=4)), trainer.global_rank, loss.folder)


def by_hand(rank: int, loss: Loss) -> None:
    """A loop of one's own: rank 0 exports, and the other waits for it."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{loss.folder}/store", rank=rank, world_size=RANKS)
    dist.distributed_c10d._set_pg_timeout(TIMEOUT)
    loss.arm(rank)

    def run() -> None:
        network, quantizer = model(loss), QuantizeModule(group_size=32, nsamples=16, batch_size=4)
        quantizer.quantize(network, DataLoader(Rows(loss), batch_size=4))
        if rank == 0:
            quantizer.export(network, loss.folder / "export")
        dist.barrier()
        dist.destroy_process_group()

    told(run, rank, loss.folder)


def told(run: Callable[[], None], rank: int, folder: Path) -> None:
    try:
        run()
    except BaseException as error:
        (folder / f"{rank}.txt").write_text(f"{type(error).__name__}: {error}")
        raise


def start_by_hand(kind: str, phase: str, folder: Path) -> None:
    mp.start_processes(by_hand, (Loss(kind, phase, folder),), nprocs=RANKS, start_method="fork")


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # what starts this may have it ignored
    fit(Loss(sys.argv[1], sys.argv[2], Path(sys.argv[3])))
