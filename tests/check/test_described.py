"""Faults of the files, and what the checkpoint is."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from gptq_plugin import QuantizeConfig
from gptq_plugin.check.described import facts, short
from gptq_plugin.check.lint import lint
from gptq_plugin.checkpoint.checkpoint import Checkpoint
from gptq_plugin.clients.inventory import Inventory
from gptq_plugin.export.export import export_model

from damage import cast, quantizable_llama, without


@pytest.mark.parametrize("case,said", [("4 bits symmetric", "gptq_v2"), ("4 bits asymmetric", "gptq")])
def test_a_wrong_format_shows_by_the_other_file_and_by_the_codes(
    case: str, said: str, damaged: Callable[..., Path], float_dir: Path
) -> None:
    out = damaged(case, lambda tensors, bits: None)
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"].update(checkpoint_format=said, format=said)
    (out / "config.json").write_text(json.dumps(config))
    assert any("zeros of one read as the other are off by one" in error for error in lint(out).errors)
    (out / "quantize_config.json").unlink()
    alone = lint(out)
    if case == "4 bits symmetric":
        assert any("a gptq (v1) file labelled gptq_v2" in error for error in alone.errors)
        return
    assert any("codes average" in finding.message for finding in alone.findings) and not alone.errors
    assert any("zeros off by one" in error for error in lint(out, float_dir).errors)


def test_changes_that_change_no_number_are_reported_as_such(damaged: Callable[..., Path], float_dir: Path) -> None:
    for change, words in ((cast(torch.float32), "no number changes"), (without("g_idx"), "no number changes")):
        out = damaged("4 bits symmetric", change)
        found = lint(out, float_dir)
        assert not found.errors
        assert any(words in finding.message for finding in found.findings)
        shutil.rmtree(out)


def test_a_checkpoint_is_described_by_its_formats_layers_and_bytes(rtn: Callable[..., Any], tmp_path: Path) -> None:
    config = QuantizeConfig(group_size=32, modules_to_not_convert=("o_proj",), dynamic={r".*down_proj": {"bits": 8}})
    model = rtn(quantizable_llama(), config)
    checkpoint = Checkpoint.open(export_model(model, tmp_path / "out", config))
    found = facts(checkpoint, Inventory.of(checkpoint))
    total = sum(tensor.nbytes for tensor in load_file(tmp_path / "out" / "model.safetensors").values())
    assert found["format"] == "gptq" and found["model"] == "LlamaForCausalLM"
    assert found["layers"] == (
        "5 layers at 4 bits, group_size=32, symmetric; 1 layer at 8 bits, group_size=32, symmetric"
    )
    assert found["left float"] == "model.layers.0.self_attn.o_proj"
    assert found["tokenizer"] == "none in the folder: servers need one"
    (checkpoint.directory / "tokenizer_config.json").write_text("{}")
    assert "tokenizer" not in facts(checkpoint, Inventory.of(checkpoint))
    assert found["bytes"].startswith(f"{total:,}, of which ") and found["bytes"].endswith("float weights in bfloat16")


def test_a_quantized_head_that_the_configuration_ties_is_an_error(rtn: Callable[..., Any], tmp_path: Path) -> None:
    config = QuantizeConfig(group_size=32, lm_head=True)
    out = export_model(rtn(quantizable_llama(), config), tmp_path / "out", config)
    assert not lint(out).findings
    content = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**content, "tie_word_embeddings": True}))
    (message,) = lint(out).errors
    assert "set tie_word_embeddings to false" in message


def test_two_descriptions_that_disagree_are_an_error(damaged: Callable[..., Path]) -> None:
    out = damaged("4 bits symmetric", lambda tensors, bits: None)
    beside = json.loads((out / "quantize_config.json").read_text())
    (out / "quantize_config.json").write_text(json.dumps({**beside, "desc_act": True}))
    (message,) = lint(out).errors
    assert "config.json has desc_act=False and quantize_config.json has True" in message


def test_scales_of_compressed_tensors_may_have_the_models_dtype(damaged: Callable[..., Path]) -> None:
    out = damaged("4 bits compressed-tensors", cast(torch.bfloat16))
    assert not [finding for finding in lint(out).findings if "bfloat16" in finding.message]
    assert short(torch.bfloat16) == "bfloat16"


def test_nan_in_what_is_not_quantized_is_an_error(damaged: Callable[..., Path]) -> None:
    def change(tensors: dict[str, torch.Tensor], bits: int) -> None:
        tensors["model.norm.weight"][3] = float("nan")
        tensors["model.embed_tokens.weight"][5, 1] = float("inf")

    errors = lint(damaged("4 bits symmetric", change)).errors
    assert any("model.embed_tokens.weight, model.norm.weight: not quantized, and NaN or infinity" in e for e in errors)


@pytest.mark.parametrize("kind", ["layers", "JSON", "pipe"])
def test_descriptions_of_the_model_that_loading_refuses_are_errors(kind: str, damaged: Callable[..., Path]) -> None:
    out = damaged("4 bits symmetric", lambda tensors, bits: None)
    generation = out / "generation_config.json"
    generation.unlink(missing_ok=True)
    if kind == "layers":
        config = json.loads((out / "config.json").read_text())
        (out / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 10**6}))
    elif kind == "pipe":
        os.mkfifo(generation)
    else:
        generation.write_text("[" * 100_000)
    (found,) = lint(out).errors
    assert ("config.json: num_hidden_layers is 1000000" if kind == "layers" else "generation_config.json") in found
