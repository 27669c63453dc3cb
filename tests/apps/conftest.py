"""Fixtures of the commands' tests."""

from __future__ import annotations

import sys

import pytest
from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig

from gptq_plugin.apps import cli
from gptq_plugin.apps.tokenizer import train_tokenizer

from forked_python import python
from language_models import tiny
from texts import PROSE


@pytest.fixture
def app(tmp_path, monkeypatch):
    """app("finetune", "data.seq_len=64", ...) runs the application in this process, as Hydra would."""
    monkeypatch.setattr(sys, "executable", python())  # evaluates the export

    def run(name: str, *overrides: str):
        with initialize_config_module("gptq_plugin.conf", version_base="1.3"):
            cfg = compose(name, [*overrides, f"hydra.runtime.output_dir={tmp_path}/run"], return_hydra_config=True)
        HydraConfig.instance().set_config(cfg)
        (tmp_path / "run").mkdir(exist_ok=True)
        return getattr(cli, name)(cfg)

    yield run
    GlobalHydra.instance().clear()
    HydraConfig.instance().cfg = None


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The folder of a tiny base model, and the model."""
    folder, model = tmp_path_factory.mktemp("base") / "base", tiny(1)
    model.network.save_pretrained(folder)
    model.tokenizer.save_pretrained(folder)
    return folder, model.network


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(PROSE * 10, 300)
