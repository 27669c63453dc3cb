"""AutoGPTQForCausalLM: the classic script as written, and every option of its two loaders."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from gptq_plugin import QuantizeConfig, QuantizeModule, load_quantized
from gptq_plugin.autogptq import AutoGPTQForCausalLM, BaseGPTQForCausalLM, BaseQuantizeConfig
from gptq_plugin.autogptq.options import IGNORED_LOADING, IGNORED_LOADING_FLOAT, REFUSED_LOADING
from gptq_plugin.errors import CheckpointError

from hub_caches import cache_checkpoint
from paths import FIXTURES


@pytest.fixture(scope="module")
def export(opt: Path, texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the first half of the classic script writes."""
    folder = tmp_path_factory.mktemp("autogptq") / "opt-4bit-128g"

    tokenizer = AutoTokenizer.from_pretrained(str(opt), use_fast=True)
    examples = [tokenizer(text) for text in texts]
    quantize_config = BaseQuantizeConfig(bits=4, group_size=128, damp_percent=0.1, desc_act=False)
    model = AutoGPTQForCausalLM.from_pretrained(str(opt), quantize_config)
    with pytest.warns(UserWarning, match="quantize ignores use_triton"):
        model.quantize(examples, use_triton=False)
    model.save_quantized(str(folder), use_safetensors=True)
    tokenizer.save_pretrained(str(folder))

    return folder


def test_the_classic_script_writes_the_files_of_quantize_module(
    export: Path, reference: Path, same_files: Callable[[Path, Path], None]
) -> None:
    same_files(export, reference)


def test_the_classic_script_generates(export: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(str(export))
    with pytest.warns(UserWarning, match="from_quantized ignores use_triton"):
        model = AutoGPTQForCausalLM.from_quantized(str(export), device_map="auto", use_triton=False)
    inputs = tokenizer("The assignment statement", return_tensors="pt").to(model.device)
    tokens = model.generate(**inputs, max_new_tokens=50, min_new_tokens=50, do_sample=False)
    assert tokens.shape == (1, inputs["input_ids"].shape[1] + 50)
    plain = load_quantized(export).generate(**inputs.to("cpu"), max_new_tokens=50, min_new_tokens=50, do_sample=False)
    assert torch.equal(tokens.cpu(), plain)
    assert tokenizer.decode(tokens[0]).startswith("The assignment statement")


@pytest.mark.gpu
def test_a_model_on_the_cpu_is_quantized_on_the_gpu_and_stays(opt: Path, texts: list[str], tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(opt)
    model = AutoGPTQForCausalLM.from_pretrained(opt, BaseQuantizeConfig(4, 128), torch_dtype=torch.float16)
    torch.cuda.reset_peak_memory_stats()
    model.quantize([tokenizer(text) for text in texts])
    assert torch.cuda.max_memory_allocated() > 0
    assert {tensor.device.type for tensor in model.state_dict().values()} == {"cpu"}
    model.save_quantized(tmp_path / "out")
    loaded = AutoGPTQForCausalLM.from_quantized(tmp_path / "out", device="cuda:0")
    inputs = tokenizer("The assignment statement", return_tensors="pt").to(loaded.device)
    assert loaded.device == torch.device("cuda:0")
    assert loaded.generate(**inputs, max_new_tokens=5, min_new_tokens=5).is_cuda


def test_a_loaded_model_is_the_model_and_knows_how_it_was_quantized(export: Path) -> None:
    model = AutoGPTQForCausalLM.from_quantized(export, device="cpu")
    assert isinstance(model, BaseGPTQForCausalLM)
    assert model.quantized
    assert (model.config.model_type, model.device.type, model.hf_device_map) == ("opt", "cpu", None)
    assert model.quantize_config == BaseQuantizeConfig(4, 128, 0.1, False, model_name_or_path=str(export))
    tokens = torch.arange(8)[None]
    assert torch.equal(model(tokens).logits, load_quantized(export)(tokens).logits)
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = model.no_such_thing
    with pytest.raises(RuntimeError, match=f"was loaded quantized: copy {export}"):
        model.save_quantized(export.parent / "again")
    with pytest.raises(RuntimeError, match="quantized already"):
        model.quantize([])


def test_the_script_may_run_again_and_keeps_the_tokenizer(opt: Path, texts: list[str], tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(opt)
    tokenizer.save_pretrained(tmp_path / "out")  # before the model: some scripts do
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    model = AutoGPTQForCausalLM.from_pretrained(opt, BaseQuantizeConfig(bits=4, group_size=128))
    model.quantize([tokenizer(text) for text in texts[:4]])
    for _ in range(2):
        assert model.save_quantized(tmp_path / "out") == (tmp_path / "out").resolve()
        assert {name: (tmp_path / "out" / name).read_bytes() for name in before} == before
    assert load_quantized(tmp_path / "out") is not None


def test_all_examples_count_and_none_is_cut(opt: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = AutoGPTQForCausalLM.from_pretrained(opt, BaseQuantizeConfig(bits=4, group_size=32))
    given: dict[str, Any] = {}

    def quantize(self: QuantizeModule, model: Any, samples: Any, **options: Any) -> str:
        given.update(config=self.config, offload=self.offload_activations, samples=samples, **options)
        return "report"

    monkeypatch.setattr(QuantizeModule, "quantize", quantize)
    examples = [{"input_ids": [1] * 2100, "attention_mask": [1] * 2100}] * 130
    assert model.quantize(examples, batch_size=2, cache_examples_on_gpu=False) == "report"
    config = BaseQuantizeConfig(bits=4, group_size=32).forwarded(nsamples=130, model_seqlen=2100, batch_size=2)
    assert given["config"] == config
    assert (given["offload"], len(given["samples"])) == (True, 130)


def test_few_short_examples_leave_the_defaults(opt: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = AutoGPTQForCausalLM.from_pretrained(opt, BaseQuantizeConfig(bits=4, group_size=32))
    given: list[tuple[QuantizeConfig, bool | None]] = []
    monkeypatch.setattr(
        QuantizeModule, "quantize", lambda self, *_, **__: given.append((self.config, self.offload_activations))
    )
    model.quantize([{"input_ids": [1, 2]}])
    assert given == [(BaseQuantizeConfig(bits=4, group_size=32).forwarded(), None)]


def test_texts_are_taken_with_a_tokenizer_which_is_saved(opt: Path, texts: list[str], tmp_path: Path) -> None:
    model = AutoGPTQForCausalLM.from_pretrained(opt, BaseQuantizeConfig(bits=4, group_size=128))
    model.quantize(texts[:4], tokenizer=AutoTokenizer.from_pretrained(opt))
    model.save_pretrained(tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (opt / "tokenizer.json").read_bytes()


def test_the_float_model_comes_as_stored_or_in_the_dtype_asked_for(opt: Path) -> None:
    config = BaseQuantizeConfig()
    assert AutoGPTQForCausalLM.from_pretrained(opt, config).dtype == torch.float32
    with pytest.warns(UserWarning) as caught:
        model = AutoGPTQForCausalLM.from_pretrained(
            opt,
            quantize_config=config,
            torch_dtype=torch.float16,
            attn_implementation="eager",
            **dict.fromkeys(IGNORED_LOADING_FLOAT, 1),
        )
    assert (model.dtype, model.config._attn_implementation) == (torch.float16, "eager")
    assert not model.quantized
    message = str(caught[0].message)
    assert all(name in message for name in IGNORED_LOADING_FLOAT)
    assert caught[0].filename == __file__


@pytest.mark.parametrize(
    ("config", "options", "error", "match"),
    [
        (BaseQuantizeConfig(true_sequential=False), {}, ValueError, "Lock-step .* leave the option out"),
        (
            BaseQuantizeConfig(),
            {"torch_dtpe": 1},
            ValueError,
            "unknown option 'torch_dtpe': did you mean 'torch_dtype'",
        ),
        (QuantizeConfig(), {}, TypeError, r"QuantizeConfig goes to QuantizeModule\(config\)"),
    ],
)
def test_a_float_model_that_could_not_be_quantized_is_not_loaded(
    config: Any, options: dict[str, Any], error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        AutoGPTQForCausalLM.from_pretrained("no/such-model", config, **options)


def test_options_of_kernels_are_ignored_in_one_warning_when_a_checkpoint_is_loaded(export: Path) -> None:
    with pytest.warns(UserWarning) as caught:
        model = AutoGPTQForCausalLM.from_quantized(
            export, device_map={"": "cpu"}, device="cpu", use_safetensors=True, **dict.fromkeys(IGNORED_LOADING, 1)
        )
    message = str(caught[0].message)
    assert all(name in message for name in (*IGNORED_LOADING, "device (device_map places the model)"))
    assert caught[0].filename == __file__
    assert model.generate(torch.tensor([[5]]), max_new_tokens=1).shape == (1, 2)


@pytest.mark.parametrize(
    ("option", "value", "remedy"),
    [
        ("use_safetensors", False, "Convert them to safetensors once"),
        ("max_memory", {0: "20GIB"}, r"device_map=\{module: device\}, or .*gptq_plugin.quantized_config\(folder\)"),
        ("checkpoint_format", "gptq", "write another format as checkpoint_format into its quantize_config.json"),
        ("quant_config_name", "q.json", "rename the file"),
    ],
)
def test_options_that_would_change_what_is_loaded_are_refused(option: str, value: Any, remedy: str) -> None:
    assert option in REFUSED_LOADING
    with pytest.raises(ValueError, match=rf"from_quantized does not take {option}=.*{remedy}"):
        AutoGPTQForCausalLM.from_quantized("no/such-checkpoint", **{option: value})


def test_every_option_refused_at_loading_is_tested() -> None:
    assert set(REFUSED_LOADING) == {"use_safetensors", "max_memory", "checkpoint_format", "quant_config_name"}


def test_an_unknown_option_of_from_quantized_names_the_nearest() -> None:
    with pytest.raises(ValueError, match="unknown option 'devicemap': did you mean 'device_map'"):
        AutoGPTQForCausalLM.from_quantized("no/such-checkpoint", devicemap="auto")


def test_a_given_quantize_config_must_agree_with_the_folder(export: Path) -> None:
    AutoGPTQForCausalLM.from_quantized(export, quantize_config=BaseQuantizeConfig(4, 128))
    with pytest.raises(ValueError, match="quantize_config has group_size=64, and .* with group_size=128: leave"):
        AutoGPTQForCausalLM.from_quantized(export, quantize_config=BaseQuantizeConfig(4, 64))


def test_weights_under_autogptqs_name_are_loaded(export: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(export, tmp_path / "old")
    (folder / "model.safetensors").rename(folder / "gptq_model-4bit-128g.safetensors")
    model = AutoGPTQForCausalLM.from_quantized(folder, device="cpu", model_basename="gptq_model-4bit-128g")
    assert model.quantize_config.group_size == 128
    with pytest.warns(UserWarning, match="='gptq_model-4bit-128g' is ignored: .* holds model.safetensors"):
        AutoGPTQForCausalLM.from_quantized(export, device="cpu", model_basename="gptq_model-4bit-128g")
    shutil.copy(export / "model.safetensors", folder)
    with pytest.raises(CheckpointError, match="holds gptq_model-4bit-128g.safetensors, model.safetensors"):
        AutoGPTQForCausalLM.from_quantized(folder, model_basename="model")


def test_a_checkpoint_is_loaded_by_its_name_on_the_hub(export: Path, tmp_path: Path) -> None:
    cache_checkpoint(tmp_path, "someone/opt-4bit", export)
    model = AutoGPTQForCausalLM.from_quantized(
        "someone/opt-4bit", device="cpu", cache_dir=tmp_path, torch_dtype=torch.float16
    )
    assert (model.dtype, model.quantize_config.model_name_or_path) == (torch.float16, "someone/opt-4bit")
    found = BaseQuantizeConfig.from_pretrained("someone/opt-4bit", cache_dir=tmp_path)
    assert (found.bits, found.damp_percent) == (4, 0.1)


def test_it_is_not_made_by_itself() -> None:
    with pytest.raises(TypeError, match="call its from_pretrained or from_quantized"):
        AutoGPTQForCausalLM()


def test_a_field_that_cannot_be_is_refused_with_its_file(tmp_path: Path) -> None:
    folder = tmp_path / "x"
    shutil.copytree(FIXTURES / "autogptq-w4g32", folder)
    file = folder / "config.json"
    content = json.loads(file.read_text())
    content["quantization_config"]["true_sequential"] = 8
    file.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"x/\w+\.json describes no GPTQ checkpoint: true_sequential must be"):
        AutoGPTQForCausalLM.from_quantized(folder, device="cpu")
