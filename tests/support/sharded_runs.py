"""The runs of tests/lightning/test_unsharded.py: each of two processes calls `main`, and both train together."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import resource
import time
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.strategies.fsdp import _setup_activation_checkpointing
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils.data import DataLoader
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.distributed.tensor_parallel import apply_tensor_parallelism
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from gptq_plugin import GPTQCallback, QuantizeModule, QuantLinear, distributed
from gptq_plugin.lightning.surroundings import whole
from gptq_plugin.training import consolidated as consolidating
from gptq_plugin.training.consolidated import consolidated

SMALL = {"group_size": 32, "nsamples": 15, "batch_size": 4}


def llama(**options):
    """A vocabulary that no even number of ranks divides."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2,
             "num_key_value_heads": 1, "vocab_size": 61}  # fmt: skip
    return AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **{**sizes, **options}))


def tokens():
    ids = torch.randint(0, 61, (23, 11), generator=torch.Generator().manual_seed(0))
    return DataLoader([{"input_ids": row, "labels": row} for row in ids], batch_size=4)


def pairs():
    g = torch.Generator().manual_seed(0)
    return DataLoader([(torch.randn(64, generator=g), torch.randn(7, generator=g)) for _ in range(150)], batch_size=9)


class Model(pl.LightningModule):
    """A fine-tune whose weights stay what they were. What it shards is up to `plan`."""

    def __init__(self, plan=None, **options):
        super().__init__()
        self.model = llama(**options)
        self.temperature = nn.Parameter(torch.full((3,), 2.0))  # beside the model, and whole on every rank
        self.plan = plan

    def configure_model(self):
        if self.plan is not None:
            self.plan(self.model, self.device_mesh)

    def training_step(self, batch, batch_idx):
        loss = self.model(**batch).loss * self.temperature.mean()
        self.log("loss", loss)
        self.log("gain", -loss)
        return loss

    validation_step = training_step

    def on_validation_epoch_end(self):
        layers = [layer for layer in self.modules() if isinstance(layer, QuantLinear)]
        self.layers_mapped = sum(in_file(layer.qweight) and in_file(layer.scales) for layer in layers)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0, foreach=False)  # of whole and sharded ones


class Plain(Model):
    """No transformers model, batches of pairs, and a last layer of seven outputs, which stays float."""

    def __init__(self, plan=None):
        pl.LightningModule.__init__(self)
        torch.manual_seed(0)
        self.model = nn.Sequential(
            nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 64), nn.BatchNorm1d(64), nn.Linear(64, 7)
        )
        self.plan = plan

    def forward(self, x):
        return self.model(x)

    def training_step(self, batch, batch_idx):
        loss = nn.functional.mse_loss(self(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    validation_step = training_step


def fsdp(model, mesh, **options):
    layers = [model[0], model[2], model[4]] if isinstance(model, nn.Sequential) else model.model.layers
    for part in (*layers, model):
        fully_shard(part, mesh=mesh["data_parallel"], **options)


def mixed(model, mesh):
    """The forward computes in bfloat16; the parameters are float32."""
    fsdp(model, mesh, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))


def tensor_parallel(model, mesh):
    mesh = mesh["tensor_parallel"]
    if isinstance(model, nn.Sequential):
        parallelize_module(model, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
        parallelize_module(model[4], mesh, ColwiseParallel(output_layouts=Replicate()))
        return
    halves = {"mlp.gate_proj": ColwiseParallel(), "mlp.up_proj": ColwiseParallel(), "mlp.down_proj": RowwiseParallel()}
    for layer in model.model.layers:
        parallelize_module(layer, mesh, halves)
    parallelize_module(model.model.embed_tokens, mesh, RowwiseParallel(input_layouts=Replicate()))
    parallelize_module(model.lm_head, mesh, ColwiseParallel(output_layouts=Replicate()))


class FlatOnCPU(FSDPStrategy):
    """On a CPU, where Lightning refuses exactly FSDPStrategy, and PyTorch wants to be told the device."""

    def _setup_model(self, model):
        wrapped = FullyShardedDataParallel(model, device_id=torch.device("cpu"), **self.kwargs)
        _setup_activation_checkpointing(wrapped, self._activation_checkpointing_kwargs)
        return wrapped


class ZeroOnCPU(DeepSpeedStrategy):
    """On a CPU, which DeepSpeed can use (DS_ACCELERATOR=cpu), and Lightning refuses."""

    def __init__(self):
        super().__init__(stage=3, process_group_backend="gloo")

    def setup_environment(self):
        super(DeepSpeedStrategy, self).setup_environment()

    def setup_distributed(self):
        self.set_world_ranks()
        self._init_deepspeed_distributed()

    def _setup_model_and_optimizer(self, model, optimizer, lr_scheduler=None):
        import deepspeed

        self.config["zero_optimization"]["stage3_param_persistence_threshold"] = 0  # small ones in parts too
        place = argparse.Namespace(device_rank=0)
        return deepspeed.initialize(
            args=place, config=self.config, model=model, optimizer=optimizer, dist_init_required=False
        )[:2]


STRATEGIES = {
    "plain": lambda: "auto",
    "fsdp": lambda: ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1),
    "tp": lambda: ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=2),
    "flat": lambda: FlatOnCPU(
        auto_wrap_policy={LlamaDecoderLayer}, activation_checkpointing_policy={LlamaDecoderLayer}
    ),
    "zero": ZeroOnCPU,
    "flat-only": lambda: FlatOnCPU(use_orig_params=False),
    "flat-gpu": lambda: FSDPStrategy(auto_wrap_policy={LlamaDecoderLayer}),
}


class Watching(GPTQCallback):
    """Keeps what the module was like when it had its last calibration data, and what was mapped in training."""

    seen: dict
    mapped_in_training = False

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.mapped_in_training |= ".unsharded/" in Path("/proc/self/maps").read_text()

    def calibration_data(self, trainer):
        module = trainer.lightning_module
        self.seen = {
            "kinds": sorted({type(p.data).__name__ for p in module.parameters()}),
            "classes": sorted({type(m).__name__ for m in module.modules()}),
            "mapped": all(in_file(p) for p in module.parameters()),
            "copied": copied_bytes(),
            "folders": len(list(self.export_dir.parent.glob(".*.unsharded"))),
        }
        return super().calibration_data(trainer)


def in_file(tensor):
    for line in Path("/proc/self/maps").read_text().splitlines():
        start, end = (int(part, 16) for part in line.split()[0].split("-"))
        if start <= tensor.data_ptr() < end:
            return ".unsharded/" in line
    return False


def copied_bytes():
    """Of the mapped files, what this process has in memory of its own."""
    smaps = Path("/proc/self/smaps").read_text()
    found = re.findall(r"\.unsharded/.*?^Private_Dirty: +(\d+) kB", smaps, re.MULTILINE | re.DOTALL)
    return sum(map(int, found)) * 1024


def run(name, strategy, module, data, out, **options):
    """One fit; what is to be known of it, from each rank, in a file."""
    validate, accelerator = options.pop("validate", True), options.pop("accelerator", "cpu")
    callback = Watching(QuantizeModule(**SMALL | options.pop("config", {})), out / name / "export", **options)
    trainer = pl.Trainer(max_epochs=1, accelerator=accelerator, devices=1 if strategy == "plain" else 2, logger=False,
        strategy=STRATEGIES[strategy](), enable_progress_bar=False, enable_checkpointing=False,
        enable_model_summary=False, callbacks=[callback], default_root_dir=out / name)  # fmt: skip
    error = ""
    try:
        trainer.fit(module, data(), data() if validate else None)
    except Exception as caught:
        error = f"{type(caught).__name__}: {caught}"
    if torch.distributed.is_initialized():
        torch.distributed.barrier()  # what rank 0 removes last is gone
    loss = None
    if type(module) is Model and callback.report and "flat" not in strategy and accelerator == "cpu":
        with torch.no_grad():  # collective, where the strategy shards
            loss = float(module.model(**next(iter(tokens()))).loss)
    said = {
        "error": error,
        "steps": trainer.global_step,
        "seen": getattr(callback, "seen", None),
        "samples": callback.report.samples if callback.report else None,
        "metrics": callback.report.metrics if callback.report else None,
        "quantized": [m.name for m in callback.report.quantized] if callback.report else [],
        "left": sum(isinstance(m, QuantLinear) for m in module.modules()),
        "kinds": sorted({type(p.data).__name__ for p in module.parameters()}),
        "folders": len(list((out / name).glob(".*"))),
        "mapped in training": callback.mapped_in_training,
        "loss": loss,
        "layers mapped": getattr(module, "layers_mapped", None),
    }
    (out / name).mkdir(exist_ok=True, parents=True)
    (out / name / f"rank{trainer.global_rank}.json").write_text(json.dumps(said))


class NaN(Model):
    """Its calibration breaks after training, on one rank."""

    def calibration_step(self, batch):
        broken = self.trainer.global_step > 0 and self.global_rank == 1
        return self.model(inputs_embeds=torch.full((len(batch["input_ids"]), 11, 64), float("nan") if broken else 1.0))


class Heads(nn.Module):
    """Attention whose number of heads is that of one rank, as tutorials of tensor parallelism have it."""

    def __init__(self, rest):
        super().__init__()
        self.heads, self.rest = 4, rest
        self.q, self.k, self.v, self.o = (nn.Linear(64, 64) for _ in range(4))

    def forward(self, x):
        q, k, v = (
            layer(x).unflatten(-1, (self.heads, self.rest)).transpose(1, 2) for layer in (self.q, self.k, self.v)
        )
        return self.o(nn.functional.scaled_dot_product_attention(8 * q, 8 * k, v).transpose(1, 2).flatten(2))


class LocalHeads(Plain):
    def __init__(self, rest):
        pl.LightningModule.__init__(self)
        torch.manual_seed(0)
        self.model = Heads(rest)

    def configure_model(self):
        columns = {name: ColwiseParallel() for name in "qkv"}
        parallelize_module(self.model, self.device_mesh["tensor_parallel"], {**columns, "o": RowwiseParallel()})
        self.model.heads //= 2


class FlatOnly(Model):
    """Under FSDPStrategy(use_orig_params=False) only the flat parameters are any."""

    def configure_optimizers(self):
        return torch.optim.SGD(self.trainer.model.parameters(), lr=0.0)


def transformers_parallel(model, mesh):
    styles = {"gate_proj": "colwise", "up_proj": "colwise", "down_proj": "rowwise", "lm_head": "colwise_gather_output",
              "embed_tokens": "embedding_rowwise"}  # fmt: skip
    plan = {}
    for name, _ in model.named_modules():
        if name.rpartition(".")[2] in styles:
            plan[name] = plan[f"{name}.weight"] = styles[name.rpartition(".")[2]]
    apply_tensor_parallelism(model, mesh["tensor_parallel"], plan)


@contextlib.contextmanager
def small_files_on_rank_0():
    """As on a disk that is full."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if os.environ["RANK"] == "0":
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


class Memory(pl.Callback):
    """Has the module whole and reads every weight; measures what this process then has in memory of its own."""

    def on_fit_start(self, trainer, pl_module):
        before = own_memory()
        with whole(trainer, pl_module, Path(trainer.default_root_dir) / "export"):
            read = float(sum(parameter.sum() for parameter in pl_module.parameters()))
            self.said = {"size": sum(p.nbytes for p in pl_module.parameters()), "grown": own_memory() - before}
        assert read != 0


def own_memory():
    return 1024 * int(re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


def memory(out):
    (out / "memory").mkdir(exist_ok=True)
    module, callback = Plain(fsdp), Memory()
    module.model = nn.Sequential(*(nn.Linear(1024, 1024) for _ in range(32)))
    trainer = pl.Trainer(accelerator="cpu", devices=2, strategy=STRATEGIES["fsdp"](), logger=False, max_steps=0,
        enable_checkpointing=False, enable_progress_bar=False, callbacks=[callback],
        default_root_dir=out / "memory")  # fmt: skip
    trainer.fit(module, pairs())
    (out / "memory" / f"rank{trainer.global_rank}.json").write_text(json.dumps(callback.said))


def two_nodes(out):
    """Two ranks that call themselves nodes; the second sees nothing of the first one's disk."""
    rank = int(os.environ["RANK"])
    tensors = [("a", torch.arange(5.0)), ("b", torch.ones(3, 7, dtype=torch.bfloat16).T)]
    with pytest.MonkeyPatch.context() as patch:
        seen = Path.is_dir
        patch.setattr(Path, "is_dir", lambda path: seen(path) and path.parent.name != str(1 - rank))
        with consolidated(tensors, out / "nodes" / str(rank) / "export", node=rank, local_rank=0) as files:
            same = all(torch.equal(files.tensors[name], tensor) for name, tensor in tensors)
            folders = len(os.listdir(out / "nodes" / str(rank)))
    said = {"same": same, "folders": folders, "left": len(os.listdir(out / "nodes" / str(rank)))}
    (out / "nodes" / f"rank{rank}.json").write_text(json.dumps(said))


def hasty(out):
    """Rank 0, which writes the files, leaves the block before rank 1 has done more than enter it."""
    rank, folder = int(os.environ["RANK"]), out / "hasty"
    with pytest.MonkeyPatch.context() as patch, distributed.ending_together():  # as around every hook
        map_files = consolidating._map
        patch.setattr(consolidating, "_map", lambda path: (time.sleep(rank), map_files(path))[1])
        with consolidated([("a", torch.arange(5.0))], folder / "export", node=0, local_rank=rank) as files:
            mapped = files.tensors["a"]
            time.sleep(rank)
            found = mapped.tolist()
    (folder / f"rank{rank}.json").write_text(json.dumps(found))


def sequences():
    g = torch.Generator().manual_seed(0)
    return DataLoader([(torch.randn(9, 64, generator=g), torch.randn(9, 64, generator=g)) for _ in range(20)])


def zero(out):
    torch.set_num_threads(1)
    run("zero", "zero", Model(), tokens, out)


def gpus(out):
    for name, plan in (("fsdp", fsdp), ("tp", tensor_parallel), ("flat-gpu", None)):
        run(name, name, Model(plan), tokens, out, accelerator="gpu")


def main(out):
    torch.set_num_threads(1)
    run("fsdp", "fsdp", Model(fsdp), tokens, out)
    run("tp", "tp", Model(tensor_parallel), tokens, out)
    run("plain-fsdp", "fsdp", Plain(fsdp), pairs, out, config={"nsamples": 149})
    run("plain-tp", "tp", Plain(tensor_parallel), pairs, out, config={"nsamples": 149})
    run("flat", "flat", Model(), tokens, out)
    run("nan", "fsdp", NaN(fsdp), tokens, out, validate=False)
    both_ways = {"loss": 1e-9, "gain": 1e-9}  # one of them rises
    never = {"max_degradation": both_ways, "on_fail": "escalate", "max_bits": 6.0}
    run("never-good", "fsdp", Model(fsdp), tokens, out, **never)
    run("tied-fsdp", "fsdp", Model(mixed, tie_word_embeddings=True), tokens, out)
    run("tied-tp", "tp", Model(tensor_parallel, tie_word_embeddings=True), tokens, out)
    with small_files_on_rank_0():
        run("full", "fsdp", Model(fsdp), tokens, out)
    run("flat-only", "flat-only", FlatOnly(), tokens, out)
    run("transformers", "tp", Model(transformers_parallel), tokens, out)
    run("heads-fail", "tp", LocalHeads(16), sequences, out)
    run("heads-differ", "tp", LocalHeads(-1), sequences, out)
    memory(out)
    two_nodes(out)
    hasty(out)
