"""gptq-plugin's arguments and exit status; what it finds and writes is tested in tests/check and tests/export."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

import gptq_plugin
from gptq_plugin import QuantizeModule
from gptq_plugin.apps.command import main
from gptq_plugin.checkpoint.checkpoint import Checkpoint

from models import tiny_llama


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    folder, model, quantizer = tmp_path_factory.mktemp("command") / "out", tiny_llama(), QuantizeModule(group_size=16)
    quantizer.round_to_nearest(model)
    return quantizer.export(model, folder)


def test_a_sound_checkpoint_exits_with_0_and_one_its_target_refuses_with_1(export, capsys):
    assert main(["check", str(export)]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == str(export) and printed[-1].startswith("0 errors, ")
    assert [line for line in printed if line.startswith("vllm")] == ["vllm: refuses it"]  # groups of 16
    assert main(["check", str(export), "--target", "vllm"]) == 1
    assert main(["check", str(export), "--target", "transformers"]) == 0
    assert main(["check", str(export), "--target", "transformers", "--target", "vllm"]) == 1


def test_tensor_parallelism_counts_for_clients_that_have_it(export, capsys):
    main(["check", str(export), "--tensor-parallel-size", "3"])
    printed = capsys.readouterr().out
    assert "vllm (tensor_parallel_size=3)" in printed and "sglang (tensor_parallel_size=3)" in printed
    assert "transformers: takes it" in printed


def test_what_cannot_be_checked_or_converted_exits_with_1_and_the_reason(export, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert main(["check", f"{tmp_path}/empty"]) == 1
    assert capsys.readouterr().out.splitlines()[-1] == "1 error, 0 warnings"
    assert main(["check", str(export), "--float", f"{tmp_path}/empty"]) == 1
    assert capsys.readouterr().err.startswith(f"gptq-plugin check: {tmp_path}/empty")
    assert main(["convert", f"{tmp_path}/empty", f"{tmp_path}/out", "checkpoint_format=gptq_v2"]) == 1
    assert capsys.readouterr().err.startswith(f"gptq-plugin convert: {tmp_path}/empty")
    assert main(["convert", str(export), f"{tmp_path}/out", "checkpoint_format=ggml"]) == 1
    assert "gptq-plugin convert: " in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_convert_writes_the_format_and_replaces_an_export_only_when_asked(export, tmp_path, capsys):
    call = ["convert", str(export), str(tmp_path / "out"), "checkpoint_format=gptq_v2"]
    assert main(call) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'out'} has checkpoint_format=gptq_v2\n"
    assert Checkpoint.open(tmp_path / "out").quantization["checkpoint_format"] == "gptq_v2"
    assert main(call) == 1 and "gptq-plugin convert: " in capsys.readouterr().err
    assert main([*call, "--overwrite"]) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "COMMAND"),
        (["check"], "DIR"),
        (["check", "x", "--target", "ollama"], "invalid choice: 'ollama'"),
        (["check", "x", "--tensor-parallel-size", "0"], "must be a positive integer, got 0"),
        (["check", "x", "--tensor-parallel-size", "two"], "must be a positive integer, got two"),
        (["check", ""], "argument DIR: must be a path, got ''"),
        (["push", "", "owner/name"], "argument DIR: must be a path, got ''"),
        (["convert", "x", "", "checkpoint_format=gptq"], "argument OUT: must be a path, got ''"),
        (["eval", "x", "--tasks", " ,"], "must be names with commas between them"),
        (["convert", "x", "y", "gptq"], "write checkpoint_format=FORMAT, got 'gptq'"),
        (["convert", "x", "y", "checkpoint_format="], "write checkpoint_format=FORMAT"),
        (["convert", "x", "y", "format=gptq"], "write checkpoint_format=FORMAT"),
    ],
)
def test_wrong_arguments_exit_with_2_and_say_what_is_wrong(arguments, message, capsys):
    with pytest.raises(SystemExit) as exit:
        main(arguments)
    assert exit.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize("command", [["gptq-plugin"], [sys.executable, "-m", "gptq_plugin"]], ids=["script", "module"])
def test_its_version_is_that_of_the_installed_package(command, tmp_path):
    command[0] = str(Path(sys.executable).parent / command[0])
    done = subprocess.run([*command, "--version"], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout == f"gptq-plugin {version('gptq-plugin')}\n" == f"gptq-plugin {gptq_plugin.__version__}\n"


def test_python_m_runs_it(export, tmp_path):
    done = subprocess.run([sys.executable, "-m", "gptq_plugin", "check", export], cwd=tmp_path, capture_output=True)
    assert done.returncode == 0 and done.stdout.splitlines()[-1].startswith(b"0 errors")


def test_its_help_names_the_subcommands():
    done = subprocess.run([Path(sys.executable).parent / "gptq-plugin", "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "check" in done.stdout and "convert" in done.stdout


def test_names_beyond_ascii_are_printed_in_any_encoding_and_command_no_terminal(export, tmp_path, monkeypatch):
    """Files are UTF-8 all the same."""
    folder, out, raw = tmp_path / "漢字\x1b[2J", tmp_path / "Maß", io.BytesIO()
    shutil.copytree(export, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": ["Maß\n\x1b[2J"]}))
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    assert main(["check", str(folder)]) == 0
    assert main(["convert", str(folder), str(out), "checkpoint_format=gptq_v2"]) == 0
    printed = raw.getvalue().decode("ascii").splitlines()
    assert printed[0].endswith("\\u6f22\\u5b57\\x1b[2J") and printed[-1].startswith(f"{tmp_path}/Ma\\xdf has ")
    assert "  model:       Ma\\xdf \\x1b[2J" in printed
    assert json.loads((out / "config.json").read_text(encoding="utf-8"))["architectures"] == ["Maß\n\x1b[2J"]
