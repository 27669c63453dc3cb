"""Checkpoints and PEFT adapters on a base model."""

from __future__ import annotations

import copy
import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model

from gptq_plugin.apps.fine_tuned import fine_tuned
from gptq_plugin.apps.language_model import pretrained
from gptq_plugin.errors import CheckpointError
from gptq_plugin.model.adapters import merged_copy

from language_models import LORA, same_weights, save_checkpoint, save_sharded, tiny


def test_an_adapter_is_merged_into_its_base(base, tmp_path):
    adapted = get_peft_model(copy.deepcopy(base[1]), LoraConfig(**LORA))
    adapted.save_pretrained(tmp_path / "adapter")
    network = fine_tuned(pretrained([], name_or_path=str(base[0])).network, adapter=tmp_path / "adapter")
    ids = torch.arange(12)[None]
    with torch.no_grad():
        torch.testing.assert_close(network(ids).logits, adapted.eval()(ids).logits)
        assert not torch.allclose(network(ids).logits, base[1].eval()(ids).logits, atol=1e-2)


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("save", [save_checkpoint, save_sharded])
def test_a_checkpoint_with_adapters_takes_their_scaling_from_the_adapters_folder(base, tmp_path, save, own):
    trained = tiny(2)
    if own:  # transformers' own integration, without a wrapper
        trained.network.add_adapter(LoraConfig(**LORA), adapter_name="default")
    else:
        trained.network = get_peft_model(trained.network, LoraConfig(**LORA))
    ckpt = save(trained, tmp_path / "run.ckpt")
    LoraConfig(**LORA).save_pretrained(tmp_path / "adapter")  # no weights: those are the checkpoint's
    expected = merged_copy(trained.network)
    network = fine_tuned(tiny(3).network, ckpt=ckpt, adapter=tmp_path / "adapter")
    same_weights(network, expected)
    with pytest.raises(CheckpointError, match=r"run\.ckpt was written with PEFT adapters.*Give adapter=FOLDER"):
        fine_tuned(tiny(3).network, ckpt=ckpt)
    LoraConfig(**{**LORA, "r": 3}).save_pretrained(tmp_path / "adapter")
    with pytest.raises(CheckpointError, match="does not hold the weights of LlamaForCausalLM"):
        fine_tuned(tiny(3).network, ckpt=ckpt, adapter=tmp_path / "adapter")
    LoraConfig(**{**LORA, "target_modules": ["q_proj"]}).save_pretrained(tmp_path / "adapter")
    with pytest.raises(CheckpointError, match=r"does not hold"):
        fine_tuned(tiny(3).network, ckpt=ckpt, adapter=tmp_path / "adapter")


def test_an_adapter_on_top_of_a_plain_checkpoint_is_merged_into_the_checkpoints_weights(base, tmp_path):
    trained = tiny(2)
    ckpt = save_checkpoint(trained, tmp_path / "run.ckpt")
    adapted = get_peft_model(trained.network, LoraConfig(**LORA))
    adapted.save_pretrained(tmp_path / "adapter")
    network = fine_tuned(tiny(3).network, ckpt=ckpt, adapter=tmp_path / "adapter")
    same_weights(network, merged_copy(adapted))


def test_a_second_adapter_in_a_checkpoint_is_not_dropped_in_silence(base, tmp_path):
    trained = tiny(2)
    trained.network = get_peft_model(trained.network, LoraConfig(**LORA))
    trained.network.add_adapter("other", LoraConfig(**LORA))
    ckpt = save_checkpoint(trained, tmp_path / "run.ckpt")
    LoraConfig(**LORA).save_pretrained(tmp_path / "adapter")
    with pytest.raises(CheckpointError, match=r"holds more than the weights.*lora_A\.other\.weight.*other adapters"):
        fine_tuned(tiny(3).network, ckpt=ckpt, adapter=tmp_path / "adapter")


def test_an_adapter_that_is_none_or_another_models_is_refused(base, tmp_path):
    network = pretrained([], name_or_path=str(base[0])).network
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"adapter=.*empty cannot be put on the model: .*adapter_config\.json"):
        fine_tuned(network, adapter=tmp_path / "empty")
    other = get_peft_model(copy.deepcopy(base[1]), LoraConfig(**LORA))
    other.save_pretrained(tmp_path / "adapter")
    config = tmp_path / "adapter" / "adapter_config.json"
    config.write_text(config.read_text().replace('"down_proj"', '"up_proj"'))
    with pytest.raises(CheckpointError, match="cannot be put on the model: .*missing adapter keys"):
        fine_tuned(network, adapter=tmp_path / "adapter")


def test_without_peft_an_adapters_error_names_what_to_install(base, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match=r"pip install 'gptq-plugin\[peft\]'"):
        fine_tuned(copy.deepcopy(base[1]), adapter=tmp_path)
