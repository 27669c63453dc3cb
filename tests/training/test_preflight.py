"""Pre-flight checks: runs that could not end in a quantized export are refused, others are not.

Whole runs that are refused before training: tests/lightning/test_callback.py, tests/hf/test_trainer_callback.py.
"""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
from torch import nn

from gptq_plugin import QuantizeModule
from gptq_plugin.clients.client import Client
from gptq_plugin.errors import ExportError, TargetError
from gptq_plugin.training import preflight

from models import tiny_llama

OUT = Path("out")


def adapted():
    return peft.get_peft_model(tiny_llama(), peft.LoraConfig(r=2, target_modules=["q_proj"]))


@pytest.mark.parametrize(
    ("make", "swap", "stays"),
    [(tiny_llama, None, True), (tiny_llama, False, False), (tiny_llama, True, True), (adapted, None, False)],
)
def test_a_module_stays_quantized_as_asked_and_by_default_unless_it_has_adapters(make, swap, stays):
    assert preflight.leaves_quantized(make(), swap) is stays


def test_a_quantized_module_is_not_trained_again_and_the_float_weights_are_named():
    model = tiny_llama()
    preflight.refuse_quantized(model, "run/last.ckpt")
    QuantizeModule(group_size=32).round_to_nearest(model)
    with pytest.raises(TargetError, match=r"LlamaForCausalLM is quantized.*into a new one \(run/last\.ckpt\)"):
        preflight.refuse_quantized(nn.Sequential(model)[0], "run/last.ckpt")
    with pytest.raises(TargetError, match="Sequential is quantized"):
        preflight.refuse_quantized(nn.Sequential(model), "")


def test_what_a_client_would_refuse_is_refused_with_or_without_an_export():
    quantizer = QuantizeModule(group_size=16)
    for export_dir in (OUT, None):
        preflight.refuse_export(quantizer, tiny_llama(), export_dir, None)
        preflight.refuse_export(quantizer, tiny_llama(), export_dir, Client("transformers"))
        with pytest.raises(ExportError, match="not 16"):
            preflight.refuse_export(quantizer, tiny_llama(), export_dir, Client("vllm"))


def test_a_module_that_cannot_be_saved_is_refused_only_if_it_is_to_be_exported():
    quantizer, model = QuantizeModule(group_size=32), tiny_llama()
    model.generation_config.update(do_sample=False, temperature=0.5)  # which transformers refuses to save
    preflight.refuse_export(quantizer, model, None, None)
    with pytest.raises(ExportError, match="generation_config cannot be saved"):
        preflight.refuse_export(quantizer, model, OUT, None)


@pytest.mark.parametrize(
    ("offload", "device", "refused"),
    [(True, "cuda", True), (True, "cpu", False), (False, "cuda", False), (None, "cuda", False)],
)
def test_weights_that_training_has_on_a_gpu_are_not_streamed_there(offload, device, refused):
    quantizer = QuantizeModule(offload_weights=offload)
    if not refused:
        preflight.refuse_offload(quantizer, torch.device(device))
        return
    with pytest.raises(ValueError, match="leave the option out, or save a checkpoint and run gptq-quantize"):
        preflight.refuse_offload(quantizer, torch.device(device))


def test_a_model_that_its_configuration_does_not_describe_is_refused_only_if_it_is_to_be_exported():
    quantizer, model = QuantizeModule(group_size=32), tiny_llama(num_hidden_layers=2)
    model.model.layers = model.model.layers[:1]
    preflight.refuse_export(quantizer, model, None, None)
    with pytest.raises(ExportError, match=r"it lacks model\.layers\.1.*num_hidden_layers"):
        preflight.refuse_export(quantizer, model, OUT, None)


def test_adapters_need_an_export_and_a_place_for_the_merged_copy():
    model = adapted()
    holder = nn.ModuleDict({"model": model})
    preflight.refuse_adapters(model, None, OUT, holder=holder)
    preflight.refuse_adapters(model, False, OUT)
    for options, message in (((True, OUT), "leave swap out"), ((None, None), "give an export_dir")):
        with pytest.raises(TargetError, match=message):
            preflight.refuse_adapters(model, *options, holder=holder)
    with pytest.raises(TargetError, match=r"PeftModel.* itself carries PEFT adapters.*hold the model in an attribute"):
        preflight.refuse_adapters(model, None, OUT, holder=model)
    plain = tiny_llama()
    preflight.refuse_adapters(plain, True, None, holder=plain)  # none of it concerns a model without adapters
