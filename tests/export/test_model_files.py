"""Float tensors and config.json, as transformers writes them or as we do."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

from gptq_plugin import QuantizeConfig, QuantizeModule, load_quantized
from gptq_plugin.check.lint import lint
from gptq_plugin.errors import ExportError
from gptq_plugin.export import model_files
from gptq_plugin.export.export import export_model
from gptq_plugin.layers.qlinear import QuantLinear

from exports import logits
from models import Plain, tiny_llama, tiny_llava

Rtn = Callable[..., Any]


def test_a_quantized_head_of_a_tied_model_is_stored_untied(rtn: Rtn, tmp_path: Path) -> None:
    config = QuantizeConfig(group_size=32, lm_head=True)
    model = rtn(tiny_llama(tie_word_embeddings=False), config)
    model.config.tie_word_embeddings = True  # what a tied model whose head was quantized still says
    folder = export_model(model, tmp_path / "out", config)
    content = json.loads((folder / "config.json").read_text())
    assert content["tie_word_embeddings"] is False
    assert content["quantization_config"]["lm_head"] is True
    loaded = load_quantized(folder)
    assert isinstance(loaded.lm_head, QuantLinear)
    assert torch.equal(logits(loaded), logits(model))


def _exported(model: Any, folder: Path) -> tuple[dict[str, Any], Any]:
    config = QuantizeConfig(group_size=32)
    export_model(model, folder, config)
    return json.loads((folder / "config.json").read_text()), load_quantized(folder)


def test_a_head_that_was_trained_apart_is_not_announced_as_tied(rtn: Rtn, tmp_path: Path) -> None:
    """transformers loads what is stored; other clients go by the flag, and would compute with the embedding."""
    model = rtn(tiny_llama(tie_word_embeddings=True), QuantizeConfig(group_size=32))
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach() + 0.1)
    content, loaded = _exported(model, tmp_path / "out")
    assert content["tie_word_embeddings"] is False
    assert not torch.equal(loaded.lm_head.weight, loaded.model.embed_tokens.weight)
    assert torch.equal(logits(loaded), logits(model))
    assert model.config.tie_word_embeddings is True


def test_a_head_apart_from_a_tied_embedding_is_told_in_every_part_of_the_config(rtn: Rtn, tmp_path: Path) -> None:
    model = rtn(tiny_llava(), QuantizeConfig(group_size=32))
    for part in (model.config, model.config.text_config):
        part.tie_word_embeddings = True
    model.all_tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}
    content, _ = _exported(model, tmp_path / "out")
    assert content["tie_word_embeddings"] is content["text_config"]["tie_word_embeddings"] is False


@pytest.mark.parametrize("checkpoint_format", ["gptq_v2", "compressed-tensors"])
def test_blocks_that_occur_twice_are_stored_twice(rtn: Rtn, tmp_path: Path, checkpoint_format: str) -> None:
    """transformers makes each block by itself, and ties none. Norms are blocks' too."""
    config = QuantizeConfig(
        group_size=32,
        checkpoint_format=checkpoint_format,
        dynamic={r".*layers\.[02]\.mlp": {"bits": 8}},
        modules_to_not_convert=["layers.3.self_attn"],
    )
    model = tiny_llama(num_hidden_layers=4, use_cache=False)
    model.model.layers = nn.ModuleList([model.model.layers[place] for place in (0, 1, 0, 1)])
    model = rtn(model, config)
    folder = export_model(model, tmp_path / "out", config)
    loaded = load_quantized(folder)
    assert torch.equal(logits(loaded), logits(model))
    bits = {name: one.bits for name, one in loaded.named_modules() if isinstance(one, QuantLinear)}
    assert len(bits) == 2 * 3 + 2 * 7 and bits["model.layers.2.mlp.up_proj"] == 8
    assert lint(folder, targets=()).errors == []

    model.config.use_cache = True  # of which the same block has one place
    with pytest.raises(ExportError, match=r"model\.layers\.2.* occur in other places too.*use_cache=False"):
        export_model(model, tmp_path / "cached", config)


def test_weights_that_layers_share_are_stored_for_each(rtn: Rtn, tmp_path: Path) -> None:
    """As PEFT's layer_replication shares them."""
    config, model = QuantizeConfig(group_size=32), tiny_llama(num_hidden_layers=2)
    first, second = model.model.layers
    second.mlp.up_proj.weight = first.mlp.up_proj.weight
    second.input_layernorm.weight = first.input_layernorm.weight
    folder = export_model(rtn(model, config), tmp_path / "out", config)
    assert torch.equal(logits(load_quantized(folder)), logits(model))


def test_a_head_of_the_embeddings_values_stays_tied(rtn: Rtn, tmp_path: Path) -> None:
    model = rtn(tiny_llama(tie_word_embeddings=True), QuantizeConfig(group_size=32))
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    content, loaded = _exported(model, tmp_path / "out")
    assert content["tie_word_embeddings"] is True
    assert torch.equal(logits(loaded), logits(model))


def test_an_encoder_decoder_keeps_its_flag_by_which_it_scales_its_outputs(rtn: Rtn, tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 1, "num_heads": 2, "vocab_size": 64}
    model = rtn(T5ForConditionalGeneration(T5Config(**sizes)).eval(), QuantizeConfig(group_size=32))
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach() + 0.1)
    content, loaded = _exported(model, tmp_path / "out")
    assert content["tie_word_embeddings"] is True
    ids = torch.arange(8)[None]
    with torch.no_grad():
        ours, theirs = (one(input_ids=ids, decoder_input_ids=ids).logits for one in (model, loaded))
    assert torch.equal(ours, theirs)


def test_large_models_are_stored_in_shards(rtn: Rtn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_files, "MAX_SHARD", "20KB")
    config = QuantizeConfig(group_size=32)
    model = rtn(tiny_llama(), config)
    folder = export_model(model, tmp_path / "out", config)
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    assert torch.equal(logits(load_quantized(folder)), logits(model))


def test_exporting_changes_nothing_of_the_model(rtn: Rtn, tmp_path: Path) -> None:
    config = QuantizeConfig(group_size=32)
    model = rtn(tiny_llama(), config)
    before, original = copy.deepcopy(model.state_dict()), model.config
    said = model.config.to_dict()
    export_model(model, tmp_path / "out", config)
    assert model.config is original and model.config.to_dict() == said
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_float_weights_that_cannot_be_stored_as_published_have_the_models_names(tmp_path, monkeypatch, caplog):
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=1,
                                         num_attention_heads=2, num_key_value_heads=1)).eval()  # fmt: skip
    save = LlamaForCausalLM.save_pretrained

    def joined(self, folder, save_original_format=True, **options):
        if save_original_format:
            raise ValueError("an expert lacks its other half")
        save(self, folder, save_original_format=False, **options)

    monkeypatch.setattr(LlamaForCausalLM, "save_pretrained", joined)
    quantizer = QuantizeModule(bits=4, group_size=32)
    ids = torch.randint(0, 64, (4, 40), generator=torch.Generator().manual_seed(0))
    quantizer.quantize(model, [ids])
    out = quantizer.export(model, tmp_path / "out")
    assert "an expert lacks its other half" in caplog.text and "own names" in caplog.text
    assert torch.equal(load_quantized(out)(ids).logits, model(ids).logits)


def test_an_extra_state_that_is_no_tensor_is_refused(rtn: Rtn, tmp_path: Path) -> None:
    class Stateful(Plain):
        def get_extra_state(self) -> Any:
            return {"step": 3}

    config = QuantizeConfig(group_size=16)
    with pytest.raises(ExportError, match="_extra_state is a dict: safetensors holds tensors only"):
        export_model(rtn(Stateful(), config), tmp_path / "out", config)
    assert not any(tmp_path.iterdir())


def test_every_tensor_is_stored_once_and_alone() -> None:
    """A tied one under its first name, and no more memory than it needs."""
    whole = torch.arange(12.0).view(3, 4)
    tied = nn.Parameter(torch.ones(2))
    once = model_files.once({"a": tied, "b": tied, "row": whole[1], "whole": whole})
    assert list(once) == ["a", "row", "whole"]
    assert torch.equal(once["row"], whole[1]) and once["row"].untyped_storage().nbytes() == 16
    assert once["whole"].data_ptr() == whole.data_ptr()


def test_a_plain_module_is_described_by_its_class(rtn: Rtn, tmp_path: Path) -> None:
    config = QuantizeConfig(group_size=16)
    folder = export_model(rtn(Plain(), config), tmp_path / "out", config)
    content = json.loads((folder / "config.json").read_text())
    assert content.keys() == {"module_class", "quantization_config"}
    assert content["module_class"] == f"{Plain.__module__}.Plain"
    assert not any(name.startswith("inner.0.weight") for name in load_file(folder / "model.safetensors"))
