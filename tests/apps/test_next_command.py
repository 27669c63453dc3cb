"""The command suggested after a run; tests/apps/test_cli.py runs one."""

from __future__ import annotations

import shlex

import pytest
from hydra import compose, initialize_config_module
from hydra.core.hydra_config import HydraConfig

from gptq_plugin.apps.next_command import next_command


@pytest.fixture
def suggested(tmp_path):
    """suggested(command, *overrides, hydra): the words of the command suggested after a run with these overrides."""

    def suggest(name, *overrides, hydra=()):
        with initialize_config_module("gptq_plugin.conf", version_base="1.3"):
            cfg = compose(name, [*overrides, *hydra, f"hydra.job.config_name={name}"], return_hydra_config=True)
        cfg.hydra.overrides.task = list(overrides)
        HydraConfig.instance().set_config(cfg)
        return shlex.split(next_command(tmp_path))

    yield suggest
    HydraConfig.instance().cfg = None


SWEEP = "quantizer.bits=2,3,4,8"


def test_after_quantize_it_is_the_same_run_at_every_width_into_its_own_folders(suggested):
    same = ["model.name_or_path=a b", "data.seq_len=64", "seed=3"]
    found = suggested("quantize", *same, "quantizer.bits=3", "export_dir=out", "target=vllm")
    assert found == ["gptq-quantize", "-m", *same, SWEEP]


def test_after_finetune_it_takes_the_saved_float_model_and_the_same_data(suggested, tmp_path):
    (tmp_path / "float").mkdir()
    found = suggested("finetune", "trainer.max_steps=9", "data=text", "data.path=x.txt", "quantizer.group_size=64",
                      "model.vocab_size=384", "quantizer.bits=2")  # fmt: skip
    assert found == ["gptq-quantize", "-m", f"model.name_or_path={tmp_path / 'float'}", "data=text", "data.path=x.txt",
                     "quantizer.group_size=64", SWEEP]  # fmt: skip


def test_there_is_none_without_a_saved_float_model_or_within_a_sweep(suggested, tmp_path):
    assert suggested("finetune") == []
    (tmp_path / "float").mkdir()
    assert suggested("finetune") and suggested("finetune", hydra=["hydra.job.num=1"]) == []
