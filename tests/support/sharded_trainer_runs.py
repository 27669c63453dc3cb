"""The runs of tests/hf/test_sharded.py: every rank calls `main`, with a folder and how accelerate is to
shard."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from torch.distributed.fsdp import FullyShardedDataParallel
from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainingArguments

from gptq_plugin import GPTQTrainerCallback, QuantizeModule, QuantLinear, distributed
from gptq_plugin.training.unsharded import unwrapped

from trainer_runs import SMALL, Rows

FSDP = {
    "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
    "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"],
    "state_dict_type": "FULL_STATE_DICT",
}
# accelerate takes the device of what it then distributes from CUDA.
ON_CPUS = {} if torch.cuda.is_available() else {"sync_module_states": False, "cpu_ram_efficient_loading": False}
RUNNING: list[Trainer] = []
KINDS = {
    "ddp": {},
    "fsdp1": {"fsdp": True, "fsdp_config": {**FSDP, **ON_CPUS, "version": 1, "activation_checkpointing": True}},
    "fsdp2": {"fsdp": True, "fsdp_config": {**FSDP, "version": 2}},
    "zero3": {
        "deepspeed": {
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_accumulation_steps": "auto",
            "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        }
    },
}


def llama(**options):
    """A vocabulary that no even number of ranks divides."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2,
             "num_key_value_heads": 1, "vocab_size": 67}  # fmt: skip
    return AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **{**sizes, **options}))


class Watching(GPTQTrainerCallback):
    """Keeps what the model was like when it had its last calibration data."""

    seen: dict
    trained: torch.nn.Module

    def calibration_data(self, train_dataloader):
        self.seen = {
            "classes": sorted({type(m).__name__ for m in self.trained.modules()}),
            "kinds": sorted({type(p.data).__name__ for p in self.trained.parameters()}),
            "mapped": ".unsharded/" in Path("/proc/self/maps").read_text(),
        }
        return super().calibration_data(train_dataloader)

    def on_train_begin(self, args, state, control, **training):
        self.trained = unwrapped(training["model"])
        super().on_train_begin(args, state, control, **training)


def run(kind, out, name="", *, evaluates=True, arguments=None, **options):
    """One training whose weights stay what they were; what is to be known of it, from each rank, in a file."""
    folder = out / (name or kind)
    values = {"max_steps": 2, "per_device_train_batch_size": 4, "per_device_eval_batch_size": 4, "report_to": [],
              "disable_tqdm": True, "save_strategy": "no", "optim": "sgd", "learning_rate": 0.0,
              "use_cpu": not torch.cuda.is_available()}  # fmt: skip
    model = llama()  # before the arguments, with which transformers would build it in parts for ZeRO-3
    made = TrainingArguments(str(folder / "run"), **values, **KINDS[kind], **(arguments or {}))
    if kind != "ddp":
        take_cpus_for_gpus()
    trainer = Trainer(model, made, train_dataset=Rows(), eval_dataset=Rows())
    RUNNING.append(trainer)
    options = {"export_dir": folder / "export", "validate": trainer.evaluate if evaluates else None, **options}
    callback = Watching(QuantizeModule(**SMALL), **options)
    trainer.add_callback(callback)
    error = ""
    try:
        trainer.train()
    except Exception as caught:
        error = f"{type(caught).__name__}: {caught}"
    if torch.distributed.is_initialized():
        torch.distributed.barrier()  # what rank 0 removes last is gone
    told = {
        "kind": trainer.accelerator.distributed_type.value,
        "error": error,
        "steps": trainer.state.global_step,
        "seen": getattr(callback, "seen", None),
        "samples": callback.report.samples if callback.report else None,
        "metrics": callback.report.metrics if callback.report else None,
        "left": sum(isinstance(m, QuantLinear) for m in trainer.model.modules()),
        "kinds": sorted({type(p.data).__name__ for p in trainer.model.parameters()}),
        "folders": len(list(folder.glob(".*"))),
    }
    if not error:
        told["loss"] = trainer.evaluate()["eval_loss"]  # collective, where accelerate shards
        if kind == "fsdp2":  # PyTorch's FSDP 1 crashes at its own state dict on a CPU
            trainer.save_model(str(folder / "saved"))
    folder.mkdir(exist_ok=True, parents=True)
    (folder / f"rank{distributed.rank()}.json").write_text(json.dumps(told))


def take_cpus_for_gpus():
    """On CPUs accelerate takes DDP in the place of FSDP: here it takes CPUs for GPUs, and then shards."""
    if torch.cuda.is_available():
        return
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    if FullyShardedDataParallel.__init__ is ORIGINAL_INIT:
        FullyShardedDataParallel.__init__ = lambda self, module, **options: ORIGINAL_INIT(
            self,
            module,
            **{**options, "device_id": torch.device("cpu")},  # accelerate's has a number
        )


ORIGINAL_INIT = FullyShardedDataParallel.__init__


def nan_on_rank_1(model, batch):
    """A forward that breaks after training, on one rank."""
    if distributed.rank() == 1 and RUNNING[-1].state.global_step:
        return model(inputs_embeds=torch.full((len(batch["input_ids"]), 16, 64), float("nan")))
    return model(**batch)


def both_ways():
    """Metrics of which one rises."""
    loss = RUNNING[-1].evaluate()["eval_loss"]
    return {"loss": loss, "gain": -loss}


def main(out, kind):
    torch.set_num_threads(1)
    run(kind, out)
    if kind == "fsdp2":
        evaluated = {"bf16": True, "eval_strategy": "steps", "eval_steps": 2}
        run(kind, out, "bf16-val", calibration="val", arguments=evaluated)
        run(kind, out, "nan", evaluates=False, forward=nan_on_rank_1)
        never = {"max_degradation": {"loss": 1e-9, "gain": 1e-9}, "on_fail": "escalate", "max_bits": 5.0}
        run(kind, out, "never-good", validate=both_ways, **never)
        run(kind, out, "swap", evaluates=False, swap=True)


def alone(out):
    torch.set_num_threads(1)
    run("ddp", out, "alone")
