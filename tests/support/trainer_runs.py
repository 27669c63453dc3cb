"""A small model, its data, and runs of transformers.Trainer on them."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.utils.data import Dataset, IterableDataset, SubsetRandomSampler
from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainingArguments

from gptq_plugin import QuantLinear

SMALL = {"group_size": 32, "nsamples": 17, "batch_size": 4}


def llama():
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(
        AutoConfig.for_model("llama", hidden_size=64, intermediate_size=96, num_hidden_layers=1,
                             num_attention_heads=2, num_key_value_heads=1, vocab_size=64, attention_dropout=0.1)
    )  # fmt: skip


class Rows(Dataset):
    """24 samples of 16 tokens; remembers which were read."""

    def __init__(self, noisy=False):
        self.ids = torch.randint(0, 64, (24, 16), generator=torch.Generator().manual_seed(0))
        self.noisy = noisy
        self.read = []

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, index):
        self.read.append(index)
        row = self.ids[index]
        if self.noisy:  # draws of the global random numbers, as masking and augmentation do
            row = torch.where(torch.rand(16) < 0.1, torch.zeros(16, dtype=torch.long), row)
        return {"input_ids": row, "labels": row}


def train(model, callbacks, tmp_path, data=None, kind=Trainer, trainer_options=None, **options):
    values = {"use_cpu": True, "max_steps": 3, "per_device_train_batch_size": 8, "report_to": [], "disable_tqdm": True,
              "save_strategy": "no", "learning_rate": 1e-3}  # fmt: skip
    trainer = kind(
        model,
        TrainingArguments(str(tmp_path / "run"), **{**values, **options}),
        train_dataset=Rows() if data is None else data,
        callbacks=callbacks,
        **(trainer_options or {}),
    )
    trainer.train()
    return trainer


def quantized(module):
    return [name for name, layer in module.named_modules() if isinstance(layer, QuantLinear)]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


class Tokenizer:
    def __call__(self, text):
        return {"input_ids": [ord(c) % 64 for c in text]}

    def save_pretrained(self, directory):
        (Path(directory) / "tokenizer.json").write_text("{}")


class Some(Trainer):
    """Draws 5 of the samples only."""

    def _get_train_sampler(self, train_dataset=None):
        return SubsetRandomSampler([3, 5, 8, 11, 17])


class Stream(IterableDataset):
    def __iter__(self):
        return (Rows()[index] for index in range(24))


class Untrained(Trainer):
    """Fails the test if a training step runs."""

    def training_step(self, *args, **kwargs):
        raise AssertionError("training began")
