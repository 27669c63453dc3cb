"""What a model takes: the fields of its forward through any wrapper, its positions, its tokens."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    GPTJConfig,
    GPTJForCausalLM,
    LlamaForCausalLM,
    RobertaConfig,
    RobertaForMaskedLM,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs

from gptq_plugin.calibration.takes import Takes, check_tokens, fields_taken, positions_of, receiver
from gptq_plugin.errors import CalibrationError

from models import tiny_gpt2, tiny_llama, tiny_llava, tiny_opt

SMALL = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 64}


def tiny_t5():
    sizes = {"vocab_size": 64, "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    return T5ForConditionalGeneration(T5Config(**sizes))


class Hidden(nn.Module):
    """A wrapper that hides what it takes."""

    def __init__(self, inner, beside=None):
        super().__init__()
        self.inner = inner
        if beside is not None:
            self.beside = beside

    def forward(self, *args, **kwargs):
        return self.inner(*args, **kwargs)


class Named(Hidden):
    """A wrapper with an argument of its own."""

    def forward(self, input_ids, scale=1.0, **options):
        return self.inner(input_ids=input_ids, **options)


class Features(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x, shift=0.0):
        return self.layer(x) + shift


# --- fields ---


def test_a_wrapper_takes_what_the_one_module_in_it_takes():
    llama, plain = tiny_llama(), Features()
    assert receiver(Hidden(llama)) is llama and receiver(Hidden(Hidden(plain))) is plain
    assert receiver(Hidden(llama, nn.Dropout())) is llama  # of several the transformers model
    two = Hidden(plain, Features())
    assert receiver(two) is two and receiver(plain) is plain
    assert receiver(nn.DataParallel(plain)) is plain
    assert fields_taken(Hidden(plain)) == {"x", "shift"}
    assert fields_taken(Hidden(llama)) == fields_taken(llama) and fields_taken(two) is None


def test_open_keywords_are_those_of_the_transformers_model_inside():
    llama = tiny_llama()
    assert fields_taken(Named(llama)) == fields_taken(llama) | {"scale"}
    assert fields_taken(Named(Features())) is None
    assert "kwargs" not in fields_taken(llama) and {"input_ids", "position_ids", "labels"} <= fields_taken(llama)
    options = Takes.of(llama, [Named(llama)]).options
    assert {"cu_seq_lens_q", "max_length_k", "seq_idx"} <= options <= fields_taken(llama)
    assert not options & {"input_ids", "position_ids", "scale"} and not Takes.of(llama, [Features()]).options


def test_a_class_derived_from_a_transformers_model_takes_its_options_too():
    class Derived(LlamaForCausalLM):
        def forward(self, input_ids=None, **others):
            return super().forward(input_ids, **others)

    class Annotated(LlamaForCausalLM):
        def forward(self, input_ids=None, **kwargs: Unpack[TransformersKwargs]):  # a string in this file
            return super().forward(input_ids, **kwargs)

    class Own(LlamaForCausalLM):
        def forward(self, input_ids=None, **kwargs: dict[str, Takes]):  # no typed dictionary
            return super().forward(input_ids, **kwargs)

    class Closed(LlamaForCausalLM):
        def forward(self, input_ids=None):
            return super().forward(input_ids)

    options = Takes.of(tiny_llama(), [tiny_llama()]).options
    for kind in (Derived, Annotated, Own):
        model = kind(tiny_llama().config)
        assert Takes.of(model, [model]).options >= options >= {"seq_idx", "cu_seq_lens_q"}
    assert fields_taken(Closed(tiny_llama().config)) == {"input_ids"}


def test_several_runners_take_the_fields_of_all_and_one_that_takes_a_batch_whole_takes_any():
    llama = tiny_llama()
    both = Takes.of(llama, [llama, Named(llama)])
    assert both.fields == fields_taken(llama) | {"scale"} and both.name == "LlamaForCausalLM.forward"
    assert Takes.of(Features(), [Features()]).fields is None  # by position
    assert (
        Takes.of(llama, []).fields is None and Takes.of(llama, [llama, Hidden(Features(), Features())]).fields is None
    )


# --- positions ---


@pytest.mark.parametrize(
    ("model", "positions"),
    [
        (lambda: tiny_gpt2(), 64),
        (lambda: tiny_opt(), 512),
        (lambda: BertForMaskedLM(BertConfig(**SMALL, max_position_embeddings=40)), 40),
        (lambda: RobertaForMaskedLM(RobertaConfig(**SMALL, max_position_embeddings=42)), 40),
        (
            lambda: GPTJForCausalLM(GPTJConfig(vocab_size=64, n_embd=32, n_layer=1, n_head=2, n_positions=48,
                rotary_dim=8)), 48,
        ),
        (
            lambda: BartForConditionalGeneration(BartConfig(vocab_size=64, d_model=16, max_position_embeddings=24,
                encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
                encoder_ffn_dim=16, decoder_ffn_dim=16)), 24,
        ),
        (lambda: tiny_llama(), None),
        (lambda: tiny_t5(), None),
        (lambda: Features(), None),
    ],
    ids=["GPT-2", "OPT", "BERT", "RoBERTa", "GPT-J", "BART", "Llama", "T5", "plain"],
)  # fmt: skip
def test_positions_are_known_where_a_model_has_a_table_of_them(model, positions):
    network = model().eval()
    assert positions_of(network) == positions and positions_of(Hidden(network)) == positions
    if positions is None:
        return
    ids = torch.full((1, positions), 5)
    network(input_ids=ids)  # as many as it has, and not one more
    with pytest.raises((IndexError, RuntimeError)):
        network(input_ids=torch.full((1, positions + 1), 5))


# --- tokens ---


@pytest.mark.parametrize(
    ("model", "arguments", "message"),
    [
        (tiny_llama, {"input_ids": [[1, 128]]}, "token id 128 in input_ids, and Llama.* the ids 0 to 127: use"),
        (tiny_gpt2, {"input_ids": [[-100, 3]]}, "the token id -100 in input_ids"),
        (tiny_opt, {"input_ids": [[0.5, 3.0]]}, "input_ids of a calibration batch are torch.float32"),
        (tiny_gpt2, {"input_ids": [[1] * 65]}, r"is 65 positions long \(input_ids\), and GPT2LMHeadModel has 64"),
    ],
    ids=["beyond", "negative", "float", "long"],
)  # fmt: skip
def test_tokens_and_positions_that_a_model_does_not_have_are_refused(model, arguments, message):
    arguments = {name: torch.tensor(value) for name, value in arguments.items()}
    for module in (model(), Hidden(model())):
        with pytest.raises(CalibrationError, match=message):
            check_tokens(module, arguments)


def test_an_encoder_decoders_labels_are_tokens_too():
    model = tiny_t5()
    good = {"input_ids": torch.tensor([[1, 2]]), "labels": torch.tensor([[3, -100]])}
    check_tokens(model, good)
    with pytest.raises(CalibrationError, match="the token id 64 in labels"):
        check_tokens(model, {**good, "labels": torch.tensor([[64, -100]])})
    with pytest.raises(CalibrationError, match="the token id 70 in decoder_input_ids"):
        check_tokens(model, {**good, "decoder_input_ids": torch.tensor([[70]])})


def test_right_tokens_pass_and_so_do_ids_that_may_stand_for_images():
    check_tokens(tiny_llama(), {"input_ids": torch.tensor([[0, 127]]), "labels": torch.tensor([[-100, 500]])})
    check_tokens(tiny_llava(), {"input_ids": torch.tensor([[500]])})
    check_tokens(Features(), {"x": torch.tensor([[500]])})
    check_tokens(tiny_llama(), {"input_ids": torch.ones(1, 0, dtype=torch.long), "inputs_embeds": torch.ones(1, 2, 64)})
