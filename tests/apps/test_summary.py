"""The table and the JSON of a run, and of a sweep."""

from __future__ import annotations

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import save_file

from gptq_plugin import distributed
from gptq_plugin.apps.summary import Clock, Summary, SweepTable, files_size, sweep_table, weights_size


def test_a_sweeps_table_shows_what_differs_and_survives_runs_without_evaluation(tmp_path):
    for number, nll in enumerate([{"float": 1.0, "rtn": 1.5, "gptq": 1.25}, {}]):
        folder = tmp_path / str(number)
        (folder / ".hydra").mkdir(parents=True)
        (folder / ".hydra" / "overrides.yaml").write_text(f"- model=hf\n- quantizer.bits={number + 2}\n")
        Summary(number + 2, 128, 10_000_000, "float32", 2_000_000, nll=nll).write(folder)
    (tmp_path / "10").mkdir()
    lines = sweep_table(tmp_path).splitlines()
    assert lines[2].split() == [
        "0",
        "quantizer.bits=2",
        "2.718",
        "4.482",
        "3.490",
        "+0.25000",
        "2.00",
        "MB",
        "of",
        "10.00",
        "MB",
        "0",
    ]
    assert lines[3].split()[:2] == ["1", "quantizer.bits=3"]
    assert "model=hf" not in sweep_table(tmp_path)
    assert sweep_table(tmp_path / "nothing") == ""


def summary(**values):
    return Summary(4, 128, 10_000_000, "float32", 2_000_000, **values)


def test_the_clock_adds_up_phases_and_moves_parts_of_them():
    clock = Clock()
    with clock("train"):
        pass
    with pytest.raises(KeyError), clock("evaluate"):
        raise KeyError
    assert list(clock.seconds) == ["train", "evaluate"]
    clock.seconds = {"train": 5.0}
    with clock("train"):
        pass
    assert 5.0 < clock.seconds["train"] < 5.5
    clock.seconds = {"train": 5.0}
    clock.move(2.0, "train", "quantize")
    clock.move(1.0, "train", "quantize")
    assert clock.seconds == {"train": 2.0, "quantize": 3.0}


def test_a_runs_table_has_a_row_a_model_and_what_was_measured():
    run = summary(
        nll={"float": 1.0, "rtn": 1.5, "gptq": 1.25}, windows=(7, 32), prompt="The  value\n" + "x" * 100, text="is the",
        seconds={"train": 1.25, "quantize": 22.0}, files={"GPTQ model": "/a/gptq"}, deviations=["one layer is float"],
        next_command="gptq-quantize -m",
    )  # fmt: skip
    lines = run.table().splitlines()
    cells = [line.split("  ") for line in lines]
    rows = {words[0]: [word.strip() for word in words[1:] if word.strip()] for words in cells}
    assert rows["float"] == ["2.718", "1.00000", "10.00 MB (float32)"]
    assert rows["round-to-nearest, 4 bits"] == ["4.482", "1.50000", "+0.50000"]
    assert rows["GPTQ, 4 bits"] == ["3.490", "1.25000", "+0.25000", "2.00 MB"]
    assert "(At 16 bits the float weights would take 5.00 MB.)" in lines
    assert "Measured on 7 held-out windows of 32 tokens; the GPTQ model" in lines
    continued = next(line for line in lines if line.startswith("It continues"))
    assert continued == f"It continues  The value {'x' * 79}…" and "with          is the" in lines
    seconds = next(number for number, line in enumerate(lines) if line.startswith("seconds"))
    assert lines[seconds].split()[1:] == ["train", "quantize"] and lines[seconds + 1].split() == ["1.2", "22.0"]
    assert "GPTQ model  /a/gptq" in lines and "! one layer is float" in lines
    assert lines[-2:] == ["Try next:", "  gptq-quantize -m"]


def test_a_table_without_an_evaluation_names_no_perplexity_and_half_precision_needs_no_note():
    table = Summary(4, 128, 10_000_000, "bfloat16", 2_000_000).table()
    for words in (
        "Measured on",
        "It continues",
        "At 16 bits",
        "Try next",
        "!",
        "perplexity",
        "round-to-nearest",
        "\n\n\n",
    ):
        assert words not in table
    assert "10.00 MB (bfloat16)" in table


def test_the_files_bytes_and_the_weights_bytes_are_counted(tmp_path):
    save_file({"a": torch.zeros(5)}, tmp_path / "a.safetensors")
    (tmp_path / "other.bin").write_bytes(b"12345")
    assert files_size(tmp_path) == (tmp_path / "a.safetensors").stat().st_size
    network = torch.nn.ModuleList([torch.nn.Linear(3, 5), torch.nn.Linear(3, 5).to(torch.bfloat16)])
    assert weights_size(network) == (20 * 4 + 20 * 2, "bfloat16/float32")
    network[1].weight, network[1].bias = network[0].weight, network[0].bias  # tied ones count once
    assert weights_size(network) == (20 * 4, "float32")


def test_rank_0_writes_and_prints_the_sweeps_table(tmp_path, capsys, monkeypatch):
    config = OmegaConf.create({"hydra": {"sweep": {"dir": str(tmp_path)}}})
    SweepTable().on_multirun_end(config)
    assert not (tmp_path / "sweep.txt").exists()  # no run has left a summary
    (tmp_path / "0").mkdir()
    summary(nll={"gptq": 1.0}).write(tmp_path / "0")
    monkeypatch.setattr(distributed, "rank", lambda: 1)
    SweepTable().on_multirun_end(config)
    assert not (tmp_path / "sweep.txt").exists()
    monkeypatch.setattr(distributed, "rank", lambda: 0)
    SweepTable().on_multirun_end(config)
    assert (tmp_path / "sweep.txt").read_text() == sweep_table(tmp_path) + "\n"
    assert sweep_table(tmp_path) in capsys.readouterr().out
