"""TRL's trainers with the callback: what they train on is what calibrates. Run where TRL is installed."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM

from gptq_plugin import GPTQTrainerCallback, QuantizeModule, load_quantized
from gptq_plugin.apps.tokenizer import train_tokenizer
from gptq_plugin.hf.completions import Completions

from trainer_runs import SMALL, quantized

trl = pytest.importorskip("trl")

TEXTS = [f"def f{number}(x): return x + {number}" for number in range(24)]
QUICK = {"use_cpu": True, "bf16": False, "max_steps": 2, "report_to": [], "disable_tqdm": True, "save_strategy": "no"}


@pytest.fixture(scope="module")
def tokenizer():
    made = train_tokenizer(TEXTS * 20, vocab_size=300)
    made.pad_token = made.eos_token
    return made


def llama(tokenizer):
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=1, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
        )
    )  # fmt: skip


def finished(trainer, callback, tmp_path):
    trainer.train()
    assert len(quantized(trainer.model)) == 7 and load_quantized(tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").exists()
    return callback.report


def test_sft_calibrates_on_its_tokens_and_is_judged_by_its_own_evaluation(tokenizer, tmp_path):
    data = Dataset.from_dict({"text": TEXTS})
    args = trl.SFTConfig(str(tmp_path / "run"), per_device_train_batch_size=8, **QUICK)
    trainer = trl.SFTTrainer(llama(tokenizer), args, train_dataset=data, eval_dataset=data, processing_class=tokenizer)
    callback = GPTQTrainerCallback(
        QuantizeModule(**SMALL), tmp_path / "out", validate=trainer.evaluate, max_degradation={"eval_loss": 1.0}
    )
    trainer.add_callback(callback)
    report = finished(trainer, callback, tmp_path)
    assert report.samples == SMALL["nsamples"]
    assert report.metrics["eval_loss"]["gptq"] == pytest.approx(trainer.evaluate()["eval_loss"], abs=1e-5)


def test_dpo_calibrates_on_chosen_and_rejected_answers(tokenizer, tmp_path):
    data = Dataset.from_dict({"prompt": TEXTS, "chosen": [" # good"] * 24, "rejected": [" # bad, and longer"] * 24})
    args = trl.DPOConfig(str(tmp_path / "run"), per_device_train_batch_size=4, **QUICK)
    trainer = trl.DPOTrainer(
        llama(tokenizer), llama(tokenizer), args=args, train_dataset=data, eval_dataset=data, processing_class=tokenizer
    )
    callback = GPTQTrainerCallback(
        QuantizeModule(**SMALL), tmp_path / "out", validate=trainer.evaluate, max_degradation={"eval_loss": 1.0}
    )
    trainer.add_callback(callback)
    report = finished(trainer, callback, tmp_path)
    assert report.samples >= SMALL["nsamples"] and "eval_rewards/accuracies" in report.metrics


class OnCompletions(GPTQTrainerCallback):
    """As the page about the Trainer has it."""

    def calibration_data(self, train_dataloader):
        return list(self.completions)


def length(completions, **_):
    return [float(len(set(completion))) for completion in completions]


def test_grpo_calibrates_on_its_own_completions(tokenizer, tmp_path):
    completions = Completions(tokenizer, keep=6)
    args = trl.GRPOConfig(
        str(tmp_path / "run"), per_device_train_batch_size=4, num_generations=4, max_completion_length=12, **QUICK
    )
    trainer = trl.GRPOTrainer(
        llama(tokenizer),
        [length, completions],
        args=args,
        train_dataset=Dataset.from_dict({"prompt": TEXTS}),
        processing_class=tokenizer,
    )
    quantizer = QuantizeModule(**{**SMALL, "nsamples": 6})
    callback = OnCompletions(quantizer, tmp_path / "out")
    callback.completions = completions
    trainer.add_callback(callback)
    report = finished(trainer, callback, tmp_path)
    assert len(completions.kept) == 6 == report.samples  # of 8 that were generated
    assert all(prompt in TEXTS and isinstance(completion, str) for prompt, completion in completions.kept)
    assert report.tokens == sum(len(tokenizer(prompt + said)["input_ids"]) for prompt, said in completions.kept)


def test_completions_of_chats_go_through_the_template(tokenizer):
    completions = Completions(tokenizer, keep=2)
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    try:
        question, answer = {"role": "user", "content": "f"}, {"role": "assistant", "content": "x"}
        assert completions([[question]] * 3, [[answer]] * 3) == [None] * 3
        (row, _) = list(completions)
        assert tokenizer.decode(row, skip_special_tokens=True) == "user: f\nassistant: x\n"
    finally:
        tokenizer.chat_template = None
    with pytest.raises(ValueError, match="keep must be"):
        Completions(tokenizer, keep=0)
