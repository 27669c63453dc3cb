"""Names in checkpoints, as transformers' own tables have them."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from gptq_plugin.model.experts import find_experts, unfused
from gptq_plugin.model.linears import is_linear, linear_shape
from gptq_plugin.model.stored_names import expert_parts, key_renaming, plain_renaming, renaming, stored_names

TINY = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 1, "vocab_size": 64}  # fmt: skip


def mixtral(experts=3):
    config = AutoConfig.for_model("mixtral", num_local_experts=experts, num_experts_per_tok=2, **TINY)
    return AutoModelForCausalLM.from_config(config)


def gpt_oss():
    config = AutoConfig.for_model("gpt_oss", num_local_experts=3, num_experts_per_tok=2, head_dim=16, **TINY)
    return AutoModelForCausalLM.from_config(config)


def saved(model, folder):
    """The shapes in the checkpoint that transformers writes."""
    from safetensors import safe_open

    model.save_pretrained(folder)
    with safe_open(folder / "model.safetensors", "pt") as file:
        return {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118


def shapes(model):
    return {name: linear_shape(module) for name, module in model.named_modules() if is_linear(module)}


def test_a_module_that_is_not_of_transformers_keeps_its_names():
    assert stored_names(nn.Module(), {"a.b": (2, 3)}) == {"a.b": "a.b"}


def test_layers_have_the_names_that_save_pretrained_gives_them(tmp_path):
    model = mixtral()
    files = saved(model, tmp_path)
    with unfused(model):
        wanted = shapes(model)
        names = stored_names(model, wanted)
    assert {f"{stored}.weight": wanted[name] for name, stored in names.items()}.items() <= files.items()
    experts = [name for name in names if ".experts." in name]
    assert len(experts) == 9 and all(names[name] != name for name in experts)


def test_a_layer_whose_weight_is_stored_joined_with_others_keeps_the_models_name():
    model = mixtral()
    names = stored_names(model, {"model.layers.0.mlp.experts.gate_up_proj": (128, 32), "lm_head": (64, 32)})
    assert names["model.layers.0.mlp.experts.gate_up_proj"] == "model.layers.0.mlp.experts.gate_up_proj"
    assert names["lm_head"] == "lm_head"


def test_names_of_a_checkpoint_lead_back_to_the_models(tmp_path):
    model = mixtral()
    keys = list(saved(model, tmp_path))
    whole = {new for key in keys for new in key_renaming(model)(key)}
    assert whole == set(model.state_dict())  # experts are joined
    with unfused(model):
        names = stored_names(model, shapes(model))
        back, plain = renaming(model), plain_renaming(model)
        for name, stored in names.items():
            assert back(stored) == name  # each expert by itself
            assert ".experts." in name or plain(stored) == name


def test_a_base_model_reads_the_names_of_a_model_with_a_head():
    config = AutoConfig.for_model("llama", **TINY)
    rename = renaming(AutoModel.from_config(config))
    assert rename("model.layers.0.mlp.up_proj") == "layers.0.mlp.up_proj"


def test_the_parts_of_an_expert_are_the_rows_that_the_checkpoint_has_of_it(tmp_path):
    model = mixtral()
    stacks = find_experts(model)
    parts = expert_parts(model, stacks)
    assert list(parts) == [(stack.name, stack.parameter) for stack in stacks]
    model.save_pretrained(tmp_path)
    from safetensors.torch import load_file

    files = load_file(tmp_path / "model.safetensors")
    prefix = stacks[0].name.replace(".mlp.", ".block_sparse_moe.")
    for stack in stacks:
        of_all = parts[stack.name, stack.parameter]
        assert len(of_all) == 3 and {len(one) for one in of_all} == {2 if "gate" in stack.parameter else 1}
        for expert, of_one in enumerate(of_all):
            for part in of_one:
                assert torch.equal(files[f"{prefix}.{part.name}.weight"], stack.whole[expert][part.rows])


def test_experts_that_are_stored_whole_have_one_part_named_after_the_parameter():
    model = gpt_oss()
    for (_, parameter), of_all in expert_parts(model, find_experts(model)).items():
        assert [[part.name for part in one] for one in of_all] == [[f"{e}.{parameter}"] for e in range(3)]
        assert all(one[0].rows == slice(0, 128 if parameter == "gate_up_proj" else 32) for one in of_all)


@pytest.mark.parametrize("where", ["", "net"])
def test_experts_of_a_model_inside_another_module_have_its_name_before_theirs(where):
    model = mixtral()
    root = nn.ModuleDict({where: model}) if where else model
    assert {name for name, _ in expert_parts(root, find_experts(root))} == {
        f"{where}{'.' if where else ''}model.layers.0.mlp.experts"
    }


@pytest.mark.parametrize("kind", ["qwen3_moe", "mixtral"])
def test_names_of_many_experts_are_those_that_each_has_if_all_are_asked_about(kind, monkeypatch):
    from gptq_plugin.model import stored_names as module

    sizes = {"num_experts": 12, "num_local_experts": 12, "hidden_size": 32, "intermediate_size": 32,
             "moe_intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2,
             "vocab_size": 64}  # fmt: skip
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes))
    with unfused(model):
        shapes = {name: (8, 8) for name, one in model.named_modules() if isinstance(one, nn.Linear)}
    found = module.stored_names(model, shapes)
    monkeypatch.setattr(module, "_by_expert", lambda names: {})
    assert found == module.stored_names(model, shapes) and list(found) == list(shapes)
    if kind == "mixtral":
        assert found["model.layers.1.mlp.experts.11.w1"] == "model.layers.1.block_sparse_moe.experts.11.w1"


def test_if_names_differ_by_more_than_the_number_all_experts_are_asked_about(monkeypatch):
    from gptq_plugin.model import stored_names as module

    asked = []

    def revert(model, state):
        asked.append(len(state))
        return {name.replace("experts.1.", "others.7."): tensor for name, tensor in state.items()}

    monkeypatch.setattr("transformers.core_model_loading.revert_weight_conversion", revert)
    monkeypatch.setattr(module, "is_transformers", lambda model: True)
    shapes = {f"a.experts.{number}.up": (2, 2) for number in range(5)}
    found = module.stored_names(nn.Module(), shapes)
    assert (
        asked == [2, 5] and found["a.experts.1.up"] == "a.others.7.up" and found["a.experts.4.up"] == "a.experts.4.up"
    )


@pytest.mark.parametrize("asked", [2, 3])
def test_parts_of_many_experts_are_those_that_each_has_if_all_are_asked_about(asked, monkeypatch):
    from gptq_plugin.model import stored_names as module

    model = mixtral(experts=7)
    stacks = find_experts(model)
    monkeypatch.setattr(module, "_ASKED", 7)
    wanted = expert_parts(model, stacks)
    assert [part.name for part in wanted[stacks[0].name, "gate_up_proj"][6]] == ["6.w1", "6.w3"]
    monkeypatch.setattr(module, "_ASKED", asked)
    assert expert_parts(model, stacks) == wanted


def test_if_parts_differ_by_more_than_the_number_all_experts_are_asked_about(monkeypatch):
    from transformers import core_model_loading

    model = mixtral(experts=7)
    stacks = find_experts(model)
    revert = core_model_loading.revert_weight_conversion

    def odd(model, state):
        return {key.replace(".1.w", ".1.v"): tensor for key, tensor in revert(model, state).items()}

    monkeypatch.setattr(core_model_loading, "revert_weight_conversion", odd)
    found = expert_parts(model, stacks)[stacks[0].name, "down_proj"]
    assert [parts[0].name for parts in found] == ["0.w2", "1.v2", *(f"{number}.w2" for number in range(2, 7))]


def test_what_a_rule_makes_of_a_modules_own_tensor_is_found_under_the_names_that_the_model_has(tmp_path):
    """The experts' module is in the model, and w13_weight, which its checkpoint has there, is not."""
    pytest.importorskip("transformers.models.inkling2")
    config = AutoConfig.for_model(
        "inkling2_text", hidden_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, head_dim=16,
        swa_num_attention_heads=2, swa_num_key_value_heads=1, swa_head_dim=16, moe_intermediate_size=32,
        n_routed_experts=4, num_experts_per_tok=2, layer_types=["hybrid"], vocab_size=64, unpadded_vocab_size=64,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    rename, stored = key_renaming(model), saved(model, tmp_path)
    assert any(name.endswith("experts.w13_weight") for name in stored)
    assert {key for name in stored for key in rename(name)} == set(model.state_dict())
