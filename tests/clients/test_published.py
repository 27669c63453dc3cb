"""An export as its model card shows it: the grids of its layers."""

from __future__ import annotations

import dataclasses

from gptq_plugin.clients.published import Published

from cards import SETTINGS, TASKLESS, report_of


def test_the_grids_are_those_of_the_quantized_layers_and_without_any_those_of_the_settings() -> None:
    mixed = report_of((4, 128), (3, 32), (4, 128))
    assert Published(mixed, SETTINGS, TASKLESS).grids == {(4, 128), (3, 32)}
    unknown = report_of((4, 128))
    unknown.modules = [dataclasses.replace(unknown.modules[0], bits=None)]
    for report in (report_of(), unknown):
        assert Published(report, {**SETTINGS, "bits": 8, "group_size": -1}, TASKLESS).grids == {(8, -1)}
