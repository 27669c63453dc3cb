"""The commands' own options: each is a sentence about the option where its value cannot be."""

from __future__ import annotations

import pytest
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf

from gptq_plugin.apps.own_options import _KINDS, check_own_options


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ckpt", float("inf")), ("adapter", 3), ("device", None), ("device", 0), ("eval_batch_size", 0),
        ("eval_batch_size", True), ("evaluate", "yes"), ("export_dir", None), ("overwrite", 1), ("save_float", "x"),
        ("seed", True), ("seed", -1), ("seed", 2**32), ("seed", "3"), ("ckpt", {"a": "b"}), ("ckpt", ""),
    ],
)  # fmt: skip
def test_a_value_that_cannot_be_is_refused_by_the_options_name(name, value):
    with pytest.raises(ValueError, match=f"^{name} must be "):
        check_own_options(OmegaConf.create({name: value}))


def test_what_the_commands_come_with_is_taken_and_every_plain_option_is_checked():
    left = set(_KINDS)
    for command in ("finetune", "quantize"):
        with initialize_config_module("gptq_plugin.conf", version_base="1.3"):
            cfg = compose(command, ["export_dir=x"] if command == "quantize" else [])
        check_own_options(cfg)
        plain = {name for name, value in cfg.items() if not OmegaConf.is_config(value)}
        assert plain - {"target"} <= set(_KINDS)
        left -= plain
    assert not left
