"""Loading checkpoints: those other tools wrote (tests/fixtures), and broken ones."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from gptq_plugin import QuantizeConfig, QuantizeModule, load_quantized, quantized_config
from gptq_plugin.checkpoint.checkpoint import Checkpoint
from gptq_plugin.errors import CheckpointError
from gptq_plugin.export.export import export_model
from gptq_plugin.layers.packing import (
    pack_weight,
    pack_zeros,
    unpack_weight,
    unpack_zeros,
)
from gptq_plugin.layers.qlinear import QuantLinear

from copies import DOWN, LLAMA, UP, Tensors, drop, edited, expected, logits_of, put, set_quantization
from forked_python import python
from gpu_products import stand_in
from models import tiny_llama
from paths import FIXTURES

COMPRESSED = sorted(path.name for path in FIXTURES.glob("llmcompressor-*") if path.is_dir())
NAMES = sorted(path.name for path in FIXTURES.iterdir() if path.is_dir() and path.name not in COMPRESSED)


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
        true = checkpoint.format.zeros_from_file(zeros, bits, layer.out_features)
        back = checkpoint.format.zeros_to_file(true, bits, layer.out_features)
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
    wrong = edited(
        name, tmp_path / "x", config=lambda c: set_quantization(c, checkpoint_format="gptq_v2", format=None, sym=False)
    )
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


def test_a_quantized_head_is_saved_as_such_whatever_the_files_tell(rtn: Any, tmp_path: Path) -> None:
    config = QuantizeConfig(group_size=32, lm_head=True)
    out = export_model(rtn(tiny_llama(tie_word_embeddings=False), config), tmp_path / "out", config)
    content = json.loads((out / "config.json").read_text())
    set_quantization(content, lm_head=False)
    (out / "config.json").write_text(json.dumps(content))
    assert load_quantized(out).config.quantization_config["lm_head"] is True


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


@pytest.mark.parametrize("name", NAMES)
def test_fused_it_computes_and_holds_the_same(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    reference, plain = expected(name), load_quantized(FIXTURES / name, dtype=torch.float32)
    products = stand_in(monkeypatch)
    model = load_quantized(FIXTURES / name, dtype=torch.float32, fuse=True)
    products.clear()
    with torch.no_grad():
        torch.testing.assert_close(logits_of(model, reference), reference["logits"], atol=2e-4, rtol=0)
    layers = [module for module in model.modules() if isinstance(module, QuantLinear)]
    assert bool(products) == any(layer.siblings for layer in layers) == any(layer.arranged() for layer in layers)
    before = plain.state_dict()
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    for each, folder in ((plain, "plain"), (model, "fused")):
        each.save_pretrained(tmp_path / folder)
    written = [(tmp_path / folder / "model.safetensors").read_bytes() for folder in ("plain", "fused")]
    assert written[0] == written[1]
    print(name, products)


def test_what_cannot_be_fused_is_told(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    load_quantized(FIXTURES / NAMES[0], fuse=True)
    assert "no layers are fused: none is on a GPU that the kernels serve" in caplog.text
    with pytest.raises(ValueError, match="fuse_layers\\(model, inputs\\)"):
        load_quantized(FIXTURES / NAMES[0], model=torch.nn.Linear(2, 2), fuse=True)
    with pytest.raises(ValueError, match="fuse"):
        load_quantized(FIXTURES / NAMES[0], fuse="yes")
    stand_in(monkeypatch)
    monkeypatch.setattr("transformers.PreTrainedModel.dummy_inputs", {"input_ids": torch.zeros(1, 2)})
    load_quantized(FIXTURES / NAMES[0], fuse=True)
    assert "does not run with its own dummy_inputs" in caplog.text


def test_tied_embeddings_stay_tied() -> None:
    model = load_quantized(FIXTURES / "gptqmodel-qwen2-bias-w4g32")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.model.layers[0].self_attn.q_proj.bias.abs().max() > 0


# --- where it goes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device_map", ["auto", "balanced", {"": "cpu"}, {"model": "cpu", "lm_head": "cpu"}])
def test_a_device_map_is_understood_as_transformers_does(device_map: Any) -> None:
    pytest.importorskip("accelerate")
    reference = expected(LLAMA)
    model = load_quantized(FIXTURES / LLAMA, device_map=device_map, dtype=torch.float32)
    torch.testing.assert_close(logits_of(model, reference), reference["logits"], atol=2e-4, rtol=0)


@pytest.mark.parametrize("options", [{"device": "cuda"}, {"model": torch.nn.Linear(2, 2)}])
def test_a_device_map_together_with_a_device_or_a_model_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="give it without `device`"):
        load_quantized(FIXTURES / LLAMA, device_map="auto", **options)


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
    result = subprocess.run([python(), "-c", script], check=True, capture_output=True, text=True)
    size, grown = map(int, result.stdout.split())
    assert size > 96 * 2**20
    assert grown < 0.3 * size


def write_large(folder: Path) -> None:
    """A Llama with 100 MiB of 4-bit words in 3 blocks, all codes 0, and few float weights."""
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
        state[f"{module}.qzeros"] = torch.full((inputs[0] // 128, out // 8), 0x77777777, dtype=torch.int32)
        state[f"{module}.scales"] = torch.ones(inputs[0] // 128, out, dtype=torch.float16)
        state[f"{module}.g_idx"] = torch.arange(inputs[0], dtype=torch.int32) // 128
    save_file(state, folder / "model.safetensors")
    description = {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True, "desc_act": False}
    content = {**config.to_dict(), "architectures": ["LlamaForCausalLM"], "quantization_config": description}
    (folder / "config.json").write_text(json.dumps(content))


# --- what does not fit ------------------------------------------------------------------------------------


def test_a_generation_config_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    folder = edited(LLAMA, tmp_path / "x")
    (folder / "generation_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"generation_config\.json cannot be read as JSON"):
        load_quantized(folder)


def test_an_architecture_transformers_does_not_have_is_refused(tmp_path: Path) -> None:
    folder = edited(LLAMA, tmp_path / "x", config=lambda c: c.update(architectures=["LamaForPoetry"]))
    with pytest.raises(CheckpointError, match="has no architecture 'LamaForPoetry'"):
        load_quantized(folder)


MISFITS: dict[str, tuple[Callable[[Tensors], Any], list[str]]] = {
    "a whole layer is missing": (
        drop(*(f"up_proj.{s}" for s in ("qweight", "qzeros", "scales", "g_idx"))),
        [f"{UP}.weight is missing"],
    ),
    "a float tensor is missing": (drop("model.norm.weight"), ["model.norm.weight is missing"]),
    "a tensor belongs nowhere": (
        lambda s: s.update({"model.layers.0.mlp.extra": torch.zeros(3)}),
        ["model.layers.0.mlp.extra belongs to no module"],
    ),
    "a float tensor has another shape": (
        put("model.norm.weight", lambda t: t[:-1]),
        ["model.norm.weight has shape [63], the model needs [64]"],
    ),
}


@pytest.mark.parametrize("case", MISFITS)
def test_tensors_that_do_not_fit_the_model_are_refused_and_named(case: str, tmp_path: Path) -> None:
    change, needles = MISFITS[case]
    with pytest.raises(CheckpointError) as caught:
        load_quantized(edited(LLAMA, tmp_path / "x", change))
    for needle in [*needles, str(tmp_path)]:
        assert needle in str(caught.value)


@pytest.mark.parametrize("name", ["__name__", "models", "LlamaConfig", "AutoModelForCausalLM", "LlamaTokenizer", "a b"])
def test_what_is_no_architecture_is_refused(name: str, tmp_path: Path) -> None:
    folder = edited(LLAMA, tmp_path / "x", config=lambda c: c.update(architectures=[name]))
    with pytest.raises(CheckpointError, match=f"has no architecture '{name}'"):
        load_quantized(folder)


@pytest.mark.parametrize("key", ["num_hidden_layers", "num_experts", "encoder_layers"])
def test_more_layers_than_the_files_can_hold_are_refused_before_they_are_built(key: str, tmp_path: Path) -> None:
    folder = edited(LLAMA, tmp_path / "x", config=lambda c: c.update({key: 10**6}))
    with pytest.raises(CheckpointError, match=rf"config\.json: {key} is 1000000, and the files hold"):
        load_quantized(folder)


def test_a_model_far_larger_than_the_files_is_refused_before_it_takes_memory(tmp_path: Path) -> None:
    folder = edited(LLAMA, tmp_path / "x", config=lambda c: c.update(vocab_size=2**40))
    with pytest.raises(
        CheckpointError, match=r"config\.json describes a LlamaForCausalLM with .* such as model\.embed"
    ):
        load_quantized(folder)


@pytest.mark.parametrize(
    "values", [{"num_attention_heads": 0}, {"hidden_act": "poetry"}, {"rope_parameters": 3}], ids=str
)
def test_values_that_transformers_cannot_use_are_refused_by_file(values: dict[str, Any], tmp_path: Path) -> None:
    folder = edited(LLAMA, tmp_path / "x", config=lambda c: c.update(values))
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load_quantized(folder)


@pytest.mark.parametrize("field", ["attn_implementation", "_attn_implementation", "experts_implementation"])
def test_attention_that_lies_in_another_repository_is_not_fetched(field: str, tmp_path: Path) -> None:
    folder = edited(LLAMA, tmp_path / "x", config=lambda c: c.update({field: "owner/code"}))
    for load in (load_quantized, quantized_config):
        with pytest.raises(CheckpointError, match=f"{field.removeprefix('_')} is 'owner/code', code of another"):
            load(folder)


def test_code_of_another_repository_is_named_as_such(tmp_path: Path) -> None:
    folder = edited(
        LLAMA,
        tmp_path / "x",
        config=lambda c: c.update(architectures=["Own"], auto_map={"AutoModel": "owner/other--code.Own"}),
    )
    with pytest.raises(CheckpointError, match="finds Own in the code of the repository owner/other"):
        load_quantized(folder)


def test_exporting_and_loading_draw_no_random_numbers(tmp_path):
    """Mamba 2 initializes parameters at random, also those that are read afterwards."""
    config = AutoConfig.for_model(
        "mamba2",
        hidden_size=64,
        num_hidden_layers=1,
        vocab_size=64,
        num_heads=8,
        head_dim=16,
        state_size=16,
        n_groups=1,
    )
    model = AutoModelForCausalLM.from_config(config)
    quantizer = QuantizeModule(group_size=32, nsamples=4)
    quantizer.quantize(model, list(torch.randint(0, 64, (4, 32))))
    before = torch.get_rng_state()
    quantizer.export(model, tmp_path / "export")
    load_quantized(tmp_path / "export")
    assert torch.equal(torch.get_rng_state(), before)
