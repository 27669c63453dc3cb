"""Steps and judgements of a descent, of one number; with whole finishes it is tested by test_finish_model.py."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from gptq_plugin.finish import block_training
from gptq_plugin.finish.descent import Descent, Pace
from gptq_plugin.report.finish_record import Judgement

CPU = torch.device("cpu")


class Number:
    """A student of one number."""

    def __init__(self):
        self.parameters = [torch.nn.Parameter(torch.zeros(1))]

    def values(self):
        return [one.detach().clone() for one in self.parameters]

    def show(self):
        pass


class Upwards(Descent):
    """Trains the number to grow, on batches whose loss is the step's number; judgements are as given."""

    def __init__(self, judgements, counts=(2, 0, 2), patience=9):
        student = Number()
        pace = Pace(steps=8, tokens_per_step=2, judgements=4, patience=patience, seed=0)
        super().__init__(student, [(student.parameters, 0.1)], counts, pace, CPU)
        self.learned, self.judgements, self.student = [], iter(judgements), student

    def _learn(self, number):
        self.learned.append(number)
        self.student.parameters[0].grad -= 1
        return torch.tensor(2.0 * self.steps)

    def _measure(self):
        return {0: (next(self.judgements), 1)}


def trained(*judgements, asked=lambda: False, **options):
    descent = Upwards(judgements, **options)
    interruption = type("Asked", (), {"asked": property(lambda _: asked())})()
    (kept,) = descent.train(lambda *_: None, interruption)
    return descent, float(kept)


def test_a_judgement_has_the_loss_of_the_steps_since_the_last_one_and_empty_batches_are_left_out():
    descent, _ = trained(*range(5))
    assert [one.step for one in descent.curve] == [0, 2, 4, 6, 8] and descent.tokens == 16
    assert math.isnan(descent.curve[0].training)
    assert [one.training for one in descent.curve[1:]] == [0.5, 2.5, 4.5, 6.5]
    assert set(descent.learned) == {0, 2}


@pytest.mark.parametrize("worse", [math.nan, math.inf, 9.0])
def test_the_best_finite_judgement_is_kept(worse):
    descent, kept = trained(worse, 3.0, 2.0, worse, 2.5)
    assert descent.best.step == 4 and descent.ended == "all 8 steps were made"
    assert 0 < kept < float(descent.student.parameters[0].detach())


def test_it_ends_where_patience_or_the_user_does_and_the_last_step_is_judged():
    descent, kept = trained(5.0, 3.0, 4.0, 4.0, patience=2)
    assert descent.steps == 6 and "no better in 2 judgements" in descent.ended and descent.best.step == 2
    steps = iter([False, False, True])
    descent, kept = trained(5.0, 3.0, 2.0, asked=lambda: next(steps))
    assert descent.interrupted and descent.steps == descent.best.step == 3
    assert kept == float(descent.student.parameters[0].detach())


def test_a_step_that_is_not_finite_changes_nothing_and_ends_it():
    class Broken(Upwards):
        def _learn(self, number):
            return super()._learn(number) * (math.nan if self.steps == 3 else 1)

    descent = Broken([5.0, 3.0, 2.0])
    (kept,) = descent.train(lambda *_: None, SimpleNamespace(asked=False))
    assert descent.ended == "the loss is not finite in step 4" and descent.best == Judgement(2, 0.5, 3.0)
    assert 0 < float(kept) < float(descent.student.parameters[0].detach())


def test_the_unit_of_a_blocks_error_is_that_of_all_ranks_and_1_where_the_block_changes_nothing(monkeypatch):
    monkeypatch.setattr(block_training.distributed, "gather_objects", lambda own: [own, (6.0, 4)])
    assert block_training._unit([], CPU) == 1.5
    monkeypatch.setattr(block_training.distributed, "gather_objects", lambda own: [own, (0.0, 0)])
    assert block_training._unit([], CPU) == 1.0
