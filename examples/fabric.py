"""Trains with Lightning Fabric, quantizes on the training batches, and exports; on several ranks too.

python examples/fabric.py [OUT] [DEVICES]
"""

from __future__ import annotations

import sys

import torch
from lightning.fabric import Fabric
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

from gptq_plugin import QuantizeModule, load_quantized
from gptq_plugin.apps.data import builtin
from gptq_plugin.apps.documents import texts
from gptq_plugin.apps.tokenizer import train_tokenizer


def main(out: str, devices: int) -> None:
    fabric = Fabric(accelerator="cpu", devices=devices, strategy="ddp" if devices > 1 else "auto")
    fabric.launch()
    fabric.seed_everything(0)
    data = builtin(seq_len=64, batch_size=16)  # Python's own manual
    tokenizer = train_tokenizer(texts(data.documents), vocab_size=512)
    data.encode(tokenizer)
    network = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=512, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
            bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        )
    )  # fmt: skip
    quantizer = QuantizeModule(bits=4, group_size=128, nsamples=128)
    quantizer.check(network)  # raises before training if nothing can be quantized

    model, optimizer = fabric.setup(network, torch.optim.AdamW(network.parameters(), lr=3e-3))
    loader = fabric.setup_dataloaders(data.train_dataloader())
    model.train()
    for step, batch in zip(range(40), loader, strict=False):
        loss = model(input_ids=batch["input_ids"], labels=batch["input_ids"]).loss
        optimizer.zero_grad()
        fabric.backward(loss)
        optimizer.step()
        if step % 10 == 0:
            fabric.print(f"step {step}: loss {loss.item():.3f}")
    optimizer.zero_grad(set_to_none=True)

    # The network itself, not Fabric's wrapper. Each rank uses its own rows; Hessians are summed over the ranks, so that
    # all ranks get the same codes.
    mine = data.calibration(quantizer.config.nsamples)[fabric.global_rank :: fabric.world_size]
    with fabric.autocast():
        report = quantizer.quantize(network, DataLoader(mine, batch_size=8))
    fabric.print(report.table())
    if fabric.is_global_zero:
        quantizer.export(network, out, tokenizer=tokenizer)
        held_out = data.validation[:32]
        with torch.no_grad():
            loss = load_quantized(out)(input_ids=held_out, labels=held_out).loss
        print(f"4 bits, reloaded from {out}: loss {loss.item():.4f} on held-out text")
    fabric.barrier()


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "out", int(sys.argv[2]) if len(sys.argv) > 2 else 1)
