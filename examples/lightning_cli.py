"""Fine-tunes with LightningCLI, and quantizes by its configuration alone.

python examples/lightning_cli.py fit --config examples/lightning_cli.yaml
"""

from __future__ import annotations

from pathlib import Path

import lightning
import torch
from lightning.pytorch.cli import LightningCLI
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

from gptq_plugin.apps.data import builtin
from gptq_plugin.apps.documents import builtin_documents, texts
from gptq_plugin.apps.tokenizer import train_tokenizer

VOCABULARY, TOKENIZER = 512, Path("tokenizer")


class FineTune(lightning.LightningModule):
    def __init__(self, layers: int = 2, learning_rate: float = 3e-3):
        super().__init__()
        self.learning_rate = learning_rate
        self.model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=VOCABULARY, hidden_size=128, intermediate_size=256, num_hidden_layers=layers,
                num_attention_heads=4, bos_token_id=0, eos_token_id=1,
            )
        )  # fmt: skip

    def training_step(self, batch: dict[str, torch.Tensor], index: int) -> torch.Tensor:
        return self.model(input_ids=batch["input_ids"], labels=batch["input_ids"]).loss

    def validation_step(self, batch: dict[str, torch.Tensor], index: int) -> None:
        self.log("val_loss", self.training_step(batch, index))

    test_step = validation_step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.learning_rate)


class Manual(lightning.LightningDataModule):
    """Python's own manual."""

    def __init__(self, batch_size: int = 16):
        super().__init__()
        self.data = builtin(seq_len=64, batch_size=batch_size)

    def setup(self, stage: str) -> None:
        from transformers import AutoTokenizer

        self.data.encode(AutoTokenizer.from_pretrained(TOKENIZER))

    def train_dataloader(self) -> DataLoader:
        return self.data.train_dataloader()

    def val_dataloader(self) -> DataLoader:
        return self.data.val_dataloader()

    test_dataloader = val_dataloader


if __name__ == "__main__":
    if not TOKENIZER.exists():  # yours comes with the model that you fine-tune
        train_tokenizer(texts(builtin_documents()), vocab_size=VOCABULARY).save_pretrained(TOKENIZER)
    LightningCLI(FineTune, Manual, save_config_kwargs={"overwrite": True})
