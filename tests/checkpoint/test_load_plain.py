"""A plain module that the user built, filled from a checkpoint."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from gptq_plugin import QuantizeConfig, load_quantized
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
