"""GPTQCallback in a trainer of the older import root, `pytorch_lightning`, whose classes are others."""

from __future__ import annotations

import subprocess
import sys

import lightning.pytorch as newer
import pytest
import pytorch_lightning as older  # comes with lightning
import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import AutoConfig, AutoModelForCausalLM

from gptq_plugin import GPTQCallback, QuantizeModule, QuantLinear, load_quantized
from gptq_plugin.errors import CalibrationError
from gptq_plugin.lightning.roots import in_any_root, overrides

from forked_python import python

SMALL = {"group_size": 32, "nsamples": 16, "batch_size": 4}


class Base(older.LightningModule):
    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


class Holds(Base):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.model = AutoModelForCausalLM.from_config(
            AutoConfig.for_model("llama", hidden_size=64, intermediate_size=96, num_hidden_layers=1,
                                 num_attention_heads=2, num_key_value_heads=1, vocab_size=64)
        )  # fmt: skip

    def training_step(self, batch, batch_idx):
        loss = self.model(**batch).loss
        self.log("loss", loss)
        return loss

    test_step = training_step


class NoForward(Base):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(64, 32)

    def training_step(self, batch, batch_idx):
        raise AssertionError("training began")


def loader():
    ids = torch.randint(0, 64, (24, 16), generator=torch.Generator().manual_seed(0))
    return DataLoader([{"input_ids": row, "labels": row} for row in ids], batch_size=8)


def trainer(callback, tmp_path, root=older, **options):
    values = {"max_epochs": 1, "accelerator": "cpu", "devices": 1, "logger": False, "enable_checkpointing": False,
              "enable_model_summary": False, "default_root_dir": tmp_path}  # fmt: skip
    return root.Trainer(**{**values, **options}, callbacks=[callback])


@pytest.mark.parametrize("swap", [True, False])
def test_its_trainer_fits_quantizes_exports_and_tests(swap, tmp_path):
    module = Holds()
    callback = GPTQCallback(QuantizeModule(**SMALL), tmp_path / "out", swap=swap)
    fitted = trainer(callback, tmp_path)
    fitted.fit(module, loader())
    assert callback.report.samples == 16 and callback.report.tokens == 16 * 16
    assert sum(isinstance(layer, QuantLinear) for layer in module.modules()) == (7 if swap else 0)
    assert load_quantized(tmp_path / "out").generate(torch.arange(4)[None], max_new_tokens=2).shape == (1, 6)
    assert fitted.test(module, loader(), verbose=False)[0]["loss"] > 0


def test_a_module_without_a_forward_is_told_what_to_add(tmp_path):
    batches = DataLoader([(torch.randn(64), torch.randn(32)) for _ in range(8)], batch_size=4)
    with pytest.raises(CalibrationError, match=r"NoForward has no forward: give it a method calibration_step"):
        trainer(GPTQCallback(QuantizeModule(**SMALL)), tmp_path).fit(NoForward(), batches)


@pytest.mark.slow
def test_the_older_root_is_not_imported_by_the_callback():
    code = "import sys; from gptq_plugin import GPTQCallback; sys.exit('pytorch_lightning' in sys.modules)"
    assert subprocess.run([python(), "-c", code]).returncode == 0  # whose process has imported the callback


def test_a_class_is_found_in_every_root_that_was_imported():
    assert in_any_root("LightningModule") == (newer.LightningModule, older.LightningModule)
    strategies = (newer.strategies.FSDPStrategy, older.strategies.FSDPStrategy)
    assert in_any_root("strategies.FSDPStrategy") == strategies and strategies[0] is not strategies[1]


def test_a_root_that_was_not_imported_is_left_alone(monkeypatch):
    monkeypatch.delitem(sys.modules, "pytorch_lightning")
    assert in_any_root("LightningModule") == (newer.LightningModule,)
    assert "pytorch_lightning" not in sys.modules


@pytest.mark.parametrize("root", [older, newer], ids=["older", "newer"])
def test_a_hook_counts_as_overridden_only_in_a_lightning_module_that_defines_it(root):
    class Module(root.LightningModule):
        def validation_step(self, batch, batch_idx):
            pass

    assert overrides(Module(), "validation_step") and not overrides(Module(), "forward")
    assert not overrides(root.LightningModule(), "validation_step")
    assert not overrides(nn.Linear(2, 2), "forward")  # which has one, and is no LightningModule
