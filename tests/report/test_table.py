"""Layers as lines of text: one for each layer, or for a large model one for each kind."""

from __future__ import annotations

from reports import module

from gptq_plugin.report.module_report import ModuleReport
from gptq_plugin.report.table import bits_counts, kind_table, layer_table

HEAD = ModuleReport("head", "float", None, None, (20, 48), reason="the output embedding")


def words(line: str) -> str:
    return " ".join(line.split())


def test_a_narrow_table_has_what_fits_a_terminal_and_reasons() -> None:
    head, first, last = layer_table([module("a", output_power=2.0), HEAD], narrow=True)
    assert words(head) == "module bits group out x in relative error loss/RTN"
    assert words(first) == "a 3 16 20 x 48 1 % 0.4" and words(last) == "head 20 x 48 the output embedding"
    assert len(max(layer_table([module("model.layers.10.self_attn.q_proj")], narrow=True), key=len)) < 90


def test_kinds_are_lines_with_their_number_the_worst_error_and_the_ratio_of_summed_losses() -> None:
    layers = [module(f"layers.{n}.up", 0.1 * n, 1.0, output_power=1.0) for n in (1, 3)]
    head, up, odd, last = kind_table([*layers, module("layers.0.down", 0.5, 0.0), HEAD])
    assert words(head) == "modules number bits out x in worst relative error loss/RTN s"
    assert words(up) == "layers.*.up 2 3 20 x 48 30 % 0.2 0.50"
    assert words(odd) == "layers.0.down 1 3 20 x 48 0.25"
    assert words(last) == "head 1 float 20 x 48 0.00"


def test_layers_of_different_shapes_and_bits_in_a_kind_are_told() -> None:
    wide = ModuleReport("layers.1.up", "gptq", 8, 16, (40, 48))
    line = kind_table([module("layers.0.up"), module("layers.2.up"), wide])[1]
    assert words(line).startswith("layers.*.up 3 3 (2), 8 (1) several")


def test_widths_are_counted_if_they_differ() -> None:
    assert bits_counts([module("a"), module("b")]) == "3" and bits_counts([]) == ""
    assert bits_counts([HEAD, module("a"), module("b")]) == "3 (2), float (1)"
