"""LoRA by PEFT on layers that are quantized here, through PEFT's registered custom modules."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gptq_plugin import QuantizeModule, QuantLinear, load_quantized

from models import tiny_llama

peft = pytest.importorskip("peft")

IDS = torch.randint(0, 100, (4, 16), generator=torch.Generator().manual_seed(0))


def config():
    """As the page about adapters has it."""
    from peft.tuners.lora.gptq import GPTQLoraLinear

    made = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"])
    made._register_custom_module({QuantLinear: GPTQLoraLinear})
    return made


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    model, quantizer = tiny_llama(), QuantizeModule(group_size=16)
    quantizer.round_to_nearest(model)
    return quantizer.export(model, tmp_path_factory.mktemp("lora") / "out")


def loss(model) -> torch.Tensor:
    return model(input_ids=IDS, labels=IDS).loss


def trained(base):
    torch.manual_seed(0)
    model = peft.get_peft_model(base, config())
    model.train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    losses = []
    for _ in range(15):
        losses.append(loss(model))
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval(), [value.item() for value in losses]


@pytest.fixture(scope="module")
def tuned(export):
    return trained(load_quantized(export))


def test_adapters_learn_on_quantized_layers_whose_codes_stay(tuned, export):
    model, losses = tuned
    assert losses[-1] < losses[0] - 0.1
    kept = {name: tensor for name, tensor in load_quantized(export).state_dict().items() if "weight" in name}
    here = {
        name.removeprefix("base_model.model.").replace(".base_layer", ""): tensor
        for name, tensor in model.state_dict().items()
    }
    assert kept and all(torch.equal(here[name], tensor) for name, tensor in kept.items())
    learned = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert learned and all("lora_" in name for name in learned)


def test_without_the_adapters_the_model_is_the_export(tuned, export):
    model, _ = tuned
    with torch.no_grad(), model.disable_adapter():
        assert torch.equal(loss(model), loss(load_quantized(export)))
    with torch.no_grad():
        assert loss(model) < loss(load_quantized(export)) - 0.1


def test_gradients_are_those_of_the_layers_float_weights(export):
    torch.manual_seed(0)
    quantized = peft.get_peft_model(load_quantized(export), config())
    torch.manual_seed(0)
    plain = load_quantized(export)
    for name, module in list(plain.named_modules()):
        if isinstance(module, QuantLinear):
            layer = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
            layer.weight = nn.Parameter(module.dequantize().to(torch.float32), requires_grad=False)
            plain.get_submodule(name.rpartition(".")[0]).__setattr__(name.rpartition(".")[2], layer)
    floats = peft.get_peft_model(plain, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"]))
    adapters = {name: p for name, p in floats.named_parameters() if p.requires_grad}
    assert adapters
    with torch.no_grad():
        for name, parameter in quantized.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))) / 8)
                adapters[name].copy_(parameter)
    loss(quantized).backward()
    loss(floats).backward()
    for name, parameter in quantized.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, adapters[name].grad, rtol=2e-3, atol=1e-5)


def test_saved_adapters_load_on_an_export(tuned, export, tmp_path):
    model, _ = tuned
    model.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(load_quantized(export), tmp_path / "adapter", config=config())
    with torch.no_grad():
        assert torch.equal(loss(again.eval()), loss(model))


def test_without_registering_peft_refuses_the_layers(export):
    with pytest.raises(ValueError, match="Target module QuantLinear.* is not supported"):
        peft.get_peft_model(load_quantized(export), peft.LoraConfig(r=4, target_modules=["q_proj"]))
