"""Checkpoints by name: a folder of that name, the hub's cache, a server like the hub, or neither."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from transformers import AutoModelForCausalLM

from gptq_plugin import QuantizeModule, load_quantized, quantized_config
from gptq_plugin.apps.command import main
from gptq_plugin.check.lint import lint
from gptq_plugin.checkpoint.checkpoint import Checkpoint
from gptq_plugin.checkpoint.hub import local_folder
from gptq_plugin.errors import CheckpointError
from gptq_plugin.export.convert import convert

from hub_caches import cache_checkpoint
from hub_server import hub_server
from models import tiny_llama

NAME = "someone/llama-4bit"
IDS = torch.arange(9)[None]


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model, quantizer = tiny_llama(), QuantizeModule(group_size=16)
    model.save_pretrained((folder := tmp_path_factory.mktemp("hub")) / "float")
    quantizer.round_to_nearest(model)
    return quantizer.export(model, folder / "out")


@pytest.fixture
def cached(export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """huggingface_hub's cache, with the export (branches main and v1) and its float model, and nothing else there."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub._snapshot_download.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    cache_checkpoint(tmp_path / "cache", NAME, export)
    cache_checkpoint(tmp_path / "cache", "someone/llama", export.parent / "float")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    yield tmp_path / "cache"


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def test_a_folder_is_itself_and_a_name_is_looked_up_in_the_hubs_cache(tmp_path: Path) -> None:
    (tmp_path / "here" / "part").mkdir(parents=True)
    (tmp_path / "here" / "part" / "config.json").write_text("{}")
    assert local_folder(tmp_path / "here") == tmp_path / "here"
    cache = tmp_path / "cache"
    cache_checkpoint(cache, "someone/opt-4bit", tmp_path / "here", revision="v1")
    found = local_folder("someone/opt-4bit", revision="v1", cache_dir=cache, local_files_only=True, subfolder="part")
    assert [(file.name, file.read_text()) for file in found.iterdir()] == [("config.json", "{}")]


@pytest.mark.parametrize("subfolder", [None, "part"])
def test_only_what_a_checkpoint_needs_is_downloaded(
    subfolder: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = ["config.json", "model-1-of-2.safetensors", "code.py", "tokenizer.model", "README.md", "LICENSE"]
    files = [*there, "pytorch_model.bin", "x.gguf", "model.onnx", *(f"part/{name}" for name in there)]
    asked: dict[str, Any] = {}

    def download(name: str, **options: Any) -> str:
        asked.update(options, name=name)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    local_folder("someone/opt-4bit", token="t", subfolder=subfolder)
    chosen = set(filter_repo_objects(files, allow_patterns=asked["allow_patterns"]))
    assert {f"part/{name}" for name in there[:5]} <= chosen
    assert (set(there) <= chosen) == (subfolder is None)
    assert not {name for name in chosen if name.endswith((".bin", ".gguf", ".onnx"))}
    assert (asked["name"], asked["token"]) == ("someone/opt-4bit", "t")


def test_an_id_loads_as_its_folder_does(cached: Path, export: Path) -> None:
    model = load_quantized(NAME)
    assert torch.equal(logits(model), logits(load_quantized(export)))
    assert model.name_or_path == NAME
    assert torch.equal(logits(load_quantized(NAME, cache_dir=cached, local_files_only=True)), logits(model))


def test_a_plain_module_is_filled_from_an_id(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(32, 32))
    quantizer = QuantizeModule(group_size=16)
    quantizer.round_to_nearest(model)
    cache_checkpoint(tmp_path / "cache", "someone/plain", quantizer.export(model, tmp_path / "out"))
    loaded = load_quantized(
        "someone/plain", model=torch.nn.Sequential(torch.nn.Linear(32, 32)), cache_dir=tmp_path / "cache"
    )
    assert torch.equal(loaded(torch.ones(1, 32)), model(torch.ones(1, 32)))


def test_a_folder_of_the_same_name_wins_and_a_revision_is_reported(
    cached: Path, export: Path, caplog: pytest.LogCaptureFixture
) -> None:
    Path("someone").mkdir()
    other, quantizer = tiny_llama(), QuantizeModule(bits=8, group_size=16)
    quantizer.round_to_nearest(other)
    quantizer.export(other, NAME)
    assert {layer.bits for layer in load_quantized(NAME).modules() if hasattr(layer, "bits")} == {8}
    assert not [record for record in caplog.records if record.levelname == "WARNING"]
    local_folder(NAME, revision="v1")
    assert f"{NAME} is a folder here, so nothing is fetched from the hub: revision=v1 is ignored" in caplog.text


@pytest.mark.parametrize("read", [load_quantized, local_folder, lambda name: convert(name, "out", "gptq_v2")])
def test_an_id_that_is_neither_is_an_error_that_names_both_readings(read: Any, cached: Path) -> None:
    message = rf"someone/nothing is neither a folder \(looked in {Path.cwd()}\) nor a repository that huggingface_hub"
    with pytest.raises(CheckpointError, match=message):
        read("someone/nothing")
    with pytest.raises(CheckpointError, match=r"\./nothing is not a folder: give the folder .* or its id on the hub"):
        read("./nothing")
    assert not any(Path.cwd().iterdir())


def test_a_revision_that_is_not_there_is_no_other(cached: Path) -> None:
    assert isinstance(load_quantized(NAME, revision="main"), torch.nn.Module)
    with pytest.raises(CheckpointError, match="is neither a folder"):
        load_quantized(NAME, revision="v2")


def test_check_and_convert_take_ids(cached: Path, export: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", NAME, "--float", "someone/llama", "--target", "transformers"]) == 0
    printed = capsys.readouterr().out
    assert printed.splitlines()[0] == NAME and "layers with those of someone/llama" in printed
    found, local = lint(NAME, "someone/llama"), lint(export, export.parent / "float")
    assert found.refusals == local.refusals and found.errors == local.errors == []
    assert main(["convert", NAME, "out", "checkpoint_format=gptq_v2", "--revision", "main"]) == 0
    assert {path.name for path in Path("out").iterdir()} == {path.name for path in export.iterdir()}
    assert Checkpoint.open("out").checkpoint_format == "gptq_v2"
    assert main(["check", "someone/nothing"]) == 1
    assert "error: someone/nothing is neither a folder" in capsys.readouterr().out
    assert main(["check", NAME, "--float", "someone/nothing"]) == 1
    assert "gptq-plugin check: someone/nothing is neither a folder" in capsys.readouterr().err


def test_revision_and_token_reach_the_hub(export: Path, tmp_path: Path) -> None:
    with hub_server(NAME, export, revision="v1", token="secret") as hub:
        code = "import sys; from gptq_plugin.apps.command import main; call = sys.argv[1:]; " + (
            "print(main(call[:-2]), main(call))"  # without the token, and with it
        )
        done = subprocess.run(
            [sys.executable, "-c", code, "check", NAME, "--revision", "v1", "--token", "secret"],
            cwd=tmp_path,
            env={**os.environ, "HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home")},
            capture_output=True,
            text=True,
            timeout=120,
        )
    assert done.returncode == 0, done.stderr
    refused, found = done.stdout.split(f"{NAME}\n")[1:]
    assert refused.startswith(f"error: {NAME} is neither a folder (looked in {tmp_path}) nor a repository")
    assert found.splitlines()[-2:] == ["0 errors, 0 warnings", "1 0"]
    assert {request.token for request in hub.requests} == {None, "secret"}
    assert any("/revision/v1" in request.path for request in hub.requests)


def test_from_pretrained_loads_a_name_and_refuses_one_that_describes_far_more_than_it_holds(
    cached: Path, export: Path, tmp_path: Path
) -> None:
    wanted = logits(load_quantized(NAME))
    options = {"cache_dir": cached, "local_files_only": True}
    config = quantized_config(NAME, **options)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(NAME, config=config, **options)), wanted)
    hostile = tmp_path / "hostile"
    shutil.copytree(export, hostile)
    content = json.loads((hostile / "config.json").read_text())
    (hostile / "config.json").write_text(json.dumps({**content, "num_hidden_layers": 10**6}))
    cache_checkpoint(cached, "someone/hostile", hostile)
    with pytest.raises(CheckpointError, match=r"config\.json: num_hidden_layers is 1000000, and the files hold"):
        quantized_config("someone/hostile", **options)
    with pytest.raises(CheckpointError, match="neither a folder .* nor a repository"):
        quantized_config("someone/absent", **options)
