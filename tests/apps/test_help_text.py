"""What --help prints: what a command does, examples, every option with its comment."""

from __future__ import annotations

import re
import shlex

import pytest
import yaml
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf

from gptq_plugin.apps.help_text import comments_of, help_text
from gptq_plugin.apps.option_names import unknown_names

from paths import REPOSITORY

OPTIONS = "and their values:\n\n"


@pytest.mark.parametrize("name", ["finetune", "quantize"])
def test_it_begins_with_what_the_command_does_and_examples_that_can_be_typed(name):
    text = help_text(name)
    assert re.match(rf"gptq-{name} (fine-tunes|quantizes) a language model", text)
    examples = text.partition("Examples:\n")[2].partition("\n\n")[0].replace("\\\n", "")
    commands = [shlex.split(line) for line in examples.splitlines() if not line.strip().startswith("#")]
    assert len(commands) >= 4
    for program, *overrides in commands:
        assert program == f"gptq-{name}"
        assert unknown_names(name, [word for word in overrides if word != "-m"]) == []


@pytest.mark.parametrize(
    ("name", "overrides", "parts"),
    [
        ("finetune", [], ["finetune", "model/small_llama", "data/builtin", "quantizer/w4g128", "trainer/default",
                          "callbacks/gptq"]),
        ("finetune", ["data=text", "model=hf"], ["finetune", "model/hf", "data/text"]),
        ("quantize", ["data=hub"], ["quantize", "model/hf", "data/hub", "quantizer/w4g128"]),
    ],
)  # fmt: skip
def test_every_comment_of_the_chosen_files_is_there(name, overrides, parts):
    lines = {line.strip() for line in help_text(name, overrides).splitlines()}
    for part in parts:
        conf = (REPOSITORY / "conf" / f"{part}.yaml").read_text()
        below_defaults = re.sub(r"\A(#.*\n)+defaults:\n( .*\n)+", "", conf)
        for comment in re.findall(r"^\s*(#.*)$", below_defaults, re.M):
            assert comment in lines, (part, comment)


def test_the_options_are_the_configuration_that_the_overrides_give():
    overrides = ["data=text", "quantizer=w3g128", "data.path=[a.txt,b.txt]", "+trainer.min_epochs=2", "seed=7"]
    shown = yaml.safe_load(help_text("finetune", overrides).partition(OPTIONS)[2])
    with initialize_config_module("gptq_plugin.conf", version_base="1.3"):
        assert shown == OmegaConf.to_container(compose("finetune", overrides), resolve=False)
    assert shown["quantizer"]["bits"] == 3 and shown["seed"] == 7


def test_the_choices_of_each_group_have_their_headings_and_a_mark():
    text = help_text("finetune", ["quantizer=w3g128"])
    assert "* quantizer=w3g128       GPTQ, 3 bits, groups of 128" in text and "    data=text " in text
    assert "# GPTQ, 3 bits, groups of 128; all else as in w4g128.\nquantizer:" in text
    assert "run=" not in text.partition(OPTIONS)[0]
    assert "    finish=full            After GPTQ, every block is trained to give its float outputs, then" in text


def test_what_a_command_does_not_read_is_none_of_its_choices():
    offered = help_text("quantize").partition(OPTIONS)[0]
    assert "model=hf " in offered
    assert not any(one in offered for one in ("callbacks=", "trainer=", "model=small_llama"))
    assert all(one in help_text("finetune") for one in ("callbacks=gptq", "trainer=default", "model=small_llama"))


def test_comments_are_those_above_a_key_and_behind_its_value():
    found = comments_of(
        "# Heading.\n_target_: x\n# One\n# two.\na: 1  # three\nb:\n  # Four.\n  c: '#'\n\n# lost\n\nd: 1\n", ("g",)
    )
    assert found == {
        ("g",): (("# Heading.",), ""),
        ("g", "a"): (("# One", "# two."), "# three"),
        ("g", "b", "c"): (("# Four.",), ""),
    }
