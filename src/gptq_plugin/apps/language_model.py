"""The model to fine-tune: a LightningModule around a Hugging Face causal language model.

Two functions, one for each config of the group `model`, make the network.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from gptq_plugin.apps.paths import folder_or_id
from gptq_plugin.apps.tokenizer import train_tokenizer
from gptq_plugin.checkpoint.formats.registry import FORMATS
from gptq_plugin.export.disk_space import disk_errors_explained, refuse_full
from gptq_plugin.options import fields
from gptq_plugin.options.limited_files import check_sizes

# Sizes in multiples of 128 fit every group size and every kernel.
_ROUND = 128


class LanguageModel(LightningModule):
    """Next-token training with AdamW, a linear warm-up and a linear decay to a tenth.

    Args:
        network: A transformers causal language model.
        tokenizer: Its tokenizer, to be exported beside the weights.
        learning_rate: AdamW's peak learning rate.
        warmup_steps: Optimizer steps up to the peak.
        weight_decay: AdamW's weight decay, on matrices only.
    """

    def __init__(
        self,
        network: Any,
        tokenizer: Any,
        *,
        learning_rate: float = 1e-3,
        warmup_steps: int = 20,
        weight_decay: float = 0.01,
    ):
        super().__init__()
        self.network = network
        self.tokenizer = tokenizer
        self.learning_rate = learning_rate
        self.warmup_steps = warmup_steps
        self.weight_decay = weight_decay

    def forward(self, input_ids: Tensor, **options: Any) -> Any:
        """input_ids: int64 [batch, positions]; returns what the network returns."""
        return self.network(input_ids=input_ids, **options)

    def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
        loss = self._loss(batch)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: dict[str, Tensor], index: int) -> None:
        self.log("val_loss", self._loss(batch), prog_bar=True, sync_dist=True, batch_size=len(batch["input_ids"]))

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        matrices = [p for p in self.parameters() if p.requires_grad and p.dim() > 1]
        others = [p for p in self.parameters() if p.requires_grad and p.dim() <= 1]
        optimizer: Optimizer = AdamW(
            [
                {"params": matrices, "weight_decay": self.weight_decay},
                {"params": others, "weight_decay": 0.0},
            ],
            lr=self.learning_rate,
            betas=(0.9, 0.95),
        )
        schedule = LambdaLR(optimizer, self._share_of_peak)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _loss(self, batch: dict[str, Tensor]) -> Tensor:
        loss: Tensor = self.network(input_ids=batch["input_ids"], labels=batch["input_ids"]).loss
        return loss

    def _share_of_peak(self, step: int) -> float:
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        total = max(self.trainer.estimated_stepping_batches, self.warmup_steps + 1)
        done = min(1.0, (step - self.warmup_steps) / (total - self.warmup_steps))
        return 1.0 - 0.9 * done


class SaveFloat(Callback):
    """Saves the trained float model as a Hugging Face folder before quantization, which may fail.

    Args:
        directory: Folder to write; None saves nothing.

    Attributes:
        seconds: Time it took; 0 before.
    """

    def __init__(self, directory: Path | None):
        self.directory = directory
        self.seconds = 0.0

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuses, before training, a disk that has no room for it.

        Raises:
            ExportError: It tells the bytes.
        """
        if self.directory is not None and trainer.is_global_zero:
            refuse_full(self.directory, _bytes_of(pl_module), "the fine-tuned float model (save_float)")

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Saves it.

        Raises:
            ExportError: It cannot be written.
        """
        if self.directory is None or not trainer.is_global_zero:
            return
        started = time.perf_counter()
        assert isinstance(pl_module, LanguageModel)
        with disk_errors_explained(self.directory, lambda: _bytes_of(pl_module)):
            pl_module.network.save_pretrained(self.directory)
            pl_module.tokenizer.save_pretrained(self.directory)
        self.seconds = time.perf_counter() - started


def _bytes_of(module: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in module.parameters())


def small_llama(
    texts: Iterable[str],
    *,
    vocab_size: int = 1024,
    hidden_size: int = 128,
    intermediate_size: int = 384,
    num_hidden_layers: int = 3,
    num_attention_heads: int = 4,
    num_key_value_heads: int = 4,
    max_position_embeddings: int = 2048,
    **training: Any,
) -> LanguageModel:
    """Makes a small Llama with random weights, and trains a tokenizer on `texts`.

    Args:
        texts: The training documents.
        vocab_size: Tokens of the tokenizer at most; the embedding is rounded up to a multiple of 128.
        hidden_size: Width of the residual stream.
        intermediate_size: Width inside the MLP.
        num_hidden_layers: Blocks.
        num_attention_heads: Query heads; must divide hidden_size.
        num_key_value_heads: Key and value heads; must divide num_attention_heads.
        max_position_embeddings: Longest sequence, in tokens.
        **training: LanguageModel's learning_rate, warmup_steps, weight_decay.
    """
    tokenizer = train_tokenizer(texts, vocab_size)
    config = LlamaConfig(
        vocab_size=-(-len(tokenizer) // _ROUND) * _ROUND,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=num_attention_heads,
        num_key_value_heads=num_key_value_heads,
        max_position_embeddings=max_position_embeddings,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LanguageModel(LlamaForCausalLM(config), tokenizer, **training)


def pretrained(
    texts: Iterable[str],
    *,
    name_or_path: str | None,
    dtype: str = "float32",
    weights: bool = True,
    trust_remote_code: bool = False,
    **training: Any,
) -> LanguageModel:
    """Loads a transformers causal language model with its tokenizer.

    Args:
        texts: Not used.
        name_or_path: A local folder or a hub id.
        dtype: Dtype of the weights in memory: ``float32``, ``bfloat16``, ``float16``, or ``auto`` (as on disk).
        weights: Load the weights; False leaves them random.
        trust_remote_code: Run code from the model's repository.
        **training: LanguageModel's learning_rate, warmup_steps, weight_decay.

    Raises:
        ValueError: `name_or_path` is missing, a file, or holds a quantized model, or `dtype` is unknown.
        OSError: transformers finds no model there.
    """
    if name_or_path is None:
        raise ValueError("model=hf needs model.name_or_path=PATH_OR_HUB_ID: a folder with config.json, or a hub id")
    fields.PATH.check("model.name_or_path", name_or_path)
    if dtype != "auto" and not isinstance(getattr(torch, str(dtype), None), torch.dtype):
        raise ValueError(f"model.dtype={dtype!r} is not a dtype: choose float32, bfloat16, float16 or auto")
    name_or_path = folder_or_id(name_or_path)
    if Path(name_or_path).is_file():
        raise ValueError(
            f"model.name_or_path={name_or_path} is a file: give the folder or hub id of the model that was fine-tuned, "
            "and gptq-quantize takes the weights of a Lightning checkpoint from ckpt=FILE"
        )
    check_sizes(name_or_path)
    try:
        config = AutoConfig.from_pretrained(name_or_path, trust_remote_code=trust_remote_code)
    except OSError as error:
        if Path(name_or_path).exists():
            raise
        raise OSError(f"model.name_or_path={name_or_path} is no folder here, nor found on the hub: {error}") from error
    _refuse_quantized(name_or_path, config)
    tokenizer = AutoTokenizer.from_pretrained(name_or_path, trust_remote_code=trust_remote_code)
    if weights:
        network = AutoModelForCausalLM.from_pretrained(name_or_path, dtype=dtype, trust_remote_code=trust_remote_code)
    else:
        chosen = config.dtype or torch.float32 if dtype == "auto" else getattr(torch, dtype)
        network = AutoModelForCausalLM.from_config(config, dtype=chosen, trust_remote_code=trust_remote_code)
    return LanguageModel(network, tokenizer, **training)


def _refuse_quantized(name_or_path: str, config: Any) -> None:
    """Refuses our formats, for which transformers would ask for other packages first."""
    stated = getattr(config, "quantization_config", None) or {}
    method = stated.get("quant_method") if isinstance(stated, dict) else getattr(stated, "quant_method", None)
    if method in {known.quant_method for known in FORMATS.values()}:
        raise ValueError(
            f"{name_or_path} is quantized already (quant_method {method}): give the float model it was made from. "
            "`gptq-plugin check` tells what it is"
        )
