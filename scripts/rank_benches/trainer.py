"""`trainer`: GPTQTrainerCallback on several ranks, each way to share a model, against one rank.

A Llama with random float32 weights is trained for two steps that change none of them, evaluated, quantized and
exported: on one rank, and by every kind asked for, with exact sums in each, as several ranks have them by default. A
line of each tells the losses before and after, and the least share of a layer's words that are those of the one rank's
export. Exits with 1 where a rank failed, ranks tell different things, or the float model's loss, tensors that are not
quantized or more than 3 % of a layer's words are not as on one rank.

On CPUs there is DDP alone: accelerate takes it in the place of the others there. ZeRO-3 needs DeepSpeed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import LlamaForCausalLM, PrinterCallback, Trainer, TrainingArguments

from gptq_plugin import GPTQTrainerCallback, QuantizeModule, QuantLinear
from rank_benches.llamas import add_sizes, begin, llama_config, run, samples

from ports import reserved_port

FSDP = {
    "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
    "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"],
    "state_dict_type": "FULL_STATE_DICT",
}
KINDS: dict[str, dict[str, Any]] = {
    "ddp": {},
    "fsdp1": {"fsdp": True, "fsdp_config": {**FSDP, "version": 1}},
    "fsdp2": {"fsdp": True, "fsdp_config": {**FSDP, "version": 2}},
    "zero3": {
        "deepspeed": {
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_accumulation_steps": "auto",
            "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        }
    },
}
ALONE = "one rank"
LEAST = 0.97  # share of words: another order of addition may flip a near tie


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=["ddp"])
    add_sizes(parser, width=256, layers=2, vocab=67)
    parser.set_defaults(samples=24, tokens=16, batch_size=4)


def main(options: argparse.Namespace) -> None:
    if not torch.cuda.is_available() and options.kinds != ["ddp"]:
        raise SystemExit("on CPUs accelerate takes DDP in the place of other kinds: give --kinds ddp")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with reserved_port() as port:
            run(work, 1, ALONE, 1, folder, port, options)
        print(line(folder, ALONE), flush=True)
        failed = []
        for kind in options.kinds:
            begun = time.perf_counter()
            try:
                with reserved_port() as port:
                    run(work, options.ranks, kind, options.ranks, folder, port, options)
                print(f"{line(folder, kind)}; {time.perf_counter() - begun:.0f} s with the start", flush=True)
            except (SystemExit, ValueError) as error:
                print(f"{kind}: {error}", flush=True)
                failed.append(kind)
    if failed:
        raise SystemExit(f"not as on one rank: {', '.join(failed)}")


def work(rank: int, _: Path, kind: str, ranks: int, folder: Path, port: int, options: argparse.Namespace) -> None:
    """One training on one rank, as torchrun would start it; what it ends with goes into a file."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "LOCAL_RANK": str(rank),
                   "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}  # fmt: skip
    if kind == "zero3":
        os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    begin(rank)
    torch.manual_seed(0)
    model = LlamaForCausalLM(llama_config(options))  # before the arguments, with which ZeRO-3 would build it in parts
    rows = [{"input_ids": row, "labels": row} for row in samples(options, options.samples)]
    place = folder / kind
    arguments = TrainingArguments(
        str(place / "run"), max_steps=2, per_device_train_batch_size=options.batch_size,
        per_device_eval_batch_size=options.batch_size, report_to=[], disable_tqdm=True, save_strategy="no", optim="sgd",
        learning_rate=0.0, use_cpu=not torch.cuda.is_available(), **KINDS.get(kind, {}),
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=rows, eval_dataset=rows)  # type: ignore[arg-type]
    trainer.remove_callback(PrinterCallback)
    quantizer = QuantizeModule(
        group_size=32,
        nsamples=options.samples,
        batch_size=options.batch_size,
        exact_sums=True,
    )
    callback = GPTQTrainerCallback(quantizer, place / "export", validate=trainer.evaluate)
    trainer.add_callback(callback)
    trainer.train()
    assert callback.report is not None
    told = {
        "by": f"{trainer.accelerator.distributed_type.value} over {backend()} on {device()}",
        "loss": callback.report.metrics["eval_loss"],
        "codes": codes(trainer.model),
    }
    (place / f"{rank}.json").write_text(json.dumps(told))
    if torch.distributed.is_initialized():
        torch.distributed.barrier()  # before the first to end takes the others' store along
        torch.distributed.destroy_process_group()


def backend() -> str:
    return torch.distributed.get_backend() if torch.distributed.is_initialized() else "nothing"


def device() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "the CPU"


def codes(model: nn.Module) -> str:
    """SHA-256 of all codes of the layers that are quantized, its first 12 digits; "" without such layers."""
    layers = [layer for _, layer in sorted(model.named_modules()) if isinstance(layer, QuantLinear)]
    found = hashlib.sha256()
    for layer in layers:
        found.update(layer.qweight.cpu().numpy().tobytes())
    return found.hexdigest()[:12] if layers else ""


def line(folder: Path, kind: str) -> str:
    """What the ranks of a kind told, and how its export compares; raises ValueError where it must not differ."""
    told = [json.loads(file.read_text()) for file in sorted((folder / kind).glob("*.json"))]
    if any(one != told[0] for one in told):
        raise ValueError(f"ranks differ: {told}")
    before, after = told[0]["loss"]["float"], told[0]["loss"]["gptq"]
    text = f"{kind}: {told[0]['by']}: loss {before:.7f}, quantized {after:.7f}"
    if kind == ALONE:
        return text
    whole = json.loads((folder / ALONE / "0.json").read_text())["loss"]["float"]
    if not math.isclose(before, whole, rel_tol=1e-5):
        raise ValueError(f"the float model's loss is {before}, on one rank {whole}")
    return f"{text}; {compared(*(load_file(folder / name / 'export' / 'model.safetensors') for name in (kind, ALONE)))}"


def compared(ours: dict[str, Tensor], whole: dict[str, Tensor]) -> str:
    """How an export's tensors compare to those of one rank; raises ValueError where they must not differ."""
    if ours.keys() != whole.keys():
        raise ValueError(f"tensors of other names: {sorted(ours.keys() ^ whole.keys())}")
    solved = (".qweight", ".scales", ".qzeros")
    others = [key for key in whole if not key.endswith(solved) and not torch.equal(ours[key], whole[key])]
    if others:
        raise ValueError(f"tensors that are not quantized differ: {others}")
    shares = {key: float((ours[key] == whole[key]).float().mean()) for key in whole if key.endswith(".qweight")}
    least = min(shares, key=lambda key: shares[key])
    if shares[least] < LEAST:
        raise ValueError(f"only {shares[least]:.4f} of the words of {least} are those of one rank")
    return f"least share of a layer's words that are one rank's: {shares[least]:.4f} ({len(shares)} layers)"
