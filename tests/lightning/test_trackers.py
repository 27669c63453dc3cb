"""Trackers get totals as metrics, the layers as a table and the export as an artifact; each with its own library,
offline."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, MLFlowLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.loggers.logger import Logger

from gptq_plugin import GPTQCallback, QuantizeModule, load_quantized

from lightning_runs import SMALL, Holds, fit, token_loader

LAYER = "model.layers.0.self_attn.q_proj"
EXPORT = {"README.md", "config.json", "generation_config.json", "model.safetensors", "quantization_report.json",
          "quantize_config.json", "report.html"}  # fmt: skip


def run(tmp_path, logger, **options):
    callback = GPTQCallback(QuantizeModule(**SMALL), tmp_path / "out", **options)
    fit(Holds(), token_loader(), [callback], tmp_path, val=token_loader(), logger=logger)
    return callback.report


def test_csv_files_get_totals_a_table_of_their_own_and_what_to_read(tmp_path):
    logger = CSVLogger(tmp_path, name="log")
    report = run(tmp_path, logger, log_artifacts=True)
    folder = tmp_path / "log" / "version_0"
    with open(folder / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    (row,) = [row for row in rows if row.get("gptq/loss")]
    assert float(row["gptq/modules"]) == 7 and float(row["gptq/train_loss/difference"])
    assert not [name for name in row if LAYER in name]
    with open(folder / "gptq" / "layers.csv") as file:
        layers = {row["name"]: row for row in csv.DictReader(file)}
    assert list(layers) == [module.name for module in report.modules]
    assert float(layers[LAYER]["loss"]) > 0 and layers[LAYER]["bits"] == "4" and layers["lm_head"]["bits"] == ""
    assert {path.name for path in (folder / "gptq").iterdir()} == {"layers.csv", "report.html", "quantize_config.json"}


def test_tensorboard_gets_the_table_as_text(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = TensorBoardLogger(tmp_path, name="log")
    report = run(tmp_path, logger, log_artifacts=True)
    events = EventAccumulator(logger.log_dir)
    events.Reload()
    assert events.Scalars("gptq/loss")[0].value == pytest.approx(report.totals()["loss"])
    assert not [tag for tag in events.Tags()["scalars"] if LAYER in tag]
    (text,) = events.Tensors("gptq/layers/text_summary")
    assert f"| {LAYER} | gptq | 4 | 32 |" in text.tensor_proto.string_val[0].decode()
    assert (tmp_path / "log" / "version_0" / "gptq" / "report.html").exists()


def test_wandb_gets_a_table_and_an_artifact_offline(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "data"))
    logger = WandbLogger(project="p", save_dir=tmp_path, offline=True)
    logged = []
    monkeypatch.setattr(type(logger.experiment), "log_artifact", lambda run, artifact: logged.append(artifact))
    report = run(tmp_path, logger, log_artifacts="tuned")
    summary = dict(logger.experiment.summary)
    wandb.finish()
    assert summary["gptq/loss"] == pytest.approx(report.totals()["loss"])
    assert summary["gptq/layers"]["_type"] == "table-file" and summary["gptq/layers"]["nrows"] == len(report.modules)
    (artifact,) = [one for one in logged if one.type == "model"]  # beside the table's own
    assert artifact.name.startswith("tuned") and {*artifact.manifest.entries} == EXPORT
    assert not [name for name in summary if LAYER in name]


@pytest.mark.parametrize("store", ["file", pytest.param("sqlite", marks=pytest.mark.slow)])
def test_mlflow_gets_a_table_artifacts_and_a_version_in_its_registry(store, tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    from mlflow import MlflowClient

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    where = f"file:{tmp_path}/runs" if store == "file" else f"sqlite:///{tmp_path}/runs.db"
    logger = MLFlowLogger(tracking_uri=where, artifact_location=f"file:{tmp_path}/artifacts")
    report = run(tmp_path, logger, log_artifacts="tuned")
    client = MlflowClient(where)
    kept = client.get_run(logger.run_id).data.metrics
    assert kept["gptq/loss"] == pytest.approx(report.totals()["loss"]) and not [name for name in kept if LAYER in name]
    files = {file.path.removeprefix("gptq/") for file in client.list_artifacts(logger.run_id, "gptq")}
    assert files == EXPORT | {"layers.json"}
    table = json.loads(Path(client.download_artifacts(logger.run_id, "gptq/layers.json")).read_text())
    assert [row[0] for row in table["data"]] == [module.name for module in report.modules]
    (version,) = client.search_model_versions("name = 'tuned'")
    assert version.run_id == logger.run_id and version.source.endswith("/gptq")
    folder = mlflow.artifacts.download_artifacts(f"models:/tuned/{version.version}", tracking_uri=where)
    assert load_quantized(folder).generate(torch.arange(4)[None], max_new_tokens=2).shape == (1, 6)


class Other(Logger):
    """A logger that takes metrics only."""

    name, version, experiment = "other", "0", None

    def __init__(self):
        super().__init__()
        self.metrics = {}

    def log_metrics(self, metrics, step=None):
        self.metrics |= metrics

    def log_hyperparams(self, *args, **kwargs):
        pass


def test_any_other_logger_gets_each_layers_numbers_and_what_it_cannot_take_is_told(tmp_path, caplog):
    logger = Other()
    report = run(tmp_path, logger, log_artifacts=True)
    assert logger.metrics["gptq/loss"] == report.totals()["loss"] and logger.metrics[f"gptq/{LAYER}/loss"] > 0
    assert "could not be logged to Other: this logger has no artifacts that are known here" in caplog.text


def test_a_tracker_that_fails_does_not_end_the_run(tmp_path, caplog, monkeypatch):
    logger = CSVLogger(tmp_path, name="log")
    monkeypatch.setattr("gptq_plugin.lightning.trackers._write_csv", lambda *_: 1 / 0)
    assert run(tmp_path, logger)
    assert "the table of layers could not be logged to CSVLogger: division by zero" in caplog.text


def test_a_tracker_that_is_gone_at_the_end_does_not_end_the_run(tmp_path, caplog):
    class Gone(Other):
        def log_metrics(self, metrics, step=None):
            if "gptq/loss" in metrics:
                raise ConnectionError("no route to the server")

    other = Other()
    assert run(tmp_path, [Gone(), other])
    assert "metrics could not be logged to Gone: no route to the server" in caplog.text
    assert other.metrics["gptq/loss"] > 0


@pytest.mark.parametrize("value", [1, None, ["a"]])
def test_what_names_no_artifact_is_refused(value):
    with pytest.raises(ValueError, match="log_artifacts must be true, false, or the artifact's name"):
        GPTQCallback(QuantizeModule(), log_artifacts=value)
