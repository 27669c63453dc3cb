"""The callback from the YAML of a LightningCLI: every option that YAML can give."""

from __future__ import annotations

import sys

import lightning.pytorch as pl
import pytest
import yaml
from lightning.pytorch.cli import LightningCLI

from gptq_plugin import GPTQCallback, QuantizeConfig
from gptq_plugin.apps.tokenizer import train_tokenizer
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

    def callback(init_args=None, **options) -> GPTQCallback:
        init_args = {"bits": 4, "group_size": 32} if init_args is None else init_args
        quantizer = {"class_path": "gptq_plugin.QuantizeModule", "init_args": init_args}
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


RULES = {".*down": {"bits": 8}, "-:.*gate": {}}


@pytest.mark.parametrize(
    ("init_args", "wanted"),
    [
        ({}, QuantizeConfig()),
        ({"bits": 3, "method": "best"}, QuantizeConfig(bits=3, method="best")),
        ({"clip_ratios": [1, 0.9], "damp_percent": 0.05}, QuantizeConfig(clip_ratios=(1, 0.9), damp_percent=0.05)),
        ({"dynamic": RULES, "modules_to_not_convert": ["head"]},
         QuantizeConfig(dynamic=RULES, modules_to_not_convert=("head",))),
        ({"config": {"bits": 8, "group_size": -1}}, QuantizeConfig(bits=8, group_size=-1)),
    ],
)  # fmt: skip
def test_options_of_the_configuration_stand_among_the_quantizers_own(init_args, wanted, make):
    assert make(init_args).quantizer.config == wanted


def test_options_beside_a_configuration_are_refused_unless_they_are_defaults(make, caplog):
    assert make({"config": {"bits": 3}, "bits": 4}).quantizer.config == QuantizeConfig(bits=3)
    assert "config is taken whole: bits=4 beside it, as by default, does not count" in caplog.text
    caplog.clear()
    assert make({"config": {"bits": 4}}).quantizer.config == QuantizeConfig()
    assert "config is taken whole" not in caplog.text
    with pytest.raises(ValueError, match="not both: got group_size beside config"):
        make({"config": {"bits": 3}, "group_size": 64})


@pytest.mark.parametrize(("init_args", "told"), [({"bitz": 4}, "'bitz' is not accepted"), ({"bits": "x"}, "bits")])
def test_options_that_are_none_are_refused_while_the_file_is_read(init_args, told, make, capsys):
    with pytest.raises(SystemExit):
        make(init_args)
    assert told in capsys.readouterr().err


FLAGS = ["--trainer.logger=false", "--trainer.callbacks+=gptq_plugin.GPTQCallback",
         "--trainer.callbacks.quantizer=gptq_plugin.QuantizeModule", "--trainer.callbacks.quantizer.bits=3",
         '--trainer.callbacks.quantizer.dynamic={".*down": {"bits": 8}}', "--trainer.callbacks.calibration=val",
         "--trainer.callbacks.export_dir=out"]  # fmt: skip


def cli(*arguments: str) -> LightningCLI:
    return LightningCLI(Plain, Data, run=False, save_config_callback=None, args=list(arguments))


def test_flags_give_what_yaml_gives_and_the_printed_configuration_is_read_again(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train.py"])
    with pytest.raises(SystemExit):
        cli(*FLAGS, "--print_config")
    printed = capsys.readouterr().out
    (tmp_path / "printed.yaml").write_text(printed)
    with pytest.raises(SystemExit):
        cli("--config", str(tmp_path / "printed.yaml"), "--print_config")
    assert capsys.readouterr().out == printed
    for made in (cli(*FLAGS), cli("--config", str(tmp_path / "printed.yaml"))):
        (callback,) = [one for one in made.trainer.callbacks if isinstance(one, GPTQCallback)]
        assert callback.quantizer.config == QuantizeConfig(bits=3, dynamic={".*down": {"bits": 8}})
        assert callback.data.calibration == "val" and callback.export_dir.name == "out"


def test_the_help_has_a_line_for_every_option(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train.py"])
    with pytest.raises(SystemExit):
        cli(*FLAGS[:2], "--trainer.callbacks.quantizer.help", "gptq_plugin.QuantizeModule")
    told = " ".join(capsys.readouterr().out.split())
    for name in QuantizeConfig().to_dict():
        assert f"--quantizer.{name} " in told
    assert "Width of a code: 2, 3, 4 or 8." in told and "Share of the mean of diag(H)" in told


def test_a_tokenizer_is_loaded_from_its_folder(tmp_path, make):
    train_tokenizer(["a few words of text"] * 50, vocab_size=300).save_pretrained(tmp_path / "tokenizer")
    assert make(tokenizer=str(tmp_path / "tokenizer")).tokenizer("text")["input_ids"]


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
