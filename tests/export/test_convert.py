"""Checkpoints from one format to another, bit for bit."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from gptq_plugin import QuantizeConfig, load_quantized
from gptq_plugin.apps.command import main
from gptq_plugin.checkpoint.checkpoint import Checkpoint
from gptq_plugin.config import own_config
from gptq_plugin.errors import CheckpointError, ExportError
from gptq_plugin.export import convert as converting
from gptq_plugin.export import export as export_module
from gptq_plugin.export.convert import convert

from copies import edited
from models import tiny_llama
from paths import FIXTURES

IDS = torch.arange(3, 15)[None]


def fixtures(*formats):
    """Checkpoints of other tools with one of these formats."""
    folders = sorted(file.parent for file in FIXTURES.glob("*/config.json"))
    return [f.name for f in folders if _format(f) in formats]


def _format(folder):
    try:
        return Checkpoint.open(folder).checkpoint_format
    except CheckpointError:  # optimum's, which states two
        return None


def tensors(folder):
    checkpoint = Checkpoint.open(folder)
    read = {name: checkpoint.read_tensors(name) for name in checkpoint.layers}
    floats = {name: {"": checkpoint.read(name)} for name in checkpoint.float_names}
    return {f"{name} {suffix}": t for name, layer in {**read, **floats}.items() for suffix, t in layer.items()}


def same(one, other):
    one, other = tensors(one), tensors(other)
    assert one.keys() == other.keys()
    return all(torch.equal(one[key], other[key]) and one[key].dtype == other[key].dtype for key in one)


def logits(folder):
    with torch.no_grad():
        return load_quantized(folder)(input_ids=IDS).logits


def has_contiguous_groups(name):
    checkpoint = Checkpoint.open(FIXTURES / name)
    for layer in checkpoint.layers.values():
        size = layer.group_size if layer.group_size > 0 else layer.in_features
        natural = torch.arange(layer.in_features, dtype=torch.int32) // size
        if not torch.equal(checkpoint.read_tensors(layer.name)["g_idx"], natural):
            return False
    return True


CASES = [
    *((name, to) for name in fixtures("compressed-tensors") for to in ("gptq", "gptq_v2")),
    *((name, "gptq_v2") for name in fixtures("gptq")),
    *((name, "gptq") for name in fixtures("gptq_v2")),
    *((name, "compressed-tensors") for name in fixtures("gptq", "gptq_v2") if has_contiguous_groups(name)),
]


@pytest.mark.parametrize(("name", "checkpoint_format"), CASES)
def test_another_tools_checkpoint_goes_there_and_back_bit_for_bit(name, checkpoint_format, tmp_path):
    source = FIXTURES / name
    before = Checkpoint.open(source).checkpoint_format
    try:
        there = convert(source, tmp_path / "there", checkpoint_format)
    except ExportError as error:  # the only two that a format cannot hold
        zero = checkpoint_format == "gptq" and "zeros are 0" in str(error)
        assert zero or (checkpoint_format == "compressed-tensors" and "bits=8 and sym=False" in str(error))
        assert not any(tmp_path.iterdir())
        return
    assert Checkpoint.open(there).checkpoint_format == checkpoint_format and same(there, source)
    if name.endswith(("w4g32", "mixed-bits", "w8-channel")):
        assert torch.equal(logits(there), logits(source))
    if before != "compressed-tensors" or "8" not in name or "asym" not in name:
        back = convert(there, tmp_path / "back", before)
        assert same(back, source)
        tools = json.loads((back / "config.json").read_text())["quantization_config"]["meta"]["quantizer"]
        assert tools[-1].startswith("gptq_plugin:") and len(set(tools)) == len(tools)


def test_groups_in_act_order_stay_in_gptq(tmp_path):
    with pytest.raises(
        ExportError, match="no longer supports groups in act-order.*desc_act=False.*checkpoint_format='gptq'"
    ):
        convert(FIXTURES / "gptqmodel-w4g32-desc-act", tmp_path / "out", "compressed-tensors")
    assert not any(tmp_path.iterdir())


def test_layers_left_float_other_files_and_shards_come_along(tmp_path, rtn, monkeypatch):
    monkeypatch.setattr(export_module, "SHARD", 20_000)
    monkeypatch.setattr(converting, "SHARD", 20_000)
    config = QuantizeConfig(
        group_size=32, dynamic={r".*\.down_proj": {"bits": 8}, r"-:.*layers\.0.*q_proj": {}}, damp_percent=0.05
    )
    model = rtn(tiny_llama(tie_word_embeddings=True), config)
    source = export_module.export_model(model, tmp_path / "source", config)
    (source / "chat_template.jinja").write_text("{{ messages }}")
    (source / "code").mkdir()
    (source / "code" / "more.py").write_text("pass")
    there = convert(source, tmp_path / "there", "compressed-tensors")
    assert same(there, source) and len(list(there.glob("*.safetensors"))) > 1
    assert torch.equal(logits(there), logits(source))
    assert (there / "code" / "more.py").read_text() == "pass" and (there / "chat_template.jinja").exists()
    description = json.loads((there / "config.json").read_text())["quantization_config"]
    assert description["ignore"] == ["model.layers.0.self_attn.q_proj", "lm_head"]
    back = convert(there, tmp_path / "back", "gptq")
    assert same(back, source)
    before, after = (json.loads((f / "config.json").read_text())["quantization_config"] for f in (source, back))
    for key in ("bits", "group_size", "sym", "desc_act", "lm_head", "modules_in_block_to_quantize"):
        one, other = (sorted(v[0]) if isinstance(v, list) else v for v in (before[key], after[key]))
        assert one == other, key
    with pytest.raises(ExportError, match="overwrite=True"):
        convert(there, back, "gptq_v2")
    assert same(convert(there, back, "gptq_v2", overwrite=True), source)


@pytest.mark.parametrize("to", ["gptq_v2", "compressed-tensors"])
def test_how_we_quantized_it_is_stated_after_a_conversion_too(to, tmp_path, rtn):
    config = QuantizeConfig(
        group_size=32,
        static_groups=False,
        damp_percent=0.05,
        clip_ratios=(1.0, 0.8),
        nsamples=7,
        seed=3,
        dynamic={r".*\.down_proj": {"bits": 8, "clip_ratios": [0.9]}, "-:.*q_proj": {}},
        modules_to_not_convert=("layers.0.mlp.up_proj",),
    )
    source = export_module.export_model(rtn(tiny_llama(), config), tmp_path / "source", config)
    out = convert(source, tmp_path / "out", to)
    for folder, form in ((out, to), (convert(out, tmp_path / "back", "gptq"), "gptq")):
        content = Checkpoint.open(folder).quantize_config
        kept = own_config(content)
        skipped = {rule: {} for rule in kept.dynamic if rule.startswith("-:")}
        assert kept == dataclasses.replace(config, checkpoint_format=form, dynamic={**skipped, **config.dynamic})
        assert sorted(content["meta"]["gptq_plugin"]["files"]) == sorted(file.name for file in folder.iterdir())


def test_how_another_tool_quantized_it_is_stated_in_its_terms_and_not_as_ours(tmp_path):
    source = FIXTURES / "gptqmodel-w4g32"
    before = Checkpoint.open(source).quantize_config
    out = convert(source, tmp_path / "out", "gptq_v2")
    for folder in (out, convert(out, tmp_path / "ct", "compressed-tensors")):
        after = Checkpoint.open(folder).quantize_config
        assert own_config(after) is None and list(after["meta"]["gptq_plugin"]) == ["files"]
        others = {key: value for key, value in before["meta"].items() if key != "quantizer"}
        assert others and others.items() <= after["meta"].items()
        for key in ("damp_percent", "damp_auto_increment", "static_groups", "true_sequential"):
            assert after.get(key) == before.get(key)


def test_what_cannot_be_is_refused_before_anything_is_written(tmp_path):
    source = FIXTURES / "gptqmodel-w4g32"
    with pytest.raises(ValueError, match="must be one of gptq, gptq_v2, compressed-tensors; got 'awq'"):
        convert(source, tmp_path / "out", "awq")
    with pytest.raises(ValueError, match="has checkpoint_format='gptq' already"):
        convert(source, tmp_path / "out", "gptq")
    with pytest.raises(CheckpointError, match="is not a folder"):
        convert(tmp_path / "nowhere", tmp_path / "out", "gptq")
    assert not any(tmp_path.iterdir())


def test_the_command_converts_and_prints_where_the_result_is(tmp_path, capsys):
    source, out = str(FIXTURES / "gptqmodel-w4g32"), str(tmp_path / "out")
    assert main(["convert", source, out, "checkpoint_format=compressed-tensors"]) == 0
    assert capsys.readouterr().out == f"{out} has checkpoint_format=compressed-tensors\n"
    assert same(out, source)
    assert main(["convert", source, out, "checkpoint_format=gptq_v2"]) == 1
    assert "gptq-plugin convert:" in (said := capsys.readouterr().err) and "overwrite" in said
    assert main(["convert", source, out, "checkpoint_format=gptq_v2", "--overwrite"]) == 0
    with pytest.raises(SystemExit) as ended:
        main(["convert", source, out, "gptq"])
    assert ended.value.code == 2 and "write checkpoint_format=FORMAT" in capsys.readouterr().err


def test_a_name_that_means_a_quantized_layer_in_the_other_format_is_refused_before_anything_is_written(tmp_path):
    folder = edited(
        "llmcompressor-w4g32", tmp_path / "x", tensors=lambda state: state.update({"model.norm.qweight": torch.ones(3)})
    )
    with pytest.raises(CheckpointError, match=r"x holds model\.norm\.qweight, which belong to no quantized layer"):
        convert(folder, tmp_path / "out", "gptq_v2")
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


@pytest.mark.parametrize(
    ("name", "value", "refused"),
    [("model.norm.weight", float("nan"), True), ("model.embed_tokens.weight", float("inf"), True),
     ("lm_head.weight", -float("inf"), True), ("model.mask", float("inf"), False), ("model.mask", float("nan"), True)],
)  # fmt: skip
def test_nan_and_infinity_are_not_copied(name, value, refused, tmp_path, rtn):
    config = QuantizeConfig(group_size=16)
    folder = export_module.export_model(rtn(tiny_llama(), config), tmp_path / "out", config)
    tensors = load_file(folder / "model.safetensors")
    tensors.setdefault(name, torch.zeros(4, 4))[..., 1] = value
    save_file(tensors, folder / "model.safetensors")
    if refused:
        with pytest.raises(CheckpointError, match=rf"model\.safetensors: {name} holds (NaN|infinity)"):
            convert(folder, tmp_path / "converted", "gptq_v2")
        assert [one.name for one in tmp_path.iterdir()] == ["out"]
    else:
        assert convert(folder, tmp_path / "converted", "gptq_v2").is_dir()
