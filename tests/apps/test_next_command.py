"""The command suggested after a run, as it can be pasted; tests/apps/test_cli.py runs one."""

from __future__ import annotations

import shlex
import sys
import sysconfig

import pytest
from hydra import compose, initialize_config_module
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser

from gptq_plugin.apps.next_command import next_command


@pytest.fixture
def scripts(tmp_path, monkeypatch):
    """The folder of this environment's commands, with gptq-quantize in it; not on PATH."""
    folder = tmp_path / "an environment" / "bin"
    folder.mkdir(parents=True)
    (folder / "gptq-quantize").write_text("#!/bin/sh")
    (folder / "gptq-quantize").chmod(0o755)
    monkeypatch.setattr(sys, "argv", [str(folder / "gptq-finetune")])
    monkeypatch.setenv("PATH", str(tmp_path / "elsewhere"))
    return folder


@pytest.fixture
def suggested(tmp_path, scripts):
    """suggested(command, *overrides, hydra): the words of the command suggested after a run with these overrides."""

    def suggest(name, *overrides, hydra=(), run_dir=None):
        with initialize_config_module("gptq_plugin.conf", version_base="1.3"):
            cfg = compose(name, [*overrides, *hydra, f"hydra.job.config_name={name}"], return_hydra_config=True)
        cfg.hydra.overrides.task = list(overrides)
        HydraConfig.instance().set_config(cfg)
        return shlex.split(next_command(run_dir or tmp_path))

    yield suggest
    HydraConfig.instance().cfg = None


SWEEP = "quantizer.bits=2,3,4,8"


def test_it_names_the_program_by_its_path_unless_path_leads_to_it(suggested, scripts, tmp_path, monkeypatch):
    (program, *_) = suggested("quantize")
    assert program == str(scripts / "gptq-quantize")
    monkeypatch.setenv("PATH", f"{tmp_path}:{scripts}")
    assert suggested("quantize")[0] == "gptq-quantize"
    (tmp_path / "gptq-quantize").write_text("#!/bin/sh")  # of another environment, found first
    (tmp_path / "gptq-quantize").chmod(0o755)
    assert suggested("quantize")[0] == str(scripts / "gptq-quantize")


def test_it_finds_the_program_beside_python_and_works_without_any(suggested, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["cli.py"])
    monkeypatch.setattr(sys, "executable", str(tmp_path / "an environment" / "bin" / "python"))
    assert suggested("quantize")[0] == str(tmp_path / "an environment" / "bin" / "gptq-quantize")
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path / "nowhere"))
    code = "from gptq_plugin.apps.cli import quantize; quantize()"
    assert suggested("quantize")[:4] == [str(tmp_path / "python"), "-c", code, "-m"]


def test_a_folder_with_characters_that_mean_something_to_hydra_is_quoted(suggested, tmp_path):
    run = tmp_path / "it's a {run}, 2%"
    (run / "float").mkdir(parents=True)
    (_, _, name, *_) = suggested("finetune", run_dir=run)
    (parsed,) = OverridesParser.create().parse_overrides([name])
    assert parsed.key_or_group == "model.name_or_path" and parsed.value() == str(run / "float")


def test_after_quantize_it_is_the_same_run_at_every_width_into_its_own_folders(suggested, scripts):
    same = ["model.name_or_path=a b", "data.seq_len=64", "seed=3"]
    found = suggested("quantize", *same, "quantizer.bits=3", "export_dir=out", "target=vllm", "quantizer.resume=true")
    assert found == [str(scripts / "gptq-quantize"), "-m", *same, SWEEP]


def test_after_finetune_it_takes_the_saved_float_model_and_the_same_data(suggested, scripts, tmp_path):
    (tmp_path / "float").mkdir()
    found = suggested("finetune", "trainer.max_steps=9", "data=text", "data.path=x.txt", "quantizer.group_size=64",
                      "model.vocab_size=384", "quantizer.bits=2")  # fmt: skip
    assert found == [str(scripts / "gptq-quantize"), "-m", f"model.name_or_path={tmp_path / 'float'}", "data=text",
                     "data.path=x.txt", "quantizer.group_size=64", SWEEP]  # fmt: skip


def test_there_is_none_where_a_budget_chose_the_widths(suggested):
    assert suggested("quantize", "quantizer=mixed3_best") == [] == suggested("quantize", "quantizer.target_bits=3")


def test_there_is_none_without_a_saved_float_model_or_within_a_sweep(suggested, tmp_path):
    assert suggested("finetune") == []
    (tmp_path / "float").mkdir()
    assert suggested("finetune") and suggested("finetune", hydra=["hydra.job.num=1"]) == []
