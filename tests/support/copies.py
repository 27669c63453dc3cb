"""Copies of the checkpoints in tests/fixtures after a change, and what the originals compute."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from paths import FIXTURES

LLAMA = "gptqmodel-w4g32-v2"
DOWN = "model.layers.0.mlp.down_proj"
UP = "model.layers.0.mlp.up_proj"

Tensors = dict[str, torch.Tensor]


def expected(name: str) -> Tensors:
    return load_file(FIXTURES / f"{name}.expected.safetensors")


def edited(
    name: str,
    target: Path,
    tensors: Callable[[Tensors], Any] | None = None,
    config: Callable[[dict[str, Any]], Any] | None = None,
) -> Path:
    """A copy of a fixture after `tensors(state)` and `config(config.json's content)` changed it."""
    shutil.copytree(FIXTURES / name, target)
    weights = next(target.glob("*.safetensors"))
    if tensors is not None:
        state = load_file(weights)
        tensors(state)
        save_file({k: v.contiguous() for k, v in state.items()}, weights)
    if config is not None:
        content = json.loads((target / "config.json").read_text())
        config(content)
        (target / "config.json").write_text(json.dumps(content))
        (target / "quantize_config.json").unlink()
    return target


def logits_of(model: Any, reference: Tensors) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=reference["input_ids"]).logits[0, -len(reference["logits"]) :].float()


def drop(*endings: str) -> Callable[[Tensors], None]:
    def change(state: Tensors) -> None:
        found = [name for name in state if name.endswith(endings)]
        assert found
        for name in found:
            del state[name]

    return change


def put(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Tensors], None]:
    return lambda state: state.update({name: change(state[name])})


def set_quantization(config: dict[str, Any], **values: Any) -> None:
    config["quantization_config"].update(values)


def with_value(index: int, value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        changed = tensor.clone()
        changed.view(-1)[index] = value
        return changed

    return change


def sharded(target: Path) -> Path:
    shutil.copytree(FIXTURES / LLAMA, target)
    state = load_file(target / "model.safetensors")
    (target / "model.safetensors").unlink()
    weight_map = {}
    for number, names in enumerate((sorted(state)[::2], sorted(state)[1::2]), start=1):
        file = f"model-{number:05}-of-00002.safetensors"
        save_file({name: state[name] for name in names}, target / file)
        weight_map.update(dict.fromkeys(names, file))
    (target / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return target
