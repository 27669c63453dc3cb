"""A model whose configuration does not describe it would not load."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel

from gptq_plugin import QuantizeConfig, QuantizeModule
from gptq_plugin.errors import ExportError
from gptq_plugin.model.as_configured import refuse_other_than_configured

from models import Plain, tiny_experts, tiny_gpt2, tiny_llama, tiny_llava


def _without_a_block(model: Any) -> None:
    model.model.layers = model.model.layers[:1]


def _with_another_block(model: Any) -> None:
    model.model.layers = nn.ModuleList([*model.model.layers, model.model.layers[0]])


def _with_another_head(model: Any) -> None:
    model.lm_head = nn.Linear(64, 130, bias=True)


@pytest.mark.parametrize("is_quantized", [False, True], ids=["float", "quantized"])
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_without_a_block, r"it lacks model\.layers\.1\."),
        (_with_another_block, r"it has model\.layers\.2\..* beside"),
        (_with_another_head, r"it has lm_head.bias beside; it has lm_head.weight \[130, 64\] instead of \[128, 64\]"),
    ],
)
def test_layers_that_were_changed_by_hand_are_named(
    change: Callable[[Any], None], words: str, is_quantized: bool, rtn: Callable[..., Any]
) -> None:
    model = tiny_llama(num_hidden_layers=2, tie_word_embeddings=False)
    refuse_other_than_configured(model)
    change(model)
    if is_quantized:
        rtn(model, QuantizeConfig(group_size=32, lm_head=True))
    with pytest.raises(ExportError, match=rf"LlamaForCausalLM is not the model of its configuration, .*{words}"):
        refuse_other_than_configured(model)


def test_a_part_that_an_argument_of_the_class_left_out_is_told_with_that_argument() -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = BertModel(BertConfig(vocab_size=64, **sizes), add_pooling_layer=False)
    words = r"lacks pooler\.dense\.weight, .* made with add_pooling_layer=False, which no configuration holds"
    with pytest.raises(ExportError, match=words):
        refuse_other_than_configured(model)


def _resized() -> Any:
    model = tiny_llama()
    model.resize_token_embeddings(150)
    return model


@pytest.mark.parametrize(
    "make", [tiny_experts, tiny_gpt2, tiny_llava, Plain, _resized, lambda: tiny_llama(tie_word_embeddings=True).model]
)
def test_models_as_they_were_configured_pass_and_no_random_number_is_drawn(make: Callable[[], Any]) -> None:
    model = make()
    torch.manual_seed(3)
    before = torch.get_rng_state()
    refuse_other_than_configured(model)
    QuantizeModule(group_size=16).round_to_nearest(model)
    refuse_other_than_configured(model)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_bias_that_the_configured_layer_has_not_is_named_unless_it_is_all_zeros(rtn: Callable[..., Any]) -> None:
    model = rtn(tiny_llama(num_hidden_layers=1), QuantizeConfig(group_size=32))
    layer = model.model.layers[0].mlp.up_proj
    layer.bias = torch.zeros(layer.out_features)
    refuse_other_than_configured(model)
    layer.bias[5] = 0.5
    with pytest.raises(ExportError, match=r"it has model\.layers\.0\.mlp\.up_proj\.bias beside"):
        refuse_other_than_configured(model)
