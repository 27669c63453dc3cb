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
        ("checkpoint_activations", 1), ("seed", -1), ("learning_rate", float("nan")), ("block_steps", 0),
        ("block_nsamples", None), ("block_learning_rate", 0), ("block_code_learning_rate", 1),
        ("code_learning_rate", 1), ("task_weight", 1), ("task_weight", -0.1), ("task_weight", None),
    ],
)  # fmt: skip
def test_an_option_out_of_range_is_refused_by_its_name(name, value):
    with pytest.raises(ValueError, match=f"^{name} must be .*; got "):
        Finish(**{name: value})


def test_rates_follow_the_width_unless_given():
    finish = Finish("full")
    assert [finish.rates(bits) for bits in (2, 3, 4, 8)] == 2 * [(1e-3, 3e-3, 1e-3)] + 2 * [(3e-4, 1e-3, 3e-4)]
    blocks = [(1e-3, 4e-3, 1e-3), (3e-4, 2e-3, 3e-4), (3e-4, 1e-3, 3e-4), (3e-4, 1e-3, 3e-4)]
    assert [finish.rates_in_blocks(bits) for bits in (2, 3, 4, 8)] == blocks
    given = Finish("full", block_learning_rate=0.1, block_code_learning_rate=0.2, norm_learning_rate=0)
    assert {given.rates_in_blocks(bits) for bits in (2, 4)} == {(0.1, 0.2, 0)} and not given.trains_norms
    assert {Finish(learning_rate=0.1, code_learning_rate=0.3).rates(bits) for bits in (2, 4)} == {(0.1, 0.3, 0.1)}
    assert finish.by_blocks and Finish("blocks").by_blocks and not Finish().by_blocks and finish.trains_norms


def test_it_asks_for_samples_to_train_on_and_to_judge_on():
    config = QuantizeConfig(nsamples=100, batch_size=1, seed=7)
    asked = Finish(held_out=20, batch_size=3).data_config(config)
    assert (asked.nsamples, asked.batch_size, asked.seed) == (120, 3, 7)
    assert Finish(nsamples=50, held_out=20).data_config(config).nsamples == 70


def test_training_of_codes_ends_early_only_where_patience_is_given():
    assert Finish().patience_with(codes=False) == 4
    assert Finish("full", judgements=10).patience_with(codes=True) > 10
    assert {Finish("blocks", patience=2).patience_with(codes=codes) for codes in (True, False)} == {2}


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
