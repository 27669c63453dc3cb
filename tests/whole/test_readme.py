"""What the README shows, run as it stands there."""

from __future__ import annotations

import re
import subprocess
import sys
import textwrap

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader
from transformers import AutoConfig, AutoModelForCausalLM, TrainingArguments
from transformers import Trainer as HFTrainer

from gptq_plugin import QuantLinear, load_quantized

from paths import REPOSITORY


def snippets() -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", (REPOSITORY / "README.md").read_text(), flags=re.M | re.S)


def llama():
    return AutoModelForCausalLM.from_config(
        AutoConfig.for_model("llama", hidden_size=128, intermediate_size=256, num_hidden_layers=1,
                             num_attention_heads=2, num_key_value_heads=2, vocab_size=128)
    )  # fmt: skip


class FineTune(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.model = llama()

    def training_step(self, batch, batch_idx):
        return self.model(**batch).loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


class Data(pl.LightningDataModule):
    def train_dataloader(self):
        return DataLoader([{"input_ids": row, "labels": row} for row in torch.randint(0, 128, (32, 16))], batch_size=8)


class Characters:
    """A tokenizer, as far as the snippets need one."""

    def __call__(self, text):
        return {"input_ids": [ord(c) % 128 for c in text * 20]}

    def save_pretrained(self, directory):
        (directory / "tokenizer.json").write_text("{}")


def test_the_python_snippets_run(tmp_path, monkeypatch):
    training, plain, loading, hf, streamed = snippets()
    monkeypatch.chdir(tmp_path)
    names = {"tokenizer": Characters(), "lightning_module": FineTune(), "datamodule": Data()}
    short = training.replace("Trainer(", 'Trainer(max_epochs=1, accelerator="cpu", logger=False, ', 1)
    exec(compile(short, "README.md", "exec"), names)
    assert names["model"].generate(torch.arange(4)[None], max_new_tokens=2).shape == (1, 6)
    assert sum(isinstance(m, QuantLinear) for m in names["lightning_module"].modules()) == 7

    second = {"quantizer": names["quantizer"], "model": llama(), "tokenizer": Characters()}
    exec(compile(plain.replace('"out"', '"out2"'), "README.md", "exec"), second)
    assert (tmp_path / "out2" / "model.safetensors").exists()
    assert len(second["report"].quantized) == 7

    third = {"load_quantized": load_quantized}
    exec(compile(loading, "README.md", "exec"), third)
    assert sum(isinstance(m, QuantLinear) for m in third["model"].modules()) == 7

    rows = [{"input_ids": row, "labels": row} for row in torch.randint(0, 128, (32, 16))]
    arguments = TrainingArguments("run", use_cpu=True, max_steps=1, report_to=[], save_strategy="no")
    trained = {"quantizer": names["quantizer"], "Trainer": HFTrainer, "args": arguments, "dataset": rows}
    exec(compile(hf, "README.md", "exec"), {**trained, "model": llama()})
    assert (tmp_path / "hf-out" / "model.safetensors").exists()

    llama().save_pretrained("float")
    texts = ["some text", "more text"]
    last = {"quantizer": names["quantizer"], "path": "float", "tokenizer": Characters(), "batches": texts}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    exec(compile(streamed.replace('"out"', '"out3"').replace('"cuda"', repr(device)), "README.md", "exec"), last)
    assert (tmp_path / "out3" / "model.safetensors").exists() and last["model"].device.type == "cpu"


@pytest.mark.slow
def test_a_hydra_application_of_ones_own_finds_the_groups_through_its_search_path(tmp_path):
    (tmp_path / "config.yaml").write_text(
        textwrap.dedent("""
        hydra:
          searchpath: [pkg://gptq_plugin.conf]
        defaults:
          - quantizer: w3g128
          - callbacks: gptq
          - _self_
        """)
    )
    (tmp_path / "app.py").write_text(
        textwrap.dedent("""
        import hydra
        from hydra.utils import instantiate

        @hydra.main(version_base="1.3", config_path=".", config_name="config")
        def main(cfg):
            callback = instantiate(cfg.callbacks.gptq, _convert_="all")
            print(type(callback).__name__, callback.quantizer.config.bits, callback.export_dir.name)

        main()
        """)
    )
    done = subprocess.run(
        [sys.executable, "app.py", "callbacks.gptq.export_dir=mine"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.stdout.split() == ["GPTQCallback", "3", "mine"], done.stderr
