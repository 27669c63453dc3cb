"""transformers models in a tree of modules, and what they are."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    LlamaForCausalLM,
    LlamaModel,
    PreTrainedModel,
)

from gptq_plugin.errors import ExportError
from gptq_plugin.model import hf_models

TINY = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 64}
LLAMA = AutoConfig.for_model("llama", num_key_value_heads=1, **TINY)
BERT = AutoConfig.for_model("bert", **TINY)
T5 = AutoConfig.for_model("t5", d_model=32, d_kv=16, d_ff=32, num_layers=1, num_heads=2, vocab_size=64)


@pytest.mark.parametrize(
    ("make", "generates", "encoder_decoder", "predicts_next"),
    [
        (lambda: AutoModelForCausalLM.from_config(LLAMA), True, False, True),
        (lambda: AutoModelForSeq2SeqLM.from_config(T5), True, True, False),
        (lambda: AutoModelForMaskedLM.from_config(BERT), False, False, False),
        (lambda: AutoModel.from_config(LLAMA), False, False, False),  # no head, no loss
        (lambda: nn.Linear(2, 2), False, False, False),
    ],
    ids=["decoder", "encoder-decoder", "encoder", "without a head", "not of transformers"],
)
def test_a_model_is_known_by_what_it_can_do(make, generates, encoder_decoder, predicts_next):
    model = make()
    assert hf_models.is_transformers(model) == isinstance(model, PreTrainedModel)
    assert hf_models.generates(model) is generates
    assert hf_models.is_encoder_decoder(model) is encoder_decoder
    assert hf_models.predicts_next(model) is predicts_next


def test_the_outermost_models_are_found_with_their_names():
    llama, bert = LlamaModel(LLAMA), AutoModel.from_config(BERT)
    tree = nn.ModuleDict({"head": nn.Linear(2, 2), "towers": nn.ModuleList([llama, bert])})
    assert dict(hf_models.transformers_models(tree)) == {"towers.0": llama, "towers.1": bert}
    whole = LlamaForCausalLM(LLAMA)  # holds a LlamaModel
    assert dict(hf_models.transformers_models(whole)) == {"": whole}
    assert list(hf_models.transformers_models(nn.Linear(2, 2))) == []


def test_a_users_subclass_has_the_published_class_it_comes_from():
    class Mine(LlamaForCausalLM):
        pass

    class OfMyOwn(PreTrainedModel):
        config_class, _supports_sdpa = type(LLAMA), True

    assert hf_models.published_class(Mine(LLAMA)) is LlamaForCausalLM
    assert hf_models.published_class(LlamaModel(LLAMA)) is LlamaModel
    assert hf_models.published_class(OfMyOwn(LLAMA)) is None


def test_a_generation_config_that_contradicts_itself_is_refused_before_the_export():
    model = LlamaForCausalLM(LLAMA)
    hf_models.check_savable(model)
    hf_models.check_savable(nn.Linear(2, 2))
    model.generation_config.do_sample, model.generation_config.temperature = False, 0.3
    with pytest.raises(ExportError, match=r"generation_config cannot be saved[\s\S]*temperature"):
        hf_models.check_savable(model)


def test_code_beside_the_weights_is_told_by_its_module():
    model = LlamaForCausalLM(LLAMA)
    assert not hf_models.has_own_code(model)
    type_of_own = type("Own", (LlamaForCausalLM,), {"__module__": "transformers_modules.somewhere.modeling"})
    model.__class__ = type_of_own
    assert hf_models.has_own_code(model)


def test_architectures_of_conv1d_have_layers_that_are_no_linear():
    from transformers.pytorch_utils import Conv1D

    model = AutoModel.from_config(AutoConfig.for_model("gpt2", n_embd=32, n_layer=1, n_head=2, vocab_size=64))
    assert model.config.model_type in hf_models.CONV1D
    assert any(isinstance(module, Conv1D) for module in model.modules())
    assert not any(isinstance(module, nn.Linear) for module in model.modules())
    assert torch.is_tensor(model(torch.zeros(1, 3, dtype=torch.long)).last_hidden_state)


def test_a_module_whose_name_cannot_be_printed_is_refused_before_the_export():
    model = nn.Sequential()
    model.add_module("a/b 漢字", nn.Linear(2, 2))
    hf_models.check_savable(model)
    model.add_module("a\nb", nn.Linear(2, 2))
    with pytest.raises(ExportError, match=r"a module is named 'a\\nb'.*another name"):
        hf_models.check_savable(model)
