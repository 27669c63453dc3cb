"""Exporting: what was in memory comes back bit for bit, clients find what they need, nothing is half done."""

from __future__ import annotations

import contextlib
import copy
import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from gptq_plugin import QuantizeConfig, QuantizeModule, load_quantized
from gptq_plugin.checkpoint.checkpoint import Checkpoint
from gptq_plugin.errors import ExportError
from gptq_plugin.export import export as export_module
from gptq_plugin.export import shard_writer as shards
from gptq_plugin.export import staging as placing
from gptq_plugin.export import verify_files as verifying
from gptq_plugin.export.export import Export, export_model
from gptq_plugin.layers.qlinear import QuantLinear
from gptq_plugin.layers.swap import swap_modules
from gptq_plugin.model.structure import Structure

from exports import IDS, BrokenTokenizer, description, files, logits
from models import Plain, tiny_experts, tiny_gpt2, tiny_llama, tiny_llava

Rtn = Callable[..., Any]


# --- round trips --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("permuted", [False, True], ids=["contiguous groups", "act-order"])
@pytest.mark.parametrize("sym", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("checkpoint_format", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_an_exported_llama_loads_back_bit_for_bit(
    bits: int, checkpoint_format: str, sym: bool, permuted: bool, rtn: Rtn, tmp_path: Path
) -> None:
    config = QuantizeConfig(bits=bits, group_size=32, sym=sym, checkpoint_format=checkpoint_format)
    model = tiny_llama(num_hidden_layers=1)
    with torch.no_grad():  # off-centre weights, so that asymmetric zeros differ from the symmetric one
        for parameter in model.parameters():
            parameter += 0.01
    model = rtn(model, config, permuted=permuted)
    folder = export_model(model, tmp_path / "out", config)
    loaded = load_quantized(folder)
    assert torch.equal(logits(loaded), logits(model))
    assert {n: m.bits for n, m in loaded.named_modules() if isinstance(m, QuantLinear)} == {
        n: m.bits for n, m in model.named_modules() if isinstance(m, QuantLinear)
    }
    assert description(folder)["desc_act"] is permuted
    assert QuantizeConfig.from_quantize_config(json.loads((folder / "quantize_config.json").read_text())).bits == bits


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_an_exported_conv1d_model_with_biases_and_tied_embeddings_loads_back_bit_for_bit(
    dtype: torch.dtype, rtn: Rtn, tmp_path: Path
) -> None:
    config = QuantizeConfig(group_size=16)
    model = tiny_gpt2().to(dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    model = rtn(model, config)
    folder = export_model(model, tmp_path / "out", config)
    loaded = load_quantized(folder)
    assert loaded.dtype == dtype
    assert torch.equal(logits(loaded), logits(model))
    assert loaded.lm_head.weight is loaded.transformer.wte.weight
    with safe_open(folder / "model.safetensors", "pt") as stored:
        assert "lm_head.weight" not in stored.keys()  # noqa: SIM118
    ids = loaded.generate(input_ids=IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=4, pad_token_id=3)
    assert ids.shape[1] > IDS.shape[1]


def test_an_exported_plain_module_loads_back_into_a_fresh_one(rtn: Rtn, tmp_path: Path) -> None:
    config = QuantizeConfig(bits=2, group_size=16, checkpoint_format="gptq_v2")
    torch.manual_seed(0)
    model = rtn(Plain(), config)
    folder = export_model(model, tmp_path / "out", config)
    fresh = Plain()
    loaded = load_quantized(folder, model=fresh)
    assert loaded is fresh
    assert torch.equal(logits(loaded), logits(model))
    assert loaded.head.weight is loaded.embed.weight
    assert loaded.again is loaded.inner[2]
    assert json.loads((folder / "config.json").read_text())["module_class"].endswith("Plain")


def test_mixed_bits_and_skipped_layers_load_back_bit_for_bit(rtn: Rtn, tmp_path: Path) -> None:
    config = QuantizeConfig(
        group_size=32,
        dynamic={r".*\.down_proj": {"bits": 8, "group_size": 16}, r"-:.*layers\.0.*q_proj": {}},
    )
    model = rtn(tiny_llama(), config)
    loaded = load_quantized(export_model(model, tmp_path / "out", config))
    assert torch.equal(logits(loaded), logits(model))
    assert loaded.model.layers[0].mlp.down_proj.bits == 8
    assert isinstance(loaded.model.layers[0].self_attn.q_proj, nn.Linear)


@pytest.mark.parametrize("with_biases", [False, True], ids=["as built", "biases of zeros beside, as AutoGPTQ writes"])
def test_a_loaded_model_exports_again_to_the_same_tensors(with_biases: bool, rtn: Rtn, tmp_path: Path) -> None:
    config = QuantizeConfig(group_size=32)
    model = rtn(tiny_llama(), config)
    for layer in quantized(model).values() if with_biases else ():
        layer.bias = torch.zeros(layer.out_features)
    first = export_model(model, tmp_path / "first", config)
    assert ("model.layers.0.mlp.up_proj.bias" in tensor_names(first)) is with_biases
    second = export_model(load_quantized(first), tmp_path / "second", config)
    assert (first / "model.safetensors").read_bytes() == (second / "model.safetensors").read_bytes()


# --- in steps -----------------------------------------------------------------------------------------------


def quantized(model: nn.Module) -> dict[str, QuantLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantLinear)}


def tensor_names(folder: Path) -> set[str]:
    found: list[str] = []
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as stored:
            found += stored.keys()
    assert len(set(found)) == len(found)
    return set(found)


@pytest.mark.parametrize("make", [tiny_llama, Plain])
def test_layers_added_before_the_others_are_quantized_give_the_files_of_one_export(
    make: Callable[[], nn.Module], rtn: Rtn, tmp_path: Path
) -> None:
    config = QuantizeConfig(group_size=16)
    torch.manual_seed(0)
    model = make()
    done = rtn(copy.deepcopy(model), config)
    wanted = export_model(done, tmp_path / "at once", config)
    with Export(Structure.of(model), tmp_path / "in steps", config) as export:
        for name, layer in quantized(done).items():
            export.add(name, layer)
        swap_modules(model, quantized(done))
        export.finish(model)
        folder = export.place()
    assert folder == tmp_path / "in steps"
    assert files(folder) == files(wanted)


@pytest.mark.parametrize("shard", [10**9, 10_000], ids=["one file", "shards"])
def test_tensors_have_the_names_that_save_pretrained_gives_them(
    shard: int, rtn: Rtn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export_module, "SHARD", shard)
    config = QuantizeConfig(group_size=32, dynamic={r"-:.*v_proj": {}})
    model = rtn(tiny_llava(), config)
    model.save_pretrained(tmp_path / "theirs")
    folder = export_model(model, tmp_path / "ours", config)
    assert (len(list(folder.glob("*.safetensors"))) > 1) is (shard == 10_000)
    assert tensor_names(folder) == tensor_names(tmp_path / "theirs")
    assert "language_model.model.layers.0.mlp.up_proj.qweight" in tensor_names(folder)
    assert torch.equal(logits(load_quantized(folder)), logits(model))


def test_a_layer_that_transformers_stores_joined_with_others_keeps_its_own_name(rtn: Rtn, tmp_path: Path) -> None:
    from transformers import NomicBertConfig, NomicBertModel

    config = QuantizeConfig(group_size=32)
    model = NomicBertModel(
        NomicBertConfig(vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4)
    )
    out = export_model(rtn(model, config), tmp_path / "out", config)
    assert "layers.0.self_attn.q_proj" in Checkpoint.open(out).layers
    ids = torch.arange(48).reshape(2, 24)
    assert torch.equal(load_quantized(out)(ids).last_hidden_state, model.eval()(ids).last_hidden_state)


@pytest.mark.parametrize("make", [tiny_llama, Plain])
def test_shards_are_written_while_layers_are_added(
    make: Callable[[], nn.Module], rtn: Rtn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export_module, "SHARD", 5_000)
    config = QuantizeConfig(group_size=16)
    model = rtn(make(), config)
    layers = quantized(model)
    with Export(Structure.of(model), tmp_path / "out", config) as export:
        for name, layer in layers.items():
            export.add(name, layer)
        deadline = time.monotonic() + 20
        while not any(export.written(name) for name in layers):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        export.finish(model)
        folder = export.place()
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == tensor_names(folder)
    assert {path.name for path in folder.glob("*.safetensors")} == set(index["weight_map"].values())
    assert ("total_parameters" in index["metadata"]) is hasattr(model, "config")
    loaded = load_quantized(folder) if hasattr(model, "config") else load_quantized(folder, model=make())
    assert torch.equal(logits(loaded), logits(model))


def test_layers_that_point_to_their_files_stay_valid_after_finish_and_after_giving_up(
    rtn: Rtn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export_module, "SHARD", 1)
    config = QuantizeConfig(group_size=16)
    model = rtn(tiny_gpt2(), config)
    wanted, layers = logits(model), quantized(model)
    for finish in (False, True):
        with Export(Structure.of(model), tmp_path / "out", config) as export:
            for name, layer in layers.items():
                export.add(name, layer)
                while (mapped := export.written(name)) is None:
                    time.sleep(0.001)
                assert set(mapped) == {"qweight", "scales", "g_idx", "bias"}
                for suffix, tensor in mapped.items():
                    assert tensor.data_ptr() != getattr(layer, suffix).data_ptr()
                    setattr(layer, suffix, tensor)
            if finish:
                export.finish(model)
                export.place()
        assert torch.equal(logits(model), wanted)
    assert torch.equal(logits(load_quantized(tmp_path / "out")), wanted)


def test_finish_names_layers_that_were_not_added_or_are_no_longer_there(rtn: Rtn, tmp_path: Path) -> None:
    config = QuantizeConfig(group_size=16)
    model = rtn(Plain(), config)
    export = Export(Structure.of(model), tmp_path / "out", config)
    export.add("inner.0", model.inner[0])
    with pytest.raises(ExportError, match=r"inner\.2, again were not added"):
        export.finish(model)
    assert not any(tmp_path.iterdir())
    export = Export(Structure.of(model), tmp_path / "out", config)
    export.add("inner.0", model.inner[0])
    export.add("again", model.again)
    model.inner[0] = nn.Linear(48, 96)
    with pytest.raises(ExportError, match=r"inner\.0 were added to the export but are not quantized"):
        export.finish(model)
    assert not any(tmp_path.iterdir())


def test_a_model_that_its_configuration_does_not_describe_is_refused_before_anything_is_written(
    rtn: Rtn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = QuantizeConfig(group_size=32)
    model = rtn(tiny_llama(num_hidden_layers=2), config)
    model.model.layers = model.model.layers[:1]
    monkeypatch.setattr(export_module, "Export", None)
    with pytest.raises(ExportError, match=r"not the model of its configuration, .* lacks model\.layers\.1\."):
        export_model(model, tmp_path / "out", config)
    assert not any(tmp_path.iterdir())


def test_adding_a_layer_twice_or_one_that_the_model_has_not_is_refused(rtn: Rtn, tmp_path: Path) -> None:
    config = QuantizeConfig(group_size=16)
    model = rtn(Plain(), config)
    with Export(Structure.of(model), tmp_path / "out", config) as export:
        export.add("inner.0", model.inner[0])
        with pytest.raises(ExportError, match=r"inner\.0 was added to the export before"):
            export.add("inner.0", model.inner[0])
        with pytest.raises(ExportError, match="other cannot be exported: not a linear layer"):
            export.add("other", model.inner[0])


@pytest.mark.parametrize("tensor", ["qweight", "qzeros", "scales"])
def test_a_layer_that_changed_after_it_was_added_is_noticed(
    tensor: str, rtn: Rtn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verifying, "_COMPARED", 1000)
    config = QuantizeConfig(group_size=16)
    model = rtn(Plain(), config)
    with Export(Structure.of(model), tmp_path / "out", config) as export:
        for name, layer in quantized(copy.deepcopy(model)).items():
            export.add(name, layer)
        getattr(model.inner[0], tensor)[-1, -1] += 1  # beyond the rows that are decoded bit by bit
        with pytest.raises(ExportError, match=rf"{tensor} of inner\.0 differs"):
            export.finish(model)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("error", [KeyboardInterrupt, None], ids=["Ctrl-C", "return"])
def test_an_export_that_is_left_unfinished_leaves_nothing(
    error: type[BaseException] | None, rtn: Rtn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export_module, "SHARD", 1)
    config = QuantizeConfig(group_size=16)
    model = rtn(Plain(), config)
    export_model(model, tmp_path / "out", config)
    before = files(tmp_path)
    with (
        contextlib.suppress(KeyboardInterrupt),
        Export(Structure.of(model), tmp_path / "out", config, overwrite=True) as export,
    ):
        export.add("inner.0", model.inner[0])
        if error is not None:
            raise error
    assert files(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    with pytest.raises(ExportError, match="finished or given up"):
        export.add("again", model.again)


@pytest.mark.gpu
def test_a_model_on_the_gpu_exports_the_files_of_one_on_the_cpu(rtn: Rtn, tmp_path: Path) -> None:
    config = QuantizeConfig(group_size=32)
    model = rtn(tiny_gpt2(), config)
    wanted = files(export_model(model, tmp_path / "cpu", config))
    assert files(export_model(model.cuda(), tmp_path / "gpu", config)) == wanted


# --- refusals -----------------------------------------------------------------------------------------------


def test_a_float_model_is_not_exported(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="has no QuantLinear: quantize it"):
        export_model(Plain(), tmp_path / "out", QuantizeConfig())
    assert not any(tmp_path.iterdir())


def test_a_config_that_is_not_the_models_is_refused(rtn: Rtn, tmp_path: Path) -> None:
    model = rtn(Plain(), QuantizeConfig(bits=4, group_size=16))
    with pytest.raises(ExportError, match=r"inner\.0 is quantized with bits=4, .* has bits=3"):
        export_model(model, tmp_path / "out", QuantizeConfig(bits=3, group_size=16))
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("checkpoint_format", ["gptq", "gptq_v2", "compressed-tensors"])
def test_a_part_of_a_model_whose_rules_have_its_full_names_is_refused_with_what_differs(
    checkpoint_format: str, rtn: Rtn, tmp_path: Path
) -> None:
    config = QuantizeConfig(group_size=16, dynamic={r"inner\.0": {"sym": False}}, checkpoint_format=checkpoint_format)
    model = rtn(Plain(), config)
    assert export_model(model, tmp_path / "whole", config).is_dir()
    with pytest.raises(ExportError, match=r"^0 is quantized with sym=False, and the given config has sym=True for it"):
        export_model(model.inner, tmp_path / "part", config)
    assert [path.name for path in tmp_path.iterdir()] == ["whole"]


# --- failures on the way ------------------------------------------------------------------------------------


def fail_saving(monkeypatch: pytest.MonkeyPatch) -> None:
    def save(tensors: Any, path: Path, metadata: Any = None) -> None:
        Path(path).write_bytes(b"half a fi")
        raise OSError("no space left on device")

    monkeypatch.setattr(shards, "write_tensors", save)


def spoil_a_tensor(monkeypatch: pytest.MonkeyPatch, ending: str) -> None:
    original = shards.write_tensors

    def save(tensors: dict[str, torch.Tensor], path: Path, metadata: Any = None) -> None:
        spoiled = {name: (tensor.clone() + 1 if name.endswith(ending) else tensor) for name, tensor in tensors.items()}
        original(spoiled, path, metadata)

    monkeypatch.setattr(shards, "write_tensors", save)


def fail_renaming(monkeypatch: pytest.MonkeyPatch) -> None:
    original = Path.rename
    monkeypatch.setattr(placing, "_exchange", lambda one, other: False)  # as on a file system that cannot

    def rename(self: Path, target: Path) -> Path:
        if self.name.endswith(".partial"):
            raise OSError("stale file handle")
        return original(self, target)

    monkeypatch.setattr(Path, "rename", rename)


FAILURES: dict[str, tuple[Callable[[pytest.MonkeyPatch], None], type[Exception], str]] = {
    "the disk fills up": (fail_saving, ExportError, "no space left.*make room"),
    "the rename fails": (fail_renaming, ExportError, "stale file handle"),
    "codes are written wrongly": (
        lambda m: spoil_a_tensor(m, "0.qweight"),
        ExportError,
        r"qweight of inner\.0 differs",
    ),
    "zeros are written wrongly": (
        lambda m: spoil_a_tensor(m, "0.qzeros"),
        ExportError,
        r"inner\.0: sym=True promises zeros of 8, and most others are 9",
    ),
    "scales are written wrongly": (
        lambda m: spoil_a_tensor(m, "0.scales"),
        ExportError,
        r"scales of inner\.0 differs",
    ),
    "groups are written wrongly": (
        lambda m: spoil_a_tensor(m, "0.g_idx"),
        ExportError,
        r"does not read back.*g_idx",
    ),
    "a float is written wrongly": (lambda m: spoil_a_tensor(m, "shift"), ExportError, "shift differs"),
}


@pytest.mark.parametrize("case", FAILURES)
@pytest.mark.parametrize("earlier", [False, True], ids=["new target", "earlier export"])
def test_a_failed_export_leaves_everything_as_it_was(
    case: str, earlier: bool, rtn: Rtn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail, error, message = FAILURES[case]
    config = QuantizeConfig(group_size=16)
    target = tmp_path / "out"
    if earlier:
        export_model(rtn(Plain(), config), target, config)
    before = files(tmp_path)
    model = rtn(Plain(), config)
    fail(monkeypatch)
    with pytest.raises(error, match=f"(?s){message}"):
        export_model(model, target, config, overwrite=True)
    assert files(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == (["out"] if earlier else [])


def test_a_tokenizer_that_fails_leaves_no_half_export(rtn: Rtn, tmp_path: Path) -> None:
    config = QuantizeConfig(group_size=32)
    model = rtn(tiny_llama(), config)
    original = model.config
    with pytest.raises(RuntimeError, match="no space left"):
        export_model(model, tmp_path / "deep" / "out", config, tokenizer=BrokenTokenizer())
    assert files(tmp_path) == {}
    assert model.config is original


def test_a_wrong_checkpoint_is_noticed_by_the_comparison_these_tests_use(rtn: Rtn, tmp_path: Path) -> None:
    config = QuantizeConfig(group_size=32)
    model = rtn(tiny_llama(), config)
    loaded = load_quantized(export_model(model, tmp_path / "out", config))
    layer = loaded.model.layers[0].mlp.up_proj
    swapped = copy.deepcopy(layer)
    swapped.qzeros = layer.qzeros + 0x11111111
    swap_modules(loaded, {"model.layers.0.mlp.up_proj": swapped})
    assert not torch.equal(logits(loaded), logits(model))


def test_a_checkpoint_reads_back_with_the_names_of_the_model(rtn: Rtn, tmp_path: Path) -> None:
    config = QuantizeConfig(group_size=32)
    model = rtn(tiny_llama(), config)
    checkpoint = Checkpoint.open(export_model(model, tmp_path / "out", config))
    assert set(checkpoint.layers) == {n for n, m in model.named_modules() if isinstance(m, QuantLinear)}


@pytest.mark.parametrize("checkpoint_format", ["gptq", "gptq_v2", "compressed-tensors"])
def test_layers_with_smaller_groups_are_described_and_load(checkpoint_format, tmp_path):
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=128, intermediate_size=96, num_hidden_layers=2,
                                         num_attention_heads=2, num_key_value_heads=1)).eval()  # fmt: skip
    quantizer = QuantizeModule(bits=4, group_size=128, checkpoint_format=checkpoint_format)
    ids = torch.randint(0, 64, (4, 40), generator=torch.Generator().manual_seed(0))
    report = quantizer.quantize(model, [ids])
    small = {module.name for module in report.quantized if module.group_size == 32}
    assert small == {f"model.layers.{number}.mlp.down_proj" for number in (0, 1)}
    assert sum("group_size 128 does not divide its 96 inputs" in d for d in report.all_deviations()) == 2
    out = quantizer.export(model, tmp_path / "out")
    assert torch.equal(load_quantized(out)(ids).logits, model(ids).logits)
    if checkpoint_format == "gptq":
        config = json.loads((out / "config.json").read_text())["quantization_config"]
        assert config["group_size"] == 128
        rules = {pattern: rule for pattern, rule in config["dynamic"].items() if rule}
        assert list(rules.values()) == [{"group_size": 32}]  # one for all blocks
        assert all(any(re.match(pattern, name) for pattern in rules) for name in small)


# --- files that change before they are verified --------------------------------------------------------------


def spoil(folder: Path, suffix: str) -> str:
    """Flips a bit of the last output of a layer, in place: whoever maps the file sees it. Returns the tensor's name."""
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("r+b") as opened:
            size = int.from_bytes(opened.read(8), "little")
            header = json.loads(opened.read(size))
            for name, entry in header.items():
                if name.endswith((f"mlp.down_proj.{suffix}", f"experts.1.down_proj.{suffix}")):
                    place = 8 + size + entry["data_offsets"][1] - 2
                    opened.seek(place)
                    before = opened.read(1)[0]
                    opened.seek(place)
                    opened.write(bytes([before ^ 16]))
                    return str(name)
    raise AssertionError(suffix)


@pytest.mark.parametrize("suffix", ["qweight", "scales", "qzeros", "g_idx"])
@pytest.mark.parametrize("kind", ["dense", "experts"])
def test_a_shard_that_changes_while_the_model_maps_it_is_refused(
    kind: str, suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model's layers and the files have equal bits then, as both are the files."""
    monkeypatch.setattr(export_module, "SHARD", 4000)
    seen = []  # whether the model's layer has changed with the file

    def verify(folder: Path, layers: dict[str, QuantLinear], *rest: Any) -> None:
        before = {name: getattr(layer, suffix).clone() for name, layer in layers.items()}
        name = spoil(folder, suffix).rpartition(".")[0]
        seen.append(not torch.equal(getattr(layers[name], suffix), before[name]))
        verifying.verify(folder, layers, *rest)

    monkeypatch.setattr(export_module, "verify", verify)
    model = tiny_llama(num_hidden_layers=2) if kind == "dense" else tiny_experts()
    quantizer = QuantizeModule(bits=4, group_size=16, sym=False, checkpoint_format="gptq_v2")
    with pytest.raises(ExportError, match="does not read back"):
        quantizer.quantize(model, list(torch.randint(0, 64, (8, 64))), export_dir=tmp_path / "out")
    assert seen == [suffix != "qzeros"]
    assert not any(tmp_path.iterdir())


def test_layers_whose_zero_points_are_one_word_a_group_are_exported(tmp_path: Path) -> None:
    """Eight outputs of 4 bits. PyTorch counts such a column as contiguous, whatever its strides."""
    model = tiny_llama(num_key_value_heads=1, head_dim=8, num_hidden_layers=1)
    QuantizeModule(group_size=32).quantize(model, [torch.arange(32)] * 4, export_dir=tmp_path / "out")
    assert model.model.layers[0].self_attn.k_proj.qzeros.shape == (2, 1)
    assert torch.equal(logits(load_quantized(tmp_path / "out")), logits(model))
