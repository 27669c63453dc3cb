"""What transformers does not load of a model's source is in the export, float, and named."""

from __future__ import annotations

import json
import logging
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaModel

from gptq_plugin import QuantizeModule, load_quantized
from gptq_plugin.check.lint import lint
from gptq_plugin.errors import ExportError
from gptq_plugin.export.unloaded import Unloaded

from models import tiny_llama

SMALL = {"bits": 4, "group_size": 32, "nsamples": 24}


def _published(folder, extra=None, shard=None):
    """A tiny Llama that is published with a module which predicts a second token."""
    model = tiny_llama()
    model.save_pretrained(folder, **({"max_shard_size": shard} if shard else {}))
    tensors = extra or {
        "mtp.layers.0.up.weight": torch.randn(96, 64),
        "mtp.layers.0.up.bias": torch.randn(96),
        "mtp.norm.weight": torch.ones(64),
    }
    file = folder / "model.safetensors"
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        listed = json.loads(index.read_text())
        save_file(tensors, folder / "mtp.safetensors", {"format": "pt"})
        listed["weight_map"] |= dict.fromkeys(tensors, "mtp.safetensors")
        index.write_text(json.dumps(listed))
    else:
        save_file({**load_file(file), **tensors}, file, {"format": "pt"})
    return tensors


def _ids():
    return [{"input_ids": torch.randint(0, 128, (1, 24))} for _ in range(24)]


@pytest.mark.parametrize("form", ["gptq", "compressed-tensors"])
@pytest.mark.parametrize("shard", [None, "40kB"])
def test_modules_that_transformers_leaves_out_are_taken_over(form, shard, tmp_path, caplog):
    tensors = _published(tmp_path / "source", shard=shard)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "source")
    module = QuantizeModule(**SMALL, checkpoint_format=form)
    with caplog.at_level(logging.WARNING):
        report = module.quantize(model, _ids(), export_dir=tmp_path / "export")
    files = {k: v for file in (tmp_path / "export").glob("*.safetensors") for k, v in load_file(file).items()}
    assert all(torch.equal(files[name], tensor) for name, tensor in tensors.items())
    sentence = "3 tensors of mtp, which transformers does not load, are taken over float from the model's source"
    assert sentence in report.deviations and sentence in caplog.messages
    description = json.loads((tmp_path / "export/config.json").read_text())["quantization_config"]
    if form == "gptq":
        assert any(re.match(rule.removeprefix("-:"), "mtp.layers.0.up") for rule in description["dynamic"])
    else:
        assert "mtp.layers.0.up" in description["ignore"]
    assert not [finding for finding in lint(tmp_path / "export").findings if "mtp" in finding.message]
    loaded = load_quantized(tmp_path / "export")
    ids = torch.arange(12)[None]
    with torch.no_grad():
        torch.testing.assert_close(loaded(input_ids=ids).logits, model(input_ids=ids).logits)


def test_a_layer_behind_the_last_is_taken_over_and_one_that_was_taken_out_is_not(tmp_path):
    _published(tmp_path, {"model.layers.2.mlp.up_proj.weight": torch.randn(96, 64)})  # as DeepSeek's and GLM's
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert Unloaded.of(model).modules == ["model.layers.2"]
    model.model.layers = model.model.layers[:1]
    model.config.num_hidden_layers = 1
    assert list(Unloaded.of(model).tensors) == ["model.layers.2.mlp.up_proj.weight"]


@pytest.mark.parametrize(
    "extra",
    [
        {"model.layers.0.self_attn.masked_bias": torch.zeros(1, 1)},  # of a module that is there
        {"model.layers.0.self_attn.rotary.inv_freq": torch.zeros(8)},  # a vector, which is no layer
    ],
)
def test_remains_of_old_versions_are_left_out(extra, tmp_path):
    _published(tmp_path, extra)
    assert Unloaded.of(AutoModelForCausalLM.from_pretrained(tmp_path)) == Unloaded()


def test_a_model_of_another_class_leaves_out_what_it_has_no_place_for(tmp_path):
    _published(tmp_path)
    assert Unloaded.of(LlamaModel.from_pretrained(tmp_path)) == Unloaded()


@pytest.mark.parametrize("source", ["", "nowhere/at-all", "not a hub id", "/no/such/folder"])
def test_a_model_without_a_source_has_nothing_to_take_over(source):
    model = tiny_llama()
    model.config._name_or_path = source
    assert Unloaded.of(model) == Unloaded()


def test_what_is_quantized_in_the_source_is_refused_before_the_work(tmp_path):
    _published(tmp_path / "source", {"mtp.up.weight": torch.zeros(96, 64).to(torch.float8_e4m3fn)})
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "source")
    with pytest.raises(ExportError, match=r"mtp, which transformers does not load, in F8_E4M3.*_name_or_path"):
        QuantizeModule(**SMALL).quantize(model, _ids(), export_dir=tmp_path / "export")
    assert not (tmp_path / "export").exists()
    assert not any(hasattr(layer, "qweight") for layer in model.modules())


@pytest.mark.parametrize("damage", ["cut", "index", "missing", "layers", "kind"])
def test_a_source_that_is_damaged_meanwhile_is_named_with_what_to_do(damage, tmp_path):
    _published(tmp_path, shard="100KB" if damage in ("index", "missing") else None)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    names = {
        "index": "model.safetensors.index.json",
        "missing": "mtp.safetensors",
        "layers": "config.json",
        "kind": "config.json",
    }
    file = tmp_path / names.get(damage, "model.safetensors")
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:500])
    elif damage == "index":
        file.write_text('{"weight_map": [1]}')
    elif damage == "missing":
        file.unlink()
    else:
        change = {"num_hidden_layers": 10**6} if damage == "layers" else {"hidden_act": False}
        file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(ExportError, match=file.name) as caught:
        Unloaded.of(model)
    assert "clear model.config._name_or_path" in str(caught.value)
