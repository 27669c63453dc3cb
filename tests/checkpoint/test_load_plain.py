"""A plain module that the user built, filled from a checkpoint."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from gptq_plugin import QuantizeConfig, QuantizeModule, load_quantized
from gptq_plugin.checkpoint import load_plain
from gptq_plugin.errors import CheckpointError
from gptq_plugin.export.export import export_model
from gptq_plugin.layers.qlinear import QuantLinear

from copies import LLAMA, expected, logits_of
from models import Plain
from paths import FIXTURES


def test_a_foreign_checkpoint_fills_a_model_the_user_built() -> None:
    from transformers import AutoConfig, LlamaForCausalLM

    config = AutoConfig.from_pretrained(FIXTURES / LLAMA)
    del config.quantization_config
    model = LlamaForCausalLM(config)
    assert load_quantized(FIXTURES / LLAMA, model=model, dtype=torch.float32) is model
    reference = expected(LLAMA)
    torch.testing.assert_close(logits_of(model, reference), reference["logits"], atol=2e-4, rtol=0)


@pytest.fixture
def plain_export(rtn: Callable[..., Any], tmp_path: Path) -> Path:
    config = QuantizeConfig(group_size=16)
    return export_model(rtn(Plain(), config), tmp_path / "out", config)


def test_a_plain_export_asks_for_its_module(plain_export: Path) -> None:
    with pytest.raises(CheckpointError, match=r"Plain.*load_quantized\(directory, model=it\)"):
        load_quantized(plain_export)


def other_size(model: Plain) -> None:
    model.inner[0] = nn.Linear(48, 64)


def other_name(model: Plain) -> None:
    model.outer = model.inner
    del model.inner


def one_more(model: Plain) -> None:
    model.norm = nn.LayerNorm(48)


def one_less(model: Plain) -> None:
    del model.shift


def other_shape(model: Plain) -> None:
    model.window = nn.Parameter(torch.zeros(7))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (other_size, r"inner\.0 has 48 inputs and 96 outputs at bits=4; the model's Linear has 48 and 64"),
        (other_name, r"inner\.0 is quantized in the checkpoint and no module in the model"),
        (one_more, r"norm\.weight is missing.*norm\.bias is missing"),
        (one_less, "shift belongs to no module"),
        (other_shape, r"window has shape \[48\], the model needs \[7\]"),
    ],
)
def test_a_module_that_does_not_fit_is_refused_and_left_alone(
    change: Callable[[Plain], None], message: str, plain_export: Path
) -> None:
    model = Plain()
    change(model)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(CheckpointError, match=f"(?s){message}"):
        load_quantized(plain_export, model=model)
    assert not any(isinstance(module, QuantLinear) for module in model.modules())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_a_module_that_is_quantized_already_is_refused(plain_export: Path) -> None:
    model = load_quantized(plain_export, model=Plain())
    with pytest.raises(CheckpointError, match="quantized already"):
        load_quantized(plain_export, model=model)


class Holder(nn.Module):
    """What holds a network, as a LightningModule does."""

    def __init__(self, path: str) -> None:
        super().__init__()
        here: nn.Module = self
        *around, last = path.split(".")
        for name in around:
            here.add_module(name, nn.Module())
            here = here.get_submodule(name)
        here.add_module(last, Plain())


@pytest.mark.parametrize("path", ["net", "model.net", "a.b.c"])
def test_the_export_of_what_holds_the_module_is_refused_with_the_way_to_export_it_alone(
    rtn: Callable[..., Any], tmp_path: Path, path: str
) -> None:
    config = QuantizeConfig(group_size=16)
    folder = export_model(rtn(Holder(path), config), tmp_path / "out", config)
    with pytest.raises(CheckpointError) as caught:
        load_quantized(folder, model=Plain())
    assert f"which holds its layers in {path!r} ({path}.inner.0), and Plain has them without" in str(caught.value)
    assert f"GPTQCallback(module={path!r})" in str(caught.value)
    load_quantized(folder, model=Holder(path))


@pytest.mark.parametrize("path", ["net", "model.net"])
def test_the_export_of_a_part_is_refused_with_the_part_to_load_it_into(plain_export: Path, path: str) -> None:
    with pytest.raises(CheckpointError, match=rf"which is '{path}' in Holder: load it.*model=model\.{path}\)"):
        load_quantized(plain_export, model=Holder(path))


def test_another_model_is_told_apart_from_another_prefix(plain_export: Path) -> None:
    with pytest.raises(CheckpointError, match="is quantized in the checkpoint and no module in the model"):
        load_quantized(plain_export, model=nn.Sequential(nn.Linear(48, 96)))


class Experts(nn.Module):
    """Two experts whose matrices are one parameter each, among other layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.gate = nn.Linear(32, 32), nn.LayerNorm(32), nn.Linear(32, 2)
        self.experts = Matrices()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.first(x))
        return self.experts(x, self.gate(x).softmax(-1))


class Matrices(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Parameter(torch.randn(2, 32, 32)), nn.Parameter(torch.randn(2, 32, 32))

    def forward(self, x: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
        outputs = [torch.relu(x @ self.up[e].T) @ self.down[e].T * share[..., e : e + 1] for e in range(2)]
        return outputs[0] + outputs[1]


@pytest.mark.parametrize("failure", ["a tensor lacks", "a tensor more", "NaN", "swap_modules", "note_float_rest"])
def test_what_cannot_be_loaded_leaves_a_model_with_experts_as_it_was(
    failure: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantizer, model = QuantizeModule(group_size=32), Experts()
    quantizer.quantize(model, [torch.randn(60, 32) for _ in range(3)], export_dir=tmp_path / "out")
    file = tmp_path / "out/model.safetensors"
    tensors = load_file(file)
    if failure == "a tensor lacks":
        del tensors["norm.weight"]
    elif failure == "a tensor more":
        tensors["more"] = torch.ones(1)
    elif failure == "NaN":
        tensors["norm.weight"][3] = float("nan")
    else:
        monkeypatch.setattr(load_plain, failure, lambda *_: 1 / 0)
    save_file(tensors, file)
    fresh = Experts()
    modules, parameters = dict(fresh.named_modules()), dict(fresh.named_parameters())
    values = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    with pytest.raises((CheckpointError, ZeroDivisionError)):
        load_quantized(tmp_path / "out", model=fresh)
    assert dict(fresh.named_modules()) == modules
    found = dict(fresh.named_parameters())
    assert found.keys() == parameters.keys() and all(found[name] is parameters[name] for name in found)
    assert all(torch.equal(found[name], values[name]) for name in found)
    assert fresh.training
