"""How far metrics may move from float to quantized: every limit at its threshold, and what is told when it fails."""

from __future__ import annotations

import math

import pytest

from gptq_plugin.errors import QualityError
from gptq_plugin.training.limit import Limit
from gptq_plugin.training.paired import Measured
from gptq_plugin.training.quality_gate import ON_FAIL, QualityGate
from gptq_plugin.training.samples import Divided, Samples

# --- a limit ---


@pytest.mark.parametrize(
    ("value", "amount", "relative"),
    [
        (0.02, 0.02, False),
        (-0.01, -0.01, False),
        (3, 3.0, False),
        ("0.5", 0.5, False),
        ("2%", 0.02, True),
        ("-150%", -1.5, True),
        (" 2 % ", 0.02, True),
        ("1e-3%", 1e-5, True),
    ],
)
def test_numbers_are_absolute_and_percentages_relative(value, amount, relative):
    limit = Limit.parse("loss", value)
    assert limit.amount == pytest.approx(amount, rel=1e-12) and limit.relative is relative


@pytest.mark.parametrize(
    ("value", "limit"),
    [
        ("2% at 95%", Limit(0.02, True, 0.95)),
        ("-0.01 at 97.5 %", Limit(-0.01, False, 0.975)),
        (" 1 %  at 50% ", Limit(0.01, True, 0.5)),
        ("0.5 at 99%", Limit(0.5, False, 0.99)),
    ],
)
def test_a_limit_may_ask_for_confidence(value, limit):
    assert Limit.parse("loss", value) == limit


@pytest.mark.parametrize(
    "value",
    [0, 0.0, "0", "0%", "-0%", "much", "%", "2%%", "", None, True, False, math.nan, math.inf, "inf%", "nan%", [1], {},
     "2% at", "at 95%", "2% at 95", "2% at 40%", "2% at 99.5%", "0% at 95%", "2% at .%", "2% at 95% at 95%"],
)  # fmt: skip
def test_what_is_no_limit_is_refused_with_an_example(value):
    with pytest.raises(ValueError) as caught:
        Limit.parse("val loss", value)
    assert str(caught.value) == (
        "max_degradation['val loss'] must be a number or a percentage other than zero, such as 0.02 or '2%' for a "
        "metric that may rise by so much, -0.01 for one that may fall, and '2% at 95%' to be so sure of it (50 to "
        f"99 %); got {value!r}"
    )


@pytest.mark.parametrize(
    ("given", "example"),
    [(0.02, "0.02"), (-1, "-1"), ("2%", "'2%'"), (0, "0.02"), (True, "0.02"), (False, "0.02"), ("", "0.02"),
     ([], "0.02"), (["val_loss", 0.02], "0.02"), ("val_loss", "0.02"), (math.nan, "0.02")],
)  # fmt: skip
def test_limits_without_a_metric_are_refused_with_the_right_form(given, example):
    with pytest.raises(ValueError) as caught:
        QualityGate(given)
    assert str(caught.value) == (
        f"max_degradation names a logged metric for each limit, such as {{'val_loss': {example}}}; got {given!r}"
    )


@pytest.mark.parametrize("name", [1, None, "", ("val_loss",)])
def test_a_metric_that_is_no_name_is_refused(name):
    with pytest.raises(ValueError, match="keys are names of logged metrics, such as 'val_loss'; got"):
        QualityGate({name: 0.02})


def test_no_limits_are_none_or_empty():
    assert QualityGate(None).limits == QualityGate({}).limits == {}


@pytest.mark.parametrize(
    ("limit", "before", "after", "excess"),
    [
        (Limit(0.25, False), 1.0, 1.25, 0.0),  # exactly as much as it may
        (Limit(0.25, False), 1.0, 1.5, 0.25),
        (Limit(0.25, False), 1.0, 1.125, -0.125),
        (Limit(0.25, False), 1.0, 0.0, -1.25),  # the better direction
        (Limit(0.25, False), -4.0, -3.75, 0.0),  # absolute: whatever the float model's value
        (Limit(-0.25, False), 0.75, 0.5, 0.0),
        (Limit(-0.25, False), 0.75, 0.25, 0.25),
        (Limit(-0.25, False), 0.75, 1.0, -0.5),
        (Limit(0.5, True), 4.0, 6.0, 0.0),
        (Limit(0.5, True), 4.0, 8.0, 2.0),
        (Limit(0.5, True), -4.0, -2.0, 0.0),  # a share of the size, also of negative values
        (Limit(0.5, True), -4.0, 0.0, 2.0),
        (Limit(-0.5, True), 4.0, 2.0, 0.0),
        (Limit(-0.5, True), 4.0, 1.0, 1.0),
        (Limit(-0.5, True), -4.0, -8.0, 2.0),
        (Limit(0.5, True), 0.0, 0.25, 0.25),  # no share of nothing
        (Limit(0.5, True), 0.0, 0.0, 0.0),
    ],
)
def test_the_excess_is_how_much_worse_than_allowed_a_change_is(limit, before, after, excess):
    assert limit.excess(before, after) == excess


@pytest.mark.parametrize(("before", "after"), [(1.0, math.nan), (math.nan, 1.0), (math.inf, math.inf)])
@pytest.mark.parametrize("amount", [0.5, -0.5])
def test_a_change_that_is_no_number_is_infinitely_bad(amount, before, after):
    assert Limit(amount, False).excess(before, after) == math.inf


# --- the gate ---


def test_by_default_a_failure_raises_and_bits_have_no_limit():
    gate = QualityGate({"loss": 0.5, "accuracy": "-1%"})
    assert gate.on_fail == "raise" and gate.max_bits is None
    assert gate.limits == {"loss": Limit(0.5, False), "accuracy": Limit(-0.01, True)}


def test_a_limit_that_is_none_is_refused_with_its_metric():
    with pytest.raises(ValueError, match=r"max_degradation\['accuracy'\] must be a number"):
        QualityGate({"loss": 0.5, "accuracy": 0})


@pytest.mark.parametrize("on_fail", ["raise", "warn", "escalate"])
def test_there_are_three_things_to_do_on_failure(on_fail):
    assert ON_FAIL == ("raise", "warn", "escalate")
    assert QualityGate({}, on_fail).on_fail == on_fail


def test_anything_else_to_do_on_failure_is_refused():
    with pytest.raises(ValueError) as caught:
        QualityGate({}, "retry")
    assert str(caught.value) == "on_fail must be one of 'raise', 'warn', 'escalate'; got 'retry'"


@pytest.mark.parametrize("max_bits", [0, 0.0, -1, math.nan, "4", True, False, [4]])
def test_a_limit_of_bits_is_a_number_above_0(max_bits):
    with pytest.raises(ValueError) as caught:
        QualityGate({}, max_bits=max_bits)
    assert str(caught.value) == f"max_bits must be a number above 0, or None (no limit); got {max_bits!r}"


def test_bits_are_afforded_up_to_their_limit():
    gate = QualityGate({}, "escalate", 4.5)
    assert gate.max_bits == 4.5
    assert gate.affords(4.5) is True and gate.affords(4.499) is True and gate.affords(4.501) is False
    assert QualityGate({}, max_bits=0.5).affords(0.5) and QualityGate({}, max_bits=1).affords(1)
    assert QualityGate({}).affords(1e9) is True


def test_a_metric_that_is_not_logged_is_named_with_those_that_are():
    gate = QualityGate({"loss": 1, "accuracy": -1, "rouge": -1})
    gate.check_names(["accuracy", "rouge", "loss", "other"])
    with pytest.raises(ValueError) as caught:
        gate.check_names(iter(["other", "accuracy"]))
    assert str(caught.value) == "max_degradation names loss, rouge, and validation logs accuracy, other"
    with pytest.raises(
        ValueError,
        match=r"names loss, accuracy, and validation logs acuracy, val_loss: did you mean val_loss, acuracy\?",
    ):
        QualityGate({"loss": 1, "accuracy": -1}).check_names(["val_loss", "acuracy"])
    with pytest.raises(ValueError, match=r"did you mean val_loss\?$"):
        QualityGate({"val_los": 1}).check_names(["val_loss", "val_loss_1", "val_loss_2"])
    with pytest.raises(ValueError) as caught:
        gate.check_names({})
    assert str(caught.value) == "max_degradation names loss, accuracy, rouge, and validation logs nothing"
    QualityGate({}).check_names([])


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_float_model_without_a_finite_metric_is_what_is_named(value):
    """No configuration would do better than the others."""
    metrics = {"loss": value, "other": math.nan, "accuracy": 0.5}
    for on_fail in ("raise", "escalate"):
        with pytest.raises(QualityError, match=f"^loss is {value} of the float model"):
            QualityGate({"loss": 1, "accuracy": -1}, on_fail).check_before(metrics)
    QualityGate({"loss": 1}, "warn").check_before(metrics)
    QualityGate({"accuracy": -1}).check_before(metrics)


def test_every_limit_that_does_not_hold_is_a_sentence_and_the_limit_itself_is_good():
    gate = QualityGate({"loss": 0.5, "accuracy": -0.25, "perplexity": "50%"})
    before = {"loss": 1.0, "accuracy": 0.75, "perplexity": 4.0}
    assert gate.failures(before, {"loss": 1.5, "accuracy": 0.5, "perplexity": 6.0}) == []
    assert gate.failures(before, {"loss": 2.0, "accuracy": 0.25, "perplexity": 7.0}) == [
        "loss went from 1 to 2 (+1, +100.000%; +0.5 allowed)",
        "accuracy went from 0.75 to 0.25 (-0.5, -66.667%; -0.25 allowed)",
        "perplexity went from 4 to 7 (+3, +75.000%; +50.000% allowed)",
    ]
    assert gate.failures(before, {"loss": 1.0, "accuracy": 0.25, "perplexity": 4.0}) == [
        "accuracy went from 0.75 to 0.25 (-0.5, -66.667%; -0.25 allowed)"
    ]


def test_of_a_change_from_zero_there_is_no_share_and_of_a_negative_value_it_has_the_changes_sign():
    gate = QualityGate({"loss": 0.5})
    assert gate.failures({"loss": 0.0}, {"loss": 2.0}) == ["loss went from 0 to 2 (+2; +0.5 allowed)"]
    assert gate.failures({"loss": -4.0}, {"loss": -2.0}) == ["loss went from -4 to -2 (+2, +50.000%; +0.5 allowed)"]


def test_numbers_are_told_with_five_digits():
    gate = QualityGate({"loss": 0.0123456789})
    assert gate.failures({"loss": 1.23456789}, {"loss": 2.3456789}) == [
        "loss went from 1.2346 to 2.3457 (+1.1111, +90.000%; +0.012346 allowed)"
    ]


def test_a_metric_that_is_gone_or_not_a_number_is_a_failure():
    gate = QualityGate({"loss": 0.5})
    told = ["loss went from 1 to nan (+nan, +nan%; +0.5 allowed)"]
    assert gate.failures({"loss": 1.0, "other": 2.0}, {"other": 2.0}) == told
    assert gate.failures({"loss": 1.0}, {"loss": math.nan}) == told


def test_metrics_without_a_limit_may_move():
    assert QualityGate({}).failures({"loss": 1.0}, {"loss": 9.0}) == []
    assert QualityGate({"loss": 0.5}).failures({"loss": 1.0, "other": 1.0}, {"loss": 1.0, "other": 9.0}) == []


def test_worse_is_what_leads_beyond_a_limit_or_further_beyond_it():
    gate, before = QualityGate({"loss": 0.1, "acc": -0.1}), {"loss": 1.0, "acc": 0.5}
    for than, after, worse in [
        ((1.05, 0.5), (1.09, 0.45), False),
        ((1.05, 0.5), (1.2, 0.5), True),
        ((1.3, 0.5), (1.2, 0.5), False),
        ((1.3, 0.5), (1.4, 0.5), True),
        ((1.3, 0.5), (1.05, 0.3), True),
        ((math.nan, 0.5), (math.nan, 0.5), False),
        ((1.3, 0.5), (math.nan, 0.5), True),
    ]:
        first, last = (dict(zip(before, values, strict=True)) for values in (than, after))
        assert gate.is_worse(before, first, last) == worse, (than, after)
    assert not QualityGate(None).is_worse({}, {}, {})


# --- limits with a confidence ---


def measured(values, keys=None):
    return Measured.mean(values, [1.0] * len(values), keys)


def test_a_change_has_to_keep_its_limit_with_the_confidence_asked_for():
    """Changes of 0.01 ± 0.01 (standard error): a limit of 0.02 holds, of which there is no 95 %, and 0.03 is sure."""
    before = measured([1.0 + (n % 7) for n in range(100)])
    after = measured([b + 0.01 + (0.1 if n % 2 else -0.1) for n, b in enumerate(before.values)])
    good = {0.02: True, "0.02 at 50%": True, "0.02 at 95%": False, "0.03 at 95%": True, "0.03 at 99%": False}
    for limit, holds in good.items():
        gate = QualityGate({"loss": limit})
        assert (gate.failures({"loss": before}, {"loss": after}) == []) == holds, limit
    down = measured([2 * b - a for a, b in zip(after.values, before.values, strict=True)])
    assert QualityGate({"acc": "-0.02 at 95%"}).failures({"acc": before}, {"acc": down})
    assert not QualityGate({"acc": "-0.03 at 95%"}).failures({"acc": before}, {"acc": down})


def test_what_fails_at_a_confidence_is_told_with_its_bound():
    before = measured([2.0] * 100)
    after = measured([2.02 + (0.1 if n % 2 else -0.1) for n in range(100)])
    (told,) = QualityGate({"loss": "1% at 95%"}).failures({"loss": before}, {"loss": after})
    assert told.startswith("loss went from 2 to 2.02 (+0.02, +1.000%, at 95% confidence up to +1.8")
    assert told.endswith("%; +1.000% allowed)")
    (told,) = QualityGate({"loss": "0.02 at 95%"}).failures({"loss": before}, {"loss": after})
    assert "at 95% confidence up to +0.036" in told or "at 95% confidence up to +0.037" in told


def test_confidence_that_cannot_be_had_fails_and_tells_why():
    gate = QualityGate({"loss": "1% at 95%"})
    few, many = measured([1.0] * 9), measured([1.0] * 12, [*range(12)])
    for before, after, why in [
        (1.0, 1.0, "it is no mean of values that are logged for each batch"),
        (few, few, "it is measured on 9 samples, and fewer than 10 tell too little"),
        (many, measured([1.0] * 12, [*range(1, 13)]), "the two models were measured on different batches"),
        (many, measured([1.0] * 11, [*range(11)]), "the two models were measured on different batches"),
    ]:
        (told,) = gate.failures({"loss": before}, {"loss": after})
        assert "cannot be judged: " in told and why in told
    (told,) = gate.failures({"loss": many}, {"loss": measured([math.nan] * 12, [*range(12)])})
    assert "not all its values are finite" in told


def test_confidence_that_there_cannot_be_is_refused_before_training():
    gate = QualityGate({"loss": "1% at 95%", "acc": -0.01})
    assert gate.confident == ["loss"]
    many, other = measured([1.0] * 12, [*range(12)]), measured([1.0] * 12, [*range(1, 13)])
    gate.check_parts({"loss": many, "acc": 0.5}, {"loss": many, "acc": 0.5})
    gate.check_parts({"loss": measured([1.0], [1])}, {"loss": measured([1.0], [1])}, batches=10)
    four = Measured.mean([1.0], [4], [1], Samples([Divided(1.0, 4, [1.0] * 4, {"": [1] * 4}, [*range(4)])], 4))
    gate.check_parts({"loss": four}, {"loss": four}, batches=3)  # of four samples each
    alone = Measured.mean([1.0], [4], [1], Samples(why="reasons"))
    with pytest.raises(ValueError, match=r"there are 3 batches \(reasons\), .* make them smaller"):
        gate.check_parts({"loss": alone}, {"loss": alone}, batches=3)
    for first, second, batches, why in [
        (1.0, 1.0, None, "it is no mean"),
        (many, other, None, "neither shuffles nor augments"),
        (many, many, 9, "there are 9 samples"),
        (measured([1.0] * 3), measured([1.0] * 3), None, "there are 3 samples"),
    ]:
        with pytest.raises(ValueError, match=rf"max_degradation\['loss'\] asks for a confidence .*{why}"):
            gate.check_parts({"loss": first}, {"loss": second}, batches)


def test_with_a_confidence_worse_is_what_is_less_sure():
    gate, before = QualityGate({"loss": "0.05 at 95%"}), {"loss": measured([1.0] * 20)}
    calm, wild = (measured([1.01 + step * (-1) ** n for n in range(20)]) for step in (0.01, 0.5))
    assert gate.is_worse(before, {"loss": calm}, {"loss": wild})
    assert not gate.is_worse(before, {"loss": wild}, {"loss": calm})
