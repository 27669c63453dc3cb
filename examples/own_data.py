"""Compares calibration on a run's own data with generic text: a code model learns English with LoRA.

    python examples/own_data.py --model ../shared/models/pycode-29m --train ../shared/data/wikitext-2/test.txt \
        --valid ../shared/data/wikitext-2/valid.txt --generic ../shared/data/pycode/calib.jsonl --out runs/own_data

One `Trainer.fit` with four callbacks: 4 and 3 bits, each calibrated on training rows and on generic text (here the base
model's training data), drawn in the same way. Every export is the merged, quantized model; the adapters stay float. The
table shows how much of the training's gain in validation loss each export keeps. With `--finish scales blocks` the
training rows also finish the model: its scales, or its codes too, are trained towards the fine-tuned model.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from lightning import LightningModule, Trainer, seed_everything
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

from gptq_plugin import Finish, GPTQCallback, QuantizeConfig, QuantizeModule


class FineTune(LightningModule):
    def __init__(self, path: str, rank: int) -> None:
        super().__init__()
        base = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear")
        self.model = get_peft_model(base, config)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss: Tensor = self.model(**batch).loss
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.model(**batch).loss, prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=2e-3)


def rows(path: Path, tokenizer: object, length: int, most: int) -> list[dict[str, Tensor]]:
    """The first `most` rows of `length` tokens from a text file, or from JSON lines with a "text"."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".jsonl":
        text = "".join(json.loads(line)["text"] for line in text.splitlines()[: most * 2])
    ids = torch.tensor(tokenizer(text[: most * length * 8], verbose=False)["input_ids"])  # type: ignore[operator]
    cut = ids[: len(ids) // length * length].view(-1, length)[:most]
    return [{"input_ids": row, "labels": row} for row in cut]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "train", "valid", "generic", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=12, help="of 8 rows")
    parser.add_argument("--length", type=int, default=64, help="tokens a row")
    parser.add_argument("--samples", type=int, default=64, help="rows that calibrate, and at most that validate")
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3])
    parser.add_argument(
        "--finish", nargs="*", default=[], help="kinds of a finish on the training rows: scales, blocks"
    )
    parser.add_argument("--accelerator", default="cpu")
    parser.add_argument("--seed", type=int, default=0, help="of the training and of the choice of calibration rows")
    args = parser.parse_args()
    seed_everything(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    train = rows(args.train, tokenizer, args.length, 8 * args.steps)
    valid = rows(args.valid, tokenizer, args.length, args.samples)
    generic = DataLoader(rows(args.generic, tokenizer, args.length, len(train)), batch_size=8)
    held_out = len(train) // 8
    common = {"nsamples": len(train) - held_out, "held_out": held_out, "batch_size": 8, "tokens_per_step": 1024}
    tries = [("own", None, None), ("generic", generic, None)]
    tries += [(f"own, finish of {kind}", None, Finish(kind, **common)) for kind in args.finish]
    callbacks = {}
    for bits in args.bits:
        for source, data, finish in tries:
            config = QuantizeConfig(bits=bits, group_size=128, nsamples=args.samples, seed=args.seed)
            callbacks[bits, source] = GPTQCallback(
                QuantizeModule(config),
                args.out / f"{bits}-bits-{source}".replace(", ", "-").replace(" ", "-"),
                calibration=data,
                tokenizer=tokenizer,
                finish=finish,
            )
    module = FineTune(str(args.model), rank=16)
    trainer = Trainer(
        max_steps=args.steps,
        val_check_interval=max(1, args.steps // 3),
        callbacks=list(callbacks.values()),
        default_root_dir=args.out / "run",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator=args.accelerator,
        devices=1,
    )
    loaders = [DataLoader(data, batch_size=8, shuffle=data is train) for data in (train, valid)]
    (before,) = trainer.validate(module, loaders[1], verbose=False)
    trainer.fit(module, *loaders)
    metrics = {key: callback.report.metrics["val_loss"] for key, callback in callbacks.items()}
    learned = metrics[args.bits[0], "own"]["float"]
    print(f"validation loss before {before['val_loss']:.4f}, after {learned:.4f}")
    print("| bits | calibrated on | validation loss | above the fine-tuned model |\n|---|---|---|---|")
    for (bits, source), values in metrics.items():
        print(f"| {bits} | {source} | {values['gptq']:.4f} | {values['gptq'] - learned:+.4f} |")
    results = {f"{bits}-{source}": values for (bits, source), values in metrics.items()}
    (args.out / "results.json").write_text(json.dumps({"before": before["val_loss"], **results}, indent=2))


if __name__ == "__main__":
    main()
