"""Fine-tunes with transformers.Trainer and GPTQTrainerCallback. Needs accelerate: pip install 'gptq-plugin[trainer]'.

python examples/hf_trainer.py [OUT]                                        # one process
python -m torch.distributed.run --nproc-per-node 2 examples/hf_trainer.py  # two
"""

from __future__ import annotations

import sys
import tempfile

import torch
from transformers import (
    DataCollatorForLanguageModeling,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
)

from gptq_plugin import GPTQTrainerCallback, QuantizeModule, load_quantized
from gptq_plugin.apps.data import builtin
from gptq_plugin.apps.documents import texts
from gptq_plugin.apps.tokenizer import train_tokenizer


def main(out: str) -> None:
    torch.manual_seed(0)
    data = builtin(seq_len=64)  # Python's own manual
    tokenizer = train_tokenizer(texts(data.documents), vocab_size=512)
    data.encode(tokenizer)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=512, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
            bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        )
    )  # fmt: skip

    quantizer = QuantizeModule(bits=4, group_size=128, nsamples=128)
    with tempfile.TemporaryDirectory() as checkpoints:
        trainer = Trainer(
            model,
            TrainingArguments(
                checkpoints, use_cpu=True, max_steps=40, per_device_train_batch_size=16, learning_rate=3e-3,
                save_steps=40, logging_steps=10, report_to=[],
            ),
            train_dataset=[{"input_ids": row} for row in data.train],
            eval_dataset=[{"input_ids": row} for row in data.validation[:32]],
            data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
            processing_class=tokenizer,  # saved with the export
            callbacks=[GPTQTrainerCallback(quantizer, export_dir=out)],
        )  # fmt: skip
        trainer.train()  # trains, then calibrates on 128 training samples, quantizes, exports
        print(f"4 bits, in the trainer: {trainer.evaluate()}")

    if trainer.is_world_process_zero():
        held_out = data.validation[:32]
        with torch.no_grad():
            loss = load_quantized(out)(input_ids=held_out, labels=held_out).loss
        print(f"4 bits, reloaded from {out}: loss {loss.item():.4f} on held-out text")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "out")
