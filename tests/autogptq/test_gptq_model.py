"""Saving and uploading what AutoGPTQForCausalLM gives: its options, and when there is nothing to save."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from gptq_plugin.autogptq import BaseGPTQForCausalLM, BaseQuantizeConfig
from gptq_plugin.autogptq.options import IGNORED_SAVING, KERNELS
from gptq_plugin.errors import ExportError

from models import tiny_opt

EXAMPLES = [{"input_ids": list(range(3, 300)), "attention_mask": [1] * 297}]


@pytest.fixture(scope="module")
def quantized() -> BaseGPTQForCausalLM:
    model = BaseGPTQForCausalLM(tiny_opt(), BaseQuantizeConfig(bits=4, group_size=64, damp_percent=0.1))
    with pytest.warns(UserWarning) as caught:
        report = model.quantize(EXAMPLES, **dict.fromkeys(KERNELS, False))
    assert all(name in str(caught[0].message) for name in KERNELS)
    assert len(report.modules) >= 12
    return model


def test_a_float_model_is_not_saved(tmp_path: Path) -> None:
    model = BaseGPTQForCausalLM(tiny_opt(), BaseQuantizeConfig())
    with pytest.raises(RuntimeError, match=r"not quantized yet: call quantize\(examples\) first"):
        model.save_quantized(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_quantized_model_is_not_quantized_again(quantized: BaseGPTQForCausalLM) -> None:
    with pytest.raises(RuntimeError, match="quantized already"):
        quantized.quantize(EXAMPLES)


def test_unknown_options_of_quantize_are_refused() -> None:
    model = BaseGPTQForCausalLM(tiny_opt(), BaseQuantizeConfig())
    with pytest.raises(ValueError, match="unknown option 'batchsize': did you mean 'batch_size'"):
        model.quantize(EXAMPLES, batchsize=1)


def test_options_of_saving_are_ignored_or_refused(quantized: BaseGPTQForCausalLM, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="save_quantized does not take use_safetensors=False: weights are written as"):
        quantized.save_quantized(tmp_path / "out", use_safetensors=False)
    with pytest.raises(ValueError, match="unknown option 'use_safetensor': did you mean 'use_safetensors'"):
        quantized.save_quantized(tmp_path / "out", use_safetensor=True)
    assert not (tmp_path / "out").exists()
    with pytest.warns(UserWarning) as caught:
        quantized.save_quantized(tmp_path / "out", True, {"by": "me"}, max_shard_size="5GB")
    assert all(name in str(caught[0].message) for name in IGNORED_SAVING)
    assert caught[0].filename == __file__


def test_the_name_of_the_weights_is_ignored_and_set(quantized: BaseGPTQForCausalLM, tmp_path: Path) -> None:
    quantized.quantize_config.model_file_base_name = "gptq_model-4bit-64g"
    with pytest.warns(UserWarning, match="model_file_base_name='gptq_model-4bit-64g' is ignored: .*model.safetensors"):
        quantized.save_quantized(tmp_path / "out")
    assert quantized.quantize_config.model_file_base_name == "model"
    assert quantized.quantize_config.model_name_or_path == str(tmp_path / "out")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        quantized.save_pretrained(tmp_path / "out")


def test_a_folder_with_other_files_is_left_alone(quantized: BaseGPTQForCausalLM, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_text("the float model")
    (tmp_path / "tokenizer.json").write_text("its tokenizer")
    with pytest.raises(ExportError, match="is not an export"):
        quantized.save_quantized(tmp_path)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        "model.safetensors": "the float model",
        "tokenizer.json": "its tokenizer",
    }


def test_what_was_saved_is_uploaded(
    quantized: BaseGPTQForCausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []

    class Hub:
        def __init__(self, token: Any) -> None:
            calls.append(token)

        def create_repo(self, name: str, **options: Any) -> None:
            calls.append((name, options))

        def upload_folder(self, **options: Any) -> str:
            assert (Path(options["folder_path"]) / "model.safetensors").is_file()
            calls.append(options)
            return "done"

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    folder = tmp_path / "out"
    assert quantized.push_to_hub("me/opt", folder, use_safetensors=True, use_auth_token="t", private=True) == "done"
    assert calls[:2] == ["t", ("me/opt", {"private": True, "exist_ok": True})]
    assert calls[2] == {
        "repo_id": "me/opt",
        "folder_path": str(folder),
        "commit_message": "Upload a quantized model",
        "create_pr": False,
    }
    assert quantized.push_to_hub("me/opt") == "done"  # the folder saved last
    for last in (None, folder):
        with pytest.raises(ValueError, match="unknown option 'privat'"):
            quantized.push_to_hub("me/opt", last, privat=True)
    never = BaseGPTQForCausalLM(tiny_opt(), BaseQuantizeConfig())
    with pytest.raises(RuntimeError, match=r"in no folder yet: give push_to_hub\(repo_id, save_dir=FOLDER\)"):
        never.push_to_hub("me/opt")
