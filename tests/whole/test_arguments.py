"""Arguments that are of no use are refused by name, in messages that are short and can be printed, before any work."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import nn

from gptq_plugin import QuantizeConfig, QuantizeModule, load_quantized, quantized_config
from gptq_plugin.autogptq import AutoGPTQForCausalLM, BaseQuantizeConfig
from gptq_plugin.check.lint import lint
from gptq_plugin.export.convert import convert

ODD = ["x" * 10**5, "a\0b", "\udce9" * 9, "../" * 2000, "", "/dev/null", b"ex", 3, None, Path("x" * 5000)]
BATCHES = [torch.randn(16, 32)]


def plain():
    return nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32))


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    model, quantizer = plain(), QuantizeModule(group_size=16)
    quantizer.round_to_nearest(model)
    return model, quantizer.export(model, tmp_path_factory.mktemp("export") / "plain")


def refused(call, *words):
    """Raises one of the package's errors, or of its `raise` lines, that names one of the words."""
    with pytest.raises((ValueError, TypeError)) as told:
        call()
    message = str(told.value)
    message.encode()
    assert len(message) < 4000 and any(re.search(word, message) for word in words), message[:300]
    frame = told.traceback[-1]
    assert "gptq_plugin" in str(frame.path) and str(frame.statement).strip().startswith("raise "), frame


@pytest.mark.parametrize("value", ODD, ids=lambda value: ascii(value)[:12])
def test_what_is_no_folder_and_no_name_is_refused(value, export, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    model, folder = export
    words = ("checkpoint", "folder", "config.json")
    written = ("export", "cannot create", "is a file")
    for call in (
        lambda: load_quantized(value),
        lambda: load_quantized(value, model=plain()),
        lambda: convert(value, tmp_path / "out", "gptq_v2"),
        lambda: quantized_config(value),
        lambda: AutoGPTQForCausalLM.from_quantized(value),
        lambda: BaseQuantizeConfig.from_pretrained(value),
    ):
        if value != "":  # is the working directory, which holds no checkpoint either
            refused(call, *words)
    if value not in ("../" * 2000, ""):  # names of folders
        refused(lambda: convert(folder, value, "gptq_v2"), *written)
        refused(lambda: QuantizeModule(group_size=16).export(model, value), *written)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("value", [*ODD[:-1], torch.float32], ids=lambda value: ascii(value)[:12])
def test_other_arguments_are_refused_by_name(value, export, tmp_path):
    _, folder = export
    for call in (
        lambda: QuantizeModule(group_size=16).quantize(value, BATCHES),
        lambda: QuantizeModule(group_size=16).rehearse(value, BATCHES),
        lambda: QuantizeModule(group_size=16).round_to_nearest(value),
        lambda: QuantizeModule(group_size=16).check(value),
        lambda: QuantizeModule(group_size=16).export(value, tmp_path / "out"),
    ):
        refused(call, r"model must be a torch\.nn\.Module")
    refused(lambda: convert(folder, tmp_path / "out", value), "checkpoint_format must be one of")
    if value is not None:
        refused(lambda: load_quantized(folder, model=value), r"model must be a torch\.nn\.Module")
        if value is not torch.float32:
            refused(lambda: load_quantized(folder, model=plain(), dtype=value), "dtype must be a floating torch.dtype")
    if not isinstance(value, str):
        refused(lambda: QuantizeConfig.from_yaml(value), "text must be a text")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("revision", ["/dev/zero", "../main", 3, b"main"])
def test_a_revision_is_no_path(revision):
    for call in (lambda: load_quantized("a/b", revision=revision), lambda: lint("a/b", revision=revision)):
        assert "revision must be the name of a branch" in _told(call)


def test_the_export_of_a_plain_module_is_not_loaded_through_transformers(export):
    refused(lambda: quantized_config(export[1]), "has no model_type.*load_quantized")


def _told(call):
    """An error's message, or those that check finds."""
    try:
        return str(call().errors)
    except ValueError as error:
        return str(error)
