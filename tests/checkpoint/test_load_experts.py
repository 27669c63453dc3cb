"""Models of experts that are loaded for serving: one product for all experts of a parameter.

Without a GPU a stand-in multiplies.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from gptq_plugin import QuantizeConfig, QuantizeModule, load_quantized
from gptq_plugin.layers.qlinear import QuantLinear
from gptq_plugin.model.experts_at_once import stack_experts

from gpu_products import stand_in
from kernel_cases import gpu

EXPERTS = 4


def mixture(kind: str = "qwen3_moe", **options: Any) -> Any:
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 128, "intermediate_size": 128, "moe_intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 128,
        "num_experts": EXPERTS, "num_experts_per_tok": 2, "initializer_range": 0.2,
    }  # fmt: skip
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**sizes, **options})).eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("experts") / "export"
    batches = [torch.randint(0, 128, (2, 40), generator=torch.Generator().manual_seed(n)) for n in range(2)]
    QuantizeModule(QuantizeConfig(group_size=32, batch_size=2, nsamples=4)).quantize(
        mixture(), batches, export_dir=made
    )
    return made


def tokens(*shape: int) -> torch.Tensor:
    return torch.randint(0, 128, shape, generator=torch.Generator().manual_seed(7))


@torch.no_grad()
def test_a_loaded_model_multiplies_all_experts_in_one_product(folder, monkeypatch):
    plain = load_quantized(folder)
    assert plain.config._experts_implementation == "eager"  # on a CPU, expert by expert
    wanted, written = plain(tokens(2, 5)).logits, plain.generate(tokens(1, 4), max_new_tokens=6, do_sample=False)
    products = stand_in(monkeypatch)
    model = load_quantized(folder)
    assert model.config._experts_implementation == "gptq_plugin"
    torch.testing.assert_close(model(tokens(2, 5)).logits, wanted, rtol=1e-3, atol=1e-3)
    assert products == [EXPERTS * 2 * 64, EXPERTS * 128] * 2
    products.clear()
    assert torch.equal(model.generate(tokens(1, 4), max_new_tokens=6, do_sample=False), written)
    assert len(products) == 2 * 2 * 6
    names = {name: one.shape for name, one in model.state_dict().items()}
    assert names == {name: one.shape for name, one in plain.state_dict().items()}


@torch.no_grad()
def test_a_model_that_is_cast_computes_in_the_dtype_that_it_has(folder, monkeypatch):
    stand_in(monkeypatch)
    model, inputs = load_quantized(folder), tokens(2, 5)
    seen: list[torch.dtype] = []
    model.model.layers[0].mlp.experts.gate_up_proj.call.register_forward_pre_hook(
        lambda module, args: seen.append(args[0].dtype)
    )
    for dtype in (torch.float32, torch.bfloat16, torch.float32):
        model.to(dtype)
        for _ in range(3):  # in a checkpoint's layout, then in the kernels', then stacked
            model(inputs)
        assert set(seen) == {dtype}
        seen.clear()


def test_gradients_flow_through_the_experts_that_are_called(folder, monkeypatch):
    products = stand_in(monkeypatch)
    model = load_quantized(folder)
    inputs = torch.randn(1, 5, 128, requires_grad=True)
    model(inputs_embeds=inputs).logits.sum().backward()
    assert products == [] and inputs.grad is not None and inputs.grad.abs().sum() > 0


@torch.no_grad()
def test_a_copy_and_a_layer_that_is_replaced_compute_what_they_are(folder, monkeypatch):
    products = stand_in(monkeypatch)
    model = load_quantized(folder)
    wanted = model(tokens(2, 5)).logits
    other = copy.deepcopy(model)
    products.clear()
    torch.testing.assert_close(other(tokens(2, 5)).logits, wanted, rtol=1e-3, atol=1e-3)
    assert products == [EXPERTS * 2 * 64, EXPERTS * 128] * 2

    class Nothing(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.new_zeros(*x.shape[:-1], 128)

    for block in other.model.layers:
        for expert in range(EXPERTS):
            block.mlp.experts.get_submodule(str(expert)).down_proj = Nothing()
    skipped = other(tokens(2, 5)).logits
    assert not torch.allclose(skipped, wanted, atol=1e-2)
    torch.testing.assert_close(model(tokens(2, 5)).logits, wanted, rtol=1e-3, atol=1e-3)


def test_where_one_parameter_cannot_be_stacked_its_model_is_left_as_it_is(folder, monkeypatch):
    stand_in(monkeypatch)
    model = load_quantized(folder)
    model.config._experts_implementation = "eager"
    layer = next(one for name, one in model.named_modules() if "experts.1.down_proj" in name)
    assert isinstance(layer, QuantLinear)
    layer.restore()
    assert stack_experts(model) == [] and model.config._experts_implementation == "eager"


@gpu
@torch.no_grad()
def test_on_a_gpu_a_loaded_model_generates_what_it_does_on_a_cpu(folder):
    plain, model = load_quantized(folder), load_quantized(folder, device="cuda")
    assert model.config._experts_implementation == "gptq_plugin"
    for shape in ((1, 1), (2, 5), (4, 100)):
        torch.testing.assert_close(
            model(tokens(*shape).cuda()).logits.cpu(), plain(tokens(*shape)).logits, rtol=2e-2, atol=2e-2
        )
    written = model.generate(tokens(1, 4).cuda(), max_new_tokens=6, do_sample=False)
    assert torch.equal(written.cpu(), plain.generate(tokens(1, 4), max_new_tokens=6, do_sample=False))
