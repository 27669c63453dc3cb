"""Fine-tunes with lightning.Trainer and GPTQCallback.

python examples/lightning_callback.py [OUT]
"""

from __future__ import annotations

import sys

import lightning
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from gptq_plugin import GPTQCallback, QuantizeModule, load_quantized
from gptq_plugin.apps.data import builtin
from gptq_plugin.apps.documents import texts
from gptq_plugin.apps.tokenizer import train_tokenizer


class FineTune(lightning.LightningModule):
    def __init__(self, model: LlamaForCausalLM):
        super().__init__()
        self.model = model

    def training_step(self, batch: dict[str, torch.Tensor], index: int) -> torch.Tensor:
        return self.model(input_ids=batch["input_ids"], labels=batch["input_ids"]).loss

    def test_step(self, batch: dict[str, torch.Tensor], index: int) -> None:
        self.log("loss", self.training_step(batch, index))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


def main(out: str) -> None:
    lightning.seed_everything(0)
    data = builtin(seq_len=64, batch_size=16)  # Python's own manual
    tokenizer = train_tokenizer(texts(data.documents), vocab_size=512)
    data.encode(tokenizer)
    module = FineTune(
        LlamaForCausalLM(
            LlamaConfig(
                vocab_size=512, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
                bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
            )
        )
    )  # fmt: skip

    quantizer = QuantizeModule(bits=4, group_size=128, nsamples=128)
    callback = GPTQCallback(quantizer, export_dir=out, tokenizer=tokenizer)
    trainer = lightning.Trainer(
        max_steps=40, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, callbacks=[callback]
    )
    trainer.fit(module, data.train_dataloader())  # trains, then calibrates on 128 training samples, quantizes, exports
    assert callback.report is not None
    print(callback.report.table())
    trainer.test(module, data.val_dataloader())  # the quantized module

    held_out = data.validation[:32]
    with torch.no_grad():
        loss = load_quantized(out)(input_ids=held_out, labels=held_out).loss
    print(f"4 bits, reloaded from {out}: loss {loss.item():.4f} on held-out text")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "out")
