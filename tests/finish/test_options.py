"""The options of a finish: what they may be, and which data they ask for."""

from __future__ import annotations

import dataclasses

import pytest

from gptq_plugin import Finish, QuantizeConfig
from gptq_plugin.finish.options import NONE, check_finish


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("kind", "scale"), ("kind", None), ("steps", 0), ("steps", 2.0), ("learning_rate", 0), ("learning_rate", 1.0),
        ("learning_rate", "1e-3"), ("norm_learning_rate", -0.1), ("tokens_per_step", 0), ("nsamples", 0),
        ("held_out", 0), ("batch_size", True), ("judgements", 0), ("patience", 0), ("top_logits", 0),
        ("checkpoint_activations", 1), ("seed", -1), ("learning_rate", float("nan")),
    ],
)  # fmt: skip
def test_an_option_out_of_range_is_refused_by_its_name(name, value):
    with pytest.raises(ValueError, match=f"^{name} must be .*; got "):
        Finish(**{name: value})


@pytest.mark.parametrize("kind", ["blocks", "full"])
def test_kinds_to_come_are_refused_by_name(kind):
    with pytest.raises(ValueError, match=f"kind='{kind}' of a finish is not there yet: give 'scales'"):
        Finish(kind=kind)


def test_rates_of_norms_follow_those_of_scales_unless_given():
    assert Finish(learning_rate=1e-3).rate_of_norms == 1e-3
    assert Finish(learning_rate=1e-3, norm_learning_rate=0).rate_of_norms == 0


def test_it_asks_for_samples_to_train_on_and_to_judge_on():
    config = QuantizeConfig(nsamples=100, batch_size=1, seed=7)
    asked = Finish(held_out=20, batch_size=3).data_config(config)
    assert (asked.nsamples, asked.batch_size, asked.seed) == (120, 3, 7)
    assert Finish(nsamples=50, held_out=20).data_config(config).nsamples == 70


def test_it_is_plain_values_and_back():
    finish = Finish(steps=7, nsamples=9)
    assert Finish(**finish.to_dict()) == finish
    with pytest.raises(dataclasses.FrozenInstanceError):
        finish.steps = 8


def test_no_finish_is_one_of_the_kind_none_and_anything_else_is_refused():
    assert check_finish(None) == NONE and NONE.kind == "none"
    assert check_finish(Finish()) == Finish()
    with pytest.raises(ValueError, match="finish must be a Finish"):
        check_finish({"kind": "scales"})
