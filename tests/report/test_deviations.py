"""Deviations that layers share are one line with a count, and no two different ones become one."""

from __future__ import annotations

import pytest

from gptq_plugin.report.deviations import grouped


def lines(general: list[str], **by_module: list[str]) -> list[str]:
    return [one.line for one in grouped(general, {name.replace("_", "."): texts for name, texts in by_module.items()})]


def test_equal_sentences_of_many_layers_are_one_line_that_counts_and_names_them() -> None:
    found = grouped(["dropped"], {f"layers.{n}.up": ("never called", "damped") for n in range(6)})
    assert [one.line for one in found] == [
        "dropped",
        "6 layers (layers.0.up, layers.1.up, layers.2.up, layers.3.up and 2 more): never called",
        "6 layers (layers.0.up, layers.1.up, layers.2.up, layers.3.up and 2 more): damped",
    ]
    assert found[1].modules == tuple(f"layers.{n}.up" for n in range(6)) and found[0].modules == ()


def test_a_sentence_of_one_layer_follows_its_name() -> None:
    assert lines([], a=["damped"], b=[]) == ["a: damped"]


def test_sentences_that_differ_in_numbers_are_one_with_their_ranges() -> None:
    assert lines(
        [],
        a=["only 812 calibration tokens for 2048 inputs: damp_percent is 0.03"],
        b=["only 37 calibration tokens for 2048 inputs: damp_percent is 1e-05"],
        c=["only 1,024 calibration tokens for 2048 inputs: damp_percent is 0.011"],
    ) == ["3 layers (a, b, c): only 37 to 1,024 calibration tokens for 2048 inputs: damp_percent is 1e-05 to 0.03"]


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("read by layers.3.q_proj", "read by layers.4.q_proj"),  # names are not numbers
        ("beyond float16", "beyond float32"),
        ("v1 stores no zeros", "v2 stores no zeros"),
        ("takes 3-bit codes", "takes 4-bit codes"),
        ("damped", "not damped"),
    ],
)
def test_sentences_that_differ_in_more_stay_apart(first: str, second: str) -> None:
    assert lines([], a=[first], b=[second]) == [f"a: {first}", f"b: {second}"]


def test_a_general_sentence_about_a_layer_joins_those_of_others_like_it() -> None:
    assert lines(["a: 3 calls came late", "b: 9 calls came late", "other: 1 call"], a=[], b=[]) == [
        "other: 1 call",
        "2 layers (a, b): 3 to 9 calls came late",
    ]


def test_a_repeated_general_sentence_is_there_once() -> None:
    assert lines(["dropped", "dropped", "dropped 2", "dropped 3"]) == ["dropped", "dropped 2", "dropped 3"]
