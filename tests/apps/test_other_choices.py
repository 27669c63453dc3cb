"""Options of the choices that a command line does not make."""

from __future__ import annotations

import pytest
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf

from gptq_plugin.apps.option_names import unknown_names
from gptq_plugin.apps.other_choices import Options


@pytest.fixture
def options():
    """options(*overrides): those of gptq-finetune."""
    with initialize_config_module("gptq_plugin.conf", version_base="1.3"):

        def composed(*overrides):
            tree = compose("finetune", list(overrides), return_hydra_config=True)
            return Options("finetune", OmegaConf.to_container(tree, resolve=False))

        yield composed


def test_an_option_of_another_choice_counts_only_if_it_is_nearer_than_the_nearest_here(options):
    here = options()
    assert here.nearer("data.path", None) == [("data=hub", "data.path"), ("data=text", "data.path")]
    assert here.nearer("data.pth", "data.path") == []  # as near
    assert here.nearer("data.colum", "data.bos") == [("data=hub", "data.column"), ("data=text", "data.column")]
    assert here.nearer("data.seq_len", None) == []  # it is here
    assert here.nearer("quantizer.bits", "quantizer.bits") == []
    assert options("data=text").nearer("data.split", None) == [("data=hub", "data.split")]


def test_what_other_choices_would_add_is_listed_by_choice(options):
    added = dict(options().of_other_choices("data"))
    assert added.keys() == {"data=hub", "data=text"} and "path" in added["data=text"] and "split" in added["data=hub"]
    assert "seq_len" not in added["data=text"] and not any(name.startswith("_") for name in added["data=text"])
    assert list(options().of_other_choices("")) == [] == list(options().of_other_choices("quantizer"))


def test_the_choice_that_the_command_line_makes_is_the_one_whose_options_count():
    (sentence,) = unknown_names("finetune", ["model=hf", "model.hidden_sizes=64"])
    assert sentence == "model=hf has no model.hidden_sizes: did you mean model=small_llama model.hidden_size=64?"
