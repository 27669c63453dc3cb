"""Tables of what was measured: their form, and those that the package ships."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from gptq_plugin.kernels.product import table as module
from gptq_plugin.kernels.product.choice import Choice
from gptq_plugin.kernels.product.layout import Layout
from gptq_plugin.kernels.product.registry import fits
from gptq_plugin.kernels.product.table import Key, Table, shipped, slug

from gpus import A100, GPUS, H100

LAYOUT = Layout.of(4, 128, 4096, 4096, True)
FILES = sorted(Path(module.__file__).parent.glob("tables/*"))


def example():
    table = Table(A100.name, A100.processors, "by hand")
    for rows, text in ((1, "few_rows BN=32 BM=8"), (64, "dense"), (2048, "dense")):
        table.choices[Key.of(LAYOUT, rows, torch.float16)] = Choice.parse(text)
    other = Layout.of(3, 64, 100, 70, False)
    table.choices[Key.of(other, 8, torch.float32)] = Choice("few_rows")
    return table


def test_a_table_is_read_as_it_was_written():
    table = example()
    assert Table.parse(table.to_json()) == table
    assert Table.parse(table.to_json().encode()).to_json() == table.to_json()


def test_a_choice_is_found_by_sizes_rows_and_dtype():
    table = example()

    def find(rows=1, layout=LAYOUT, dtype=torch.float16, gpu=A100):
        return str(table.find(layout, rows, dtype, gpu))

    assert find() == "few_rows BN=32 BM=8" and find(33) == find(64) == find(5000) == "dense"
    assert find(2) == find(65) == find(1024) == "None"
    assert find(dtype=torch.bfloat16) == find() and find(dtype=torch.float32) == "None"
    for layout in (
        Layout.of(8, 128, 4096, 4096, True), Layout.of(4, 64, 4096, 4096, True), Layout.of(4, 128, 4032, 4096, True),
        Layout.of(4, 128, 4096, 4032, True), Layout.of(4, 128, 4096, 4096, False),
    ):  # fmt: skip
        assert find(layout=layout) == "None"
    assert find(layout=Layout.of(4, 256, 4096, 4096, True)) == find(), "longer groups are repeated, and cost the same"


def test_a_choice_that_does_not_fit_is_not_found():
    table = Table(H100.name, H100.processors)
    key = Key.of(LAYOUT, 2048, torch.float16)
    for text in ("no_kernel", "few_rows", "dense BN=64", "many_rows STAGES=7"):
        table.choices[key] = Choice.parse(text)
        assert table.find(LAYOUT, 2048, torch.float16, H100) is None
    table.choices[key] = Choice("many_rows")
    assert table.find(LAYOUT, 2048, torch.float16, H100) == Choice("many_rows")
    assert table.find(LAYOUT, 2048, torch.float16, A100) is None, "it has no such kernel"


def damaged():
    def edited(change):
        read = json.loads(example().to_json())
        change(read)
        return json.dumps(read)

    first = lambda read: read["layouts"][0]  # noqa: E731
    yield from ("", "[]", "{}", "null", "[" * 100_000, "{", "\x00", '{"layouts": 1}', "NaN", b"\xff\xfe\x00\xd8")
    yield edited(lambda read: read.pop("gpu"))
    yield edited(lambda read: read.update(processors="108"))
    yield edited(lambda read: read.update(processors=True))
    yield edited(lambda read: read.update(layouts=[1]))
    yield edited(lambda read: read.update(layouts={}))
    for name, value in (("bits", 5), ("bits", "4"), ("group", 16), ("symmetric", 1), ("n_in", 0), ("n_out", -1),
                        ("n_in", 1.5), ("dtype", "float64"), ("dtype", None), ("rows", [1])):  # fmt: skip
        yield edited(lambda read, name=name, value=value: first(read).update({name: value}))
    for rows, text in (("3", "dense"), ("01", "dense"), ("1", 1), ("1", "rm -rf"), ("1", "dense;"), ("1", None)):
        yield edited(lambda read, rows=rows, text=text: first(read)["rows"].update({rows: text}))


@pytest.mark.parametrize("text", list(damaged()))
def test_what_is_no_table_is_refused(text):
    with pytest.raises(ValueError):
        Table.parse(text)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_every_shipped_choice_is_one_that_its_gpu_can_run(file):
    table = Table.parse(file.read_bytes())
    assert file.name == f"{slug(table.gpu)}.json" and file.read_text() == table.to_json()
    (gpu,) = (gpu for gpu in GPUS if gpu.name == table.gpu)  # a new one belongs in tests/support/gpus.py
    assert shipped(gpu) is not None and table.made_by and len(table.choices) >= 24
    for key, choice in table.choices.items():
        layout = Layout(key.bits, key.group, key.n_in, key.n_out, key.group, key.symmetric)
        assert Layout.of(key.bits, key.group, key.n_in, key.n_out, key.symmetric) == layout
        for dtype in (torch.float16, torch.bfloat16) if key.dtype == "float16" else (getattr(torch, key.dtype),):
            assert fits(choice, layout, key.rows, dtype, gpu), f"{choice} for {key}"
            assert table.find(layout, key.rows, dtype, gpu) == choice


def test_a_table_is_for_the_whole_gpu_of_its_name():
    assert FILES and shipped(H100) is not None and shipped(A100) is None
    part = type(H100)(H100.name, 66, True, H100.shared, H100.cache)
    named_alike = type(H100)("NVIDIA H100 80GB-HBM3", 132, True, H100.shared, H100.cache)
    assert (
        shipped(part) is None and shipped(named_alike) is None and shipped(type(H100)("../..", 1, True, 1, 1)) is None
    )
