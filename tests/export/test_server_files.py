"""What a server needs beside the weights is in an export, and its tensors are what the server expects."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from gptq_plugin import QuantizeConfig, QuantizeModule, load_quantized
from gptq_plugin.errors import CheckpointError, ExportError
from gptq_plugin.export import export, model_files

from models import tiny_llama, tokenizer

IDS = torch.randint(3, 60, (4, 16), generator=torch.Generator().manual_seed(0))
SMALL = QuantizeConfig(group_size=32, nsamples=4)
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"


def exported(model: Any, folder: Path, **options: Any) -> Path:
    quantizer = QuantizeModule(SMALL)
    quantizer.quantize(model, list(IDS))
    return quantizer.export(model, folder, **options)


def test_the_generation_config_the_tokenizer_and_its_chat_template_are_there(tmp_path):
    from transformers import AutoTokenizer, GenerationConfig

    model, words = tiny_llama(num_hidden_layers=1), tokenizer()
    model.generation_config.update(max_new_tokens=9, do_sample=True, temperature=0.5, eos_token_id=[2, 5])
    words.chat_template = TEMPLATE
    folder = exported(model, tmp_path / "out", tokenizer=words)
    generation = GenerationConfig.from_pretrained(folder)
    assert (generation.max_new_tokens, generation.temperature, generation.eos_token_id) == (9, 0.5, [2, 5])
    again = AutoTokenizer.from_pretrained(folder)
    assert again("t7").input_ids == words("t7").input_ids == [7]
    assert again.apply_chat_template([{"role": "user", "content": "t9"}], tokenize=False) == "<user>t9"


def test_a_processor_is_saved_whole(tmp_path):
    from transformers import Wav2Vec2FeatureExtractor, Wav2Vec2Processor

    processor = Wav2Vec2Processor(Wav2Vec2FeatureExtractor(sampling_rate=8000), tokenizer())
    folder = exported(tiny_llama(num_hidden_layers=1), tmp_path / "out", tokenizer=processor)
    again = Wav2Vec2Processor.from_pretrained(folder)
    assert again.feature_extractor.sampling_rate == 8000 and again.tokenizer("t7").input_ids == [7]


def test_tied_embeddings_are_stored_once_and_described_as_tied(tmp_path):
    folder = exported(tiny_llama(num_hidden_layers=1, tie_word_embeddings=True), tmp_path / "out")
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is True
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert "model.embed_tokens.weight" in file.keys() and "lm_head.weight" not in file.keys()  # noqa: SIM118
    again = load_quantized(folder)
    assert again.lm_head.weight is again.model.embed_tokens.weight


@pytest.mark.parametrize("shards", [False, True])
def test_every_weights_file_is_marked_as_pytorchs(shards, tmp_path, monkeypatch):
    if shards:
        monkeypatch.setattr(export, "SHARD", 4000)
        monkeypatch.setattr(model_files, "MAX_SHARD", "10KB")
    folder = exported(tiny_llama(num_hidden_layers=1), tmp_path / "out")
    files = sorted(folder.glob("*.safetensors"))
    assert (len(files) > 3) == shards and (folder / "model.safetensors.index.json").exists() == shards
    for file in files:
        with safe_open(file, "pt") as opened:
            assert opened.metadata()["format"] == "pt"  # without it transformers refuses the file


def test_float32_norms_of_a_bfloat16_model_keep_their_dtype_in_the_file(tmp_path):
    model = tiny_llama(num_hidden_layers=1).bfloat16()
    model.model.norm.float()
    folder = exported(Widening.of(model), tmp_path / "out")
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert file.get_tensor("model.norm.weight").dtype == torch.float32
        assert file.get_tensor("model.layers.0.input_layernorm.weight").dtype == torch.bfloat16
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"


class Widening:
    """The last norm widens; what follows it wants the model's dtype again."""

    @staticmethod
    def of(model: Any) -> Any:
        model.model.norm.register_forward_hook(lambda module, inputs, output: output.bfloat16())
        return model


# --- models with code of their own ---

CODE = {
    "configuration_own.py": """
from transformers import LlamaConfig

class OwnConfig(LlamaConfig):
    model_type = "own_llama"
""",
    "modeling_own.py": """
from transformers import LlamaForCausalLM
from .configuration_own import OwnConfig

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig

    def forward(self, input_ids=None, **kwargs):
        output = super().forward(input_ids=input_ids, **kwargs)
        output.logits = output.logits + 1
        return output
""",
}
AUTO_MAP = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}


@pytest.fixture(scope="module")
def own_code(
    tmp_path_factory: pytest.TempPathFactory, modules_cache: Callable[[Path], AbstractContextManager[None]]
) -> Any:
    """(a quantized model whose class lies in the folder it was loaded from, its export)"""
    from transformers import AutoModelForCausalLM

    source = tmp_path_factory.mktemp("code") / "own-model"
    tiny_llama(num_hidden_layers=1).save_pretrained(source)
    for name, text in CODE.items():
        (source / name).write_text(text)
    config = json.loads((source / "config.json").read_text())
    config.update(model_type="own_llama", architectures=["OwnForCausalLM"], auto_map=AUTO_MAP)
    (source / "config.json").write_text(json.dumps(config))
    with modules_cache(source.parent / "modules"):
        model = AutoModelForCausalLM.from_pretrained(source, trust_remote_code=True)
        yield model, exported(model, source.parent / "out")


def test_the_code_of_a_model_comes_along(own_code):
    model, folder = own_code
    for name, text in CODE.items():
        assert (folder / name).read_text() == text
    config = json.loads((folder / "config.json").read_text())
    assert config["auto_map"] == AUTO_MAP and config["architectures"] == ["OwnForCausalLM"]
    # The export's proof ran it, and imported nothing: all that is cached is what the model was loaded from.
    cached = (folder.parent / "modules").rglob("modeling_own.py")
    assert {file.parent.parent.name for file in cached} == {"own_hyphen_model"}
    again = load_quantized(folder, trust_remote_code=True)
    assert type(again).__name__ == "OwnForCausalLM"
    assert torch.equal(again(IDS).logits, model.eval()(IDS).logits)


def test_code_that_is_not_trusted_is_not_run_and_the_error_names_the_remedy(own_code, tmp_path):
    folder = Path(shutil.copytree(own_code[1], tmp_path / "copy"))
    for name in CODE:
        (folder / name).write_text("raise SystemExit('was run')")
    with pytest.raises(CheckpointError, match=r"modeling_own\.OwnForCausalLM.*trust_remote_code=True"):
        load_quantized(folder)
    with pytest.raises(SystemExit):
        load_quantized(folder, trust_remote_code=True)


def test_a_class_that_is_in_neither_transformers_nor_the_folder_is_refused(own_code, tmp_path):
    folder = Path(shutil.copytree(own_code[1], tmp_path / "copy"))
    config = json.loads((folder / "config.json").read_text())
    del config["auto_map"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="has no code for it"):
        load_quantized(folder, trust_remote_code=True)


def test_a_generation_config_that_transformers_would_not_save_is_refused_before_the_work(tmp_path):
    model, quantizer = tiny_llama(num_hidden_layers=1), QuantizeModule(SMALL)
    model.generation_config.temperature = 0.6  # without do_sample
    with pytest.raises(ExportError, match="(?s)generation_config cannot be saved.*do_sample"):
        quantizer.quantize(model, list(IDS), export_dir=tmp_path / "out")
    assert type(model.model.layers[0].mlp.up_proj) is torch.nn.Linear and not any(tmp_path.iterdir())


def test_code_beside_a_class_that_transformers_has_is_neither_needed_nor_run(tmp_path):
    model = tiny_llama(num_hidden_layers=1)
    model.config.auto_map = {"AutoModelForCausalLM": "somebody/repo--modeling.LlamaForCausalLM"}
    folder = exported(model, tmp_path / "out")
    assert type(load_quantized(folder)).__module__.startswith("transformers.models")
