"""`gptq-plugin check`: sound checkpoints of every width pass, and every kind of damage is found."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from gptq_plugin import QuantizeConfig, QuantizeModule
from gptq_plugin.apps.command import main
from gptq_plugin.check.lint import lint
from gptq_plugin.clients.client import Client
from gptq_plugin.export.export import export_model
from gptq_plugin.layers.packing import pack_zeros, unpack_zeros

LAYER = "model.layers.0.mlp.up_proj"
WIDTHS = {
    f"{bits} bits {'symmetric' if sym else 'asymmetric'}": {"bits": bits, "sym": sym}
    for bits in (2, 3, 4, 8)
    for sym in (True, False)
}
OTHERS: dict[str, dict[str, Any]] = {
    "4 bits act-order": {"desc_act": True, "static_groups": False},
    "3 bits a row": {"bits": 3, "group_size": -1},
    "4 bits compressed-tensors": {"checkpoint_format": "compressed-tensors", "sym": False},
    "4 bits natural order": {"static_groups": False, "clip_ratios": (1.0,)},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("lint")


@pytest.fixture(scope="module")
def float_dir(folder: Path) -> Path:
    make_llama().save_pretrained(folder / "float", max_shard_size="150KB")
    return folder / "float"


@pytest.fixture(scope="module")
def exported(folder: Path) -> Callable[[str], Path]:
    """exported(case): a checkpoint, quantized by GPTQ once."""

    def export(case: str) -> Path:
        out = folder / case.replace(" ", "-")
        if not out.exists():
            options = {"group_size": 32, **(WIDTHS | OTHERS)[case]}
            options.setdefault("checkpoint_format", "gptq" if options.get("sym", True) else "gptq_v2")
            torch.manual_seed(3)
            rows = torch.randint(0, 96, (6, 48)).tolist()
            quantizer, model = QuantizeModule(nsamples=6, **options), make_llama()
            quantizer.quantize(model, rows)
            export_model(model, out, quantizer.config)
        return out

    return export


def make_llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=128,
        intermediate_size=160,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=64,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).eval()


@pytest.fixture
def damaged(exported: Callable[[str], Path], tmp_path: Path) -> Callable[..., Path]:
    """damaged(case, change): a copy whose tensors went through change(tensors, bits)."""

    def copy(case: str, change: Callable[[dict[str, torch.Tensor], int], Any]) -> Path:
        out = tmp_path / "damaged"
        shutil.copytree(exported(case), out)
        tensors = renamed(load_file(out / "model.safetensors"), COMPRESSED)
        change(tensors, json.loads((out / "quantize_config.json").read_text())["bits"])
        back = {new: old for old, new in COMPRESSED.items()} if "compressed" in case else {}
        save_file(renamed(tensors, back), out / "model.safetensors")
        return out

    return copy


COMPRESSED = {"weight_packed": "qweight", "weight_scale": "scales", "weight_zero_point": "qzeros"}


def renamed(tensors: dict[str, torch.Tensor], suffixes: dict[str, str]) -> dict[str, torch.Tensor]:
    """compressed-tensors' tensors under GPTQ's names, or the other way round: each is the other transposed."""
    result = {}
    for name, tensor in tensors.items():
        module, _, suffix = name.rpartition(".")
        new = suffixes.get(suffix)
        result[f"{module}.{new}" if new else name] = tensor.T.contiguous() if new else tensor.contiguous()
    return result


def zeros_off(tensors: dict[str, torch.Tensor], bits: int, by: int = 1, only: str = "") -> None:
    for name in [n for n in tensors if n.endswith(f"{only}.qzeros")]:
        outputs = tensors[name.replace("qzeros", "scales")].shape[1]
        tensors[name] = pack_zeros((unpack_zeros(tensors[name], bits, outputs) + by) & (2**bits - 1), bits)


def one_group_off(tensors: dict[str, torch.Tensor], bits: int) -> None:
    """The zeros of one group in four, in a single layer."""
    whole = dict(tensors)
    zeros_off(tensors, bits, only=LAYER)
    tensors[f"{LAYER}.qzeros"][1:] = whole[f"{LAYER}.qzeros"][1:]


def bytes_swapped(tensors: dict[str, torch.Tensor], bits: int) -> None:
    for name in [n for n in tensors if n.endswith("qweight")]:
        single = tensors[name].view(torch.uint8).reshape(-1, 4).flip(-1).contiguous()
        tensors[name] = single.view(torch.int32).reshape(tensors[name].shape)


def scaled(tensors: dict[str, torch.Tensor], bits: int, only: str = "", by: float = 1.05) -> None:
    for name in [n for n in tensors if n.endswith(f"{only}.scales")]:
        tensors[name] = (tensors[name].float() * by).half()


def rolled(tensors: dict[str, torch.Tensor], bits: int) -> None:
    name = "model.layers.0.mlp.down_proj.qweight"
    tensors[name] = tensors[name].roll(1, 0)


def reversed_groups(tensors: dict[str, torch.Tensor], bits: int) -> None:
    for name in [n for n in tensors if n.endswith("g_idx")]:
        tensors[name] = tensors[name].flip(0)


def one_channel_in_another_group(tensors: dict[str, torch.Tensor], bits: int) -> None:
    for name in [n for n in tensors if n.endswith("g_idx")]:
        tensors[name][0] = (tensors[name][0] + 1) % (int(tensors[name].max()) + 1)


def without(suffix: str, only: str = "") -> Callable[[dict[str, torch.Tensor], int], None]:
    def remove(tensors: dict[str, torch.Tensor], bits: int) -> None:
        for name in [n for n in tensors if n.endswith(f"{only}.{suffix}")]:
            del tensors[name]

    return remove


def cast(dtype: torch.dtype) -> Callable[[dict[str, torch.Tensor], int], None]:
    def change(tensors: dict[str, torch.Tensor], bits: int) -> None:
        for name in [n for n in tensors if n.endswith("scales")]:
            tensors[name] = tensors[name].to(dtype)

    return change


@pytest.mark.parametrize("case", [*WIDTHS, *OTHERS])
def test_a_sound_checkpoint_passes_alone_and_beside_its_float_model(
    case: str, exported: Callable[[str], Path], float_dir: Path
) -> None:
    found = lint(exported(case), float_dir)
    assert found.findings == []
    assert found.facts["compared"].startswith("7 layers")
    assert found.facts["compared"].endswith("; 5 other tensors are equal")
    assert lint(exported(case)).findings == []


OF_THE_FLOAT_MODEL = {
    "zeros + 1": (zeros_off, "zeros off by one"),
    "zeros - 1": (lambda tensors, bits: zeros_off(tensors, bits, -1), "zeros off by one"),
    "zeros of one layer + 1": (
        lambda tensors, bits: zeros_off(tensors, bits, only=LAYER),
        f"{LAYER}: weights are",
    ),
    "zeros of one group + 1": (one_group_off, f"{LAYER}: some groups are shifted"),
    "bytes of every word swapped": (bytes_swapped, "does not hold the float model's weights"),
    "scales * 1.05": (scaled, "all 7 layers: scales are not those"),
    "scales of one layer * 1.05": (
        lambda tensors, bits: scaled(tensors, bits, LAYER),
        f"{LAYER}: scales are not those",
    ),
    "scales of one layer * 0.97": (
        lambda tensors, bits: scaled(tensors, bits, LAYER, 0.97),
        f"{LAYER}: scales are not",
    ),
    "words of one layer moved": (rolled, "model.layers.0.mlp.down_proj: it does not hold the float model's weights"),
}


@pytest.mark.parametrize(
    "case",
    ["2 bits symmetric", "3 bits asymmetric", "8 bits symmetric", "4 bits compressed-tensors"],
)
@pytest.mark.parametrize("damage", OF_THE_FLOAT_MODEL)
def test_damage_shows_beside_the_float_model_at_every_width(
    damage: str, case: str, damaged: Callable[..., Path], float_dir: Path
) -> None:
    change, words = OF_THE_FLOAT_MODEL[damage]
    found = lint(damaged(case, change), float_dir)
    assert any(words in error for error in found.errors), found.findings


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.layers.0.input_layernorm.weight"])
def test_what_is_not_quantized_must_be_the_float_model_s(
    name: str, damaged: Callable[..., Path], float_dir: Path
) -> None:
    out = damaged("4 bits symmetric", lambda tensors, bits: tensors[name][1:2].add_(0.5))
    (error,) = lint(out, float_dir).errors
    assert error.startswith(f"{name}: not quantized") and "by up to 0.5" in error
    assert not lint(out).errors


def test_what_is_not_quantized_may_be_cast_and_a_name_may_lack_the_base_model_s(
    damaged: Callable[..., Path], float_dir: Path, tmp_path: Path
) -> None:
    """The float model is float32, with digits that bfloat16 has no room for, and saved without its head."""
    whole = {key: t for file in float_dir.glob("*.safetensors") for key, t in load_file(file).items()}
    norm = torch.rand(128) + 1 / 3
    floats = {key.removeprefix("model."): t.float() for key, t in whole.items() if key != "lm_head.weight"}
    save_file({**floats, "norm.weight": norm}, tmp_path / "model.safetensors")
    out = damaged("4 bits symmetric", lambda tensors, bits: tensors.update({"model.norm.weight": norm.bfloat16()}))
    found = lint(out, tmp_path)
    assert not found.errors
    assert found.facts["compared"].endswith("4 other tensors are equal, 4 of them cast from float32 to bfloat16")
    assert "lm_head.weight: the float model has no tensor" in found.findings[0].message
    save_file({**floats, "norm.weight": norm + 0.01}, tmp_path / "model.safetensors")
    assert any(error.startswith("model.norm.weight: not quantized") for error in lint(out, tmp_path).errors)


def test_biases_of_quantized_layers_are_compared_and_a_bias_of_zeros_may_be_nowhere(
    damaged: Callable[..., Path], float_dir: Path, tmp_path: Path
) -> None:
    def bias(tensors: dict[str, torch.Tensor], bits: int, value: float = 0.0) -> None:
        tensors[f"{LAYER}.bias"] = torch.full((160,), value, dtype=torch.float16)

    out = damaged("4 bits symmetric", bias)
    assert not lint(out, float_dir).findings
    whole = {key: t for file in float_dir.glob("*.safetensors") for key, t in load_file(file).items()}
    save_file({**whole, f"{LAYER}.bias": torch.ones(160)}, tmp_path / "model.safetensors")
    assert [error.startswith(f"{LAYER}.bias: not quantized") for error in lint(out, tmp_path).errors] == [True]


def test_scales_of_an_unknown_recipe_are_held_to_the_size_of_the_weights(
    damaged: Callable[..., Path], float_dir: Path
) -> None:
    found = lint(damaged("4 bits natural order", scaled), float_dir)
    assert any("weights are larger than the float ones" in error for error in found.errors), found.findings


def test_a_g_idx_that_is_not_the_codes_own_shows_beside_the_float_model(
    damaged: Callable[..., Path], float_dir: Path
) -> None:
    out = damaged("4 bits act-order", reversed_groups)
    assert not lint(out).errors
    assert any("g_idx is wrong" in error for error in lint(out, float_dir).errors)


ALONE = {
    "zeros + 1": (zeros_off, "every zero is 8, and most others here are 9, as in a file of format gptq_v2"),
    "zeros of one layer": (lambda tensors, bits: zeros_off(tensors, bits, only=LAYER), f"{LAYER}: sym=True says"),
    "groups reversed": (reversed_groups, "desc_act=false says that channel i is in group i // group_size"),
    "one channel": (one_channel_in_another_group, "desc_act=false says"),
    "no zeros": (without("qzeros"), "lacks 7 tensors"),
    "one weight missing": (without("qweight", LAYER), f"{LAYER}.qweight"),
    "NaN": (lambda tensors, bits: tensors[f"{LAYER}.scales"].fill_(float("nan")), "NaN"),
    "nothing written": (lambda tensors, bits: tensors[f"{LAYER}.qweight"].zero_(), f"{LAYER}: every code is 0"),
}


@pytest.mark.parametrize("damage", ALONE)
def test_damage_shows_by_what_the_checkpoint_says_of_itself(damage: str, damaged: Callable[..., Path]) -> None:
    change, words = ALONE[damage]
    found = lint(damaged("4 bits symmetric", change))
    assert any(words in error for error in found.errors), found.findings


def test_groups_of_other_sizes_show_where_act_order_may_put_channels_anywhere(damaged: Callable[..., Path]) -> None:
    found = lint(damaged("4 bits act-order", one_channel_in_another_group))
    assert any("more channels into some groups" in error for error in found.errors)


@pytest.mark.parametrize("case,said", [("4 bits symmetric", "gptq_v2"), ("4 bits asymmetric", "gptq")])
def test_a_wrong_format_shows_by_the_other_file_and_by_the_codes(
    case: str, said: str, damaged: Callable[..., Path], float_dir: Path
) -> None:
    out = damaged(case, lambda tensors, bits: None)
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"].update(checkpoint_format=said, format=said)
    (out / "config.json").write_text(json.dumps(config))
    assert any("zeros of one read as the other are off by one" in error for error in lint(out).errors)
    (out / "quantize_config.json").unlink()
    alone = lint(out)
    assert any("codes average" in finding.message for finding in alone.findings)
    assert bool(alone.errors) == (case == "4 bits symmetric")
    assert any("zeros off by one" in error for error in lint(out, float_dir).errors)


def test_changes_that_change_no_number_are_said_not_to(damaged: Callable[..., Path], float_dir: Path) -> None:
    for change, words in ((cast(torch.float32), "no number changes"), (without("g_idx"), "no number changes")):
        out = damaged("4 bits symmetric", change)
        found = lint(out, float_dir)
        assert not found.errors
        assert any(words in finding.message for finding in found.findings)
        shutil.rmtree(out)


def test_scales_in_bfloat16_are_said_to_have_moved_weights_where_that_shows(
    damaged: Callable[..., Path], float_dir: Path
) -> None:
    out = damaged("4 bits symmetric", cast(torch.bfloat16))
    assert not lint(out).errors and "bfloat16" in lint(out).findings[0].message
    assert any("rounded to bfloat16" in error for error in lint(out, float_dir).errors)


def test_a_float_model_without_its_layers_is_said_and_compares_nothing(
    exported: Callable[[str], Path], tmp_path: Path
) -> None:
    save_file({"other.weight": torch.ones(4, 4)}, tmp_path / "model.safetensors")
    found = lint(exported("4 bits symmetric"), tmp_path)
    assert found.facts["compared"].startswith("0 layers")
    assert "has no weight of that name and shape" in found.findings[0].message
    assert "has no tensor of that name and shape" in found.findings[1].message


def test_layers_left_float_must_be_told_as_each_client_reads_it(rtn: Callable[..., Any], tmp_path: Path) -> None:
    config = QuantizeConfig(group_size=32, modules_to_not_convert=("o_proj",))
    out = export_model(rtn(make_llama(), config), tmp_path / "out", config)
    told = lint(out)
    assert not told.refusals[Client("transformers")] and not told.refusals[Client("gptqmodel")]
    file = json.loads((out / "config.json").read_text())
    for key in ("dynamic", "modules_in_block_to_quantize", "sym"):
        del file["quantization_config"][key]
    (out / "config.json").write_text(json.dumps(file))
    untold = lint(out)
    assert "modules_in_block_to_quantize" in untold.refusals[Client("transformers")][0]
    assert "dynamic" in untold.refusals[Client("gptqmodel")][0]
    assert any("lacks sym" in line for line in untold.refusals[Client("vllm")])


def test_the_command_says_what_it_found_and_exits_by_it(
    exported: Callable[[str], Path], damaged: Callable[..., Path], float_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, bad = exported("4 bits act-order"), damaged("4 bits symmetric", zeros_off)
    assert main(["check", str(good), "--float", str(float_dir)]) == 0
    text = capsys.readouterr().out
    for words in (
        "7 layers at 4 bits, group_size=32, symmetric, act-order",
        "LlamaForCausalLM",
        "float weights in bfloat16",
        "compared:    7 layers",
        "vllm: refuses it",
        "use static_groups=True",
        "gptqmodel: takes it",
        "0 errors, 0 warnings",
    ):
        assert words in text
    assert main(["check", str(good), "--target", "gptqmodel"]) == 0
    assert main(["check", str(good), "--target", "gptqmodel", "--target", "vllm"]) == 1
    capsys.readouterr()
    assert main(["check", str(bad)]) == 1
    assert "error: all 7 layers: sym=True says" in capsys.readouterr().out
    assert main(["check", str(good), "--tensor-parallel-size", "4"]) == 0
    assert "vllm (tensor_parallel_size=4): refuses it" in capsys.readouterr().out


def test_a_folder_that_cannot_be_read_is_an_error_and_a_wrong_call_another(
    exported: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", str(tmp_path / "nowhere")]) == 1
    assert "is not a folder" in capsys.readouterr().out
    assert main(["check", str(exported("4 bits symmetric")), "--float", str(tmp_path)]) == 1
    assert "no safetensors file" in capsys.readouterr().err
    for call in (["check"], ["check", "x", "--target", "vlm"], ["check", "x", "--tensor-parallel-size", "0"], []):
        with pytest.raises(SystemExit) as left:
            main(call)
        assert left.value.code == 2


def test_the_command_s_help_loads_no_torch() -> None:
    code = (
        "import sys; from gptq_plugin.apps.command import main\n"
        "try: main(['check', '--help'])\n"
        "except SystemExit: pass\n"
        "assert not {'torch', 'transformers', 'hydra'} & set(sys.modules)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "--tensor-parallel-size" in ran.stdout
