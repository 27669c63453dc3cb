"""The record of a finish: its sentence, its table, and the way through a file."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest

from gptq_plugin.report.ending import ending
from gptq_plugin.report.finish_record import BlockRecord, FinishRecord, Judgement
from gptq_plugin.report.html_page import report_page
from gptq_plugin.report.provenance import provenance, publishable
from gptq_plugin.report.stored_report import read_report, report_text

from cards import TASKLESS, report_of

RECORD = FinishRecord(
    "scales", True, "all 20 steps were made", 0.02, 0.015, 10, 20, 160_000, 128, 16_384,
    "160 samples of /home/me/own.txt", "ab" * 32, 7.5, {"steps": 20, "norm_learning_rate": None},
    [Judgement(0, math.nan, 0.02), Judgement(10, 0.018, 0.015), Judgement(20, 0.017, 0.016)],
)  # fmt: skip
BLOCKS = dataclasses.replace(
    RECORD,
    kind="blocks",
    blocks=(BlockRecord("layers.0", 0.02, 0.018, 160, 200), BlockRecord("layers.1", 0.1, 0.1, 0, 80)),
)


def test_the_summary_tells_how_far_it_came_and_whether_it_is_kept():
    assert RECORD.summary() == (
        "finish (scales): KL to the float model on 16384 held-out positions from 0.02 to 0.015 (-25.00 %) in 10 of 20 "
        "steps on 128 samples; kept: all 20 steps were made"
    )
    assert "(-25.00 %) in 2 blocks and 10 of 20 steps on 128 samples" in BLOCKS.summary()
    assert BLOCKS.blocks[0].summary() == "layers.0: error from 0.02 to 0.018 in 160 of 200 steps"
    of_none = dataclasses.replace(BLOCKS, kept=False, after=0.02, best_step=0)
    assert of_none.summary() == (
        "finish (blocks): not kept, since KL to the float model on 16384 held-out positions, 0.02, was no lower behind "
        "2 blocks and 20 steps on 128 samples: all 20 steps were made"
    )
    undone = RECORD.undone("val_loss rose")
    assert not undone.kept and undone.summary().endswith("; not kept: val_loss rose")


def test_the_table_has_a_row_for_each_block_and_each_judgement():
    assert BLOCKS.rows()[1:3] == [
        ("layers.0, 160 of 200", "error 0.02", "to 0.018"),
        ("layers.1, 0 of 80", "error 0.1", "to 0.1"),
    ]
    assert [BLOCKS.rows()[0], *BLOCKS.rows()[3:]] == RECORD.rows()
    assert RECORD.rows() == [
        ("step", "KL in training", "KL held out"),
        ("0", "", "0.02"),
        ("10", "0.018", "0.015"),
        ("20", "0.017", "0.016"),
    ]


def test_it_is_shown_wherever_the_report_is():
    report = report_of((4, 128), finish=RECORD)
    assert RECORD.summary() in report.table() and RECORD.summary() in ending(report, None)
    assert "<h2>Finish</h2>" in report_page(report, "x") and "0.017" in report_page(report, "x")
    assert "Finish" not in report_page(report_of((4, 128)), "x")


@pytest.mark.parametrize("record", [RECORD, BLOCKS])
def test_it_comes_back_from_the_file_without_paths_of_the_machine(record):
    report = publishable(report_of((4, 128), finish=record))
    assert report.finish.data == "160 samples of own.txt"
    read, _ = read_report(report_text(report, TASKLESS))
    first, *rest = read.finish.curve
    assert math.isnan(first.training) and rest == list(RECORD.curve[1:])
    assert dataclasses.replace(read.finish, curve=[]) == dataclasses.replace(report.finish, curve=[])
    text = json.loads(report_text(report, TASKLESS))
    del text["finish"]["blocks"]  # as earlier versions wrote it
    earlier, _ = read_report(json.dumps(text))
    assert earlier.finish.blocks == ()
    nothing, _ = read_report(report_text(report_of((4, 128)), TASKLESS))
    assert nothing.finish is None


def test_provenance_tells_steps_tokens_and_data_and_no_time():
    told = provenance(report_of((4, 128), finish=RECORD))["finish"]
    assert told == {
        "kind": "scales", "kept": True, "best_step": 10, "steps": 20, "tokens": 160_000, "samples": 128,
        "held_out_tokens": 16_384, "kl": {"before": 0.02, "after": 0.015},
        "data": {"description": "160 samples of own.txt", "sha256": "ab" * 32},
    }  # fmt: skip
    assert "finish" not in provenance(report_of((4, 128)))
