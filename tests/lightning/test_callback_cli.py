"""The callback from the YAML of a LightningCLI: every option that YAML can give."""

from __future__ import annotations

import sys

import lightning.pytorch as pl
import pytest
import yaml
from lightning.pytorch.cli import LightningCLI

from gptq_plugin import GPTQCallback
from gptq_plugin.clients.client import Client
from gptq_plugin.training.quality_gate import Limit

from lightning_runs import Plain, pair_loader


class Data(pl.LightningDataModule):
    def train_dataloader(self):
        return pair_loader()

    val_dataloader = train_dataloader


@pytest.fixture
def make(tmp_path, monkeypatch):
    """make(**options): the callback that LightningCLI makes from these options in a file."""

    def callback(**options) -> GPTQCallback:
        quantizer = {"class_path": "gptq_plugin.QuantizeModule", "init_args": {"config": {"bits": 4, "group_size": 32}}}
        arguments = {"quantizer": quantizer, "export_dir": str(tmp_path / "out"), **options}
        trainer = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False,
                   "callbacks": [{"class_path": "gptq_plugin.GPTQCallback", "init_args": arguments}]}  # fmt: skip
        file = tmp_path / "gptq.yaml"
        file.write_text(yaml.safe_dump({"trainer": trainer}))
        monkeypatch.setattr(sys, "argv", ["train.py"])
        cli = LightningCLI(Plain, Data, run=False, save_config_callback=None, args=["--config", str(file)])
        (made,) = [one for one in cli.trainer.callbacks if isinstance(one, GPTQCallback)]
        return made

    return callback


@pytest.mark.parametrize(
    ("given", "taken"),
    [("val", "val"), ("train", "train"), (None, "train"), ([[1, 2], [3]], [[1, 2], [3]]), (["a", "b"], ["a", "b"])],
)
def test_calibration_is_taken_by_name_or_as_data(given, taken, make):
    assert make(calibration=given).data.calibration == taken


@pytest.mark.parametrize(
    ("options", "read", "wanted"),
    [
        ({"weights": "best"}, lambda made: made.weights, "best"),
        ({"mix": ["a", "b"]}, lambda made: made.data.mix, ["a", "b"]),
        ({"swap": False}, lambda made: made.swap, False),
        ({"module": "net"}, lambda made: made.module, "net"),
        ({"target": "vllm"}, lambda made: made.target, Client("vllm")),
        ({"target": {"client": "vllm", "tensor_parallel_size": 2}}, lambda made: made.target, Client("vllm", 2)),
        (
            {"max_degradation": {"val_loss": "2%", "val_acc": -0.01}},
            lambda made: made.gate.limits,
            {"val_loss": Limit(0.02, True), "val_acc": Limit(-0.01, False)},
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_the_other_options_are_taken(options, read, wanted, make):
    assert read(make(**options)) == wanted


@pytest.mark.parametrize(
    "options",
    [{"max_degradation": 0.02}, {"weights": 3}, {"calibration": 5}],
    ids=["a bare number", "weights", "a number"],
)
def test_what_is_wrong_is_refused_while_the_file_is_read(options, make, capsys):
    with pytest.raises(SystemExit):
        make(**options)
    assert str(next(iter(options))) in capsys.readouterr().err


def test_a_wrong_name_is_refused_with_the_right_ones(make):
    with pytest.raises(ValueError, match="calibration='valid' is neither 'train' nor 'val'"):
        make(calibration="valid")
