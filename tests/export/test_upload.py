"""An export goes to the hub in one commit, private, over earlier exports only; against a server like the hub."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import huggingface_hub
import pytest

from gptq_plugin import QuantizeModule, load_quantized
from gptq_plugin.apps.command import main
from gptq_plugin.errors import CheckpointError, ExportError
from gptq_plugin.export import export as export_module
from gptq_plugin.export.upload import Repository, published_files

from hub_uploads import Commit, Hub, Repo, hub_for_uploads
from models import tiny_llama

NAME = "org/llama-4bit"
EXPORT = {"README.md", "config.json", "generation_config.json", "model.safetensors", "quantization_report.json",
          "quantize_config.json", "report.html", "tokenizer.json"}  # fmt: skip


class Tokenizer:
    def save_pretrained(self, directory):
        (directory / "tokenizer.json").write_text("{}")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A quantizer that has exported, and the folder."""
    model, quantizer = tiny_llama(), QuantizeModule(group_size=16)
    quantizer.round_to_nearest(model)
    return quantizer, quantizer.export(model, tmp_path_factory.mktemp("made") / "out", tokenizer=Tokenizer())


@pytest.fixture
def export(made, tmp_path) -> Path:
    return Path(shutil.copytree(made[1], tmp_path / "out"))


@pytest.fixture
def hub(tmp_path, monkeypatch):
    for place in ("huggingface_hub.constants", "huggingface_hub.file_download.constants"):
        monkeypatch.setattr(f"{place}.HF_HUB_CACHE", str(tmp_path / "cache"))
    with hub_for_uploads() as hub:
        yield hub


def test_the_whole_export_is_one_commit_to_a_private_repository_that_is_made(export, hub):
    address = Repository(NAME).push(export)
    repo = hub.repos[NAME]
    assert repo.private and set(repo.files) == EXPORT and len(repo.commits) == 1
    assert {name: (export / name).read_bytes() for name in EXPORT} == repo.files
    assert address.startswith(f"{hub.url}/{NAME}/commit/")
    assert repo.commits[0].branch == "main" and repo.commits[0].parent


def test_the_quantizer_pushes_what_it_exported_last_or_a_folder(made, export, hub):
    quantizer, folder = made
    assert quantizer.exported == folder
    quantizer.push_to_hub(NAME)
    quantizer.push_to_hub("org/other", export, private=False, revision="w4")
    assert set(hub.repos[NAME].files) == EXPORT and hub.repos[NAME].private
    assert not hub.repos["org/other"].private and hub.repos["org/other"].commits[0].branch == "w4"
    with pytest.raises(ExportError, match="nothing was exported yet"):
        QuantizeModule().push_to_hub(NAME)


def test_a_second_push_deletes_in_its_commit_what_only_the_earlier_export_had(tmp_path, hub, monkeypatch):
    model, quantizer = tiny_llama(), QuantizeModule(group_size=16)
    quantizer.round_to_nearest(model)
    with monkeypatch.context() as small:
        small.setattr(export_module, "SHARD", 10_000)
        quantizer.export(model, tmp_path / "shards")
    quantizer.push_to_hub(NAME)
    shards = {name for name in hub.repos[NAME].files if "-of-" in name}
    assert len(shards) > 1
    hub.repos[NAME].files["LICENSE"] = b"the user's"
    quantizer.export(model, tmp_path / "whole")
    quantizer.push_to_hub(NAME)
    _, second = hub.repos[NAME].commits
    assert set(second.deleted) == shards | {"model.safetensors.index.json"} and len(hub.repos[NAME].commits) == 2
    assert "LICENSE" in hub.repos[NAME].files and "model.safetensors" in hub.repos[NAME].files
    (tmp_path / "back").mkdir()
    for name, content in hub.repos[NAME].files.items():
        (tmp_path / "back" / name).write_bytes(content)
    assert load_quantized(tmp_path / "back")


@pytest.mark.parametrize(
    ("there", "told"),
    [
        (Repo(False), "is public, and push_to_hub is private unless told otherwise"),
        (Repo(True, {"model.safetensors": b"float"}), r"weights that this package did not write \(model.safetensors\)"),
        (Repo(True, {"q4.gguf": b"", "quantize_config.json": b'{"bits": 4}'}), r"did not write \(q4.gguf\)"),
        (Repo(True, {"quantize_config.json": b'{"meta": {"gptq_plugin": {"files": ["config.json"]}}}', "a.bin": b""}),
         r"did not write \(a.bin\)"),
    ],
    ids=["public", "float weights", "another tool's", "beside an earlier export"],
)  # fmt: skip
def test_a_repository_that_must_not_be_written_to_is_refused_and_stays(there, told, export, hub):
    hub.repos[NAME] = there
    before = dict(there.files)
    with pytest.raises(ExportError, match=told):
        Repository(NAME).push(export)
    assert there.files == before and there.commits == []


def test_a_public_repository_takes_an_export_if_told(export, hub, caplog):
    hub.repos[NAME] = Repo(False)
    Repository(NAME, private=False).push(export)
    assert set(hub.repos[NAME].files) == EXPORT
    hub.repos[NAME].private = True
    Repository(NAME, private=False).claim()
    assert "is private on the hub and stays so" in caplog.text


def test_a_file_of_others_that_an_export_replaces_is_told(export, hub, caplog):
    hub.repos[NAME] = Repo(True, {"README.md": b"mine", "notes.txt": b"mine"})
    Repository(NAME).push(export)
    assert "replacing README.md, which no earlier export wrote" in caplog.text
    assert hub.repos[NAME].files["notes.txt"] == b"mine"
    caplog.clear()
    Repository(NAME).push(export)
    assert "replacing" not in caplog.text


def test_names_that_an_earlier_export_lists_are_deleted_only_if_they_may_be(export, hub):
    listed = {"meta": {"gptq_plugin": {"files": [".gitattributes", "absent.bin", "old.safetensors"]}}}
    files = {".gitattributes": b"", "old.safetensors": b"", "quantize_config.json": json.dumps(listed).encode()}
    hub.repos[NAME] = Repo(True, files)
    Repository(NAME).push(export)
    assert hub.repos[NAME].commits[0].deleted == ["old.safetensors"]


@pytest.mark.parametrize("broken", ["/api/repos/create", "/preupload/", "/commit/", "objects/batch"])
def test_a_push_that_fails_leaves_the_repository_and_tells_how_to_try_again(broken, export, hub: Hub):
    hub.broken = broken
    with pytest.raises(ExportError, match=r"hf auth login|gptq-plugin push \S+ org/llama-4bit") as failed:
        Repository(NAME).push(export)
    assert "rights" in str(failed.value) or "403" in str(failed.value)
    assert NAME not in hub.repos or hub.repos[NAME].files == {}


def test_the_token_is_the_one_that_huggingface_hub_finds_or_the_one_given(export, hub):
    with pytest.MonkeyPatch.context() as patch:  # `monkeypatch` would put back the hub's token after the hub has gone
        patch.setenv("HF_TOKEN", "another")
        with pytest.raises(ExportError, match=r"(?s)cannot write to org/llama-4bit on the hub.*hf auth login"):
            Repository(NAME).push(export)
        hub.requests.clear()
        Repository(NAME).push(export, token=hub.token)
    assert {token for _, path, token in hub.requests if path.startswith("/api/models")} == {hub.token}


def test_offline_nothing_is_tried(export, hub, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ExportError, match="cannot write to org/llama-4bit"):
        Repository(NAME).push(export)
    assert hub.requests == []


def test_what_the_user_added_goes_along_and_hidden_files_stay(export, hub):
    (export / "LICENSE").write_text("mine")
    (export / ".env").write_text("TOKEN=1")
    (export / ".cache").mkdir()
    (export / ".cache" / "x").write_text("")
    Repository(NAME).push(export)
    assert set(hub.repos[NAME].files) == EXPORT | {"LICENSE"}


def test_links_are_refused_before_anything_is_asked(export, tmp_path, hub):
    (tmp_path / "id_rsa").write_text("key")
    (export / "notes.txt").symlink_to(tmp_path / "id_rsa")
    with pytest.raises(ExportError, match=r"holds links \(notes.txt\)"):
        Repository(NAME).push(export)
    assert hub.requests == []


def test_folders_that_are_no_whole_export_are_refused(export, tmp_path):
    with pytest.raises(CheckpointError, match="is not a folder"):
        published_files(tmp_path / "absent")
    (export / "model.safetensors").unlink()
    with pytest.raises(CheckpointError):
        published_files(export)


def test_another_tools_checkpoint_is_refused(export):
    content = json.loads((export / "quantize_config.json").read_text())
    del content["meta"]
    (export / "quantize_config.json").write_text(json.dumps(content))
    with pytest.raises(ExportError, match="no export of this package"):
        published_files(export)


@pytest.mark.parametrize(
    ("value", "wanted"),
    [(None, None), ("a/b", Repository("a/b")), ({"repo_id": "a/b", "private": False}, Repository("a/b", False)),
     (Repository("a/b"), Repository("a/b"))],
)  # fmt: skip
def test_a_repository_is_read_as_users_write_it(value, wanted):
    assert Repository.of(value) == wanted


@pytest.mark.parametrize(
    "value",
    ["name", "a/b/c", "", "a/ b", True, 3, {}, {"repo_id": "a/b", "token": "x"}, {"repo_id": 3}, ["a/b"],
     {"repo_id": "a/b", "private": "no"}, {"repo_id": "a/b", "revision": ""}],
)  # fmt: skip
def test_what_names_no_repository_is_refused(value):
    with pytest.raises(ValueError, match="push_to_hub"):
        Repository.of(value)


def test_the_command_pushes_and_tells_where_it_is(export, hub, capsys):
    assert main(["push", str(export), NAME]) == 0
    assert capsys.readouterr().out.startswith(f"{export} is at {hub.url}/{NAME}/commit/")
    assert hub.repos[NAME].commits == [Commit("main", hub.repos[NAME].commits[0].parent, sorted(EXPORT), [])]
    hub.repos["org/public"] = Repo(False)
    assert main(["push", str(export), "org/public"]) == 1
    assert "gptq-plugin push: org/public on the hub is public" in capsys.readouterr().err
    assert main(["push", str(export), "org/public", "--public", "--revision", "w4", "--token", hub.token]) == 0
    assert hub.repos["org/public"].commits[0].branch == "w4"
    assert main(["push", str(export), "nothing"]) == 1
    assert "owner/name" in capsys.readouterr().err
