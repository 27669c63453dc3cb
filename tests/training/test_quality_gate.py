"""Limits on metrics: how they are written, what they allow, and the sentences about those that do not hold."""

from __future__ import annotations

import math

import pytest

from gptq_plugin.training.quality_gate import Limit, QualityGate

NAN = math.nan


@pytest.mark.parametrize(
    ("value", "limit"),
    [
        (0.02, Limit(0.02, False)),
        (-1, Limit(-1.0, False)),
        ("0.5", Limit(0.5, False)),
        ("2%", Limit(0.02, True)),
        (" -1.5 % ", Limit(-0.015, True)),
    ],
)
def test_a_limit_is_a_number_or_a_percentage(value, limit):
    assert Limit.parse("val_loss", value) == limit


@pytest.mark.parametrize("value", [0, "0%", True, False, NAN, math.inf, "nan%", "%", "two", "2%%", None, [1]])
def test_what_is_neither_is_refused_with_the_metrics_name(value):
    with pytest.raises(ValueError, match=r"max_degradation\['val_loss'\] must be a number or a percentage"):
        QualityGate({"val_loss": value})


@pytest.mark.parametrize(
    ("limit", "before", "after", "excess"),
    [
        (0.5, 3.0, 3.25, -0.25),  # may rise by 0.5
        (0.5, 3.0, 4.0, 0.5),
        (0.5, 3.0, 1.0, -2.5),  # better
        (-0.5, 3.0, 2.75, -0.25),  # may fall by 0.5
        (-0.5, 3.0, 1.5, 1.0),
        ("25%", 8.0, 11.0, 1.0),  # of 8
        ("25%", -8.0, -5.0, 1.0),  # of the size of -8
        ("-25%", 8.0, 5.0, 1.0),
        ("25%", 0.0, 0.125, 0.125),
        (0.5, NAN, 3.0, math.inf),
        (0.5, 3.0, NAN, math.inf),
    ],
)
def test_the_excess_is_how_much_worse_than_allowed(limit, before, after, excess):
    assert Limit.parse("x", limit).excess(before, after) == excess


def test_a_change_of_exactly_the_limit_is_good():
    gate = QualityGate({"loss": 0.5, "accuracy": "-25%"})
    assert gate.failures({"loss": 2.0, "accuracy": 0.5}, {"loss": 2.5, "accuracy": 0.375}) == []


def test_every_limit_that_does_not_hold_is_a_sentence():
    gate = QualityGate({"loss": 0.5, "accuracy": "-25%", "rouge": -1, "zero": 0.1})
    before = {"loss": 2.0, "accuracy": 0.5, "rouge": 30.0, "zero": 0.0}
    assert gate.failures(before, {"loss": 3.0, "accuracy": 0.25, "rouge": 29.5, "zero": 0.2}) == [
        "loss went from 2 to 3 (+1, +50.000%; +0.5 allowed)",
        "accuracy went from 0.5 to 0.25 (-0.25, -50.000%; -25.000% allowed)",
        "zero went from 0 to 0.2 (+0.2; +0.1 allowed)",
    ]
    assert gate.failures({**before, "loss": -2.0}, {**before, "loss": -1.0})[0].startswith(
        "loss went from -2 to -1 (+1, +50.000%;"
    )
    assert gate.failures(before, {k: v for k, v in before.items() if k != "rouge"}) == [
        "rouge went from 30 to nan (+nan, +nan%; -1 allowed)"
    ]


def test_limits_need_metrics_that_are_logged():
    gate = QualityGate({"a": 1, "b": 1, "c": 1})
    gate.check_names(iter(["d", "c", "b", "a"]))
    with pytest.raises(ValueError, match="max_degradation names a, c, and validation logs b, d"):
        gate.check_names(["d", "b"])
    with pytest.raises(ValueError, match="validation logs nothing"):
        gate.check_names([])


@pytest.mark.parametrize("on_fail", ["raise", "warn", "escalate"])
def test_what_happens_on_failure_is_one_of_three(on_fail):
    assert QualityGate({}, on_fail).on_fail == on_fail
    with pytest.raises(ValueError, match="on_fail must be one of raise, warn, escalate, got 'ignore'"):
        QualityGate({}, "ignore")
    assert QualityGate({}).on_fail == "raise"


def test_a_limit_of_bits_is_a_number_above_zero():
    assert QualityGate({}, max_bits=0.5).affords(0.5) and not QualityGate({}, max_bits=0.5).affords(0.51)
    assert QualityGate({}).affords(1e9)
    for max_bits in (0, -1, "4", True, NAN):
        with pytest.raises(ValueError, match="max_bits must be a number above 0"):
            QualityGate({}, max_bits=max_bits)
