"""The run's own loss in what a finish trains: its share, whose parameters it moves, and what is refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gptq_plugin import Finish
from gptq_plugin.errors import CalibrationError
from gptq_plugin.finish import train
from gptq_plugin.finish.student import Student

from finish_cases import FAST, quantized, rows, same, state_of
from models import tiny_llama

MIXED = Finish(**FAST, task_weight=0.7)


def cross_entropy(model, batch):
    return model(input_ids=batch["input_ids"], labels=batch["input_ids"]).loss


def finished(finish, task_loss=None, data=None):
    """The bytes of a finished model, its record, and its own loss on what it was trained on."""
    model, twin, quantizer = quantized()
    record = quantizer.finish(model, twin, rows() if data is None else data, finish, task_loss=task_loss)
    with torch.no_grad():
        return state_of(model), record, float(cross_entropy(model, {"input_ids": torch.stack(rows()[:32])}))


def test_it_lowers_the_runs_loss_which_is_that_of_next_tokens_unless_given():
    """Of random tokens the float model knows nothing, so that coming near to it does not lower their loss as much."""
    alone, of_tokens, given = finished(Finish(**FAST)), finished(MIXED), finished(MIXED, cross_entropy)
    doubled = finished(MIXED, lambda model, batch: 2 * cross_entropy(model, batch))
    assert all(record.kept for _, record, _ in (alone, of_tokens, given, doubled))
    assert doubled[2] < given[2] < alone[2]
    assert given[2] == pytest.approx(of_tokens[2], rel=1e-4) and not same(of_tokens[0], alone[0])
    assert of_tokens[1].options["task_weight"] == 0.7


def test_it_has_its_share_of_every_batchs_gradient(monkeypatch):
    """The divergence's own mean, given as the run's loss, is that share of the same gradient."""
    added, original = [], Student.add
    monkeypatch.setattr(Student, "add", lambda self, given: (added.append([*given]), original(self, given))[1])
    model, twin, quantizer = quantized()

    def mean_divergence(model, batch):
        theirs, ours = (one(input_ids=batch["input_ids"]).logits.log_softmax(-1) for one in (twin, model))
        return (theirs.exp() * (theirs - ours)).sum(-1).mean()

    quantizer.finish(model, twin, rows(), Finish(**{**FAST, "steps": 1}, task_weight=0.7), task_loss=mean_divergence)
    of_task, of_divergence = added[:2]
    assert any(one is not None for one in of_task)
    for one, other in zip(of_task, of_divergence, strict=True):
        if one is not None:
            torch.testing.assert_close(one / 0.7, other / 0.3, rtol=1e-3, atol=1e-4 * float(one.abs().max()))


def test_what_is_kept_is_decided_by_the_divergence_alone(monkeypatch):
    """Held-out samples are not given to the loss."""
    seen = []

    def watched(model, batch):
        seen.append(batch["input_ids"].clone())
        return cross_entropy(model, batch)

    _, record, _ = finished(MIXED, watched)
    assert record.after == min(one.held_out for one in record.curve)
    held_out = torch.stack(rows()[32:])
    assert seen and not any((part[:, None] == held_out).all(-1).any() for part in seen)


def test_labels_are_what_the_loss_is_of_and_padding_is_not():
    states = []
    for filler in (5, 99):
        mask = (torch.arange(24) < torch.tensor([[24], [11], [17], [5]])).long()
        batches = []
        for number in range(10):
            ids = torch.where(mask.bool(), torch.stack(rows(4, seed=number)), filler)
            labels = ids.masked_fill((mask == 0) | (torch.arange(24) < 3), -100)
            batches.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
        states.append(finished(MIXED, data=batches)[0])
    assert same(*states)
    others = [{**batch, "labels": batch["labels"].masked_fill(torch.arange(24) < 9, -100)} for batch in batches]
    assert not same(finished(MIXED, data=others)[0], states[1])


def test_a_loss_may_take_what_it_reads_out_of_its_batch():
    def pops(model, batch):
        return cross_entropy(model, {"input_ids": batch.pop("input_ids")})

    assert same(finished(MIXED, pops)[0], finished(MIXED, cross_entropy)[0])


def test_parameters_outside_of_the_model_get_no_gradient_and_it_is_in_evaluation_mode():
    head = nn.Linear(128, 1)
    modes = []

    def loss(model, batch):
        modes.append(model.training)
        return head(model(**batch).logits).square().mean()

    finished(MIXED, loss)
    assert modes and not any(modes) and head.weight.grad is None and head.weight.requires_grad


def test_activations_that_are_computed_twice_give_the_same_result():
    twice = Finish(**FAST, task_weight=0.7, checkpoint_activations=True)
    assert same(finished(twice)[0], finished(MIXED)[0])


def test_no_room_for_the_loss_has_activations_computed_twice_and_no_gradient_counts_twice(monkeypatch):
    wanted = finished(MIXED)[0]
    original, failures = train.Training._task, iter([torch.OutOfMemoryError("no room")])

    def short(self, task, lesson):
        if not self._reruns and self.steps == 3:
            raise next(failures)
        return original(self, task, lesson)

    monkeypatch.setattr(train.Training, "_task", short)
    assert same(finished(MIXED)[0], wanted)
    failures = iter([torch.OutOfMemoryError("no room")])
    with pytest.raises(torch.OutOfMemoryError, match="no room"):
        finished(Finish(**FAST, task_weight=0.7, checkpoint_activations=False))


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda model, batch: model(**batch).logits.mean(-1), r"returned a tensor \[4, 24\]"),
        (lambda model, batch: cross_entropy(model, batch).detach(), r"a scalar with a gradient: .* a tensor \[\]"),
        (lambda model, batch: None, "returned NoneType"),
        (lambda model, batch: cross_entropy(model, batch) * torch.nan, "the loss of a batch is nan"),
        (lambda model, batch: cross_entropy(tiny_llama(), batch), "a loss that does not depend on the quantized model"),
    ],
)
def test_what_is_no_loss_is_refused_and_the_model_is_as_it_was(loss, message):
    model, twin, quantizer = quantized()
    before = state_of(model)
    with pytest.raises(CalibrationError, match=message):
        quantizer.finish(model, twin, rows(), MIXED, task_loss=loss)
    assert same(state_of(model), before)


def test_a_loss_that_runs_layers_of_its_own_in_the_place_of_quantized_ones_is_told(caplog):
    """As adapters do that hold their layers in a list: their module is no part of the model, and is not replaced."""
    model, twin, quantizer = quantized()
    own = list(twin.model.layers)[:1]

    def loss(model, batch):
        layers = model.model.layers
        replaced, layers[0] = layers[0], own[0]
        try:
            return cross_entropy(model, batch)
        finally:
            layers[0] = replaced

    quantizer.finish(model, twin, rows(), MIXED, task_loss=loss)
    (told,) = [message for message in caplog.messages if "the loss of the run does not depend on" in message]
    assert "7 of 14 quantized layers (model.layers.0.mlp.down_proj, " in told
    caplog.clear()
    finished(MIXED, cross_entropy)
    assert "does not depend" not in caplog.text


def test_a_loss_that_is_not_finite_later_ends_the_steps_and_the_reason_names_it():
    calls = []

    def breaks(model, batch):
        calls.append(batch)
        return cross_entropy(model, batch) * (torch.nan if len(calls) == 30 else 1)

    _, record, _ = finished(MIXED, breaks)
    assert (
        1 < record.steps < MIXED.steps and "the divergence or the run's own loss is not finite in step" in record.reason
    )


def test_batches_without_a_loss_and_a_loss_without_a_weight_are_refused():
    model, twin, quantizer = quantized()
    embedded = [
        {"inputs_embeds": model.get_input_embeddings()(torch.stack(rows(4, seed=n))).detach()} for n in range(5)
    ]
    with pytest.raises(CalibrationError, match="task_weight needs the loss of every .* leave task_weight out"):
        quantizer.finish(model, twin, embedded, MIXED)
    with pytest.raises(ValueError, match=r"task_weight, which is 0: give Finish\(task_weight=...\)"):
        quantizer.finish(model, twin, rows(), Finish(), task_loss=cross_entropy)


def test_samples_of_which_no_label_counts_are_refused_unless_a_loss_is_given():
    """The loss of their labels would be 0. Those held out, the last ones, have none of it."""
    ids = [torch.stack(rows(4, seed=number)) for number in range(10)]

    def labelled(*numbers):
        return [{"input_ids": x, "labels": x if n in numbers else torch.full_like(x, -100)} for n, x in enumerate(ids)]

    model, twin, quantizer = quantized()
    before = state_of(model)
    with pytest.raises(CalibrationError, match=r"task_weight: no label of the finish's samples to train on counts"):
        quantizer.finish(model, twin, labelled(9), MIXED)
    assert same(state_of(model), before)
    assert quantizer.finish(model, twin, labelled(9), MIXED, task_loss=cross_entropy).kept
    assert finished(MIXED, data=labelled(3))[1].kept


def test_layers_that_nothing_depends_on_are_not_told(caplog):
    """As experts that no token of a step goes to: the float model does not depend on them either."""
    model, twin, quantizer = quantized()
    for one in (model, twin):
        layer = one.model.layers[1]
        layer.mlp.down_proj.register_forward_hook(lambda module, args, output: torch.zeros_like(output))
    quantizer.finish(model, twin, rows(), MIXED, task_loss=lambda model, batch: cross_entropy(model, batch))
    assert not [message for message in caplog.messages if "does not depend on" in message]
