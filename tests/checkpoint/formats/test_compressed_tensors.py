"""Checkpoints in compressed-tensors' format that llm-compressor wrote (tests/fixtures/llmcompressor-*)."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gptq_plugin.kernels.reference import unpack
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM

from gptq_plugin import QuantizeConfig, load_quantized
from gptq_plugin.checkpoint.checkpoint import Checkpoint
from gptq_plugin.checkpoint.formats.format import Contents, Scheme
from gptq_plugin.checkpoint.formats.registry import FORMATS
from gptq_plugin.errors import CheckpointError, ExportError
from gptq_plugin.export.export import export_model
from gptq_plugin.hf.quantizer import quantized_config
from gptq_plugin.layers.qlinear import QuantLinear

from exports import description, logits
from models import Plain, tiny_llama
from paths import FIXTURES

Rtn = Callable[..., Any]

NAMES = sorted(path.name for path in FIXTURES.glob("llmcompressor-*") if path.is_dir())
DOWN = "model.layers.0.mlp.down_proj"


def loaded(folder: Path, **kwargs: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, config=quantized_config(folder), **kwargs)


def error_of(model: Any, name: str) -> float:
    """The largest difference to the logits that compressed-tensors' own unpacking gives."""
    reference = load_file(FIXTURES / f"{name}.expected.safetensors")
    with torch.no_grad():
        logits = model(input_ids=reference["input_ids"]).logits[0, -len(reference["logits"]) :]
    return float((logits - reference["logits"]).abs().max())


def edited(name: str, target: Path, change: Any) -> Path:
    shutil.copytree(FIXTURES / name, target)
    state = load_file(target / "model.safetensors")
    change(state)
    save_file({key: tensor.contiguous() for key, tensor in state.items()}, target / "model.safetensors")
    return target


@pytest.mark.parametrize("load", [load_quantized, loaded])
@pytest.mark.parametrize("name", NAMES)
def test_llm_compressors_checkpoint_computes_what_its_own_reader_computes(name: str, load: Any) -> None:
    model = load(FIXTURES / name, dtype=torch.float32)
    layers = [module for module in model.modules() if isinstance(module, QuantLinear)]
    assert len(layers) == len(Checkpoint.open(FIXTURES / name).layers) >= 6
    assert error_of(model, name) < 2e-4


def test_the_fixtures_hold_every_width_with_and_without_zeros_and_groups() -> None:
    seen = set()
    for name in NAMES:
        for layer in Checkpoint.open(FIXTURES / name).layers.values():
            seen |= {layer.bits, (layer.bits, layer.sym), "channel" if layer.group_size == -1 else "group"}
    assert seen >= {2, 3, 4, 8, (4, True), (4, False), (3, False), (8, False), "channel", "group"}


@pytest.mark.parametrize("name", ["llmcompressor-w4g32-asym", "llmcompressor-mixed-bits"])
@pytest.mark.parametrize("load", [load_quantized, loaded])
def test_save_pretrained_writes_them_as_gptq_v2(name: str, load: Any, tmp_path: Path) -> None:
    load(FIXTURES / name, dtype=torch.float32).save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert (written["quant_method"], written["checkpoint_format"]) == ("gptq", "gptq_v2")
    assert error_of(load_quantized(tmp_path), name) < 2e-4
    wanted, found = (Checkpoint.open(folder).layers for folder in (FIXTURES / name, tmp_path))
    assert {n: (x.bits, x.group_size, x.sym) for n, x in found.items()} == {
        n: (x.bits, x.group_size, x.sym) for n, x in wanted.items()
    }


def test_a_base_model_is_described_by_its_own_names() -> None:
    folder = FIXTURES / "llmcompressor-mixed-bits"
    model = AutoModel.from_pretrained(folder, config=quantized_config(folder))
    rules = model.config.quantization_config.to_dict()["dynamic"]
    assert rules == {
        r"-:layers\.\d+\.self_attn\.q_proj$": {},
        r"layers\.0\.mlp\.down_proj$": {"bits": 8, "group_size": -1, "sym": True},
    }


def test_a_zero_one_too_high_is_noticed_by_the_logits(tmp_path: Path) -> None:
    name = "llmcompressor-w4g32-asym"
    key = f"{DOWN}.weight_zero_point"
    wrong = edited(name, tmp_path / "x", lambda state: state.update({key: state[key] ^ 0x11111111}))
    assert error_of(load_quantized(wrong, dtype=torch.float32), name) > 0.1


@pytest.mark.parametrize("suffix", ["weight_packed", "weight_scale", "weight_shape", "weight_zero_point"])
def test_a_tensor_that_is_missing_is_refused_and_named(suffix: str, tmp_path: Path) -> None:
    folder = edited("llmcompressor-w4g32-asym", tmp_path / "x", lambda state: state.pop(f"{DOWN}.{suffix}"))
    for load in (load_quantized, loaded):
        with pytest.raises(CheckpointError, match=rf"down_proj\.{suffix}"):
            load(folder)


def test_three_bits_as_compressed_tensors_packed_them_before_0_18_are_refused(tmp_path: Path) -> None:
    """Ten codes in a word, two bits unused: a stream read as the other would be another model."""

    def repack(state: Any) -> None:
        for key in [key for key in state if key.endswith("weight_packed")]:
            in_features = int(state[key.replace("packed", "shape")][1])
            codes = unpack(state[key].t(), 3, in_features).int()
            codes = torch.cat([codes, codes.new_zeros(-in_features % 10, codes.shape[1])]).view(-1, 10, codes.shape[1])
            shifts = 3 * torch.arange(10, dtype=torch.int32)[:, None]
            state[key] = (codes << shifts).sum(1, dtype=torch.int32).t()

    folder = edited("llmcompressor-w3g32-asym", tmp_path / "x", repack)
    with pytest.raises(CheckpointError, match=r"weight_packed has shape \[64, 7\]"):
        load_quantized(folder)


def test_groups_in_act_order_as_compressed_tensors_wrote_them_before_0_19_are_read(tmp_path: Path) -> None:
    """Made of GPTQModel's act-order checkpoint, of which the independent reader's logits are known."""
    name = "gptqmodel-w4g32-desc-act"
    shutil.copytree(FIXTURES / name, tmp_path / "x")
    (tmp_path / "x" / "quantize_config.json").unlink()
    state = load_file(tmp_path / "x" / "model.safetensors")
    for key in [key for key in state if key.endswith(".qweight")]:
        layer = key.removesuffix(".qweight")
        packed, scales, g_idx = (state.pop(f"{layer}.{suffix}") for suffix in ("qweight", "scales", "g_idx"))
        del state[f"{layer}.qzeros"]  # symmetric
        state[f"{layer}.weight_packed"], state[f"{layer}.weight_scale"] = packed.t(), scales.t()
        state[f"{layer}.weight_shape"] = torch.tensor([packed.shape[1], len(g_idx)])
        state[f"{layer}.weight_g_idx"] = g_idx
    save_file({key: tensor.contiguous() for key, tensor in state.items()}, tmp_path / "x" / "model.safetensors")
    content = json.loads((tmp_path / "x" / "config.json").read_text())
    quantization = json.loads((FIXTURES / "llmcompressor-w4g32" / "config.json").read_text())["quantization_config"]
    quantization["config_groups"]["group_0"]["weights"]["actorder"] = "group"
    (tmp_path / "x" / "config.json").write_text(json.dumps({**content, "quantization_config": quantization}))
    assert error_of(load_quantized(tmp_path / "x", dtype=torch.float32), name) < 2e-4


# --- written by this package --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bits", "sym"), [(2, True), (2, False), (3, True), (3, False), (4, True), (4, False), (8, True)]
)
def test_an_export_as_compressed_tensors_loads_back_bit_for_bit(bits: int, sym: bool, rtn: Rtn, tmp_path: Path) -> None:
    if bits == 8 and not sym:
        pytest.skip("refused")
    group_size = 32 if sym else -1
    config = QuantizeConfig(bits=bits, group_size=group_size, sym=sym, checkpoint_format="compressed-tensors")
    model = tiny_llama(num_hidden_layers=1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.01
    model = rtn(model, config)
    folder = export_model(model, tmp_path / "out", config)
    assert torch.equal(logits(load_quantized(folder)), logits(model))
    (group,) = description(folder)["config_groups"].values()
    strategy = {"strategy": "group", "group_size": 32} if sym else {"strategy": "channel", "group_size": None}
    assert group["targets"] == ["Linear"] and group["weights"].items() >= {"num_bits": bits, **strategy}.items()
    assert description(folder)["ignore"] == ["lm_head"]
    read = QuantizeConfig.from_quantize_config(json.loads((folder / "quantize_config.json").read_text()))
    assert read.bits == bits and read.checkpoint_format == "compressed-tensors"
    with safe_open(folder / "model.safetensors", "pt") as stored:
        kept = {name.rpartition(".")[2] for name in stored.keys() if "q_proj" in name}  # noqa: SIM118
    assert kept == {"weight_packed", "weight_scale", "weight_shape"} | ({"weight_zero_point"} if not sym else set())


def test_compressed_tensors_names_float_layers_and_gives_each_width_a_group(rtn: Rtn, tmp_path: Path) -> None:
    config = QuantizeConfig(
        group_size=32,
        checkpoint_format="compressed-tensors",
        dynamic={r".*\.down_proj": {"bits": 8, "group_size": 16}, r"-:.*layers\.0.*q_proj": {}},
    )
    model = rtn(tiny_llama(), config)
    folder = export_model(model, tmp_path / "out", config)
    assert torch.equal(logits(load_quantized(folder)), logits(model))
    assert description(folder)["ignore"] == ["model.layers.0.self_attn.q_proj", "lm_head"]
    most, other = description(folder)["config_groups"].values()
    assert most["targets"] == ["Linear"] and other["weights"]["num_bits"] == 8
    assert other["targets"] == [f"model.layers.{i}.mlp.down_proj" for i in range(2)]


def test_compressed_tensors_refuses_what_it_cannot_hold(rtn: Rtn, tmp_path: Path) -> None:
    config = QuantizeConfig(group_size=16, checkpoint_format="compressed-tensors")
    with pytest.raises(ExportError, match="groups are not contiguous.*checkpoint_format='gptq'"):
        export_model(rtn(Plain(), config, permuted=True), tmp_path / "out", config)
    with pytest.raises(ExportError, match="is quantized with sym=False, and the given config has sym=True"):
        model = rtn(Plain(), QuantizeConfig(group_size=16, sym=False))
        export_model(model, tmp_path / "out", config)
    assert not any(tmp_path.iterdir())
    for options, way_out in (
        ({"desc_act": True, "static_groups": False}, "use desc_act=False"),
        ({"bits": 8, "sym": False}, "use sym=True, or checkpoint_format='gptq_v2'"),
    ):
        with pytest.raises(ValueError, match=way_out):
            QuantizeConfig(**options, checkpoint_format="compressed-tensors")


# --- descriptions -------------------------------------------------------------------------------------------

PACK = FORMATS["compressed-tensors"]
WEIGHTS = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 128}


def described(*groups: dict[str, Any], **fields: Any) -> dict[str, Any]:
    whole = {"targets": ["Linear"], "weights": WEIGHTS, "format": "pack-quantized"}
    return {"config_groups": {f"group_{i}": {**whole, **group} for i, group in enumerate(groups or ({},))}, **fields}


def test_a_name_counts_before_an_expression_and_that_before_a_class() -> None:
    eight, three = {**WEIGHTS, "num_bits": 8}, {**WEIGHTS, "num_bits": 3}
    quantization = described({}, {"targets": ["re:.*up$"], "weights": eight}, {"targets": ["a.up"], "weights": three})
    found = {name: PACK.schemes(quantization)(name).bits for name in ("down", "b.up", "a.up")}
    assert found == {"down": 4, "b.up": 8, "a.up": 3}
    with pytest.raises(ValueError, match="no config group has a target"):
        PACK.schemes(described({"targets": ["re:.*up$"]}))("down")


def test_a_channel_is_one_group_and_groups_along_act_order_are_known() -> None:
    channel = described({"weights": {**WEIGHTS, "strategy": "channel", "group_size": None}})
    assert PACK.schemes(channel)("x") == Scheme(4, -1, True, False)
    for actorder, desc_act in ((None, False), ("weight", False), ("static", False), ("group", True), (True, True)):
        assert PACK.schemes(described({"weights": {**WEIGHTS, "actorder": actorder}}))("x").desc_act is desc_act


@pytest.mark.parametrize(
    "quantization,words",
    [({"config_groups": {}}, "config_groups must describe"),
     (described({"format": "int-quantized"}), "format is 'int-quantized'"),
     (described({"weights": None}), "weights are not quantized"),
     (described({"weights": {**WEIGHTS, "type": "float"}}), "weights are 'float'"),
     (described({"weights": {**WEIGHTS, "strategy": "block"}}), "strategy is 'block'"),
     (described({"input_activations": {"num_bits": 8}}), "activations are quantized too"),
     (described({"targets": "Linear"}), "targets must be a list"),
     (described({"targets": ["re:("]}), "'\\(' is not a regular expression"),
     (described(ignore=["re:("]), "ignore: '\\(' is not a regular expression"),
     (described(sparsity_config={"format": "sparse-24"}), "sparse or transformed"),
     (described(transform_config={"x": 1}), "sparse or transformed")],
)  # fmt: skip
def test_what_is_not_packed_weights_of_a_few_bits_is_refused(quantization: dict[str, Any], words: str) -> None:
    with pytest.raises(CheckpointError, match=words):
        PACK.stated(quantization, Path("config.json"))
    assert PACK.stated(described(), Path("config.json")) == "compressed-tensors"


def test_modules_left_float_are_named_or_matched() -> None:
    quantization = described(ignore=["lm_head", r"re:.*\.gate$"])
    found = [name for name in ("lm_head", "a.gate", "a.gate.b", "a.up") if PACK.left_float(quantization)(name)]
    assert found == ["lm_head", "a.gate"]


def test_experts_come_first_and_blocks_that_are_all_float_are_one_expression() -> None:
    """transformers reads the first group for all experts."""
    four, eight = Scheme(4, 128, True, False), Scheme(8, -1, True, False)
    experts = {f"m.0.mlp.experts.{e}.up_proj": eight for e in range(2)}
    schemes = {**{f"m.{i}.o_proj": four for i in range(5)}, **experts}
    floats = [f"m.1.mlp.experts.{e}.up_proj" for e in range(2)] + ["m.1.q_proj"]
    found = PACK.describe(Contents(schemes, floats, "head", ["m.0.mlp.gate"]), QuantizeConfig())
    first, second = found["config_groups"].values()
    assert first["weights"]["num_bits"] == 8 and first["targets"] == ["Linear"]
    assert first["weights"]["strategy"] == "channel" and first["weights"]["group_size"] is None
    assert second["targets"] == [f"m.{i}.o_proj" for i in range(5)] and second["weights"]["group_size"] == 128
    assert found["ignore"] == [r"re:m\.1\.mlp\.experts\..*", "m.1.q_proj", "m.0.mlp.gate", "head"]


def test_groups_that_do_not_divide_the_inputs_are_refused() -> None:
    tensors = {"scales": torch.zeros(3, 5), "g_idx": torch.arange(80) // 32}
    with pytest.raises(ExportError, match="80 inputs are no multiple of its group size, 32"):
        PACK.to_file(tensors, 4, True)
    with pytest.raises(ExportError, match="96 inputs are no multiple of its group size, 64"):
        PACK.to_file({"scales": torch.zeros(2, 5), "g_idx": torch.arange(96) // 64}, 4, True)
