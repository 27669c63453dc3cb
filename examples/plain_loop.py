"""Trains in a plain torch loop, quantizes on the training batches, and exports.

python examples/plain_loop.py [OUT]
"""

from __future__ import annotations

import sys
from itertools import islice

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from gptq_plugin import QuantizeModule, load_quantized
from gptq_plugin.apps.data import builtin
from gptq_plugin.apps.documents import texts
from gptq_plugin.apps.tokenizer import train_tokenizer


def loss_on(model: torch.nn.Module, rows: torch.Tensor) -> float:
    """Mean negative log-likelihood; rows: int64 [rows, positions]."""
    model.eval()
    with torch.no_grad():
        return float(model(input_ids=rows, labels=rows).loss)


def main(out: str) -> None:
    torch.manual_seed(0)
    data = builtin(seq_len=64, batch_size=16)  # Python's own manual
    tokenizer = train_tokenizer(texts(data.documents), vocab_size=512)
    data.encode(tokenizer)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=512, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
            bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        )
    )  # fmt: skip
    quantizer = QuantizeModule(bits=4, group_size=128, nsamples=128)
    quantizer.check(model)  # raises before training if nothing can be quantized
    quantizer.rehearse(model, [next(iter(data.train_dataloader()))], whole=False)

    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    model.train()
    for step, batch in zip(range(40), data.train_dataloader(), strict=False):
        loss = model(input_ids=batch["input_ids"], labels=batch["input_ids"]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 10 == 0:
            print(f"step {step}: loss {loss.item():.3f}")
    optimizer.zero_grad(set_to_none=True)
    del optimizer  # frees memory for quantization

    held_out = data.validation[:32]
    print(f"float: loss {loss_on(model, held_out):.4f} on held-out text")
    report = quantizer.quantize(model, islice(data.train_dataloader(), 8))  # 128 rows
    print(report.table())
    quantizer.export(model, out, tokenizer=tokenizer)

    reloaded = load_quantized(out)
    print(f"4 bits, reloaded from {out}: loss {loss_on(reloaded, held_out):.4f}")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "out")
