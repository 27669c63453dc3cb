"""The command that measures kernels and writes the package's table for a GPU, with a fake GPU and a fake clock."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from gptq_plugin.kernels.product import timing
from gptq_plugin.kernels.product.choice import Gpu
from gptq_plugin.kernels.product.layout import Layout
from gptq_plugin.kernels.product.registry import fits
from gptq_plugin.kernels.product.table import Table

from gpus import A100, H100
from kernel_cases import gpu
from paths import REPOSITORY


@pytest.fixture
def bench():
    spec = importlib.util.spec_from_file_location("bench_qlinear", REPOSITORY / "scripts" / "bench_qlinear.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def on_an_h100(monkeypatch):
    monkeypatch.setattr(Gpu, "of", classmethod(lambda cls, device: H100))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)

    def last_is_fastest(device, layout, rows, dtype, choices, deadline):
        return {choice: 1e-5 / (n + 1) for n, choice in enumerate(choices)}

    monkeypatch.setattr(timing, "measure", last_is_fastest)


def test_every_product_asked_for_is_measured_and_added_to_the_table(bench, on_an_h100, tmp_path, capsys):
    file = tmp_path / "table.json"
    bench.write_table(["4096x4096", "1000x37"], ["1", "64", "2048"], ["4", "3"], ["float16"], 128, True, file)
    table = Table.parse(file.read_bytes())
    assert table.is_for(H100) and "--write-table" in table.made_by and torch.__version__ in table.made_by
    assert {(key.n_in, key.bits, key.rows) for key in table.choices} == {
        (n_in, bits, rows) for n_in in (4096, 1000) for bits in (4, 3) for rows in (1, 64, 2048)
    }
    for key, choice in table.choices.items():
        layout = Layout.of(key.bits, key.group, key.n_in, key.n_out, key.symmetric)
        assert fits(choice, layout, key.rows, torch.float16, H100)
    printed = capsys.readouterr().out
    assert printed.count(" measured [") == 12 and f"{file}: 12 choices" in printed and "not measured: 0" in printed
    bench.write_table(["4096x4096"], ["16"], ["4"], ["bfloat16"], 128, False, file)
    assert len(Table.parse(file.read_bytes()).choices) == 13


def test_a_table_of_another_gpu_is_not_written_to(bench, on_an_h100, tmp_path):
    file = tmp_path / "table.json"
    file.write_text(before := Table(A100.name, A100.processors, "by hand").to_json())
    with pytest.raises(SystemExit, match="A100"):
        bench.write_table(["4096x4096"], ["1"], ["4"], ["float16"], 128, True, file)
    assert file.read_text() == before


@gpu
def test_on_a_gpu_ragged_layers_of_every_width_are_timed_and_right(bench):
    for bits, symmetric, dtype in ((4, True, torch.bfloat16), (3, False, torch.float16), (2, True, torch.float16)):
        times, told = bench.bench_gpu(1000, 1090, 5, bits, 128, dtype, symmetric)
        assert times["QuantLinear"] > 0 and "floors, error" in told
