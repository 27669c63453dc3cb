"""Paths are those of the folder in which a command was started, also where Hydra works in another."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import hydra
import pytest

from gptq_plugin import load_quantized
from gptq_plugin.apps.documents import file_documents, hub_documents
from gptq_plugin.apps.lightning_weights import open_lightning_weights
from gptq_plugin.apps.paths import folder_or_id, typed
from gptq_plugin.errors import CheckpointError, DataError


@pytest.fixture(params=["true", "false"])
def in_a_run(request, tmp_path, monkeypatch):
    """in_a_run(function): calls it inside a Hydra run that was started in `tmp_path`, with and without chdir."""

    def run(function):
        results = []
        (tmp_path / "conf").mkdir()
        (tmp_path / "conf" / "empty.yaml").write_text("{}")

        @hydra.main(version_base="1.3", config_path=str(tmp_path / "conf"), config_name="empty")
        def app(cfg):
            assert (Path.cwd() == tmp_path / "run") == (request.param == "true")
            results.append(function())

        monkeypatch.chdir(tmp_path)
        folder = f"hydra.run.dir={tmp_path / 'run'}"
        monkeypatch.setattr(sys, "argv", ["app", f"hydra.job.chdir={request.param}", folder, "hydra/job_logging=none"])
        app()
        return results[0]

    return run


def test_relative_paths_begin_where_the_command_was_started(in_a_run, tmp_path):
    (tmp_path / "model").mkdir()
    found = in_a_run(lambda: (typed("a/b.txt"), typed("/abs"), folder_or_id("model"), folder_or_id("owner/name")))
    assert found == (tmp_path / "a" / "b.txt", Path("/abs"), str(tmp_path / "model"), "owner/name")


def test_outside_of_hydra_a_path_is_what_it_is():
    assert typed("a/b") == Path("a/b") and typed("~") == Path.home() and folder_or_id("owner/name") == "owner/name"


@pytest.mark.parametrize("path", ["text.txt", "texts", "te*/*.txt", ["text.txt", "texts/one.txt"]])
def test_text_is_found_by_its_relative_path(in_a_run, path, tmp_path):
    (tmp_path / "text.txt").write_text("some text")
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "one.txt").write_text("some text")
    assert set(in_a_run(lambda: file_documents(path)["text"])) == {"some text"}


def test_a_local_data_set_is_found_by_its_relative_path(in_a_run, tmp_path):
    (tmp_path / "owner" / "set").mkdir(parents=True)
    (tmp_path / "owner" / "set" / "train.jsonl").write_text('{"text": "a line"}\n')
    assert in_a_run(lambda: list(hub_documents("owner/set")["text"])) == ["a line"]


def test_a_path_that_is_not_there_is_named_as_it_was_looked_for(in_a_run, tmp_path):
    def look():
        with pytest.raises(FileNotFoundError) as caught:
            file_documents("nowhere.txt")
        return str(caught.value)

    assert in_a_run(look) == f"no such file or folder: nowhere.txt (looked for {tmp_path / 'nowhere.txt'})"


@pytest.mark.parametrize("cache", ["/proc/nowhere/datasets", "a file"])
@pytest.mark.parametrize("read", [file_documents, hub_documents])
def test_a_cache_that_cannot_be_written_is_named_with_the_way_to_another(cache, read, tmp_path, monkeypatch):
    text = tmp_path / "text.txt"
    text.write_text("some text")
    folder = text / "datasets" if cache == "a file" else Path(cache)
    if cache != "a file" and not os.path.isdir("/proc"):
        pytest.skip("needs /proc")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", folder)
    with pytest.raises(DataError) as caught:
        read(str(text))
    assert f"keeps what it reads in {folder}, which cannot be written" in str(caught.value)
    assert "set HF_HOME, or HF_DATASETS_CACHE, to a folder that can" in str(caught.value)


@pytest.mark.parametrize("value", [float("inf"), 3, None, {"a": 1}, ["x"], ""])
def test_what_is_no_path_is_refused_with_the_value(value):
    with pytest.raises(ValueError, match="must be a path"):
        typed(value)


@pytest.mark.parametrize("name", ["x" * 5000, "a\0b", "a/" * 3000])
def test_a_name_that_no_file_system_takes_is_no_file(name):
    assert folder_or_id(name) == name
    with pytest.raises(FileNotFoundError, match="no such checkpoint"):
        open_lightning_weights(name)
    with pytest.raises(CheckpointError, match="is not a folder"):
        load_quantized(name)
    with pytest.raises(FileNotFoundError, match="no such file"):
        file_documents(name)
