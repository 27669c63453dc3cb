"""What transformers takes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gptq_plugin import QuantizeModule, load_quantized
from gptq_plugin.clients.client import Client
from gptq_plugin.clients.rules import conditions, problems
from gptq_plugin.errors import ExportError
from gptq_plugin.export.export import export_model

from inventories import CT, DOWN8, EXPERTS, MIXTRAL, experts, inventory

REFUSED = [
    # the checkpoint, words of the sentence (which layer, why, what works instead)
    ({"change": DOWN8}, ("one width", "down_proj", CT)),
    ({"change": {"mlp.down_proj": {"group_size": 64}}}, ("one width and group size", "down_proj")),
    ({"lm_head": True}, ("output embedding", "lm_head=False")),
    ({"group_size": 8}, ("not 8", "group_size=128")),
    ({"model_type": "gpt2"}, ("layers of gpt2", "load_quantized")),
    ({"model_type": "gpt2", "checkpoint_format": CT}, ("Conv1D", "random", "target='vllm'")),
    (experts(), ("experts.0.gate_proj", "random values", CT, "modules_to_not_convert")),
    ({**experts(sym=False), "checkpoint_format": CT}, ("no zeros of experts", "sym=True")),
    ({**experts(leave=EXPERTS), "checkpoint_format": CT}, ("left float", "'gptq'")),
    ({**experts(change={"bits": 8}), "checkpoint_format": CT}, ("one grid", "experts.1.down_proj")),
]


@pytest.mark.parametrize("what,words", REFUSED)
def test_a_limit_is_named_with_the_layer_the_reason_and_what_works(
    what: dict[str, Any], words: tuple[str, ...]
) -> None:
    found = problems(inventory(**what), Client("transformers"))
    assert any(all(word in sentence for word in words) for sentence in found), found


TAKEN: list[dict[str, Any]] = [
    experts(leave=EXPERTS),
    {**experts(MIXTRAL), "checkpoint_format": CT},
    {"bits": 3, "sym": False, "act_order": True, "group_size": 32},
    {"change": DOWN8, "checkpoint_format": CT},
]


@pytest.mark.parametrize("what", TAKEN)
def test_what_it_takes_is_not_refused(what: dict[str, Any]) -> None:
    assert not problems(inventory(**what), Client("transformers"))


def test_the_packages_and_the_kernel_that_it_needs_are_listed() -> None:
    assert "backend='torch'" in " ".join(conditions(inventory(group_size=-1), Client("transformers")))
    assert conditions(inventory(), Client("transformers")) == ["needs the packages gptqmodel and optimum"]
    compressed = inventory(group_size=-1, checkpoint_format=CT)
    assert conditions(compressed, Client("transformers")) == ["needs the package compressed-tensors"]


def test_layers_left_float_without_a_list_of_the_others_are_named() -> None:
    missing, left = Client("transformers").rules.missing, inventory(leave=("mlp.up_proj",))
    (line,) = missing(left, {})
    assert "model.layers.0.mlp.up_proj" in line and "modules_in_block_to_quantize" in line
    assert not list(missing(left, {"modules_in_block_to_quantize": [["mlp.down_proj"]]}))
    assert not list(missing(inventory(), {}))


def test_conv1d_layers_as_compressed_tensors_are_for_vllm_and_not_for_transformers(
    rtn: Callable[..., Any], tmp_path: Path
) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=64, n_layer=1, n_head=2, n_positions=64)).eval()
    quantizer = QuantizeModule(group_size=32, checkpoint_format=CT)
    with pytest.raises(ExportError, match=r"layers of gpt2 are Conv1D.*target='vllm'"):
        quantizer.check_target(model, "transformers")
    folder = export_model(rtn(model, quantizer.config), tmp_path / "out", quantizer.config, target="vllm")
    with torch.no_grad():
        ids = torch.arange(32)[None]
        assert torch.equal(load_quantized(folder)(ids).logits, model(ids).logits)
