"""optimum's GPTQQuantizer: the classic script as written, what calibrates, what is quantized, and every option."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from gptq_plugin import QuantizeConfig, QuantizeModule, QuantLinear, load_quantized
from gptq_plugin.autogptq import AutoGPTQForCausalLM, GPTQQuantizer, load_quantized_model
from gptq_plugin.autogptq.options import IGNORED_LOADING, IGNORED_QUANTIZING
from gptq_plugin.errors import TargetError

from hub_caches import cache_dataset
from models import tiny_opt


def codes_of(text: str) -> list[int]:
    """A tokenizer."""
    return [ord(character) % 64 for character in text]


@pytest.fixture(scope="module")
def export(opt: Path, texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the first half of the classic script writes."""
    folder = tmp_path_factory.mktemp("optimum") / "opt-4bit-128g"

    tokenizer = AutoTokenizer.from_pretrained(str(opt))
    model = AutoModelForCausalLM.from_pretrained(str(opt), torch_dtype=torch.float32)
    with pytest.warns(UserWarning, match="GPTQQuantizer ignores use_cuda_fp16"):
        quantizer = GPTQQuantizer(
            bits=4,
            dataset=texts,
            model_seqlen=2048,
            group_size=128,
            damp_percent=0.1,
            desc_act=False,
            sym=True,
            use_cuda_fp16=True,
        )
    quantized = quantizer.quantize_model(model, tokenizer)
    quantizer.save(quantized, str(folder), use_safetensors=True)
    tokenizer.save_pretrained(str(folder))

    return folder


def test_the_classic_script_writes_the_files_of_quantize_module(
    export: Path, reference: Path, same_files: Callable[[Path, Path], None]
) -> None:
    same_files(export, reference)


def test_the_classic_script_generates_by_either_loader(export: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(str(export))
    inputs = tokenizer("The assignment statement", return_tensors="pt")
    how = {"max_new_tokens": 50, "min_new_tokens": 50, "do_sample": False}
    wanted = load_quantized(export).generate(**inputs, **how)
    with pytest.warns(UserWarning, match="use_triton"):
        model = AutoGPTQForCausalLM.from_quantized(str(export), device_map="auto", use_triton=False)
    assert torch.equal(model.generate(**inputs.to(model.device), **how).cpu(), wanted)
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(export))
    loaded = load_quantized_model(empty, save_folder=str(export), device_map="auto")
    assert torch.equal(loaded.generate(**inputs.to(loaded.device), **how).cpu(), wanted)
    assert wanted.shape[1] == inputs["input_ids"].shape[1] + 50


def test_the_script_may_run_again(texts: list[str], opt: Path, tmp_path: Path) -> None:
    for _ in range(2):
        quantizer = GPTQQuantizer(4, texts[:4])
        model = quantizer.quantize_model(AutoModelForCausalLM.from_pretrained(opt), str(opt))  # the tokenizer by name
        quantizer.save(model, tmp_path / "out")
    assert load_quantized_model(model, tmp_path / "out").config.model_type == "opt"
    assert (tmp_path / "out" / "tokenizer.json").is_file()


class Seen(Exception):
    """Ends quantization once its data is known."""


@pytest.fixture
def forwarded(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What reaches QuantizeModule."""
    given: dict[str, Any] = {}

    def quantize(self: QuantizeModule, model: Any, samples: Any, **options: Any) -> None:
        given.update(config=self.config, samples=samples, **options)
        raise Seen

    monkeypatch.setattr(QuantizeModule, "quantize", quantize)
    return given


def test_options_left_out_are_those_of_quantize_config(forwarded: dict[str, Any]) -> None:
    with pytest.raises(Seen):
        GPTQQuantizer(3, ["a text"]).quantize_model(tiny_opt(), codes_of)
    assert forwarded["config"] == QuantizeConfig(bits=3, group_size=128, damp_percent=0.1)
    assert (forwarded["samples"], forwarded["tokenizer"]) == (["a text"], codes_of)


def test_every_option_reaches_quantize_config(forwarded: dict[str, Any]) -> None:
    quantizer = GPTQQuantizer(
        8,
        ["a text"] * 130,
        64,
        0.02,
        True,
        act_group_aware=False,
        sym=False,
        model_seqlen=77,
        batch_size=3,
        checkpoint_format="GPTQ_v2",
    )
    with pytest.raises(Seen):
        quantizer.quantize_model(tiny_opt(), codes_of)
    assert forwarded["config"] == QuantizeConfig(
        bits=8,
        group_size=64,
        damp_percent=0.02,
        desc_act=True,
        static_groups=False,
        sym=False,
        model_seqlen=77,
        batch_size=3,
        nsamples=130,
        checkpoint_format="gptq_v2",
    )
    assert GPTQQuantizer(4, format="compressed-tensors").config.checkpoint_format == "compressed-tensors"


def test_tokenized_samples_are_taken_uncut_unless_model_seqlen_cuts_them(forwarded: dict[str, Any]) -> None:
    tokenized = [{"input_ids": [[5] * 2100], "attention_mask": [[1] * 2100]}]
    for model_seqlen, wanted in ((None, 2100), (300, 300)):
        with pytest.raises(Seen):
            GPTQQuantizer(4, tokenized, model_seqlen=model_seqlen).quantize_model(tiny_opt())
        assert forwarded["config"].model_seqlen == wanted
        assert forwarded["samples"][0]["input_ids"].shape == (2100,)


def test_a_named_data_set_gives_128_samples_no_longer_than_the_model_takes(
    forwarded: dict[str, Any], opt: Path, texts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path))
    cache_dataset(tmp_path, "Salesforce/wikitext", texts, config="wikitext-2-raw-v1")
    for model_seqlen, wanted in ((None, 512), (40, 40)):
        quantizer = GPTQQuantizer(4, "wikitext2", model_seqlen=model_seqlen)
        with pytest.raises(Seen):
            quantizer.quantize_model(tiny_opt(), opt)
        assert [sample.shape for sample in forwarded["samples"]] == [(wanted,)] * 128


def test_without_data_there_is_nothing_to_calibrate_on() -> None:
    with pytest.raises(ValueError, match=r"give GPTQQuantizer\(dataset=\.\.\.\), a list of texts"):
        GPTQQuantizer(4).quantize_model(tiny_opt())


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({"modules_in_block_to_quantize": [["self_attn.q_proj"], ["fc1"]]}, ("q_proj", "fc1")),
        ({"modules_in_block_to_quantize": ["fc2"], "block_name_to_quantize": "model.decoder.layers"}, ("fc2",)),
        ({"block_name_to_quantize": "model.decoder.layers.1"}, ("1.self_attn", "1.fc")),
    ],
)
def test_only_the_named_layers_of_the_named_blocks_are_quantized(options: dict[str, Any], wanted: Any) -> None:
    tokens = [{"input_ids": list(range(3, 300))}]
    model = GPTQQuantizer(4, tokens, **options).quantize_model(tiny_opt())
    kinds = {name: isinstance(m, QuantLinear) for name, m in model.named_modules() if hasattr(m, "in_features")}
    layers = [name for name in kinds if "layers." in name]
    assert len(layers) == 12
    assert all(kinds[name] == any(part in name for part in wanted) for name in layers)


def test_layers_beside_the_blocks_are_left_float() -> None:
    model = tiny_opt(word_embed_proj_dim=64)  # with project_in and project_out, as opt-350m
    tokens = [{"input_ids": list(range(3, 300))}]
    GPTQQuantizer(4, tokens, 64, block_name_to_quantize="model.decoder.layers").quantize_model(model)
    assert isinstance(model.model.decoder.project_in, nn.Linear)
    assert isinstance(model.model.decoder.layers[0].fc1, QuantLinear)


@pytest.mark.parametrize(
    "options",
    [
        {"block_name_to_quantize": "model.layers"},
        {"block_name_to_quantize": "model.decoder.layer"},  # no part of a name
        {"modules_in_block_to_quantize": [["proj"]]},
        {"modules_in_block_to_quantize": []},
    ],
)
def test_names_that_leave_nothing_are_refused_with_the_layers(options: dict[str, Any]) -> None:
    with pytest.raises(TargetError, match=r"no layer of the model is in .* its layers are model.decoder.layers.0"):
        GPTQQuantizer(4, [[1, 2]], **options).quantize_model(tiny_opt())


def test_every_ignored_option_is_taken_with_a_warning() -> None:
    with pytest.warns(UserWarning) as caught:
        GPTQQuantizer(4, **dict.fromkeys(IGNORED_QUANTIZING))
    assert all(name in str(caught[0].message) for name in IGNORED_QUANTIZING)
    assert caught[0].filename == __file__


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"true_sequential": False}, "Lock-step calibration .* leave the option out"),
        ({"data_set": ["x"]}, "GPTQQuantizer: unknown option 'data_set': did you mean 'dataset'"),
        ({"format": "marlin"}, "checkpoint_format must be one of"),
        ({"damp_percent": 2}, "damp_percent must be a number"),
    ],
)
def test_options_that_cannot_work_are_refused_at_once(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        GPTQQuantizer(4, **options)


def test_options_past_desc_act_need_their_names_since_versions_order_them_differently() -> None:
    with pytest.raises(TypeError, match="positional"):
        GPTQQuantizer(4, None, 128, 0.1, False, True)  # type: ignore[misc]


@pytest.mark.parametrize("option", ["safe_serialization", "use_safetensors"])
def test_pickled_weights_are_not_written(option: str, tmp_path: Path) -> None:
    quantizer = GPTQQuantizer(4)
    with pytest.raises(ValueError, match=f"save does not take {option}=False: weights are written as safetensors"):
        quantizer.save(tiny_opt(), tmp_path / "out", **{option: False})
    with pytest.raises(ValueError, match="unknown option 'use_safetensor'"):
        quantizer.save(tiny_opt(), tmp_path / "out", use_safetensor=True)


def test_the_size_of_shards_is_ignored_with_a_warning(tmp_path: Path) -> None:
    quantizer = GPTQQuantizer(4, [{"input_ids": list(range(3, 300))}])
    model = quantizer.quantize_model(tiny_opt())
    with pytest.warns(UserWarning, match=r"GPTQQuantizer.save ignores max_shard_size \(shards hold 1 GB"):
        quantizer.save(model, tmp_path / "one", max_shard_size="10GB", safe_serialization=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        quantizer.save(model, tmp_path / "two")


def test_its_options_make_it_again() -> None:
    quantizer = GPTQQuantizer(3, "c4", 64, model_seqlen=9, sym=False, modules_in_block_to_quantize=[["fc1"]])
    again = GPTQQuantizer.from_dict(quantizer.to_dict())
    assert again.to_dict() == quantizer.to_dict()
    assert again.config == quantizer.config


def test_load_quantized_model_ignores_and_refuses_as_from_quantized(export: Path) -> None:
    with pytest.warns(UserWarning) as caught:
        load_quantized_model(tiny_opt(), export, **dict.fromkeys(IGNORED_LOADING))
    assert all(name in str(caught[0].message) for name in IGNORED_LOADING)
    for option, value in (("max_memory", {0: "1GB"}), ("quant_config_name", "q.json")):
        with pytest.raises(ValueError, match=f"load_quantized_model does not take {option}="):
            load_quantized_model(tiny_opt(), export, **{option: value})
    with pytest.raises(ValueError, match="unknown option 'devicemap': did you mean 'device_map'"):
        load_quantized_model(tiny_opt(), export, devicemap="auto")


def test_load_quantized_model_fills_a_plain_module(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, fresh = (nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 32)) for _ in range(2))
    QuantizeModule(group_size=32).quantize(model, [torch.randn(200, 64)], export_dir=tmp_path / "out")
    assert load_quantized_model(fresh, tmp_path / "out") is fresh
    x = torch.randn(3, 64)
    assert torch.equal(fresh(x), model(x))
