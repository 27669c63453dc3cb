"""A Hydra application of the user's own that takes the groups `quantizer` and `callbacks` from this package."""

from __future__ import annotations

import subprocess
import textwrap
from pathlib import Path

import pytest

from gptq_plugin import QuantLinear, load_quantized

from forked_python import python

CONFIG = """
hydra:
  searchpath: [pkg://gptq_plugin.conf]
  run:
    dir: run
  sweep:
    dir: sweep
    subdir: ${hydra.job.num}
defaults:
  - quantizer: w4g128
  - callbacks: gptq
  - model: tiny
  - _self_

epochs: 1
"""

# A group of the user's own, beside the ones that are searched for.
MODEL = """
hidden_size: 128
vocab_size: 64
"""

APP = """
import hydra, lightning.pytorch as pl, torch
from hydra.utils import instantiate
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

class FineTune(pl.LightningModule):
    def __init__(self, sizes):
        super().__init__()
        self.model = LlamaForCausalLM(LlamaConfig(
            **sizes, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2))

    def training_step(self, batch, batch_idx):
        return self.model(**batch).loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)

@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(cfg):
    torch.manual_seed(0)
    rows = torch.randint(0, cfg.model.vocab_size, (32, 16))
    callbacks = [instantiate(callback, _convert_="all") for callback in cfg.callbacks.values()]
    trainer = pl.Trainer(max_epochs=cfg.epochs, accelerator="cpu", logger=False, enable_checkpointing=False,
                         enable_progress_bar=False, enable_model_summary=False, callbacks=callbacks)
    trainer.fit(FineTune(cfg.model), DataLoader([{"input_ids": row, "labels": row} for row in rows], batch_size=8))

main()
"""


@pytest.fixture
def app(tmp_path):
    """Runs the application with overrides, from a folder of its own."""
    (tmp_path / "conf" / "model").mkdir(parents=True)
    (tmp_path / "conf" / "config.yaml").write_text(textwrap.dedent(CONFIG))
    (tmp_path / "conf" / "model" / "tiny.yaml").write_text(MODEL)
    (tmp_path / "app.py").write_text(APP)

    def run(*overrides: str) -> subprocess.CompletedProcess[str]:
        command = [python(), "app.py", *overrides]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)

    return run


def bits(folder: Path) -> set[int]:
    layers = [m for m in load_quantized(folder).modules() if isinstance(m, QuantLinear)]
    assert len(layers) == 7
    return {layer.bits for layer in layers}


@pytest.mark.slow
def test_its_training_ends_with_an_export_into_its_run_folder(app, tmp_path):
    done = app("quantizer.nsamples=24", "quantizer.group_size=64")
    assert done.returncode == 0, done.stderr
    assert bits(tmp_path / "run" / "gptq") == {4}


@pytest.mark.slow
def test_a_sweep_over_the_quantizers_exports_each_run_beside_the_others(app, tmp_path):
    done = app("-m", "quantizer=w3g128,w8g128")
    assert done.returncode == 0, done.stderr
    assert [bits(tmp_path / "sweep" / job / "gptq") for job in ("0", "1")] == [{3}, {8}]
