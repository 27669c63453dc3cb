"""QLoRA on bitsandbytes itself, on a CPU: refused with a remedy, and the remedy.

Run where bitsandbytes is installed. It is not in the pinned set, since PEFT would import it in every process; stand-ins
for its layers are in test_trainer_adapters.py.
"""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from gptq_plugin import GPTQTrainerCallback, QuantizeModule, load_quantized, merged_copy
from gptq_plugin.errors import TargetError

from models import tiny_llama
from trainer_runs import SMALL, Untrained, llama, train

peft = pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")

IDS = torch.arange(12)[None]


def based_on(folder, **options):
    """LoRA on the folder's model as bitsandbytes loads it."""
    config = BitsAndBytesConfig(**options)
    base = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, device_map="cpu", dtype="bfloat16")
    lora = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    return peft.get_peft_model(peft.prepare_model_for_kbit_training(base), lora)


@pytest.mark.parametrize(
    "options", [{"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, {"load_in_8bit": True}], ids=str
)
def test_it_is_refused_before_training_and_told_how_to_go_on(options, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    llama().save_pretrained("base")
    message = r"q_proj.* sit on a Linear(4bit|8bitLt).*Load the base model in bfloat16"
    with pytest.raises(TargetError, match=message):
        train(
            based_on("base", **options), [GPTQTrainerCallback(QuantizeModule(**SMALL), "out")], tmp_path, kind=Untrained
        )
    with pytest.raises(TargetError, match=message):
        merged_copy(based_on("base", **options))
    plain = based_on("base", **options).unload()
    with pytest.raises(TargetError, match=r"quantized already, by another tool: Linear(4bit|8bitLt)"):
        QuantizeModule(**SMALL).quantize(plain, [IDS])
    assert not (tmp_path / "out").exists()


def test_adapters_trained_on_it_are_merged_into_the_base_that_they_name(tmp_path):
    from gptq_plugin.apps.documents import builtin_documents, texts
    from gptq_plugin.apps.tokenizer import train_tokenizer

    base = tmp_path / "base"
    tiny_llama(vocab_size=300).save_pretrained(base)
    train_tokenizer(texts(builtin_documents()), vocab_size=300).save_pretrained(base)
    trained = based_on(base, load_in_4bit=True)
    trained.save_pretrained(tmp_path / "adapter")
    named = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"]
    options = [
        f"model.name_or_path={named}", f"adapter={tmp_path / 'adapter'}", f"export_dir={tmp_path / 'out'}",
        "data.seq_len=16", "data.train_rows=16", "data.eval_rows=4", "quantizer.bits=8", "quantizer.group_size=16",
        "quantizer.nsamples=8", "device=cpu", f"hydra.run.dir={tmp_path}/run",
    ]  # fmt: skip
    code = "from gptq_plugin.apps.cli import quantize; quantize()"
    done = subprocess.run([sys.executable, "-c", code, *options], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    whole = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter").eval()
    with torch.no_grad():
        wanted, without = whole(IDS).logits, AutoModelForCausalLM.from_pretrained(base)(IDS).logits
        found = load_quantized(tmp_path / "out")(IDS).logits
    assert (found - wanted).abs().mean() < 0.1 * (without - wanted).abs().mean()
