"""The page's table of layers: the worst on top, each figure sortable, float layers at the end."""

from __future__ import annotations

import math

from reports import Page, module

from gptq_plugin.report.deviations import Deviation
from gptq_plugin.report.layer_rows import layers_table
from gptq_plugin.report.module_report import ModuleReport

HEAD = ModuleReport("head", "float", None, None, (20, 48), reason="the output embedding")


def rows(text: str) -> list[dict[str, str]]:
    """Of each row, the sorting key by column."""
    page, found = Page(text), []
    cells = [attributes for tag, attributes in page.tags if tag == "td"]
    titles = page.within("th")
    for start in range(0, len(cells), len(titles)):
        found.append(
            {t: a.get("data-key", "") for t, a in zip(titles, cells[start : start + len(titles)], strict=True)}
        )
    return found


def test_the_largest_relative_error_is_on_top_then_unknown_ones_then_float_layers() -> None:
    layers = [
        HEAD,
        module("small", 0.1, output_power=10.0),
        ModuleReport("unknown", "rtn", 3, 16, (20, 48)),
        module("large", 0.01, output_power=0.1),
    ]
    assert [row["module"] for row in rows(layers_table(layers, []))] == ["large", "small", "unknown", "head"]
    assert [row["place"] for row in rows(layers_table(layers, []))] == ["4", "2", "3", "1"]


def test_keys_are_plain_numbers_and_unknown_figures_have_none() -> None:
    first, last = rows(layers_table([module("a", 0.02, 0.05, output_power=2.0), HEAD], []))
    assert first == {
        "module": "a",
        "bits": "3",
        "group": "16",
        "out × in": "960",
        "relative error": "0.01",
        "loss": "0.02",
        "RTN loss": "0.05",
        "loss/RTN": "0.4",
        "tokens": "640",
        "damping": "0.01",
        "seconds": "0.25",
        "differs": "",
        "place": "1",
    }
    assert {title for title, key in last.items() if key} == {"module", "out × in", "place"}
    assert "nan" not in layers_table([HEAD, ModuleReport("b", "rtn", 3, -1, (20, 48))], []).lower()


def test_texts_have_units_and_separators() -> None:
    layer = ModuleReport("a", "gptq", 3, 16, (20, 48), 0.02, 0.05, 123_456, 0.01, 0.25, output_power=2.0)
    cells = Page(layers_table([layer], [])).within("td")
    assert cells[1:] == ["3", "16", "20 × 48", "1 %", "0.02", "0.05", "0.4", "123,456", "0.01", "0.25", "1"]
    assert "8 rtn" in Page(layers_table([ModuleReport("b", "rtn", 8, 16, (4, 4))], [])).within("td")


def test_a_layer_names_the_numbers_of_its_differences() -> None:
    deviations = [Deviation("all of it"), Deviation("damped", ("a", "b")), Deviation("overflows", ("b",))]
    found = {row["module"]: row["differs"] for row in rows(layers_table([module("a"), module("b")], deviations))}
    assert found == {"a": "2", "b": "2"}
    assert "2, 3" in Page(layers_table([module("b")], deviations)).within("td")


def test_a_layer_worse_than_round_to_nearest_stands_out() -> None:
    table = layers_table([module("good", 0.02, 0.05), module("bad", 0.06, 0.05)], [])
    page = Page(table)
    worse = [attributes for tag, attributes in page.tags if tag == "td" and attributes.get("class") == "worse"]
    assert [float(attributes["data-key"]) for attributes in worse] == [1.2]


def test_a_long_name_may_break_after_its_dots_and_a_reason_stands_below_it() -> None:
    table = layers_table([module("layers.0.up"), HEAD], [])
    assert "layers.<wbr>0.<wbr>up" in table and "<span class='soft'>the output embedding</span>" in table


def test_a_phone_shows_each_figure_with_its_title() -> None:
    page = Page(layers_table([module("a")], []))
    titles = page.within("th")
    assert [a.get("data-title") for tag, a in page.tags if tag == "td"][1:] == titles[1:]


def test_many_layers_scroll_in_a_box_of_their_own() -> None:
    assert "class='wide free'" in layers_table([module(f"{n}") for n in range(30)], [])
    assert "class='wide'>" in layers_table([module(f"{n}") for n in range(31)], [])


def test_an_infinite_loss_is_sorted_as_one() -> None:
    assert rows(layers_table([module("a", math.inf)], []))[0]["loss"] == "Infinity"
