"""The folder of a run's export: agreed on by all ranks, outside the run's own files, and written by rank 0.

Real ranks export in tests/ranks/test_launchers.py and tests/ranks/test_faults.py.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest

from gptq_plugin import QuantizeModule, distributed, load_quantized
from gptq_plugin.errors import ExportError
from gptq_plugin.training.rank0_export import export_on_rank0, rank0_folder, refuse_run_folders

from models import tiny_llama


class Ranks:
    """Stands in for `distributed` on one of two ranks; `first` is what rank 0 has broadcast."""

    def __init__(self, monkeypatch, rank, first=None):
        monkeypatch.setattr(distributed, "active", lambda: True)
        monkeypatch.setattr(distributed, "rank", lambda: rank)
        monkeypatch.setattr(distributed, "ending_together", contextlib.nullcontext)
        monkeypatch.setattr(distributed, "object_from_first", self.from_first)
        self.rank, self.first, self.sent = rank, first, []

    def from_first(self, value):
        self.sent.append(value)
        return value if self.rank == 0 else self.first


def test_one_process_keeps_its_folder():
    assert rank0_folder(Path("out")) == Path("out")


def test_all_ranks_use_rank_0s_folder_wherever_they_were_started(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    ranks = Ranks(monkeypatch, 0)
    assert rank0_folder(Path("out")) == tmp_path / "out" and ranks.sent == [tmp_path / "out"]
    Ranks(monkeypatch, 1, first=Path("/elsewhere/out"))
    assert rank0_folder(Path("out")) == Path("/elsewhere/out")


@pytest.mark.parametrize(
    ("export_dir", "refused"),
    [("run", True), ("run/../run", True), (".", True), ("run/gptq", False), ("out", False), ("ru", False)],
)
def test_an_export_folder_that_is_or_holds_the_runs_files_is_refused(export_dir, refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folders = [("logging_dir", None), ("output_dir", "run")]
    if not refused:
        refuse_run_folders(Path(export_dir), folders)
        return
    with pytest.raises(ExportError, match=r"is or holds output_dir \(run\).*a folder beside or below it"):
        refuse_run_folders(Path(export_dir), folders)


def test_every_folder_of_the_run_counts(tmp_path):
    for folders in ([("a", tmp_path / "x"), ("b", tmp_path / "y")], [("b", tmp_path / "y"), ("a", tmp_path / "x")]):
        with pytest.raises(ExportError, match=r"holds b \("):
            refuse_run_folders(tmp_path / "y", folders)


@pytest.fixture
def quantized():
    model, quantizer = tiny_llama(), QuantizeModule(group_size=32)
    quantizer.round_to_nearest(model)
    return quantizer, model


class Tokenizer:
    def save_pretrained(self, directory):
        (directory / "tokenizer.json").write_text("{}")


def test_one_process_exports_where_it_was_told(quantized, tmp_path):
    assert export_on_rank0(*quantized, tmp_path / "out", tokenizer=Tokenizer()) == tmp_path / "out"
    assert (tmp_path / "out" / "tokenizer.json").exists()
    assert load_quantized(tmp_path / "out")
    assert quantized[0].report.deviations == []


def test_a_name_that_was_taken_meanwhile_gets_a_suffix_and_the_report_tells(quantized, tmp_path, caplog):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "other.txt").write_text("not ours")
    folder = export_on_rank0(*quantized, tmp_path / "out", overwrite=True)  # which replaces exports only
    assert folder.parent == tmp_path and folder.name.startswith("out-") and load_quantized(folder)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["other.txt"]
    (deviation,) = quantized[0].report.deviations
    reason, _, told = deviation.rpartition(": ")
    assert told == f"exported to {folder.name} instead" and f"{reason}: exporting to {folder} instead" in caplog.text


def test_what_the_client_would_refuse_is_not_exported(tmp_path):
    model, quantizer = tiny_llama(), QuantizeModule(group_size=16)
    quantizer.round_to_nearest(model)
    with pytest.raises(ExportError, match="not 16"):
        export_on_rank0(quantizer, model, tmp_path / "out", target="vllm")
    assert not (tmp_path / "out").exists()


def test_an_earlier_export_is_replaced_if_asked_and_else_kept(quantized, tmp_path):
    export_on_rank0(*quantized, tmp_path / "out")
    assert export_on_rank0(*quantized, tmp_path / "out", overwrite=True) == tmp_path / "out"
    assert export_on_rank0(*quantized, tmp_path / "out") != tmp_path / "out"


def test_other_ranks_write_nothing_and_learn_the_folders_name(quantized, tmp_path, monkeypatch):
    Ranks(monkeypatch, 1, first=tmp_path / "out-1234abcd")
    assert export_on_rank0(*quantized, tmp_path / "out") == tmp_path / "out-1234abcd"
    assert list(tmp_path.iterdir()) == []
    ranks = Ranks(monkeypatch, 0)
    assert export_on_rank0(*quantized, tmp_path / "out") == tmp_path / "out"
    assert ranks.sent == [tmp_path / "out"] and load_quantized(tmp_path / "out")
