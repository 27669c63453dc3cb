"""The configurations for lightning-hydra-template drop into an app of its layout."""

from __future__ import annotations

import json
import shutil
import subprocess

import pytest
import yaml

from forked_python import python
from paths import EXAMPLES, REPOSITORY

CONFIGS = EXAMPLES / "lightning-hydra-template" / "configs"

TRAIN = """# @package _global_
defaults:
  - _self_
  - callbacks: default
  - paths: default
  - hparams_search: null
optimized_metric: null
hydra:
  run: {dir: logs/run}
  sweep: {dir: logs/sweep, subdir: "${hydra.job.num}"}
"""

APP = """
import sys
import hydra, torch
import lightning.pytorch as pl
from hydra.utils import instantiate
sys.path.insert(0, SUPPORT)
from lightning_runs import Holds, token_loader


class Module(Holds):
    def validation_step(self, batch, index):
        self.log("val/loss", self.model(**batch).loss)


@hydra.main(version_base="1.3", config_path="configs", config_name="train")
def main(cfg):  # as src/train.py of the template
    torch.manual_seed(0)
    callbacks = [instantiate(one) for one in cfg.callbacks.values() if "_target_" in one]
    trainer = pl.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, callbacks=callbacks, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=cfg.paths.output_dir,
    )
    trainer.fit(Module(), token_loader(), token_loader())
    metrics = dict(trainer.callback_metrics)
    if cfg.get("optimized_metric"):
        return metrics[cfg.optimized_metric].item()


main()
"""


@pytest.fixture
def app(tmp_path):
    """An app of the template's layout, with the two files in their places."""
    configs = tmp_path / "configs"
    for folder in ("callbacks", "hparams_search"):
        shutil.copytree(CONFIGS / folder, configs / folder)
    folder = "${paths.output_dir}/checkpoints"
    checkpoint = {"_target_": "lightning.pytorch.callbacks.ModelCheckpoint", "dirpath": folder, "monitor": "val/loss"}
    (configs / "callbacks" / "default.yaml").write_text(yaml.safe_dump({"model_checkpoint": checkpoint}))
    (configs / "paths").mkdir()
    (configs / "paths" / "default.yaml").write_text("output_dir: ${hydra:runtime.output_dir}\n")
    (configs / "train.yaml").write_text(TRAIN)
    (tmp_path / "train.py").write_text(f"SUPPORT = {str(REPOSITORY / 'tests' / 'support')!r}\n{APP}")
    return tmp_path


SMALL = ["callbacks=[default,gptq]", "callbacks.gptq.quantizer.group_size=32", "+callbacks.gptq.quantizer.nsamples=16"]


def run(app, *options):
    command = [python(), "train.py", *options]
    done = subprocess.run(command, cwd=app, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
def test_the_callback_drops_in_and_exports_into_the_runs_folder(app):
    run(app, *SMALL)
    report = json.loads((app / "logs" / "run" / "gptq" / "quantization_report.json").read_text())
    assert report["metrics"]["val/loss"] and report["totals"]["modules"] == 7


@pytest.mark.slow
def test_the_search_optimizes_the_quantized_models_metric(app):
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    search = ["hparams_search=gptq_optuna", "hydra.sweeper.n_trials=2", "hydra.sweeper.sampler.n_startup_trials=1"]
    run(app, "-m", SMALL[0], SMALL[2], *search)
    best = yaml.safe_load((app / "logs" / "sweep" / "optimization_results.yaml").read_text())
    reports = [json.loads(f.read_text()) for f in (app / "logs" / "sweep").glob("*/gptq/quantization_report.json")]
    found = [report["metrics"]["val/loss"]["gptq"] for report in reports]
    assert len(found) == 2 and best["best_value"] == pytest.approx(min(found), abs=1e-5)
    assert set(best["best_params"]) == {"callbacks.gptq.quantizer.bits", "callbacks.gptq.quantizer.group_size"}
