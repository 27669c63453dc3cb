"""Report, page and card of converted checkpoints tell of the folder they are in."""

from __future__ import annotations

import json
import logging
import shutil

import pytest
import torch

from gptq_plugin import QuantizeModule
from gptq_plugin.export.convert import convert
from gptq_plugin.report.numbers import format_bytes

from cards import section
from models import tiny_llama
from paths import FIXTURES


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """exported(checkpoint_format): an export of the same layers."""
    folders = {}

    def export(checkpoint_format):
        if checkpoint_format not in folders:
            model = tiny_llama()
            options = {"group_size": 32, "dynamic": {r".*\.down_proj": {"bits": 8}, "-:.*layers.0.*q_proj": {}}}
            quantizer = QuantizeModule(**options, checkpoint_format=checkpoint_format)
            quantizer.quantize(model, [{"input_ids": torch.arange(3, 30)[None]}] * 8)
            folders[checkpoint_format] = quantizer.export(model, tmp_path_factory.mktemp("out") / "out")
        return folders[checkpoint_format]

    return export


def report(folder):
    values = json.loads((folder / "quantization_report.json").read_text())
    values["totals"].pop("seconds")
    return {**values, "seconds": 0, "run_id": "", "modules": [{**module, "seconds": 0} for module in values["modules"]]}


@pytest.mark.parametrize("to", ["gptq_v2", "compressed-tensors"])
def test_a_converted_export_describes_itself_as_one_that_was_exported_so(exported, to, tmp_path):
    converted = convert(exported("gptq"), tmp_path / "out", to)
    direct = exported(to)
    card, expected = ((folder / "README.md").read_text() for folder in (converted, direct))
    size = sum(file.stat().st_size for file in converted.glob("*.safetensors"))
    assert f"The whole export is {format_bytes(size)} (" in card and f"| `checkpoint_format` | `{to}` |" in card
    assert card.splitlines() == expected.splitlines()
    assert report(converted) == {**report(direct), "size": {**report(direct)["size"], "bytes": size}}
    assert format_bytes(size) in (converted / "report.html").read_text()
    back = convert(converted, tmp_path / "back", "gptq")
    for name in ("README.md", "report.html", "quantization_report.json"):
        assert (back / name).read_text() == (exported("gptq") / name).read_text(), name


@pytest.fixture
def edited(exported, tmp_path):
    """edited(change): an export whose card was changed by hand."""

    def edit(change):
        folder = shutil.copytree(exported("gptq"), tmp_path / "edited")
        card = folder / "README.md"
        card.write_text(change(card.read_text()))
        return folder

    return edit


def test_what_was_edited_in_the_card_by_hand_is_kept(edited, exported, tmp_path, caplog):
    folder = edited(
        lambda card: card.replace("---\nlibrary_name", "---\nlicense: mit\nlibrary_name").replace(
            "## Calibration", "## What it is for\n\nTests.\n\n## Calibration"
        )
    )
    card = (convert(folder, tmp_path / "out", "compressed-tensors") / "README.md").read_text()
    assert "license: mit\n" in card and section(card, "What it is for") == "Tests."
    assert "| `checkpoint_format` | `compressed-tensors` |" in card and "pip install compressed-tensors" in card
    assert "gptqmodel" not in section(card, "transformers").lower() and not caplog.records


def test_a_line_that_both_changed_stays_the_users_with_a_warning_of_what_it_would_be(edited, tmp_path, caplog):
    folder = edited(lambda card: card.replace("A `LlamaForCausalLM` whose", "My `LlamaForCausalLM` whose"))
    with caplog.at_level(logging.WARNING):
        card = (convert(folder, tmp_path / "out", "compressed-tensors") / "README.md").read_text()
    assert "My `LlamaForCausalLM` whose" in card and "| `checkpoint_format` | `compressed-tensors` |" in card
    (warning,) = caplog.messages
    assert "README.md: lines that were changed by hand are kept" in warning
    assert "\nA `LlamaForCausalLM` whose linear layers" in warning


def test_a_card_that_was_deleted_is_written_again(edited, tmp_path):
    folder = edited(lambda card: card)
    (folder / "README.md").unlink()
    out = convert(folder, tmp_path / "out", "gptq_v2")
    assert "| `checkpoint_format` | `gptq_v2` |" in (out / "README.md").read_text()
    assert "README.md" in json.loads((out / "quantize_config.json").read_text())["meta"]["gptq_plugin"]["files"]


def test_the_card_of_another_tool_is_copied_and_the_user_told(tmp_path, caplog):
    source = shutil.copytree(FIXTURES / "gptqmodel-w4g32", tmp_path / "source")
    with caplog.at_level(logging.WARNING):
        assert not (convert(source, tmp_path / "none", "gptq_v2") / "quantization_report.json").exists()
        assert not caplog.messages
        (source / "README.md").write_text("a gptq checkpoint")
        assert (convert(source, tmp_path / "out", "gptq_v2") / "README.md").read_text() == "a gptq checkpoint"
    (warning,) = caplog.messages
    assert warning.startswith("README.md: copied as they are; they tell of the checkpoint in gptq, not of ")


def test_a_report_that_cannot_be_read_is_no_obstacle(edited, tmp_path, caplog):
    folder = edited(lambda card: card)
    (folder / "quantization_report.json").write_bytes(b"\xff\xfe")
    with caplog.at_level(logging.WARNING):
        out = convert(folder, tmp_path / "out", "gptq_v2")
    assert (out / "README.md").read_text() == (folder / "README.md").read_text()
    assert "README.md, report.html, quantization_report.json: copied as they are" in caplog.text


@pytest.mark.parametrize("long", ["card", "metrics"])
def test_what_is_longer_than_any_card_is_copied_as_it_is(long, edited, tmp_path, caplog):
    """Comparing a million lines with a hundred others takes minutes."""
    folder = edited(lambda card: "\n" * 1_000_000 if long == "card" else card)
    if long == "metrics":
        values = json.loads((folder / "quantization_report.json").read_text())
        values["metrics"] = {f"metric {number}": {"gptq": 1.0} for number in range(30_000)}
        (folder / "quantization_report.json").write_text(json.dumps(values))
    before = (folder / "README.md").read_text()
    with caplog.at_level(logging.WARNING):
        converted = convert(folder, tmp_path / "out", "gptq_v2")
    assert (converted / "README.md").read_text() == before
    assert "README.md, report.html, quantization_report.json: copied as they are" in caplog.text
