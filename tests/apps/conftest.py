"""What the tests of the commands share."""

from __future__ import annotations

import pytest

from gptq_plugin.apps.tokenizer import train_tokenizer

from language_models import tiny
from texts import PROSE


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
