"""The LightningModule of gptq-finetune, and where its network comes from."""

from __future__ import annotations

import itertools
import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from gptq_plugin.apps.language_model import LanguageModel, SaveFloat, pretrained, small_llama
from gptq_plugin.errors import ExportError

from language_models import WORDS, tiny


def test_the_learning_rate_rises_to_its_peak_and_falls_to_a_tenth():
    network = torch.nn.Linear(2, 2)
    model = LanguageModel(network, None, warmup_steps=4)
    model._trainer = type("T", (), {"estimated_stepping_batches": 24})()  # the property only forwards
    model._fabric = None
    shares = [model._share_of_peak(step) for step in range(25)]
    assert shares[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert shares[-1] == pytest.approx(0.1)
    assert all(a > b for a, b in itertools.pairwise(shares[4:]))


def test_matrices_decay_and_vectors_do_not():
    model = tiny(1)
    decaying, others = (
        LanguageModel(model.network, None, weight_decay=0.3, learning_rate=2e-3)
        .configure_optimizers()["optimizer"]
        .param_groups
    )
    assert (decaying["weight_decay"], others["weight_decay"]) == (0.3, 0.0)
    assert all(parameter.dim() > 1 for parameter in decaying["params"])
    assert all(parameter.dim() == 1 for parameter in others["params"])
    assert len(decaying["params"]) + len(others["params"]) == len(list(model.network.parameters()))
    assert decaying["initial_lr"] == others["initial_lr"] == 2e-3


def test_its_loss_is_that_of_the_next_token():
    model, batch = tiny(1), {"input_ids": torch.randint(0, 250, (3, 9))}
    logits = model(batch["input_ids"]).logits[:, :-1].flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(logits, batch["input_ids"][:, 1:].flatten())
    model.log = lambda *_, **__: None
    assert torch.isclose(model.training_step(batch, 0), expected)


def test_a_small_llama_has_an_embedding_for_every_token_in_a_multiple_of_128():
    model = small_llama(
        WORDS, vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=1, warmup_steps=7
    )
    config = model.network.config
    assert config.vocab_size % 128 == 0 and config.vocab_size - 128 < len(model.tokenizer) <= config.vocab_size
    assert (config.bos_token_id, config.eos_token_id) == (model.tokenizer.bos_token_id, model.tokenizer.eos_token_id)
    assert model.network.lm_head.weight is model.network.model.embed_tokens.weight
    assert model.warmup_steps == 7


def test_a_pretrained_model_has_the_dtype_asked_for_and_random_weights_when_asked(base):
    folder, network = base
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "auto": torch.float32}
    for weights in (True, False):
        for name, dtype in dtypes.items():
            loaded = pretrained([], name_or_path=str(folder), dtype=name, weights=weights, learning_rate=0.5)
            weight = loaded.network.lm_head.weight
            assert weight.dtype == dtype and loaded.learning_rate == 0.5
            assert torch.equal(weight, network.lm_head.weight.to(dtype)) == weights
    assert len(loaded.tokenizer) == len(AutoTokenizer.from_pretrained(folder))


def test_a_folder_that_is_not_there_is_named_and_one_that_is_keeps_its_own_error(tmp_path, monkeypatch):
    def missing(*_, **__):
        raise OSError("connection refused")

    monkeypatch.setattr(AutoConfig, "from_pretrained", missing)
    with pytest.raises(OSError, match=r"^model.name_or_path=org/typo is no folder here, nor found on the hub"):
        pretrained([], name_or_path="org/typo")
    with pytest.raises(OSError, match="^connection refused"):
        pretrained([], name_or_path=str(tmp_path))


def test_a_checkpoint_in_place_of_a_model_is_told_where_it_belongs(tmp_path):
    (tmp_path / "last.ckpt").write_bytes(b"PK")
    with pytest.raises(ValueError, match=r"last\.ckpt is a file.*ckpt=FILE"):
        pretrained([], name_or_path=str(tmp_path / "last.ckpt"))


def test_a_pretrained_model_without_a_name_or_with_an_unknown_dtype_is_refused():
    with pytest.raises(ValueError, match=r"model=hf needs model\.name_or_path"):
        pretrained([], name_or_path=None)
    for dtype in ("float31", "nn"):
        with pytest.raises(ValueError, match=f"model.dtype='{dtype}' is not a dtype"):
            pretrained([], name_or_path="x", dtype=dtype)


class Rank:
    def __init__(self, number):
        self.is_global_zero = number == 0


@pytest.mark.parametrize("method", ["gptq", "compressed-tensors"])
@pytest.mark.parametrize("weights", [True, False])
def test_a_model_that_is_quantized_already_is_refused_before_its_weights_are_read(method, weights, base, tmp_path):
    folder = shutil.copytree(base[0], tmp_path / "quantized")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": method}}))
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=rf"quantized is quantized already \(quant_method {method}\): give the float"):
        pretrained([], name_or_path=str(folder), weights=weights)


def test_rank_0_saves_the_float_model_where_that_is_asked_for(tmp_path):
    model = tiny(1)
    for directory, rank, saves in ((None, 0, False), (tmp_path / "float", 1, False), (tmp_path / "float", 0, True)):
        save = SaveFloat(directory)
        save.on_fit_end(Rank(rank), model)
        assert (save.seconds > 0) == saves == (tmp_path / "float").exists()
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "float")
    assert torch.equal(saved.lm_head.weight, model.network.lm_head.weight)
    assert len(AutoTokenizer.from_pretrained(tmp_path / "float")) == len(model.tokenizer)


def test_a_disk_without_room_for_the_float_model_is_refused_before_training(tmp_path, monkeypatch):
    model = tiny(1)
    needed = sum(parameter.nbytes for parameter in model.parameters())
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(total=10**12, free=needed - 1))
    with pytest.raises(ExportError, match=rf"float model \(save_float\) to .*float needs about {needed} bytes"):
        SaveFloat(tmp_path / "float").on_fit_start(Rank(0), model)
    for directory, rank in ((None, 0), (tmp_path / "float", 1)):
        SaveFloat(directory).on_fit_start(Rank(rank), model)


def test_a_disk_that_is_full_while_the_float_model_is_saved_is_told_with_the_bytes(tmp_path, monkeypatch):
    """What tokenizers raises has no kind of its own."""

    def fails(_):
        raise Exception("No space left on device (os error 28)")

    model = tiny(1)
    monkeypatch.setattr(type(model.tokenizer), "save_pretrained", lambda self, folder: fails(folder))
    with pytest.raises(ExportError, match=r"float could not be written: No space left .* bytes are free|bytes, and"):
        SaveFloat(tmp_path / "float").on_fit_end(Rank(0), model)
