"""Trainings that end in an export, each rank a fork of this process: Lightning's Trainer, or transformers'.

They tell what they have come to, so that another process can end them there.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import signal
import sys
import threading
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
import transformers
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainingArguments

from gptq_plugin import GPTQCallback, GPTQTrainerCallback, QuantizeModule
from gptq_plugin.export import export, staging
from gptq_plugin.quantize import one_pass

from ports import reserved_port

tqdm.set_lock(threading.RLock())  # its own is shared between processes, and stays locked where one of them is killed

QUANTIZER = {"group_size": 32, "nsamples": 16, "batch_size": 4}
STEPS, SAVE_EVERY = 6, 2
TIMEOUT = timedelta(seconds=20)  # of the process group; it is 30 minutes where nobody sets it

Tell = Callable[..., None]


def llama() -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 64}
    return AutoModelForCausalLM.from_config(
        AutoConfig.for_model("llama", num_attention_heads=2, num_key_value_heads=1, **sizes)
    )


def samples() -> list[dict[str, torch.Tensor]]:
    ids = torch.randint(0, 64, (96, 16), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row, "labels": row} for row in ids]


class Tuned(pl.LightningModule):
    """The usual fine-tune: a LightningModule with the model in an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.model = llama()

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss: torch.Tensor = self.model(**batch).loss
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def digests(path: Path) -> dict[str, str]:
    """Of a file, or of all files in a folder but those in hidden folders, by name."""
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    shown = [file for file in files if not any(part.startswith(".") for part in file.relative_to(path).parts)]
    return {str(file.relative_to(path)): hashlib.sha256(file.read_bytes()).hexdigest() for file in shown}


def _limit_waiting() -> None:
    """Lets ranks wait `TIMEOUT` for each other, from here on: they have come together, however long it took."""
    if dist.is_initialized():
        dist.distributed_c10d._set_pg_timeout(TIMEOUT)


@dataclass(frozen=True)
class Training:
    """A training.

    Attributes:
        trainer: "lightning" or "transformers".
        ranks: Processes, over gloo.
        folder: Gets "checkpoints" and "export", where an earlier export may lie.
        inside: The export is the working directory, so it is replaced file by file.
        resume: A checkpoint to go on from.
    """

    trainer: str
    ranks: int
    folder: Path
    inside: bool = False
    resume: Path | None = None

    def run(self, rank: int, port: int, tell: Tell) -> None:
        """Runs a rank in this process."""
        if self.inside:
            os.chdir(self.folder / "export")
        if self.ranks > 1:
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), LOCAL_RANK=str(rank),
                              WORLD_SIZE=str(self.ranks), TORCHELASTIC_RUN_ID="kills")  # fmt: skip
        _tell_of_steps(tell)
        (self._lightning if self.trainer == "lightning" else self._transformers)(tell)

    def _lightning(self, tell: Tell) -> None:
        class Saved(ModelCheckpoint):
            def _save_checkpoint(self, trainer: pl.Trainer, filepath: str) -> None:
                super()._save_checkpoint(trainer, filepath)
                tell("saved", filepath, digests(Path(filepath)))

            def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
                _limit_waiting()

            def on_train_batch_start(self, *_: Any) -> None:
                tell("training")

        checkpoints = Saved(self.folder / "checkpoints", every_n_train_steps=SAVE_EVERY, save_top_k=-1)
        gptq = GPTQCallback(QuantizeModule(**QUANTIZER), self.folder / "export", overwrite=True)
        trainer = pl.Trainer(
            max_steps=STEPS, accelerator="cpu", devices=self.ranks, strategy="ddp" if self.ranks > 1 else "auto",
            logger=False, enable_progress_bar=False, enable_model_summary=False, callbacks=[checkpoints, gptq],
            default_root_dir=self.folder,
        )  # fmt: skip
        trainer.fit(Tuned(), DataLoader(samples(), batch_size=8), ckpt_path=self.resume)

    def _transformers(self, tell: Tell) -> None:
        class Told(transformers.TrainerCallback):
            def on_train_begin(self, *_: Any, **__: Any) -> None:
                _limit_waiting()

            def on_step_begin(self, *_: Any, **__: Any) -> None:
                tell("training")

            def on_save(self, args: TrainingArguments, state: Any, control: Any, **_: Any) -> None:
                folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
                if state.is_world_process_zero:
                    tell("saved", str(folder), digests(folder))

        gptq = GPTQTrainerCallback(QuantizeModule(**QUANTIZER), self.folder / "export", overwrite=True)
        arguments = TrainingArguments(
            str(self.folder / "checkpoints"), use_cpu=True, max_steps=STEPS, save_steps=SAVE_EVERY, report_to=[],
            per_device_train_batch_size=8, disable_tqdm=True, ddp_backend="gloo" if self.ranks > 1 else None,
        )  # fmt: skip
        trainer = Trainer(llama(), arguments, train_dataset=samples(), callbacks=[Told(), gptq])
        trainer.train(resume_from_checkpoint=None if self.resume is None else str(self.resume))


@dataclass(frozen=True)
class Suicide:
    """A signal that rank 0 sends itself at the n-th of its steps of a kind, from 0."""

    step: str
    number: int
    signal: int


class Started:
    """A training that runs.

    Args:
        training: The training.
        output: A folder; rank N writes its output to N.txt there.
        suicide: Ends it from within.

    Attributes:
        ranks: Rank by process id.
    """

    def __init__(self, training: Training, output: Path, suicide: Suicide | None = None) -> None:
        read, write = os.pipe()
        self.ranks = {}
        with reserved_port() as port:
            for rank in range(training.ranks):
                child = os.fork()
                if not child:
                    os.close(read)
                    _rank(training, rank, port, write, output, suicide)
                self.ranks[child] = rank
        os.close(write)
        self._told = os.fdopen(read, "rb")

    def told(self) -> Iterator[list[Any]]:
        """What rank 0 tells, and all ranks of errors, until all have ended."""
        return (json.loads(line) for line in self._told)


def _rank(training: Training, rank: int, port: int, pipe: int, output: Path, suicide: Suicide | None) -> None:
    """In the fork: runs a rank, and ends the process."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever started this may have it ignored
    os.dup2(os.open(output / f"{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 1)
    os.dup2(1, 2)
    steps: Counter[str] = Counter()

    def tell(*what: Any) -> None:
        if rank == 0 or what[0] == "raised":
            os.write(pipe, (json.dumps(what) + "\n").encode())
        if rank == 0 and suicide is not None and what[0] == suicide.step and steps[what[0]] == suicide.number:
            os.kill(os.getpid(), suicide.signal)
        steps[what[0]] += 1

    try:
        training.run(rank, port, tell)
        sys.stdout.flush()
        os._exit(0)
    except BaseException as error:  # noqa: BLE001  this process ends here
        tell("raised", rank, f"{type(error).__name__}: {error}"[:500])
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)


def _tell_of_steps(tell: Tell) -> None:
    """Tells of the quantization's steps as they begin."""

    def telling(owner: Any, name: str, before: str, after: str = "") -> None:
        own = getattr(owner, name)

        @functools.wraps(own)
        def step(*args: Any, **kwargs: Any) -> Any:
            tell(before)
            found = own(*args, **kwargs)
            if after:
                tell(after)
            return found

        setattr(owner, name, step)

    telling(one_pass.OnePass, "run", "calibration", "solved")
    telling(one_pass, "solve_shared", "solve", "calibration")
    for owner, name in ((export.Export, "finish"), (export, "verify"), (export, "same_outputs"),
                        (staging.Staging, "place"), (staging, "_flush"), (staging, "_move_out"),
                        (staging, "_exchange"), (staging, "_remove_earlier")):  # fmt: skip
        telling(owner, name, "export")
    if Path.cwd().name == "export":  # where files are moved one by one
        telling(Path, "rename", "export")
