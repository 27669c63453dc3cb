"""`gptq-plugin check`: sound checkpoints of every width pass, and the command exits by what was found."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gptq_plugin import QuantizeConfig
from gptq_plugin.apps.command import main
from gptq_plugin.check.lint import lint
from gptq_plugin.clients.client import Client
from gptq_plugin.export.export import export_model

from damage import (
    OTHERS,
    WIDTHS,
    quantizable_llama,
    zeros_off,
)


@pytest.mark.parametrize("case", [*WIDTHS, *OTHERS])
def test_a_sound_checkpoint_passes_alone_and_beside_its_float_model(
    case: str, exported: Callable[[str], Path], float_dir: Path
) -> None:
    found = lint(exported(case), float_dir)
    assert found.findings == []
    assert found.facts["compared"].startswith("7 layers")
    assert found.facts["compared"].endswith("; 5 other tensors are equal")
    assert lint(exported(case)).findings == []


def test_layers_left_float_must_be_told_as_each_client_reads_it(rtn: Callable[..., Any], tmp_path: Path) -> None:
    config = QuantizeConfig(group_size=32, modules_to_not_convert=("o_proj",))
    out = export_model(rtn(quantizable_llama(), config), tmp_path / "out", config)
    told = lint(out)
    assert not told.refusals[Client("transformers")] and not told.refusals[Client("gptqmodel")]
    file = json.loads((out / "config.json").read_text())
    for key in ("dynamic", "modules_in_block_to_quantize", "sym"):
        del file["quantization_config"][key]
    (out / "config.json").write_text(json.dumps(file))
    untold = lint(out)
    assert "modules_in_block_to_quantize" in untold.refusals[Client("transformers")][0]
    assert "dynamic" in untold.refusals[Client("gptqmodel")][0]
    assert any("lacks sym" in line for line in untold.refusals[Client("vllm")])


def test_the_command_prints_what_it_found_and_exits_by_it(
    exported: Callable[[str], Path], damaged: Callable[..., Path], float_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, bad = exported("4 bits act-order"), damaged("4 bits symmetric", zeros_off)
    assert main(["check", str(good), "--float", str(float_dir)]) == 0
    text = capsys.readouterr().out
    for words in (
        "7 layers at 4 bits, group_size=32, symmetric, act-order",
        "LlamaForCausalLM",
        "float weights in bfloat16",
        "compared:    7 layers",
        "vllm: refuses it",
        "use static_groups=True",
        "gptqmodel: takes it",
        "0 errors, 0 warnings",
    ):
        assert words in text
    assert main(["check", str(good), "--target", "gptqmodel"]) == 0
    assert main(["check", str(good), "--target", "gptqmodel", "--target", "vllm"]) == 1
    capsys.readouterr()
    assert main(["check", str(bad)]) == 1
    assert ".up_proj: sym=True promises" in capsys.readouterr().out
    assert main(["check", str(good), "--tensor-parallel-size", "4"]) == 0
    assert "vllm (tensor_parallel_size=4): refuses it" in capsys.readouterr().out


def test_a_folder_that_cannot_be_read_is_an_error_and_a_wrong_call_another(
    exported: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", str(tmp_path / "nowhere")]) == 1
    assert "is not a folder" in capsys.readouterr().out
    assert main(["check", str(exported("4 bits symmetric")), "--float", str(tmp_path)]) == 1
    assert "no safetensors file" in capsys.readouterr().err
    for call in (["check"], ["check", "x", "--target", "vlm"], ["check", "x", "--tensor-parallel-size", "0"], []):
        with pytest.raises(SystemExit) as left:
            main(call)
        assert left.value.code == 2


def test_the_command_s_help_loads_no_torch() -> None:
    code = (
        "import sys; from gptq_plugin.apps.command import main\n"
        "try: main(['check', '--help'])\n"
        "except SystemExit: pass\n"
        "assert not {'torch', 'transformers', 'hydra'} & set(sys.modules)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "--tensor-parallel-size" in ran.stdout
