"""Which layers are quantized, and what is refused before any work."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    CLIPVisionConfig,
    CLIPVisionModel,
    EncoderDecoderConfig,
    EncoderDecoderModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
)
from transformers.pytorch_utils import Conv1D

from gptq_plugin import QuantizeConfig
from gptq_plugin.errors import TargetError
from gptq_plugin.layers.qlinear import QuantLinear
from gptq_plugin.model.structure import Structure
from gptq_plugin.model.targets import find_targets

CONFIG = QuantizeConfig(group_size=32)


def llama(**options):
    values = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
              "num_attention_heads": 2, "num_key_value_heads": 1, **options}  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**values))


def names(model, config=CONFIG):
    return [target.name for target in find_targets(Structure.of(model), config)[0]]


def reasons(model, config=CONFIG):
    return {skip.name: skip.reason for skip in find_targets(Structure.of(model), config)[1]}


def test_all_linears_of_a_transformers_model_but_the_output_embedding_are_targets():
    model = llama()
    assert len(names(model)) == 14
    assert reasons(model) == {"lm_head": "output embedding (lm_head=false)"}


@pytest.mark.parametrize("tied", [True, False])
def test_lm_head_true_includes_the_output_embedding(tied):
    model = llama(tie_word_embeddings=tied)
    assert "lm_head" in names(model, QuantizeConfig(group_size=32, lm_head=True))


def test_the_output_embedding_of_a_plain_module_is_found_by_its_tied_weight():
    model = nn.ModuleDict({"embed": nn.Embedding(64, 32), "body": nn.Linear(32, 32), "head": nn.Linear(32, 64)})
    model["head"].weight = model["embed"].weight
    assert names(model) == ["body"]
    assert "output embedding" in reasons(model)["head"]


def test_conv1d_is_a_target_with_its_weight_seen_as_linears():
    model = GPT2LMHeadModel(GPT2Config(n_embd=64, n_layer=1, n_head=2, vocab_size=64))
    targets, _ = find_targets(Structure.of(model), CONFIG)
    attn = next(target for target in targets if target.name.endswith("c_attn"))
    assert isinstance(attn.module, Conv1D) and attn.weight.shape == (192, 64)
    value = torch.randn(192, 64)
    attn.module.weight = attn.with_weight(value)
    x = torch.randn(3, 64)
    torch.testing.assert_close(attn.module(x), x @ value.T + attn.module.bias)


def test_linears_that_share_a_weight_stay_float_and_say_with_whom():
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 32))
    model[2].weight = model[0].weight
    assert names(model) == ["1"]
    assert reasons(model) == {"0": "its weight is tied to 2.weight", "2": "its weight is tied to 0.weight"}


def test_a_parametrized_linear_stays_float_with_a_reason():
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(32, 32)), nn.Linear(32, 32))
    assert names(model) == ["1"] and "parametrization" in reasons(model)["0"]


def test_a_linear_subclass_with_a_forward_of_its_own_is_no_target():
    class Scaled(nn.Linear):
        def forward(self, x):
            return super().forward(x) * 2

    assert names(nn.Sequential(Scaled(32, 32), nn.Linear(32, 32))) == ["1"]


def test_a_layer_whose_codes_do_not_fill_words_stays_float_with_a_reason():
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 10))
    assert names(model) == ["0"] and "out_features 10" in reasons(model)["1"]


@pytest.mark.parametrize("part", ["model.layers.0.mlp.up_proj", "layers.0.mlp.up_proj", "up_proj"])
def test_modules_to_not_convert_takes_runs_of_name_components(part):
    left = reasons(llama(), QuantizeConfig(group_size=32, modules_to_not_convert=[part]))
    assert "model.layers.0.mlp.up_proj" in left
    assert ("model.layers.1.mlp.up_proj" in left) == (part == "up_proj")


def test_a_name_that_is_only_part_of_a_component_matches_nothing_and_is_refused():
    with pytest.raises(TargetError, match="modules_to_not_convert: 'up_pro'"):
        find_targets(Structure.of(llama()), QuantizeConfig(group_size=32, modules_to_not_convert=["up_pro"]))


def test_a_regex_that_matches_nothing_is_refused_with_names_it_could_match():
    with pytest.raises(TargetError, match=r"'mlp' matches none of the 15 linear layers \(model.layers.0"):
        find_targets(Structure.of(llama()), QuantizeConfig(group_size=32, dynamic={"mlp": {"bits": 8}}))


def test_a_layer_that_the_group_size_does_not_divide_gets_smaller_groups_and_is_reported():
    targets, _ = find_targets(Structure.of(llama()), QuantizeConfig(group_size=64))
    odd = [target for target in targets if target.config.group_size != 64]
    assert [target.name for target in odd] == [name for name in names(llama()) if name.endswith("down_proj")]
    assert all(target.config.group_size == 32 for target in odd)
    assert odd[0].deviations == ("group_size 64 does not divide its 96 inputs: 32 instead",)


@pytest.mark.parametrize(
    ("group_size", "in_features", "fitted"),
    [(128, 4096, 128), (128, 192, 64), (128, 96, 32), (96, 128, 64), (128, 80, -1), (32, 48, -1), (16, 48, 16)],
)
def test_smaller_groups_are_those_that_clients_take(group_size, in_features, fitted):
    assert QuantizeConfig(group_size=group_size).group_size_for(in_features) == fitted


def test_a_dynamic_rule_can_give_the_odd_layer_its_own_group_size():
    config = QuantizeConfig(group_size=64, dynamic={r".*down_proj": {"group_size": 32}})
    targets, _ = find_targets(Structure.of(llama()), config)
    assert {t.config.group_size for t in targets if "down" in t.name} == {32}
    assert {t.config.group_size for t in targets if "down" not in t.name} == {64}


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), "no nn.Linear .*its parameters are in Conv2d"),
        (nn.Sequential(nn.Linear(32, 10)), "no layer is left to quantize: 0: out_features 10"),
    ],
)
def test_a_model_without_targets_is_refused(model, message):
    with pytest.raises(TargetError, match=message):
        find_targets(Structure.of(model), CONFIG)


def test_a_lone_linear_is_refused_since_it_cannot_be_replaced():
    with pytest.raises(TargetError, match="itself a Linear.*name the module that holds it"):
        find_targets(Structure.of(nn.Linear(32, 32)), CONFIG)


class Linear4bit(nn.Linear):
    """As bitsandbytes has it: weights packed two in a byte, and a product of its own."""

    def __init__(self, dtype):
        super().__init__(32, 32)
        self.weight = nn.Parameter(torch.zeros(512, 1, dtype=dtype), requires_grad=False)

    def forward(self, x):
        return x


class WQLinear(nn.Module):
    """As AWQ's and GPTQ's layers of other packages."""

    def __init__(self):
        super().__init__()
        self.register_buffer("qweight", torch.zeros(32, 4, dtype=torch.int32))


@pytest.mark.parametrize(
    ("layer", "told"),
    [
        (Linear4bit(torch.uint8), r"Linear4bit \(torch.uint8\)"),
        (Linear4bit(torch.int8), r"Linear4bit \(torch.int8\)"),
        (WQLinear(), r"WQLinear \(torch.int32\)"),
    ],
    ids=["uint8", "int8", "qweight"],
)
def test_a_model_in_which_another_tool_quantized_layers_is_refused(layer, told):
    model = nn.Sequential(nn.Linear(32, 32), layer)
    with pytest.raises(TargetError, match=f"^1 are quantized already, by another tool: {told}.*Load the base model in"):
        find_targets(Structure.of(model), CONFIG)


def test_a_quantized_model_is_refused():
    model = nn.Sequential(nn.Linear(32, 32), QuantLinear(32, 32, 4, 32))
    with pytest.raises(TargetError, match="quantized already"):
        find_targets(Structure.of(model), CONFIG)


def llava(**options):
    text = llama().config
    vision = CLIPVisionConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
                              image_size=16, patch_size=8)  # fmt: skip
    return LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text, **options))


def test_of_a_model_that_writes_about_images_the_language_part_is_quantized():
    model = llava()
    assert {name.partition(".layers.")[0] for name in names(model)} == {"model.language_model"}
    floats = reasons(model)
    assert "outside the language model" in floats["model.multi_modal_projector.linear_1"]
    assert "outside the language model" in floats["model.vision_tower.encoder.layers.0.self_attn.k_proj"]


def test_its_tower_is_quantized_on_request():
    config = QuantizeConfig(group_size=32, dynamic={r"model\.vision_tower\.": {"bits": 8}})
    found = {target.name: target.config.bits for target in find_targets(Structure.of(llava()), config)[0]}
    assert found["model.vision_tower.encoder.layers.0.self_attn.k_proj"] == 8
    assert found["model.language_model.layers.0.self_attn.k_proj"] == 4
    assert "model.multi_modal_projector.linear_1" not in found


def test_an_encoder_of_text_is_language_of_whatever_class():
    encoder = BertConfig(
        vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
    )
    decoder = GPT2Config(vocab_size=64, n_positions=16, n_embd=64, n_layer=1, n_head=2)
    model = EncoderDecoderModel(EncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder))
    assert {name.partition(".")[0] for name in names(model)} == {"encoder", "decoder"}
    assert all("outside" not in reason for reason in reasons(model).values())


def test_a_rule_for_all_layers_does_not_reach_the_tower():
    config = QuantizeConfig(group_size=32, dynamic={r".*self_attn": {"bits": 8}})
    assert not any("vision" in name for name in names(llava(), config))


def test_a_model_of_images_alone_is_quantized_whole():
    model = CLIPVisionModel(llava().config.vision_config)
    assert len(names(model)) == 2 * 6


class Wordy(nn.Linear):
    def forward(self, x):
        y = x @ self.weight.T
        return y if self.bias is None else y + self.bias


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Scaled(nn.Linear):
    """Computes what Linear does only as long as nobody has trained it."""

    def __init__(self, *args):
        super().__init__(*args)
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return self.scale * super().forward(x)


def test_a_subclass_is_a_target_where_it_computes_what_linear_does():
    model = nn.ModuleDict({"wordy": Wordy(32, 32), "doubled": Doubled(32, 32), "scaled": Scaled(32, 32)})
    assert names(model) == ["wordy"]
