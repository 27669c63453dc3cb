"""Optuna and joblib drive sweeps of gptq-quantize. Run where their plugins are installed."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import yaml

from forked_python import python
from models import tiny_llama


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A model's folder with a tokenizer, and a text."""
    from gptq_plugin.apps.documents import builtin_documents, texts
    from gptq_plugin.apps.tokenizer import train_tokenizer

    folder = tmp_path_factory.mktemp("source")
    tiny_llama(vocab_size=300).save_pretrained(folder / "model")
    train_tokenizer(texts(builtin_documents()), vocab_size=300).save_pretrained(folder / "model")
    return folder / "model"


def sweep(source, tmp_path, *options, by=None):
    options = [
        "-m", f"model.name_or_path={source}",
        "data.seq_len=32", "data.train_rows=16", "data.eval_rows=4", "quantizer.group_size=16", "quantizer.nsamples=8",
        "device=cpu", f"hydra.sweep.dir={tmp_path}/sweep", *options,
    ]  # fmt: skip
    code = "from gptq_plugin.apps.cli import quantize; quantize()"
    done = subprocess.run([by or python(), "-c", code, *options], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    runs = [json.loads(file.read_text()) for file in sorted((tmp_path / "sweep").glob("*/summary.json"))]
    return runs, tmp_path / "sweep"


@pytest.mark.slow
def test_optuna_minimizes_the_loss_and_with_a_list_also_the_bytes(source, tmp_path):
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    optuna = ["hydra/sweeper=optuna", "hydra.sweeper.n_jobs=1", "hydra/sweeper/sampler=random",
              "hydra.sweeper.n_trials=2", "hydra.sweeper.sampler.seed=1", "quantizer.bits=choice(2,8)"]  # fmt: skip
    runs, folder = sweep(source, tmp_path / "one", *optuna)
    results = yaml.safe_load((folder / "optimization_results.yaml").read_text())
    assert results["best_value"] == min(run["nll"]["gptq"] for run in runs) and len(runs) == 2
    both = ["hydra.sweeper.direction=[minimize,minimize]", "hydra.sweeper.n_trials=1"]
    runs, folder = sweep(source, tmp_path / "two", *optuna, *both)
    results = yaml.safe_load((folder / "optimization_results.yaml").read_text())
    (run,) = runs
    assert [tuple(one["values"]) for one in results["solutions"]] == [(run["nll"]["gptq"], run["gptq_bytes"])]


@pytest.mark.slow
def test_joblib_runs_a_sweep_side_by_side(source, tmp_path):
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    runs, _ = sweep(source, tmp_path, "hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "quantizer.bits=2,8",
                    by=sys.executable)  # joblib starts its workers with options of Python  # fmt: skip
    assert [run["bits"] for run in runs] == [2, 8] and runs[0]["gptq_bytes"] < runs[1]["gptq_bytes"]
