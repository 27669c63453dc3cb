"""The tokenizer that users give: an object, a folder, a hub id; and what is none."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from transformers import GenerationConfig, LlamaConfig, PreTrainedTokenizerFast

from gptq_plugin import GPTQCallback, GPTQTrainerCallback, QuantizeModule
from gptq_plugin.apps.tokenizer import train_tokenizer
from gptq_plugin.calibration.tokenizer import as_tokenizer

from models import tiny_llama
from texts import PROSE

SMALL = {"group_size": 32, "nsamples": 8, "batch_size": 2}


@pytest.fixture(scope="module")
def words() -> PreTrainedTokenizerFast:
    return train_tokenizer(PROSE * 10, 300)


@pytest.fixture(scope="module")
def folder(words, tmp_path_factory):
    words.save_pretrained(saved := tmp_path_factory.mktemp("words"))
    return saved


def test_a_tokenizer_stays_the_object_it_is(words):
    assert as_tokenizer(words, saved=True) is words and as_tokenizer(None) is None


@pytest.mark.parametrize(
    "encode",
    [
        lambda text: [ord(c) for c in text],
        lambda text: torch.tensor([ord(c) for c in text]),
        lambda text: {"input_ids": [[ord(c) for c in text]]},
    ],
    ids=["list", "tensor", "nested"],
)
def test_a_function_from_text_to_tokens_is_one_unless_it_has_to_be_saved(encode, words):
    assert as_tokenizer(encode) is encode
    assert as_tokenizer(encoding := partial(words, return_tensors="pt")) is encoding
    with pytest.raises(TypeError, match="has no save_pretrained, so it cannot be saved with the export: give a trans"):
        as_tokenizer(encode, saved=True)


def test_a_folder_is_loaded_as_text_or_as_path(words, folder):
    for given in (folder, str(folder)):
        assert as_tokenizer(given, saved=True)("a quick fox")["input_ids"] == words("a quick fox")["input_ids"]


@pytest.mark.parametrize("name", ["./no/such/folder", "no-such-owner/no-such-model"])
def test_a_name_without_a_tokenizer_is_refused(name):
    with pytest.raises(ValueError, match=f"tokenizer='{name}' is neither a folder nor a hub id that transformers"):
        as_tokenizer(name)


def test_a_folder_without_a_tokenizer_is_refused(tmp_path):
    with pytest.raises(ValueError, match="is a folder without a tokenizer"):
        as_tokenizer(tmp_path)


NO_TOKENIZER = {
    "a number": (3, "it cannot be called on a text"),
    "a list": (["a"], "it cannot be called"),
    "a class": (PreTrainedTokenizerFast, "it is a class, not an object of it"),
    "a model": (tiny_llama(), "it is a model"),
    "a layer": (torch.nn.Linear(2, 2), "it is a model"),
    "a model's configuration": (LlamaConfig(), "it cannot be called"),
    "a generation configuration": (GenerationConfig(), "it cannot be called"),
    "len": (len, "returned 7 instead of token ids"),
    "split": (str.split, "instead of token ids"),
    "open": (open, "raised FileNotFoundError"),
    "floats": (lambda text: torch.randn(3), "instead of token ids"),
    "no ids": (lambda text: {"tokens": [1]}, "instead of token ids"),
    "nothing": (print, "returned None instead"),
}


@pytest.mark.parametrize(("given", "reason"), NO_TOKENIZER.values(), ids=NO_TOKENIZER)
def test_what_is_no_tokenizer_is_refused_with_the_reason(given, reason):
    for saved in (False, True):
        with pytest.raises(TypeError, match=f"is not a tokenizer: .*{reason}.*Give a transformers tokenizer"):
            as_tokenizer(given, saved=saved)


def test_the_raw_tokenizers_library_is_told_how_to_wrap_its_object(words):
    with pytest.raises(TypeError, match=r"wrapped by transformers\.PreTrainedTokenizerFast\(tokenizer_object="):
        as_tokenizer(words.backend_tokenizer)


@pytest.mark.parametrize("kind", [GPTQCallback, GPTQTrainerCallback])
def test_both_callbacks_load_a_name_and_refuse_what_is_none_when_they_are_made(kind, folder, words):
    callback = kind(QuantizeModule(**SMALL), "out", tokenizer=str(folder))
    assert callback.tokenizer("a fox")["input_ids"] == words("a fox")["input_ids"]
    with pytest.raises(TypeError, match="is not a tokenizer"):
        kind(QuantizeModule(**SMALL), tokenizer=42)
    with pytest.raises(ValueError, match="neither a folder nor a hub id"):
        kind(QuantizeModule(**SMALL), tokenizer="./nowhere")
    with pytest.raises(TypeError, match="cannot be saved with the export"):
        kind(QuantizeModule(**SMALL), "out", tokenizer=lambda text: [1, 2])


def test_a_quantizer_takes_a_name_and_refuses_what_is_none_before_it_works(folder, tmp_path):
    model, quantizer = tiny_llama(vocab_size=512), QuantizeModule(**SMALL)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for work in (quantizer.quantize, quantizer.rehearse):
        with pytest.raises(TypeError, match="is not a tokenizer"):
            work(model, PROSE[:1] * 8, tokenizer=len)
    with pytest.raises(TypeError, match="cannot be saved"):
        quantizer.quantize(model, [[1, 2, 3] * 9] * 8, tokenizer=lambda text: [1], export_dir=tmp_path / "out")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    quantizer.quantize(model, [PROSE[0] * 3] * 8, tokenizer=str(folder))
    with pytest.raises(TypeError, match="is not a tokenizer"):
        quantizer.export(model, tmp_path / "out", tokenizer=len)
    assert not (tmp_path / "out").exists()
    assert (quantizer.export(model, tmp_path / "out", tokenizer=folder) / "tokenizer.json").is_file()


def test_a_path_that_cannot_be_told_is_refused():
    class Broken:
        def __fspath__(self):
            raise RuntimeError("no disk")

    with pytest.raises(ValueError, match=r"tokenizer=.* tells no path: no disk\. Give a transformers tokenizer"):
        as_tokenizer(Broken())
