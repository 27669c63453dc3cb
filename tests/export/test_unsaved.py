"""Buffers that no checkpoint holds are compared with those of a reload, and what differs is told with the remedy."""

from __future__ import annotations

import json

import pytest
import torch

from gptq_plugin import QuantizeModule, load_quantized
from gptq_plugin.export.unsaved import other_buffers

from models import tiny_llama

TOKENS = [torch.randint(0, 64, (2, 16), generator=torch.Generator().manual_seed(n)) for n in range(8)]


def test_a_model_cast_whole_is_told_that_clients_have_other_rotary_frequencies(tmp_path, caplog):
    model = tiny_llama().to(torch.bfloat16)
    report = QuantizeModule(group_size=16).quantize(model, TOKENS, export_dir=tmp_path / "out")
    (sentence,) = (one for one in report.deviations if one.startswith("non-persistent buffers differ"))
    assert "model.rotary_emb.inv_freq (bfloat16 here, float32 there)" in sentence and "dtype=torch.bfloat16" in sentence
    assert sentence in caplog.text
    stored = json.loads((tmp_path / "out" / "quantization_report.json").read_text())
    assert sentence in stored["deviations"]
    for page in ("report.html", "README.md"):
        assert "non-persistent buffers differ" in (tmp_path / "out" / page).read_text()
    loaded = load_quantized(tmp_path / "out")
    assert loaded.model.rotary_emb.inv_freq.dtype == torch.float32
    with torch.no_grad():
        here, there = model(TOKENS[0]).logits, loaded(TOKENS[0]).logits
    assert 0 < float((there - here).abs().max() / here.abs().max()) < 0.05
    with torch.no_grad():  # the proof's sample is the first row, of which the last token's logits are computed
        here, there = (one(TOKENS[0][:1]).logits[:, -1].double() for one in (model, loaded))
    share = float((there - here).abs().max() / here.abs().max())
    assert share > 0 and f"differs by {share:.2g} of the largest" in sentence


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_whose_parameters_alone_are_cast_has_the_buffers_of_a_reload(dtype, tmp_path):
    model = tiny_llama()
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    report = QuantizeModule(group_size=16).quantize(model, TOKENS, export_dir=tmp_path / "out")
    assert not [one for one in report.deviations if "buffers" in one]
    assert torch.equal(load_quantized(tmp_path / "out")(TOKENS[0]).logits, model(TOKENS[0]).logits)


def test_other_values_of_one_dtype_and_tables_that_grew_are_told_apart():
    one, other = tiny_llama(), tiny_llama()
    assert other_buffers(one, other, 0.0) == []
    one.model.rotary_emb.inv_freq.mul_(2)
    (sentence,) = other_buffers(one, other, 0.25)
    assert "model.rotary_emb.inv_freq (other values)" in sentence and "0.25" in sentence and "Casting" not in sentence
    one.model.rotary_emb.inv_freq = torch.zeros(99)
    assert other_buffers(one, other, 0.0) == []
