"""How a batch is passed to a forward: by keywords where they fit, whole otherwise, and never by guessing."""

from __future__ import annotations

from collections import namedtuple
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from transformers import T5Config, T5ForConditionalGeneration

from gptq_plugin.calibration.forward import accepts, call, describe, evaluating
from gptq_plugin.errors import CalibrationError

from models import tiny_llama

IDS = torch.tensor([[5, 6, 7], [8, 9, 10]])


class Recorder(nn.Module):
    """Returns its arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2))

    def forward(self, x, scale=1, *, shift=0):
        return x, scale, shift


class Open(nn.Module):
    def forward(self, x, **rest):
        return x, rest


@dataclass
class Sample:
    x: torch.Tensor
    shift: int
    note: str


X = torch.ones(2, 3)


@pytest.mark.parametrize(
    ("batch", "arguments"),
    [
        ({"x": X, "shift": 2, "note": "left out"}, (X, 1, 2)),
        (Sample(X, 2, "left out"), (X, 1, 2)),
        (namedtuple("Pair", ["x", "scale"])(X, 3), (X, 3, 0)),
        (X, (X, 1, 0)),
        ((X, "targets"), (X, 1, 0)),
        ([X], (X, 1, 0)),
    ],
    ids=["mapping", "dataclass", "named tuple", "tensor", "tuple", "list"],
)
def test_fields_become_keywords_and_of_a_tuple_the_first_element_is_passed(batch, arguments):
    x, scale, shift = call(Recorder(), batch)
    assert torch.equal(x, X) and (scale, shift) == arguments[1:]


def test_a_mapping_without_matching_fields_is_passed_whole():
    batch = {"pixels": X}
    assert torch.equal(call(Recorder(), batch)[0]["pixels"], X)


def test_a_forward_with_open_keywords_gets_all_fields():
    x, rest = call(Open(), {"x": X, "note": "kept"})
    assert torch.equal(x, X) and rest == {"note": "kept"}
    assert accepts(Open(), {"x": X, "note": 1}) and not accepts(Open(), {"note": 1})


def test_a_forward_accepts_a_mapping_with_all_it_requires():
    assert accepts(Recorder(), {"x": X, "other": 1}) and accepts(Recorder(), {"x": X, "scale": 2})
    assert not accepts(Recorder(), {"scale": 2}) and not accepts(Recorder(), {"other": 1})
    assert not accepts(Recorder(), {})


def test_a_batch_goes_to_the_device_of_the_first_parameter_or_the_one_given():
    assert call(Recorder().to("meta"), {"x": X})[0].is_meta
    assert call(Recorder(), {"x": X}, device=torch.device("meta"))[0].is_meta
    assert torch.equal(call(Open(), {"x": X})[0], X)  # a model without parameters


def keywords_of(model, batch, **options):
    seen = {}
    handle = model.register_forward_pre_hook(lambda module, args, kwargs: seen.update(kwargs), with_kwargs=True)
    try:
        call(model, batch, **options)
    finally:
        handle.remove()
    return seen


def test_a_decoders_cache_loss_and_other_logits_are_not_computed():
    batch = {"input_ids": IDS, "labels": IDS, "text": ["a", "b"]}
    seen = keywords_of(tiny_llama(), batch)
    assert set(seen) == {"input_ids", "use_cache", "logits_to_keep"}
    assert seen["use_cache"] is False and seen["logits_to_keep"] == 1
    assert call(tiny_llama(), batch).logits.shape[:2] == (2, 1)


@pytest.mark.parametrize("batch", [IDS, [IDS]])
def test_nor_are_they_for_tokens_without_a_name(batch):
    model = tiny_llama()
    out = call(model, batch)
    assert out.past_key_values is None and out.logits.shape[1] == 1
    assert call(model, batch, every_logit=True).logits.shape[1] == IDS.shape[1]


def test_every_logit_is_computed_where_the_output_embedding_is_calibrated():
    assert "logits_to_keep" not in keywords_of(tiny_llama(), {"input_ids": IDS}, every_logit=True)
    assert call(tiny_llama(), {"input_ids": IDS}, every_logit=True).logits.shape[:2] == (2, 3)


def test_an_encoder_decoder_keeps_its_labels_which_are_its_second_input():
    config = T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0)
    seen = keywords_of(T5ForConditionalGeneration(config), {"input_ids": IDS, "labels": IDS})
    assert torch.equal(seen["labels"], IDS) and seen["use_cache"] is False


class Hidden(nn.Module):
    """A wrapper that hides what it takes."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *args, **kwargs):
        return self.inner(*args, **kwargs)


def test_through_a_wrapper_that_hides_it_only_what_the_model_takes_is_passed():
    batch = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "text": ["a", "b"], "idx": torch.arange(2)}
    llama = tiny_llama()
    for wrapper in (Hidden(llama), Hidden(Hidden(llama))):
        seen = {}
        handle = llama.register_forward_pre_hook(lambda m, args, kwargs: seen.update(kwargs), with_kwargs=True)  # noqa: B023
        wanted = call(wrapper, batch).logits
        handle.remove()
        assert set(seen) == {"input_ids", "attention_mask"}
        assert torch.equal(wanted, llama(input_ids=IDS).logits)
    x, scale, shift = call(Hidden(Recorder()), {"x": X, "shift": 2, "note": "left out"})
    assert torch.equal(x, X) and (scale, shift) == (1, 2)
    assert accepts(Hidden(llama), {"input_ids": IDS}) and not accepts(Hidden(llama), {"pixels": X})


def test_a_wrapped_transformers_models_tuple_is_not_guessed_either():
    assert call(Hidden(tiny_llama()), (IDS,)).logits.shape[0] == 2
    with pytest.raises(CalibrationError, match="does not fit LlamaForCausalLM.forward"):
        call(Hidden(tiny_llama()), (IDS, torch.ones_like(IDS)))


@pytest.mark.parametrize(
    "batch", [{"input_ids": IDS + 125}, IDS + 125, (IDS + 125,)], ids=["mapping", "tensor", "tuple"]
)
def test_tokens_beyond_the_vocabulary_are_refused_before_the_forward(batch):
    for model in (tiny_llama(), Hidden(tiny_llama())):
        with pytest.raises(CalibrationError, match="token id 135 in input_ids"):
            call(model, batch)


@pytest.mark.parametrize(
    ("model", "batch", "message"),
    [
        (nn.Bilinear(3, 3, 2), X, r"tensor \(2, 3\) torch.float32. does not fit Bilinear.forward"),
        (
            nn.Bilinear(3, 3, 2),
            (X, X),
            r"tuple of 2, the first a tensor \(2, 3\) torch.float32. does not fit",
        ),
        (tiny_llama(), {"pixels": X}, "keys pixels. does not fit LlamaForCausalLM.forward.*calibration_step"),
        (tiny_llama(), (IDS, torch.ones_like(IDS)), r"tuple of 2, .*int64. does not fit LlamaForCausalLM.forward"),
    ],
)
def test_a_batch_that_does_not_fit_is_refused_with_the_remedy(model, batch, message):
    with pytest.raises(CalibrationError, match=message):
        call(model, batch)


def test_a_transformers_model_takes_a_tuple_of_one():
    assert call(tiny_llama(), (IDS,)).logits.shape[0] == 2


def test_a_batch_is_described_in_a_few_words():
    assert describe({"a": X, "b": 1}) == "keys a, b" and describe(Sample(X, 1, "")) == "keys x, shift, note"
    assert describe(X) == "tensor (2, 3) torch.float32" and describe([]) == "list"
    assert describe((X, 1)) == "tuple of 2, the first a tensor (2, 3) torch.float32"
    assert len(describe({f"{n}" * 500: X for n in range(99)})) < 4000


def test_every_modules_own_mode_is_restored_also_after_an_error():
    model = nn.Sequential(nn.Dropout(), nn.Sequential(nn.Dropout()))
    model.train()
    model[1][0].eval()
    with pytest.raises(RuntimeError, match="stop"), evaluating(model):
        assert not any(module.training for module in model.modules())
        raise RuntimeError("stop")
    assert [module.training for module in model.modules()] == [True, True, True, False]
