"""Loading checkpoints: those other tools wrote (tests/fixtures), and broken ones."""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from gptq_plugin import load_quantized
from gptq_plugin.checkpoint import load
from gptq_plugin.checkpoint.checkpoint import Checkpoint
from gptq_plugin.errors import CheckpointError
from gptq_plugin.layers.packing import (
    pack_weight,
    pack_zeros,
    unpack_weight,
    unpack_zeros,
    zeros_from_disk,
    zeros_to_disk,
)
from gptq_plugin.layers.qlinear import QuantLinear

from paths import FIXTURES

COMPRESSED = sorted(path.name for path in FIXTURES.glob("llmcompressor-*") if path.is_dir())
NAMES = sorted(path.name for path in FIXTURES.iterdir() if path.is_dir() and path.name not in COMPRESSED)
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


# --- files of other tools -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_a_foreign_checkpoint_computes_what_the_independent_reader_computes(name: str) -> None:
    reference = expected(name)
    model = load_quantized(FIXTURES / name, dtype=torch.float32)
    assert not model.training
    assert any(isinstance(module, QuantLinear) for module in model.modules())
    torch.testing.assert_close(logits_of(model, reference), reference["logits"], atol=2e-4, rtol=0)
    ids = reference["input_ids"]
    generated = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=len(reference["greedy"]),
        min_new_tokens=len(reference["greedy"]),
    )
    assert torch.equal(generated[0, ids.shape[1] :], reference["greedy"])


@pytest.mark.parametrize("name", NAMES)
def test_by_default_a_foreign_checkpoint_runs_in_its_own_dtype(name: str) -> None:
    reference = expected(name)
    model = load_quantized(FIXTURES / name)
    written = "bfloat16" if name.startswith("gptqmodel") and not name.endswith("v2") else "float16"
    assert model.dtype == getattr(torch, written)
    assert all(m.scales.dtype == torch.float16 for m in model.modules() if isinstance(m, QuantLinear))
    assert (logits_of(model, reference) - reference["logits"]).abs().max() < 0.15


@pytest.mark.parametrize("name", NAMES)
def test_codes_and_zeros_pack_back_to_the_bytes_the_tool_wrote(name: str) -> None:
    checkpoint = Checkpoint.open(FIXTURES / name)
    assert len(checkpoint.layers) >= 6
    for layer in checkpoint.layers.values():
        bits, stored = layer.bits, checkpoint.read(f"{layer.name}.qweight")
        assert torch.equal(pack_weight(unpack_weight(stored, bits, layer.in_features), bits), stored)
        zeros = checkpoint.read(f"{layer.name}.qzeros")
        assert torch.equal(pack_zeros(unpack_zeros(zeros, bits, layer.out_features), bits), zeros)
        true = zeros_from_disk(zeros, bits, layer.out_features, checkpoint.checkpoint_format)
        back = zeros_to_disk(true, bits, layer.out_features, checkpoint.checkpoint_format)
        assert torch.equal(back, zeros)


def test_the_fixtures_cover_every_width_and_both_formats_with_and_without_act_order() -> None:
    seen = set()
    for name in NAMES:
        checkpoint = Checkpoint.open(FIXTURES / name)
        layer = checkpoint.layers[DOWN]
        g_idx = checkpoint.read(f"{DOWN}.g_idx")
        ordered = bool((g_idx.diff() >= 0).all())
        seen |= {
            (layer.bits, checkpoint.checkpoint_format),
            (layer.bits, "sorted" if ordered else "act-order"),
        }
    assert seen >= {(bits, kind) for bits in (2, 3, 4, 8) for kind in ("gptq", "gptq_v2", "sorted", "act-order")}


def test_zeros_read_one_too_high_are_noticed_by_the_logits(tmp_path: Path) -> None:
    name = "gptqmodel-w4g32"
    wrong = edited(name, tmp_path / "x", config=lambda c: set_quantization(c, checkpoint_format="gptq_v2", format=None))
    reference = expected(name)
    off = (logits_of(load_quantized(wrong, dtype=torch.float32), reference) - reference["logits"]).abs().max()
    assert off > 0.5


def test_group_indices_in_another_order_are_noticed_by_the_logits(tmp_path: Path) -> None:
    name = "gptqmodel-w4g32-desc-act"
    wrong = edited(name, tmp_path / "x", lambda s: s.update({f"{DOWN}.g_idx": s[f"{DOWN}.g_idx"].flip(0)}))
    reference = expected(name)
    off = (logits_of(load_quantized(wrong, dtype=torch.float32), reference) - reference["logits"]).abs().max()
    assert off > 0.1


def test_what_is_in_memory_is_described_truly_so_save_pretrained_round_trips(tmp_path: Path) -> None:
    name = "gptqmodel-w4g32-asym"  # v1 on disk, true zeros in memory
    reference = expected(name)
    model = load_quantized(FIXTURES / name, dtype=torch.float32)
    model.save_pretrained(tmp_path / "again")
    again = load_quantized(tmp_path / "again")
    assert torch.equal(logits_of(again, reference), logits_of(model, reference))


def test_the_generation_config_and_the_path_come_along(tmp_path: Path) -> None:
    folder = edited(LLAMA, tmp_path / "x")
    (folder / "generation_config.json").write_text(json.dumps({"max_new_tokens": 5, "pad_token_id": 3}))
    model = load_quantized(folder)
    assert model.generation_config.max_new_tokens == 5
    assert model.name_or_path == str(folder)


def test_a_config_that_names_no_dtype_is_loaded_in_that_of_its_weights(tmp_path: Path) -> None:
    folder = edited(LLAMA, tmp_path / "x", config=lambda c: c.pop("dtype"))
    assert load_quantized(folder).dtype == torch.float16


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", NAMES)
def test_on_a_gpu_it_computes_the_same(name: str) -> None:
    reference = expected(name)
    model = load_quantized(FIXTURES / name, device="cuda", dtype=torch.float32)
    on_gpu = {"input_ids": reference["input_ids"].cuda(), "logits": reference["logits"]}
    torch.testing.assert_close(logits_of(model, on_gpu).cpu(), reference["logits"], atol=0.02, rtol=0)


def test_tied_embeddings_stay_tied() -> None:
    model = load_quantized(FIXTURES / "gptqmodel-qwen2-bias-w4g32")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.model.layers[0].self_attn.q_proj.bias.abs().max() > 0


def test_group_indices_that_are_not_stored_follow_from_the_group_size_and_the_log_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = edited(LLAMA, tmp_path / "x", drop(".g_idx"))
    with caplog.at_level(logging.WARNING, logger="gptq_plugin"):
        model = load_quantized(folder, dtype=torch.float32)
    assert "stores no g_idx for model.layers.0" in caplog.text
    reference = expected(LLAMA)
    torch.testing.assert_close(logits_of(model, reference), reference["logits"], atol=2e-4, rtol=0)


def test_shards_named_by_an_index_are_all_read(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "x")
    reference = expected(LLAMA)
    model = load_quantized(folder, dtype=torch.float32)
    torch.testing.assert_close(logits_of(model, reference), reference["logits"], atol=2e-4, rtol=0)


def test_scales_in_another_dtype_are_taken_when_float16_holds_them_exactly(tmp_path: Path) -> None:
    folder = edited(LLAMA, tmp_path / "x", lambda s: s.update({k: v.float() for k, v in s.items() if "scales" in k}))
    reference = expected(LLAMA)
    model = load_quantized(folder, dtype=torch.float32)
    torch.testing.assert_close(logits_of(model, reference), reference["logits"], atol=2e-4, rtol=0)


def test_a_foreign_checkpoint_fills_a_model_the_user_built() -> None:
    from transformers import AutoConfig, LlamaForCausalLM

    config = AutoConfig.from_pretrained(FIXTURES / LLAMA)
    del config.quantization_config
    model = LlamaForCausalLM(config)
    assert load_quantized(FIXTURES / LLAMA, model=model, dtype=torch.float32) is model
    reference = expected(LLAMA)
    torch.testing.assert_close(logits_of(model, reference), reference["logits"], atol=2e-4, rtol=0)


# --- where it goes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device_map", ["auto", "balanced", {"": "cpu"}, {"model": "cpu", "lm_head": "cpu"}])
def test_a_device_map_is_understood_as_transformers_does(device_map: Any) -> None:
    pytest.importorskip("accelerate")
    reference = expected(LLAMA)
    model = load_quantized(FIXTURES / LLAMA, device_map=device_map, dtype=torch.float32)
    torch.testing.assert_close(logits_of(model, reference), reference["logits"], atol=2e-4, rtol=0)


@pytest.mark.parametrize("options", [{"device": "cuda"}, {"model": torch.nn.Linear(2, 2)}])
def test_a_device_map_together_with_a_device_or_a_model_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="device_map says where"):
        load_quantized(FIXTURES / LLAMA, device_map="auto", **options)


def test_a_layer_away_from_its_block_sends_its_output_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second device is "meta", from which nothing comes back, so that sending is noted and not done."""
    accelerate = pytest.importorskip("accelerate")
    fill, sent = load.fill, []

    def dispatch_and_fill(checkpoint: Any, model: Any, names: Any) -> None:
        accelerate.dispatch_model(model, {"model": "cpu", "lm_head": "cpu", DOWN: "meta"}, main_device="cpu")
        del model.hf_device_map  # it would say that "cpu" and "meta" are offloading
        fill(checkpoint, model, names)

    def send(value: Any, device: Any, **options: Any) -> Any:
        if not isinstance(value, torch.Tensor) or not value.is_meta or str(device) == "meta":
            return accelerate.utils.send_to_device(value, device, **options)
        sent.append(value.shape)
        return torch.zeros(value.shape, dtype=value.dtype)

    monkeypatch.setattr(load, "fill", dispatch_and_fill)
    model = load_quantized(FIXTURES / LLAMA, device_map={"": "cpu"}, dtype=torch.float32)
    assert model.get_submodule(DOWN).qweight.is_meta
    assert not model.get_submodule(UP).qweight.is_meta
    monkeypatch.setattr("accelerate.hooks.send_to_device", send)
    monkeypatch.setattr(QuantLinear, "_product", lambda self, x: x.new_zeros(*x.shape[:-1], self.out_features))
    with torch.no_grad():
        model(torch.zeros(1, 5, dtype=torch.long))
    assert sent == [(1, 5, model.config.hidden_size)]


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("device_map", ["balanced", {"model": 0, "lm_head": 1, DOWN: 1}])
def test_layers_on_two_gpus_get_their_inputs_there(device_map: Any) -> None:
    reference = expected(LLAMA)
    model = load_quantized(FIXTURES / LLAMA, device_map=device_map, dtype=torch.float32)
    if device_map != "balanced":
        assert model.get_submodule(DOWN).qweight.device.index == 1
        assert model.get_submodule(UP).qweight.device.index == 0
    on_gpu = {"input_ids": reference["input_ids"].cuda(), "logits": reference["logits"]}
    torch.testing.assert_close(logits_of(model, on_gpu).cpu(), reference["logits"], atol=0.02, rtol=0)


def test_a_hook_that_accelerate_put_on_a_place_moves_to_the_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """As for several devices, on the one there is: transformers dispatches before the layers are in their places."""
    accelerate = pytest.importorskip("accelerate")
    fill = load.fill

    def dispatch_and_fill(checkpoint: Any, model: Any, names: Any) -> None:
        where = {"model": "cpu", DOWN: "cpu", "lm_head": "cpu"}
        accelerate.dispatch_model(model, where, force_hooks=True)
        assert model.get_submodule(DOWN)._hf_hook is not None
        fill(checkpoint, model, names)

    monkeypatch.setattr(load, "fill", dispatch_and_fill)
    model = load_quantized(FIXTURES / LLAMA, dtype=torch.float32)
    layer = model.get_submodule(DOWN)
    assert isinstance(layer, QuantLinear)
    assert layer._hf_hook.execution_device == "cpu"
    assert layer._hf_hook.io_same_device  # the block adds its own tensors to the output
    assert layer.forward.__wrapped__.__func__ is QuantLinear.forward
    reference = expected(LLAMA)
    torch.testing.assert_close(logits_of(model, reference), reference["logits"], atol=2e-4, rtol=0)


def test_loading_keeps_no_second_copy_of_the_weights_in_memory(tmp_path: Path) -> None:
    """Files are mapped, so what counts is anonymous memory: that of the float tensors and of a layer or two."""
    write_large(tmp_path)
    script = f"""
import threading, time
from gptq_plugin import load_quantized
from gptq_plugin.checkpoint import load

def anonymous():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon")) * 1024

load_quantized({str(FIXTURES / LLAMA)!r}, device_map={{"": "cpu"}})  # imports
before, peak, done = anonymous(), 0, False

def watch():
    global peak
    while not done:
        peak = max(peak, anonymous())
        time.sleep(0.001)

watcher = threading.Thread(target=watch)
watcher.start()
model = load_quantized({str(tmp_path)!r}, device_map={{"": "cpu"}})
done = True
watcher.join()
size = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
print(size, peak - before)
"""
    result = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    size, grown = map(int, result.stdout.split())
    assert size > 96 * 2**20
    assert grown < 0.3 * size


def write_large(folder: Path) -> None:
    """A Llama with 100 MiB of 4-bit words in 3 blocks, all zero, and few float weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 3, "vocab_size": 64}
    config = LlamaConfig(**sizes, num_attention_heads=8, num_key_value_heads=8, dtype="float16")
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    state: Tensors = {}
    for name, weight in model.named_parameters():
        module, (out, *inputs) = name.removesuffix(".weight"), weight.shape
        if not module.endswith("proj"):
            state[name] = torch.zeros(weight.shape, dtype=torch.float16)
            continue
        state[f"{module}.qweight"] = torch.zeros(inputs[0] // 8, out, dtype=torch.int32)
        state[f"{module}.qzeros"] = torch.zeros(inputs[0] // 128, out // 8, dtype=torch.int32)
        state[f"{module}.scales"] = torch.ones(inputs[0] // 128, out, dtype=torch.float16)
        state[f"{module}.g_idx"] = torch.arange(inputs[0], dtype=torch.int32) // 128
    save_file(state, folder / "model.safetensors")
    description = {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True, "desc_act": False}
    content = {**config.to_dict(), "architectures": ["LlamaForCausalLM"], "quantization_config": description}
    (folder / "config.json").write_text(json.dumps(content))


# --- broken files -------------------------------------------------------------------------------------------


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


BROKEN_TENSORS: dict[str, tuple[Callable[[Tensors], Any], list[str]]] = {
    "two layers lack tensors": (
        drop("up_proj.qweight", "down_proj.scales"),
        [f"{UP}.qweight", f"{DOWN}.scales", "lacks 2 tensors"],
    ),
    "a layer lacks zeros": (drop("up_proj.qzeros"), [f"{UP}.qzeros"]),
    "a whole layer is missing": (
        drop(*(f"up_proj.{s}" for s in ("qweight", "qzeros", "scales", "g_idx"))),
        [f"{UP}.weight is missing"],
    ),
    "a float tensor is missing": (drop("model.norm.weight"), ["model.norm.weight is missing"]),
    "a tensor belongs nowhere": (
        lambda s: s.update({"model.layers.0.mlp.extra": torch.zeros(3)}),
        ["model.layers.0.mlp.extra belongs to no module"],
    ),
    "a quantized layer belongs nowhere": (
        lambda s: s.update(
            {k.replace("layers.0", "layers.7"): v.clone() for k, v in list(s.items()) if "layers.0" in k}
        ),
        ["model.layers.7.mlp.up_proj is quantized in the checkpoint and no module in the model"],
    ),
    "a float tensor has another shape": (
        put("model.norm.weight", lambda t: t[:-1]),
        ["model.norm.weight has shape [63], the model needs [64]"],
    ),
    "a group index is too high": (
        put(f"{DOWN}.g_idx", with_value(5, 3)),
        [f"{DOWN}.g_idx", "from 0 to 3", "0..2"],
    ),
    "a group index is negative": (put(f"{DOWN}.g_idx", with_value(5, -1)), [f"{DOWN}.g_idx", "from -1 to 2"]),
    "group indices are too few": (put(f"{DOWN}.g_idx", lambda t: t[:64]), [DOWN, "with 64 inputs"]),
    "group indices are int64": (put(f"{DOWN}.g_idx", lambda t: t.long()), [f"{DOWN}.g_idx is I64, not I32"]),
    "codes are float": (put(f"{DOWN}.qweight", lambda t: t.float()), [f"{DOWN}.qweight is F32, not I32"]),
    "codes are one row short": (
        put(f"{DOWN}.qweight", lambda t: t[:-1]),
        [f"{DOWN}.qweight has shape [11, 64]"],
    ),
    "scales are transposed": (
        put(f"{DOWN}.scales", lambda t: t.T),
        [f"{DOWN}.scales has shape [64, 3]", "[3, 64]"],
    ),
    "scales are integers": (
        put(f"{DOWN}.scales", lambda t: t.int()),
        [f"{DOWN}.scales is I32, not floating point"],
    ),
    "a scale is NaN": (put(f"{DOWN}.scales", with_value(7, float("nan"))), [f"{DOWN}.scales holds NaN"]),
    "scales do not fit float16": (
        put(f"{DOWN}.scales", lambda t: t.float() * 1.0001),
        [f"{DOWN}.scales is F32 with values float16 cannot hold"],
    ),
    "zeros are one-dimensional": (
        put(f"{DOWN}.qzeros", lambda t: t[0]),
        [f"{DOWN}.qzeros has shape [8], not 2"],
    ),
    "nothing is quantized": (
        drop(".qweight", ".qzeros", ".g_idx", ".scales"),
        ["holds no tensor named NAME.qweight"],
    ),
}


@pytest.mark.parametrize("case", BROKEN_TENSORS)
def test_broken_tensors_are_refused_and_named(case: str, tmp_path: Path) -> None:
    change, needles = BROKEN_TENSORS[case]
    with pytest.raises(CheckpointError) as caught:
        load_quantized(edited(LLAMA, tmp_path / "x", change))
    for needle in [*needles, str(tmp_path)]:
        assert needle in str(caught.value)


BROKEN_DESCRIPTIONS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "bits that no one packs": ({"bits": 5}, ["bits is 5", "2, 3, 4, 8"]),
    "bits that contradict the shapes": (
        {"bits": 8},
        [f"{DOWN}.qweight has shape [12, 64]", "bits=8", "[24, 64]"],
    ),
    "a group size that contradicts the shapes": (
        {"group_size": 64},
        [f"{DOWN}.scales has shape [3, 64]", "[2, 64]"],
    ),
    "a group size of zero": ({"group_size": 0}, ["group_size is 0"]),
    "another method": ({"quant_method": "awq"}, ["quant_method is 'awq'"]),
    "another format": (
        {"checkpoint_format": "marlin", "format": "marlin"},
        ["checkpoint_format is 'marlin'"],
    ),
    "the planar format": ({"checkpoint_format": "gptq_p", "format": None}, ["checkpoint_format is 'gptq_p'"]),
    "two formats": ({"checkpoint_format": "gptq"}, ["disagree", "'gptq' and 'gptq_v2'"]),
    "words of another width": ({"pack_dtype": "int64"}, ["pack_dtype is 'int64'"]),
    "a rule that is no regular expression": (
        {"dynamic": {"(": {"bits": 4}}},
        ["'('", "not a regular expression"],
    ),
}


@pytest.mark.parametrize("case", BROKEN_DESCRIPTIONS)
def test_descriptions_that_cannot_be_right_are_refused(case: str, tmp_path: Path) -> None:
    values, needles = BROKEN_DESCRIPTIONS[case]
    folder = edited(LLAMA, tmp_path / "x", config=lambda c: set_quantization(c, **values))
    with pytest.raises(CheckpointError) as caught:
        load_quantized(folder)
    for needle in needles:
        assert needle in str(caught.value)


def test_files_that_disagree_about_the_format_are_refused(tmp_path: Path) -> None:
    shutil.copytree(FIXTURES / "gptqmodel-w4g32", tmp_path / "x")
    beside = tmp_path / "x" / "quantize_config.json"
    content = json.loads(beside.read_text())
    beside.write_text(json.dumps({**content, "checkpoint_format": "gptq_v2", "format": "gptq_v2"}))
    with pytest.raises(CheckpointError, match=r"config\.json says the format is 'gptq' and quantize_config\.json says"):
        load_quantized(tmp_path / "x")


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere is not a folder"):
        load_quantized(tmp_path / "nowhere")


def test_a_folder_without_a_description_is_refused(tmp_path: Path) -> None:
    folder = edited(LLAMA, tmp_path / "x", config=lambda c: c.pop("quantization_config"))
    with pytest.raises(CheckpointError, match=r"neither a quantization_config in .* nor a quantize_config"):
        load_quantized(folder)


def test_json_that_does_not_parse_is_refused(tmp_path: Path) -> None:
    folder = edited(LLAMA, tmp_path / "x")
    (folder / "config.json").write_text('{"bits": ')
    with pytest.raises(CheckpointError, match=r"config\.json cannot be read as JSON"):
        load_quantized(folder)


@pytest.mark.parametrize("keep", [0, 4, 100, 20_000, -1], ids=lambda n: f"first {n} bytes")
def test_truncated_weights_are_refused(keep: int, tmp_path: Path) -> None:
    folder = edited(LLAMA, tmp_path / "x")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"model\.safetensors .* truncated or corrupt"):
        load_quantized(folder)


def test_weights_with_a_garbled_header_are_refused(tmp_path: Path) -> None:
    folder = edited(LLAMA, tmp_path / "x")
    weights = folder / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[20:40] = b"?" * 20
    weights.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model\.safetensors .* truncated or corrupt"):
        load_quantized(folder)


def test_a_folder_without_safetensors_is_refused(tmp_path: Path) -> None:
    folder = edited(LLAMA, tmp_path / "x")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="no safetensors file"):
        load_quantized(folder)


def test_a_generation_config_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    folder = edited(LLAMA, tmp_path / "x")
    (folder / "generation_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"generation_config\.json cannot be used"):
        load_quantized(folder)


def test_a_missing_shard_is_refused_and_named(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "x")
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-00002-of-00002\.safetensors does not exist"):
        load_quantized(folder)


def test_a_shard_without_a_promised_tensor_is_refused_and_named(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "x")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"]["model.promised"] = "model-00001-of-00002.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"model-00001-of-00002\.safetensors lacks model\.promised"):
        load_quantized(folder)


def test_an_index_that_points_outside_the_folder_is_refused(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "x")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"]["lm_head.weight"] = "../elsewhere.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="which is no file of this folder"):
        load_quantized(folder)


def test_act_order_without_its_group_indices_is_refused(tmp_path: Path) -> None:
    folder = edited("gptqmodel-w4g32-desc-act", tmp_path / "x", drop(".g_idx"))
    with pytest.raises(CheckpointError, match=r"g_idx is missing, and with desc_act=true"):
        load_quantized(folder)


def test_a_layer_that_lost_its_bias_is_refused(tmp_path: Path) -> None:
    folder = edited("gptqmodel-qwen2-bias-w4g32", tmp_path / "x", drop("q_proj.bias"))
    with pytest.raises(CheckpointError, match=r"q_proj\.bias is missing"):
        load_quantized(folder)


def test_an_architecture_transformers_does_not_have_is_refused(tmp_path: Path) -> None:
    folder = edited(LLAMA, tmp_path / "x", config=lambda c: c.update(architectures=["LamaForPoetry"]))
    with pytest.raises(CheckpointError, match="has no architecture 'LamaForPoetry'"):
        load_quantized(folder)


def test_a_quantized_layer_of_another_size_than_the_models_is_refused(tmp_path: Path) -> None:
    folder = edited(LLAMA, tmp_path / "x", config=lambda c: c.update(intermediate_size=128))
    with pytest.raises(CheckpointError) as caught:
        load_quantized(folder)
    assert f"{DOWN} has 96 inputs and 64 outputs at bits=4; the model's Linear has 128 and 64" in str(caught.value)
    assert f"{UP} has 64 inputs" in str(caught.value)
