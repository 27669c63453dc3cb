"""Options of transformers' GPTQConfig are taken by QuantizeConfig.from_dict, by value; what has no counterpart is
refused."""

from __future__ import annotations

import inspect

import pytest
from transformers import GPTQConfig

from gptq_plugin import QuantizeConfig, QuantizeModule, QuantLinear
from gptq_plugin.options.gptq_config import BLOCKS, ELSEWHERE, SAME, WITHOUT_EFFECT

from models import tiny_llama

OURS = set(QuantizeConfig().to_dict())


def test_every_option_of_gptq_config_has_a_place():
    theirs = set(inspect.signature(GPTQConfig.__init__).parameters) - {"self", "kwargs"}
    assert theirs - OURS <= {*SAME, *WITHOUT_EFFECT, *ELSEWHERE, *BLOCKS}


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({}, QuantizeConfig(damp_percent=0.1, batch_size=1)),
        ({"group_size": -1, "sym": False, "damp_percent": 0.05, "batch_size": 3, "model_seqlen": 512},
         QuantizeConfig(group_size=-1, sym=False, damp_percent=0.05, batch_size=3, model_seqlen=512)),
        ({"desc_act": True}, QuantizeConfig(desc_act=True, static_groups=False, damp_percent=0.1, batch_size=1)),
        ({"act_group_aware": False}, QuantizeConfig(static_groups=False, damp_percent=0.1, batch_size=1)),
        ({"format": "gptq_v2"}, QuantizeConfig(checkpoint_format="gptq_v2", damp_percent=0.1, batch_size=1)),
    ],
)  # fmt: skip
def test_what_gptq_config_holds_is_taken(options, wanted):
    assert QuantizeConfig.from_dict(GPTQConfig(bits=4, **options).to_dict()) == wanted


def test_the_original_act_order_is_what_users_of_gptq_config_get_without_its_own_correction():
    given = {"bits": 4, "desc_act": True, "act_group_aware": True}
    assert QuantizeConfig.from_dict(given) == QuantizeConfig(desc_act=True, static_groups=False)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"quant_method": "awq"}, "quant_method must be 'gptq'; got 'awq'"),
        ({"dataset": "c4"}, "dataset is no option of QuantizeConfig: give the callback calibration="),
        ({"tokenizer": "org/name"}, "give it to the callback, or to quantize, as tokenizer="),
        ({"format": "gptq", "checkpoint_format": "gptq_v2"}, "format='gptq' contradicts checkpoint_format='gptq_v2'"),
        ({"act_group_aware": True, "static_groups": False}, "contradicts static_groups=False"),
        ({"format": "marlin"}, "checkpoint_format must be one of"),
        ({"block_name_to_quantize": 3}, "block_name_to_quantize"),
        ({"modules_in_block_to_quantize": "q_proj"}, "must be a list of names"),
        ({"modules_in_block_to_quantize": [[]]}, "names no layer"),
        ({"modules_in_block_to_quantize": [[3]]}, "each name in modules_in_block_to_quantize"),
        ({"modules_in_block_to_quantize": ["a"], "dynamic": {"-:b": {}}}, "both choose layers"),
        ({"datasets": "c4"}, "unknown option 'datasets'"),
    ],
)
def test_what_has_no_counterpart_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        QuantizeConfig.from_dict({"bits": 4, **values})


def quantized(**values):
    model = tiny_llama()
    QuantizeModule(QuantizeConfig.from_dict({"bits": 4, "group_size": 16, **values})).round_to_nearest(model)
    return sorted(name for name, module in model.named_modules() if isinstance(module, QuantLinear))


def test_only_the_named_layers_of_the_named_block_are_quantized():
    everything = quantized()
    ending = tuple(name for name in everything if name.endswith(("self_attn.q_proj", "mlp.down_proj")))
    names = [["self_attn.q_proj"], ["mlp.down_proj"]]
    assert quantized(modules_in_block_to_quantize=names) == list(ending) != everything
    assert quantized(modules_in_block_to_quantize=["q_proj"]) == [name for name in everything if "q_proj" in name]
    first = quantized(block_name_to_quantize="model.layers.0")
    assert first and first == [name for name in everything if name.startswith("model.layers.0.")]
    both = quantized(block_name_to_quantize="model.layers.0", modules_in_block_to_quantize=["q_proj"])
    assert both == ["model.layers.0.self_attn.q_proj"]


@pytest.mark.parametrize("values", [{"modules_in_block_to_quantize": ["proj"]}, {"block_name_to_quantize": "layers"}])
def test_names_that_are_parts_of_names_match_nothing_and_are_refused(values):
    with pytest.raises(ValueError, match="matches none of the"):
        quantized(**values)


def test_none_is_left_to_the_defaults():
    names = ("model_seqlen", "batch_size", "checkpoint_format", "meta", "dataset", *BLOCKS)
    assert QuantizeConfig.from_dict(dict.fromkeys(names)) == QuantizeConfig()
