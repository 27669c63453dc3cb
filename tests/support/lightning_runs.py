"""Small LightningModules, their data, and fits of them; scripts that ranks run."""

from __future__ import annotations

import lightning.pytorch as pl
import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM

from gptq_plugin import QuantLinear

SMALL = {"group_size": 32, "nsamples": 16, "batch_size": 4}


def llama():
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(
        AutoConfig.for_model("llama", hidden_size=64, intermediate_size=96, num_hidden_layers=1,
                             num_attention_heads=2, num_key_value_heads=1, vocab_size=64)
    )  # fmt: skip


def token_loader(**options):
    ids = torch.randint(0, 64, (24, 16), generator=torch.Generator().manual_seed(0))
    samples = [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row} for row in ids]
    return DataLoader(samples, batch_size=8, shuffle=True, **options)


class Base(pl.LightningModule):
    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


class Holds(Base):
    """The usual fine-tune: a LightningModule with the model in an attribute."""

    def __init__(self):
        super().__init__()
        self.model = llama()

    def training_step(self, batch, batch_idx):
        loss = self.model(**batch).loss
        self.log("train_loss", loss)
        return loss

    validation_step = test_step = training_step


class Is(LlamaForCausalLM, pl.LightningModule):
    """A LightningModule that is the model."""

    def __init__(self):
        super().__init__(llama().config)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)

    def training_step(self, batch, batch_idx):
        return self(**batch).loss


class Contains(Base):
    """The model deep inside something else, with parameters of its own around it."""

    def __init__(self):
        super().__init__()
        self.net = nn.ModuleDict({"backbone": nn.ModuleList([llama()]), "head": nn.Linear(64, 32)})

    def training_step(self, batch, batch_idx):
        return self.net["head"](self.net["backbone"][0](**batch).logits).square().mean()


class Plain(Base):
    """No transformers model at all; batches are pairs."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 32))

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        x, y = batch
        return nn.functional.mse_loss(self(x), y)


class Normed(Plain):
    """With buffers that training changes, outside of the part that tests quantize."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(64)

    def forward(self, x):
        return self.net(self.norm(x))


def pair_loader():
    g = torch.Generator().manual_seed(0)
    return DataLoader([(torch.randn(64, generator=g), torch.randn(32, generator=g)) for _ in range(128)], batch_size=8)


def fit(module, loader, callbacks, tmp_path, val=None, **options):
    values = {"max_epochs": 1, "accelerator": "cpu", "devices": 1, "logger": False, "enable_progress_bar": False,
              "enable_model_summary": False, "enable_checkpointing": False, "default_root_dir": tmp_path}  # fmt: skip
    torch.manual_seed(5)  # the order of the shuffled samples
    trainer = pl.Trainer(**{**values, **options}, callbacks=callbacks)
    trainer.fit(module, loader, val)
    return trainer


def quantized(module):
    return [name for name, layer in module.named_modules() if isinstance(layer, QuantLinear)]


DDP = """
import json, sys
from pathlib import Path
import lightning.pytorch as pl, torch
sys.path.insert(0, sys.argv[1])
from lightning_runs import Holds, SMALL, token_loader
from gptq_plugin import GPTQCallback, QuantizeModule
out, ranks, accelerator = Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
if ranks > 1:
    torch.set_num_threads(1)
class NoTraining(Holds):
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)
# One GPU is shared as two nodes would be that have one each.
places = {"devices": 1, "num_nodes": ranks} if accelerator == "shared gpu" else {"devices": ranks}
backend = "nccl" if accelerator == "gpu" else "gloo"
for samples in sys.argv[5:]:
    module, here = NoTraining(), out / samples / str(ranks)
    callback = GPTQCallback(QuantizeModule(**{**SMALL, "nsamples": int(samples)}), here / "export")
    strategy = pl.strategies.DDPStrategy(process_group_backend=backend) if ranks > 1 else "auto"
    trainer = pl.Trainer(max_epochs=1, accelerator=accelerator.split()[-1], **places, strategy=strategy, logger=False,
        enable_progress_bar=False, enable_checkpointing=False, enable_model_summary=False, callbacks=[callback])
    trainer.fit(module, token_loader())
    rank = trainer.global_rank
    torch.save({k: v for k, v in module.state_dict().items()}, here / f"rank{rank}.pt")
    (here / f"rank{rank}.json").write_text(callback.report.to_json())
"""


def rows(count, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [(torch.randn(64, generator=g), torch.randn(32, generator=g)) for _ in range(count)]


class Validated(Plain):
    """With dropout, and a validation on 13 samples in batches of 5, 5 and 3."""

    def __init__(self, loaders=1):
        super().__init__()
        self.net.insert(1, nn.Dropout(0.5))
        self.loaders = [DataLoader(rows(13 - i, seed=i), batch_size=5) for i in range(loaders)]

    def train_dataloader(self):
        return pair_loader()

    def val_dataloader(self):
        return self.loaders if len(self.loaders) > 1 else self.loaders[0]

    def error(self, batch):
        x, y = batch
        return (self(x) - y).square().mean()

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        self.log("val_loss", self.error(batch))


# On CPUs it forks its ranks, since importing takes longer than a case.
FAULTS = """
import json, os, signal, sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[1])
import lightning.pytorch as pl
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning_runs import SMALL, Holds, token_loader
from ports import reserved_port
import gptq_plugin.training.callback_base as training
import gptq_plugin.export.export as exporting
from gptq_plugin import GPTQCallback, QuantizeModule
from gptq_plugin.quantize import solve_on_ranks as dealing
from gptq_plugin.walk import hessian

def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

def fail(message):
    def failing(*_, **__):
        raise MemoryError(message)
    return failing

class Faulty(Holds):
    fault = None

    def calibration_step(self, batch):
        if self.fault is not None:
            return self.fault(batch)
        return self.model(**batch)

def spoil(original):
    def spoilt(*args):
        args[0]._sum[0] = float("nan")
        return original(*args)
    return spoilt

def inject(module, kind, phase):
    if phase == "calibration":
        def nan(batch):
            embeds = torch.full((len(batch["input_ids"]), 16, 64), float("nan"), device=module.device)
            return module.model(inputs_embeds=embeds)
        module.fault = {"raise": fail("a bad sample"), "kill": die, "nan": nan}[kind]
    elif phase == "setup":
        training.check_export_dir = fail("not on this node")
    elif phase == "reduction" and kind == "nan":
        hessian.Hessian.over_ranks = spoil(hessian.Hessian.over_ranks)
    elif phase == "reduction" and kind == "raise":
        hessian.Hessian.over_ranks = fail("out of memory")
    elif phase == "reduction":
        dist.all_reduce = die  # in the middle of the exchange
    elif phase == "solve":
        solve = dealing.solve_blocks
        nan = lambda weight, *others: solve(weight * float("nan"), *others)
        dealing.solve_blocks = {"raise": fail("no room for the factor"), "kill": die, "nan": nan}[kind]
    elif phase == "export":
        exporting.verify = {"raise": fail("disk full"), "kill": die}[kind]

class Inject(pl.Callback):
    def __init__(self, kind, phase):
        self.kind, self.phase = kind, phase

    def setup(self, trainer, module, stage):
        if trainer.global_rank == 1 and self.phase in ("setup", "rehearsal"):
            inject(module, self.kind, "calibration" if self.phase == "rehearsal" else "setup")

    def on_train_end(self, trainer, module):
        if trainer.global_rank == (0 if self.phase == "export" else 1):  # only rank 0 writes
            inject(module, self.kind, self.phase)

def run(rank, case, port):
    folder = out / case
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), LOCAL_RANK=str(rank),
        WORLD_SIZE=str(size), TORCHELASTIC_RUN_ID=case)
    try:
        callback = GPTQCallback(QuantizeModule(**SMALL), folder / "export")
        trainer = pl.Trainer(max_epochs=1, accelerator=accelerator, devices=size, strategy="ddp", logger=False,
            enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder,
            callbacks=[Inject(*case.split("-")), callback, ModelCheckpoint(folder / "ckpt", save_last=True)])
        trainer.fit(Faulty(), token_loader())
    except BaseException as error:
        (folder / f"{rank}.txt").write_text(f"{type(error).__name__}: {error}")
        os._exit(1)
    os._exit(0)

out, size, accelerator, cases, results = Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4], sys.argv[5:], {}
if accelerator == "gpu":  # which does not survive a fork: a case, a rank and a port
    run(int(cases[1]), cases[0], int(cases[2]))
for case in cases:
    started, children, ends = time.time(), {}, {}
    (out / case).mkdir()
    with reserved_port() as port:
        for rank in range(size):
            pid = os.fork()
            if not pid:
                run(rank, case, port)
            children[pid] = rank
        while children:
            pid, status = os.wait()
            ends[children.pop(pid)] = os.waitstatus_to_exitcode(status)
    results[case] = {"seconds": time.time() - started, "ends": [ends[rank] for rank in range(size)]}
(out / "results.json").write_text(json.dumps(results))
"""


FINISH = {"steps": 8, "learning_rate": 0.02, "tokens_per_step": 64, "held_out": 8, "judgements": 2, "batch_size": 2}


class Structured(Holds):
    """Its outputs depend on its weights, and training leaves them alone."""

    def __init__(self):
        super().__init__()
        for parameter in self.model.parameters():
            if parameter.dim() > 1:
                parameter.data *= 10

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


FINISH_RUN = """
import os, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[1])
import lightning.pytorch as pl
from lightning_runs import FINISH, SMALL, Structured, token_loader
from gptq_plugin import Finish, GPTQCallback, QuantizeModule
import gptq_plugin.finish.finish_model as finishing
import gptq_plugin.finish.train as train
import gptq_plugin.export.export as exporting
import gptq_plugin.finish.block_training as blocks
import gptq_plugin.finish.block_walk as walk
out, ranks, place, kind = Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4], sys.argv[5]

def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

if place == "teacher":
    finishing.ask_teacher = die
if place == "step":
    train.Training._step = die
if place == "solve":
    walk.solve_again = die
if place == "block":
    blocks.BlockTraining._learn = die
if place == "export":
    original, count = exporting.Staging.flush, []
    def second(self):
        count.append(1)
        return original(self) if len(count) == 1 else die()
    exporting.Staging.flush = second
class Odd(Structured):
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.log("odd", 2 * loss.detach(), sync_dist=True, on_epoch=True, prog_bar=True)
        if place == "missing" and self.global_rank == 1 and not self.training:
            return None
        return {"loss": loss, "more": torch.zeros(3)}

with_loss = place in ("odd", "missing")
module = Odd() if with_loss else Structured()
finish = Finish(kind, **FINISH, block_steps=4, task_weight=0.6 if with_loss else 0.0)
callback = GPTQCallback(QuantizeModule(**{**SMALL, "bits": 2}), out / "export", finish=finish)
strategy = pl.strategies.DDPStrategy(process_group_backend="gloo") if ranks > 1 else "auto"
trainer = pl.Trainer(max_epochs=1, accelerator="cpu", devices=ranks, strategy=strategy, logger=False,
    enable_progress_bar=False, enable_checkpointing=False, enable_model_summary=False, callbacks=[callback])
trainer.fit(module, token_loader())
torch.save(module.state_dict(), out / f"rank{trainer.global_rank}.pt")
(out / f"rank{trainer.global_rank}.json").write_text(callback.report.to_json())
"""
