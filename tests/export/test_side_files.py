"""The files beside the weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gptq_plugin import QuantizeConfig, QuantizeModule
from gptq_plugin.export.export import export_model

from exports import Tokenizer, description, files
from models import Plain, tiny_llama

Rtn = Callable[..., Any]


def test_the_report_is_stored_as_json_beside_the_weights(tmp_path: Path) -> None:

    quantizer = QuantizeModule(group_size=16)
    model = Plain().eval()
    quantizer.round_to_nearest(model)
    folder = quantizer.export(model, tmp_path / "out")
    content = (folder / "quantization_report.json").read_text()
    assert "NaN" not in content
    assert {module["name"] for module in json.loads(content)["modules"]} >= {"inner.0", "inner.2"}


def test_quantize_config_lists_the_files_of_the_export_and_how_to_quantize_so_again(rtn: Rtn, tmp_path: Path) -> None:
    config = QuantizeConfig(group_size=32, seed=5, clip_ratios=(1.0, 0.9))
    folder = export_model(rtn(tiny_llama(), config), tmp_path / "out", config, tokenizer=Tokenizer())
    content = json.loads((folder / "quantize_config.json").read_text())
    assert content["meta"]["gptq_plugin"]["files"] == sorted(files(folder))
    assert "tokenizer.json" in content["meta"]["gptq_plugin"]["files"]
    assert QuantizeConfig.from_quantize_config(content) == config
    inside = description(folder)
    assert inside["meta"]["quantizer"] == content["meta"]["quantizer"]
    assert {key: content[key] for key in inside if key != "meta"} == {k: v for k, v in inside.items() if k != "meta"}
