"""GPTQ's two formats: zeros on disk, and descriptions that every client reads."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gptq_plugin import QuantizeConfig
from gptq_plugin.checkpoint.formats.format import Contents, QuantizedLayer, Scheme
from gptq_plugin.checkpoint.formats.registry import FORMATS
from gptq_plugin.errors import CheckpointError, ExportError
from gptq_plugin.export.export import export_model
from gptq_plugin.layers.packing import pack_zeros, unpack_zeros

from exports import Tokenizer, description, files
from models import Plain, tiny_llama

Rtn = Callable[..., Any]
V1, V2 = FORMATS["gptq"], FORMATS["gptq_v2"]


def test_the_description_holds_what_every_client_reads(rtn: Rtn, tmp_path: Path) -> None:
    config = QuantizeConfig(group_size=32, desc_act=False, static_groups=True, damp_percent=0.0)
    folder = export_model(rtn(tiny_llama(), config), tmp_path / "out", config, tokenizer=Tokenizer())
    said = description(folder)
    meta = said.pop("meta")
    assert said == {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": 32,
        "desc_act": False,
        "sym": True,
        "lm_head": False,
        "checkpoint_format": "gptq",
        "format": "gptq",
        "pack_dtype": "int32",
    }
    assert meta["quantizer"][0].startswith("gptq_plugin:")
    full = json.loads((folder / "quantize_config.json").read_text())
    assert {key: full[key] for key in said} == said
    assert QuantizeConfig.from_quantize_config(full) == config
    assert sorted(full["meta"]["gptq_plugin"]["files"]) == sorted(files(folder))
    assert (folder / "tokenizer.json").exists()


def test_layers_left_float_are_told_to_gptqmodel_and_to_transformers(rtn: Rtn, tmp_path: Path) -> None:
    config = QuantizeConfig(group_size=32, modules_to_not_convert=("v_proj",))
    said = description(export_model(rtn(tiny_llama(), config), tmp_path / "out", config))
    assert said["dynamic"] == {r"-:model\.layers\.\d+\.self_attn\.v_proj$": {}}
    assert said["modules_in_block_to_quantize"] == [
        [
            "self_attn.q_proj",
            "self_attn.k_proj",
            "self_attn.o_proj",
            "mlp.gate_proj",
            "mlp.up_proj",
            "mlp.down_proj",
        ]
    ]


def test_a_layer_left_float_in_one_block_only_is_named_in_full(rtn: Rtn, tmp_path: Path) -> None:
    config = QuantizeConfig(group_size=32, modules_to_not_convert=("layers.1.mlp.up_proj",))
    said = description(export_model(rtn(tiny_llama(), config), tmp_path / "out", config))
    assert said["dynamic"] == {r"-:model\.layers\.1\.mlp\.up_proj$": {}}
    assert "model.layers.0.mlp.up_proj" in said["modules_in_block_to_quantize"][0]
    assert "mlp.up_proj" not in said["modules_in_block_to_quantize"][0]


def test_a_zero_that_v1_cannot_hold_is_refused_with_the_modules_name(rtn: Rtn, tmp_path: Path) -> None:
    config = QuantizeConfig(group_size=16, sym=False)
    model = rtn(Plain(), config)
    model.inner[0].qzeros.zero_()
    with pytest.raises(ExportError, match=r"inner\.0: .*gptq_v2"):
        export_model(model, tmp_path / "out", config)
    assert not any(tmp_path.iterdir())


# --- a layer's tensors --------------------------------------------------------------------------------------


def unsigned(words: torch.Tensor) -> list[list[int]]:
    return [[int(word) & 0xFFFFFFFF for word in row] for row in words.tolist()]


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([2, 3, 4, 8]), st.integers(1, 100), st.integers(1, 100), st.sampled_from([V1, V2]), st.integers(0)
)
def test_zeros_survive_the_way_to_disk_and_back(bits: int, groups: int, n_out: int, form: Any, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed % 2**31)
    zeros = torch.randint(1, 2**bits, (groups, n_out), generator=generator, dtype=torch.uint8)
    qzeros = pack_zeros(zeros, bits)
    stored = form.zeros_to_file(qzeros, bits, n_out)
    assert torch.equal(unpack_zeros(stored, bits, n_out), zeros if form is V2 else zeros - 1)
    assert torch.equal(form.zeros_from_file(stored, bits, n_out), qzeros)


def test_symmetric_zeros_are_sevens_in_v1_and_eights_in_v2() -> None:
    eights = pack_zeros(torch.full((1, 8), 8, dtype=torch.uint8), 4)
    assert unsigned(V1.zeros_to_file(eights, 4, 8)) == [[0x77777777]]
    assert unsigned(V2.zeros_to_file(eights, 4, 8)) == [[0x88888888]]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_stored_v1_zero_of_all_ones_is_read_as_zero_and_leaves_its_neighbours_alone(bits: int) -> None:
    stored = pack_zeros(torch.tensor([[0, 2**bits - 1, 0]], dtype=torch.uint8), bits)
    assert unpack_zeros(V1.zeros_from_file(stored, bits, 3), bits, 3).tolist() == [[1, 0, 1]]


def test_a_zero_of_0_is_not_written_as_v1_and_the_error_names_the_remedy() -> None:
    qzeros = pack_zeros(torch.tensor([[3, 0, 5]], dtype=torch.uint8), 4)
    with pytest.raises(ValueError, match=r"1 of 3 zeros are 0.*gptq_v2"):
        V1.zeros_to_file(qzeros, 4, 3)
    assert V2.zeros_to_file(qzeros, 4, 3) is qzeros


def test_a_layer_without_g_idx_has_contiguous_groups_and_its_inputs_are_told_by_its_words() -> None:
    shapes = {"qweight": (12, 5), "qzeros": (3, 1), "scales": (3, 5)}
    assert V1.sizes(shapes, 4, None) == (96, 5)
    assert V1.sizes({**shapes, "g_idx": (93,)}, 4, None) == (93, 5)  # the last word is not full
    layer = QuantizedLayer("x", 4, 32, 96, 5, 3, False, False, True, False)
    read = {suffix: torch.zeros(shape, dtype=torch.int32) for suffix, shape in shapes.items()}
    tensors = V2.from_file(read.__getitem__, layer)
    assert tensors["g_idx"].tolist() == [i // 32 for i in range(96)]
    assert tensors["scales"].dtype == torch.float16 and "bias" not in tensors


# --- the description ----------------------------------------------------------------------------------------


def test_the_first_rule_that_matches_the_name_from_its_start_overrides_the_description() -> None:
    described = {
        "bits": 4,
        "group_size": 128,
        "sym": False,
        "desc_act": True,
        "dynamic": {r"+:.*\.up": {"bits": 8, "sym": True}, r".*up": {"bits": 2}, "up": {"bits": 3}},
    }
    assert V1.schemes(described)("layers.0.down") == Scheme(4, 128, False, True)
    assert V1.schemes(described)("layers.0.up") == Scheme(8, 128, True, True)
    assert V1.schemes(described)("0up") == Scheme(2, 128, False, True)
    assert V1.schemes({"bits": 4})("x") == Scheme(4, -1, True, False)


@pytest.mark.parametrize(
    "described,words",
    [({}, "bits is None"), ({"bits": True}, "bits is True"), ({"bits": 4.0}, "bits is 4.0"), ({"bits": 5}, "3, 4, 8"),
     ({"bits": 4, "group_size": 0}, "group_size is 0"), ({"bits": 4, "group_size": "all"}, "group_size is 'all'"),
     ({"bits": 4, "group_size": True}, "group_size is True")],
)  # fmt: skip
def test_a_scheme_that_cannot_be_is_refused(described: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        V1.schemes(described)("x")


@pytest.mark.parametrize(
    "described,name",
    [({}, "gptq"), ({"format": "gptq_v2"}, "gptq_v2"), ({"checkpoint_format": "gptq_v2"}, "gptq_v2"),
     ({"checkpoint_format": "gptq", "format": "gptq"}, "gptq"), ({"is_marlin_format": True}, "marlin"),
     ({"pack_dtype": "torch.int32"}, "gptq")],
)  # fmt: skip
def test_the_stated_format_is_that_of_either_key_and_v1_without_one(described: dict[str, Any], name: str) -> None:
    assert V1.stated(described, Path("config.json")) == name


@pytest.mark.parametrize(
    "described,words",
    [({"pack_dtype": "int64"}, "int32 words"), ({"dynamic": [1]}, "dynamic must map"),
     ({"format": "gptq", "is_marlin_format": True}, "'gptq' and 'marlin'")],
)  # fmt: skip
def test_a_description_that_is_not_read_is_refused(described: dict[str, Any], words: str) -> None:
    with pytest.raises(CheckpointError, match=f"config.json: .*{words}"):
        V1.stated(described, Path("config.json"))


def test_in_memory_a_layer_is_gptq_v2_whatever_the_file_was() -> None:
    changed = V1.loaded({"bits": 4, "checkpoint_format": "gptq", "meta": {"a": 1}}, lambda: pytest.fail("not needed"))
    assert changed == {"bits": 4, "checkpoint_format": "gptq_v2", "format": "gptq_v2", "meta": {"a": 1}}


def test_layers_that_no_rule_of_the_user_describes_get_rules_for_all_blocks_alike() -> None:
    schemes = {f"layers.{i}.{name}": Scheme(4, 128, True, False) for i in range(3) for name in ("up", "gate")}
    small = {f"layers.{i}.down": Scheme(4, 32, True, False) for i in range(3)}
    config = QuantizeConfig(dynamic={r".*gate": {"sym": True}})
    rules = V1.describe(Contents({**schemes, **small}, []), config)["dynamic"]
    assert rules == {r"layers\.\d+\.down$": {"group_size": 32}, r".*gate": {"sym": True}}
    one = {**small, "layers.1.down": Scheme(4, 64, True, False)}
    rules = V1.describe(Contents({**schemes, **one}, []), QuantizeConfig())["dynamic"]
    assert rules == {
        r"layers\.0\.down$": {"group_size": 32},
        r"layers\.2\.down$": {"group_size": 32},
        r"layers\.1\.down$": {"group_size": 64},
    }


def test_a_users_rule_gives_way_to_an_exact_one_for_a_layer_that_it_describes_wrongly() -> None:
    schemes = {"layers.0.up": Scheme(4, 128, True, False), "layers.0.down": Scheme(8, 32, True, False)}
    rules = V1.describe(Contents(schemes, []), QuantizeConfig(dynamic={r".*down": {"bits": 8}}))["dynamic"]
    assert rules == {r"layers\.\d+\.down$": {"bits": 8, "group_size": 32}}
