"""The commands' lines before Hydra reads them."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import CompactHydraException

from gptq_plugin import QuantizeConfig
from gptq_plugin.apps.command_line import hydra_command
from gptq_plugin.apps.user_errors import is_for_users
from gptq_plugin.clients.client import Client
from gptq_plugin.errors import ExportError, brief


@pytest.fixture
def called(monkeypatch, tmp_path):
    """called(*words) runs gptq-finetune's line on a function that returns what it is called with."""
    monkeypatch.chdir(tmp_path)
    seen = []

    def call(*words):
        seen.clear()
        monkeypatch.setattr(sys, "argv", ["gptq-finetune", *words])
        hydra_command("finetune")(seen.append)()
        return seen

    return call


@pytest.mark.parametrize("name", ["gptq-finetune", "gptq-quantize"])
def test_the_installed_commands_print_the_packages_version(name, tmp_path):
    program = Path(sys.executable).parent / name
    done = subprocess.run([program, "--version"], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"{name} {version('gptq-plugin')}\n")
    assert not any(tmp_path.iterdir())


def test_help_is_printed_and_nothing_runs(called, capsys, tmp_path):
    for flag in ("--help", "-h"):
        with pytest.raises(SystemExit) as ended:
            called(flag, "data=text")
        assert ended.value.code == 0
        printed = capsys.readouterr().out
        assert printed.startswith("gptq-finetune fine-tunes a language model") and "* data=text" in printed
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["quantizer.bit=3"], "gptq-finetune: there is no option quantizer.bit: did you mean quantizer.bits=3?"),
        (["-m", "quantizer=w4g128,w4g12"], "gptq-finetune: there is no quantizer=w4g12: did you mean"),
        (["--config-name=quantize", "targt=vllm"], "there is no option targt: did you mean target=vllm?"),
        (["--help", "seeed=1"], "did you mean seed=1?"),
        (["--cfg", "job", "seeed=1"], "did you mean seed=1?"),
        (["--quantizer.bits=3"], "there is no flag --quantizer.bits=3: options are written name=value"),
    ],
)  # fmt: skip
def test_what_does_not_exist_ends_the_process_with_2_and_the_nearest(words, message, called, capsys, tmp_path):
    with pytest.raises(SystemExit) as ended:
        called(*words)
    assert ended.value.code == 2
    printed = capsys.readouterr()
    assert message in printed.err and "`gptq-finetune --help` lists all options" in printed.err and not printed.out
    assert "To append to your config use" not in printed.err
    assert not any(tmp_path.iterdir())


def test_a_right_line_reaches_the_function(called):
    (config,) = called("quantizer.bits=3", "hydra.run.dir=out", "+trainer.min_epochs=2")
    assert (config.quantizer.bits, config.trainer.min_epochs) == (3, 2)


def test_configurations_of_the_users_own_are_left_to_hydra(called, tmp_path):
    (tmp_path / "own" / "quantizer").mkdir(parents=True)
    (tmp_path / "own" / "quantizer" / "mine.yaml").write_text("defaults: [w4g128, _self_]\nbits: 8\n")
    (config,) = called("--config-dir=own", "quantizer=mine", "hydra.run.dir=out")
    assert config.quantizer.bits == 8


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["callbacks=inf"], "gptq-finetune: callbacks=inf: Config group override must be a string or a list"),
        (["quantizer.bits=3", "trainer=1e400", "-m"], "gptq-finetune: trainer=1e400: Config group override"),
        (["quantizer@x=1e400"], "gptq-finetune: quantizer@x=1e400: "),
        (["quantizer.bits.x=1"], "gptq-finetune: quantizer.bits.x=1: "),
        (["-m", "quantizer.bits=glob(*)", "callbacks=inf"], "gptq-finetune: callbacks=inf: "),
        (["hydra.run.dir=${nothing}"], "hydra.run.dir=${nothing}: Interpolation key 'nothing' not found"),
        (["--config-name=broken"], "the configuration broken: Interpolation key 'nothing' not found"),
        (["--config-name=unreadable"], "the configuration unreadable: "),
        (["--config-name=absent"], "the configuration absent: Cannot find primary config 'absent'"),
        (["--config-name=lost", "--cfg", "job", "--resolve"], "the configuration lost: Interpolation key 'nothing'"),
        (["--cfg=job", "--info=all"], "give one of --run, --multirun, --cfg, --info"),
        (["--resolve"], "--resolve belongs to --cfg"),
        (["--config-dir=nowhere"], "--config-dir=nowhere is no folder"),
    ],
)  # fmt: skip
def test_what_makes_no_configuration_is_told_by_its_override_or_file(words, message, called, capsys, tmp_path):
    own = tmp_path / "own"
    own.mkdir()
    start = "defaults: [finetune, _self_]\n"
    (own / "broken.yaml").write_text(start + "hydra: {run: {dir: '${nothing}'}}\n")
    (own / "unreadable.yaml").write_text(start + "quantizer: [\n")
    (own / "lost.yaml").write_text(start + "quantizer: {sym: '${nothing}'}\n")
    before = HydraConfig.instance().cfg
    with pytest.raises(SystemExit) as ended:
        called("--config-dir=own", *words)
    told = capsys.readouterr().err
    assert ended.value.code == 2 and message in told and "Traceback" not in told
    assert not GlobalHydra.instance().is_initialized() and HydraConfig.instance().cfg is before
    assert [one.name for one in tmp_path.iterdir()] == ["own"]


@pytest.mark.parametrize(("value", "cause"), [("${nothing}", "not found"), ("${quantizer}", "parent node")])
def test_a_value_that_cannot_be_had_is_told_without_a_traceback(value, cause, capsys, monkeypatch, tmp_path):
    from gptq_plugin.apps import cli

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["gptq-finetune", f"quantizer.sym={value}", "hydra.run.dir=out"])
    with pytest.raises(SystemExit):
        cli.finetune()
    told = capsys.readouterr().err
    assert "quantizer.sym has a value that cannot be had" in told and cause in told and "Traceback" not in told


@pytest.mark.parametrize(
    ("error", "is_ours"),
    [
        (ExportError("mine has files of yours"), True),
        (FileNotFoundError("no such checkpoint: last.ckpt"), True),
        (ValueError("a fault"), False),
    ],
)
def test_an_error_of_this_packages_is_told_by_its_sentence_and_any_other_with_a_traceback(
    error, is_ours, capsys, monkeypatch, tmp_path
):
    def task(config):
        raise error

    command = hydra_command("finetune")(task)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["gptq-finetune", "hydra.run.dir=out"])
    with pytest.raises(SystemExit) as ended:
        command()
    told = capsys.readouterr().err
    assert ended.value.code == 1 and "HYDRA_FULL_ERROR=1" in told and str(error) in told
    assert (f"gptq-finetune: {error}\n" in told) == is_ours == ("Traceback" not in told)
    with pytest.raises(type(error), match=str(error)):  # called from Python
        command({})
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises(CompactHydraException if is_ours else ValueError) as raised:
        command()
    assert error in (raised.value, raised.value.__cause__)


@pytest.mark.parametrize(
    ("name", "given", "told"),
    [
        ("finetune", "quantizer.bits=5", "bits must be "),
        ("finetune", "model=hf", "model=hf needs model.name_or_path="),
        ("finetune", "~callbacks.gptq", "gptq-finetune compares the float model with its export"),
        ("quantize", "model.weights=false", "model.weights=false leaves the model's weights random"),
    ],
)
def test_a_value_that_an_object_of_the_configuration_or_the_command_refuses_is_told_by_its_sentence(
    name, given, told, capsys, monkeypatch, tmp_path
):
    from gptq_plugin.apps import cli

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [f"gptq-{name}", given, "hydra.run.dir=out"])
    with pytest.raises(SystemExit) as ended:
        getattr(cli, name)()
    lines = capsys.readouterr().err.splitlines()
    assert ended.value.code == 1 and any(line.startswith(f"gptq-{name}: {told}") for line in lines)
    assert not any("Traceback" in line or "call to target" in line for line in lines)


@pytest.mark.parametrize(
    ("call", "is_refusal"),
    [
        (lambda: QuantizeConfig(bits=5), True),
        (lambda: Client.of(5), True),
        (lambda: brief("text", most="6"), False),  # Python's TypeError, in this package
        (lambda: int("six"), False),
        (lambda: hydra_command("finetune", "more"), False),
    ],
)
def test_an_error_that_no_statement_of_this_package_raised_is_a_fault_of_the_program(call, is_refusal):
    with pytest.raises((ValueError, TypeError)) as raised:
        call()
    assert is_for_users(raised.value) == is_refusal
