"""The tables at the end of runs and sweeps."""

from __future__ import annotations

from gptq_plugin.apps.summary import Summary, sweep_table


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
