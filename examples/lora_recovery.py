"""Recovers with LoRA what 2 bits lost: adapters learn on quantized layers, whose codes stay.

python examples/lora_recovery.py [OUT]

A small model is trained and exported with 2 bits. Then PEFT puts adapters on the export, which are trained to predict
what the float model predicts, and saved beside it.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from itertools import islice

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.gptq import GPTQLoraLinear
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from gptq_plugin import QuantizeModule, QuantLinear, load_quantized
from gptq_plugin.apps.data import builtin
from gptq_plugin.apps.documents import texts
from gptq_plugin.apps.tokenizer import train_tokenizer


def loss_on(model: nn.Module, rows: Tensor) -> float:
    """Mean negative log-likelihood; rows: int64 [rows, positions]."""
    model.eval()
    with torch.no_grad():
        return float(model(input_ids=rows, labels=rows).loss)


def divergence(model: nn.Module, teacher: nn.Module, rows: Tensor) -> Tensor:
    """Mean KL(teacher || model) of the predicted tokens."""
    with torch.no_grad():
        theirs = teacher(input_ids=rows).logits.log_softmax(-1)
    ours = model(input_ids=rows).logits.log_softmax(-1)
    return nn.functional.kl_div(ours.flatten(0, 1), theirs.flatten(0, 1), reduction="batchmean", log_target=True)


def steps(parameters: list[nn.Parameter], losses: Iterator[Tensor], learning_rate: float) -> None:
    """A step of AdamW for each loss."""
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate)
    for number, loss in enumerate(losses):
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if number % 40 == 0:
            print(f"step {number}: loss {loss.item():.3f}")


def main(out: str) -> None:
    torch.manual_seed(0)
    data = builtin(seq_len=64, batch_size=16)  # Python's own manual
    tokenizer = train_tokenizer(texts(data.documents), vocab_size=512)
    data.encode(tokenizer)
    batches = [batch["input_ids"] for batch in islice(data.train_dataloader(), 80)]
    teacher = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=512, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
            bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        )
    )  # fmt: skip
    losses = (teacher(input_ids=rows, labels=rows).loss for rows in batches * 2)
    steps(list(teacher.parameters()), losses, 3e-3)

    model, quantizer = copy.deepcopy(teacher), QuantizeModule(bits=2, group_size=64, nsamples=128)
    quantizer.quantize(model, batches[:8])
    quantizer.export(model, out, tokenizer=tokenizer)

    # PEFT 0.21 does not know QuantLinear by itself: its layer for GPTQ goes on it.
    config = LoraConfig(r=8, lora_alpha=16, target_modules=r".*_proj")
    config._register_custom_module({QuantLinear: GPTQLoraLinear})
    tuned = get_peft_model(load_quantized(out), config)
    tuned.print_trainable_parameters()
    learned = [parameter for parameter in tuned.parameters() if parameter.requires_grad]
    steps(learned, (divergence(tuned, teacher, rows) for rows in batches), 2e-3)
    tuned.save_pretrained(f"{out}/adapter")

    held_out = data.validation[:64]
    reloaded = PeftModel.from_pretrained(load_quantized(out), f"{out}/adapter", config=config)
    for name, one in (("float", teacher), ("2 bits", load_quantized(out)), ("2 bits with adapters", reloaded)):
        with torch.no_grad():
            apart = float(divergence(one, teacher, held_out))
        print(f"{name}: loss {loss_on(one, held_out):.4f}, KL to the float model {apart:.4f} on held-out text")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "out")
