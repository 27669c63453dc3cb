"""A checkpoint beside the model that its config.json describes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from gptq_plugin import load_quantized
from gptq_plugin.check.lint import lint
from gptq_plugin.errors import CheckpointError

Config = dict[str, Any]


def _edited(source: Path, out: Path, config: Config, rename: Callable[[str], str] = str) -> Path:
    shutil.copytree(source, out)
    content = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**content, **config}))
    tensors = load_file(out / "model.safetensors")
    save_file({rename(name): tensor for name, tensor in tensors.items()}, out / "model.safetensors", {"format": "pt"})
    return out


@pytest.mark.parametrize(
    ("config", "rename", "words"),
    [
        (
            {},
            "base_model.model.{}".format,
            "base_model.model.model.layers.0.mlp.down_proj is quantized in the checkpoint",
        ),
        ({"num_hidden_layers": 3}, str, "model.layers.2.self_attn.q_proj.weight is missing"),
        ({"intermediate_size": 192}, str, "the model's Linear has 192 and"),
        ({"num_attention_heads": 0}, str, "config.json is not a configuration of transformers"),
        ({"architectures": ["NewForCausalLM"]}, str, "has no architecture 'NewForCausalLM'"),
    ],
)
def test_a_checkpoint_that_does_not_load_as_its_config_has_it_is_warned_of(
    config: Config, rename: Callable[[str], str], words: str, exported: Callable[[str], Path], tmp_path: Path
) -> None:
    out = _edited(exported("4 bits symmetric"), tmp_path / "out", config, rename)
    with pytest.raises(CheckpointError) as refusal:
        load_quantized(out)
    found = [finding for finding in lint(out, targets=()).findings if "load_quantized refuses it" in finding.message]
    assert [finding.level for finding in found] == ["warning"]
    assert words in found[0].message and words in str(refusal.value)


def test_code_in_the_folder_is_neither_run_nor_warned_of(exported: Callable[[str], Path], tmp_path: Path) -> None:
    config = {"architectures": ["OwnForCausalLM"], "auto_map": {"AutoModelForCausalLM": "own.OwnForCausalLM"}}
    out = _edited(exported("4 bits symmetric"), tmp_path / "out", config)
    (out / "own.py").write_text("raise SystemExit('it ran')\n")
    assert lint(out, targets=()).findings == []
