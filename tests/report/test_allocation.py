"""What `target_bits` chose, in the report's table, on its page and in the card, and written and read back."""

from __future__ import annotations

import dataclasses

import pytest
from reports import Page, module, report

from gptq_plugin.report.allocation import Allocation, UnitChoice
from gptq_plugin.report.coverage import Coverage
from gptq_plugin.report.html_page import report_page
from gptq_plugin.report.model_card import ModelFacts, model_card
from gptq_plugin.report.stored_report import read_report, report_text

from cards import report_of

UNITS = [
    UnitChoice("model.qkv_proj", 3, 300, 4, 128, 0.002, {"2": 0.05, "3": 0.008, "4": 0.002}),
    UnitChoice("model.<b>_proj", 1, 100, 8, 64, 1e-6, {"2": 0.001, "4": 1e-4}),
]
ALLOCATION = Allocation(5.3, 5.25, 4096, 12.5, UNITS)


def test_the_summary_tells_size_widths_and_the_sum_of_what_layers_do():
    assert ALLOCATION.widths == {4: 0.75, 8: 0.25}
    summary = ALLOCATION.summary()
    assert summary.startswith("target_bits=5.3: 5.25 bits per weight")
    assert "75% of the weights at 4 bits, 25% of the weights at 8 bits" in summary
    assert "0.002 nats on 4096 held-out positions" in summary


def test_a_width_that_a_unit_was_not_measured_at_is_blank():
    head, first, second = ALLOCATION.rows()
    assert head[-3:] == ("KL at 2", "KL at 3", "KL at 4")
    assert first == ("model.qkv_proj", "3", "4", "128", "0.002", "0.05", "0.008", "0.002")
    assert second[-3:] == ("0.001", "", "0.0001")


def test_table_page_and_card_show_every_unit():
    given = dataclasses.replace(report_of((4, 128), (8, 64)), allocation=ALLOCATION)
    assert ALLOCATION.summary() in given.table() and "model.<b>_proj" in given.table()
    page = Page(report_page(given, "title"))
    assert "model.<b>_proj" in page.within("td") and ALLOCATION.summary() in page.within("p")
    card = model_card(given, given.config.to_dict(), ModelFacts("Net"))
    assert "## Bits at a budget" in card and "model.&lt;b&gt;\\_proj" in card
    assert "Bits at a budget" not in model_card(report_of((4, 128)), given.config.to_dict(), ModelFacts("Net"))


def test_it_is_written_and_read_back_as_it_was():
    given = dataclasses.replace(report_of((4, 128), (8, 64)), allocation=ALLOCATION)
    again, _ = read_report(report_text(given, ModelFacts("Net")))
    assert again.allocation == ALLOCATION


@pytest.mark.parametrize("stored", [4, 2])
def test_layers_that_stay_float_after_all_and_so_raise_the_average_are_noted(stored):
    """20 x 48 weights, 480 or 240 bytes of them."""
    found = report(module("a", stored_bytes=120 * stored))
    found.note(Coverage((), 0, 0), dataclasses.replace(ALLOCATION, target_bits=3.0))
    assert found.seconds["allocate"] == 12.5
    noted = [line for line in found.deviations if "more than target_bits=3" in line and "stayed float" in line]
    assert len(noted) == (stored == 4)
