"""What the float model's head reads: what it predicts again, and what is kept where it does not."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gptq_plugin import Finish
from gptq_plugin.errors import CalibrationError, TargetError
from gptq_plugin.finish import head_inputs, teacher, top_logits
from gptq_plugin.finish.head_inputs import AllLogits, Head
from gptq_plugin.finish.top_logits import Divergence, TopLogits

from finish_cases import FAST, divergence, quantized, rows, same, state_of
from models import tiny_llama


@pytest.mark.parametrize("piece", [40, 2**24])
def test_the_divergence_and_its_gradient_are_those_of_all_tokens(piece, monkeypatch):
    monkeypatch.setattr(top_logits, "_PIECE", piece)
    theirs, ours = torch.randn(7, 19) * 3, (torch.randn(7, 19) * 3).requires_grad_()
    theirs[2, 5] = -torch.inf
    logs, reference = theirs.double().log_softmax(-1), ours.double().log_softmax(-1)
    wanted = torch.where(logs.exp() > 0, logs.exp() * (logs - reference), 0.0).sum()
    (gradient,) = torch.autograd.grad(wanted, ours)
    value = Divergence.apply(ours, AllLogits(theirs))
    (found,) = torch.autograd.grad(value, ours)
    assert float(value.detach()) == pytest.approx(float(wanted.detach()), rel=1e-5)
    torch.testing.assert_close(found, gradient.float(), rtol=1e-4, atol=1e-6)
    assert AllLogits(theirs).divergence(ours.detach()) == pytest.approx(float(wanted.detach()), rel=1e-5)


def test_a_head_tells_what_it_reads_only_where_its_outputs_are_the_logits():
    own, x = nn.Linear(5, 9), torch.randn(2, 3, 5)
    head = Head(own, own)
    with torch.no_grad(), head.watching():
        assert head.take(own(x)) is x
        assert head.take(own(x) * 0.5) is None
        both = own(x), own(x)
        assert head.take(both[0]) is None
        assert head.take(torch.randn(2, 3, 9)) is None
        assert head.gives(x, both[0]) and not head.gives(x, both[0] + 1) and not head.gives(x.bfloat16(), both[0])
        told = head.of(x.flatten(0, 1)[1:])
        assert len(told) == 5 and torch.equal(told.to(x.device).logits, own(x).flatten(0, 1)[1:])
    own(x)
    assert head.take(own(x)) is None


@torch.no_grad()
def test_a_head_is_that_of_both_models_by_its_values():
    own, other = nn.Linear(5, 9), nn.Linear(5, 9)
    assert Head(own, own).is_that_of_both() and not Head(own, other).is_that_of_both()
    other.load_state_dict(own.state_dict())
    assert Head(own, other).is_that_of_both() and not Head(own, other.double()).is_that_of_both()
    plain = nn.Linear(5, 9, bias=False)
    plain.weight = own.weight
    assert not Head(own, plain).is_that_of_both() and not Head(plain, own).is_that_of_both()


def test_all_tokens_are_told_apart_as_with_top_logits_for_all_of_them():
    states = []
    for most in (None, 128):
        model, twin, quantizer = quantized()
        record = quantizer.finish(model, twin, rows(), Finish(**FAST, top_logits=most))
        states.append((record.before, record.after, [one.held_out for one in record.curve]))
        assert not [one for one in quantizer.report.deviations if "likeliest" in one]
    assert states[0][:2] == pytest.approx(states[1][:2], rel=1e-4) and states[0][2] == pytest.approx(states[1][2], 1e-4)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"lm_head": True}, "the model has no float head"),
        ({}, "what the head reads would take"),
        ({}, "0.0 GiB are there for it"),
        ({}, "not what the mo"),
        ({}, "the model that is trained has another head"),
    ],
)
def test_where_the_head_cannot_tell_the_likeliest_tokens_are_kept_and_the_report_tells_why(options, why, monkeypatch):
    kept, original = [], TopLogits.of.__func__
    monkeypatch.setattr(teacher, "LIKELIEST", 7)
    monkeypatch.setattr(TopLogits, "of", classmethod(lambda cls, logits, k: kept.append(k) or original(cls, logits, k)))
    if "take" in why:
        monkeypatch.setattr(head_inputs, "MOST_BYTES", 10)
        monkeypatch.setattr(teacher, "MOST_BYTES", 10)
    if "there" in why:
        monkeypatch.setattr(teacher, "available_bytes", lambda: 4 * 1000)
    model, twin, quantizer = quantized(**options)
    if "not what" in why:
        for one in (model, twin):
            one.register_forward_hook(lambda _, __, output: setattr(output, "logits", output.logits * 0.5))
    if "another" in why:
        twin.lm_head.weight.data[3] *= 1.5
    apart = divergence(model, twin, rows()[32:])
    record = quantizer.finish(model, twin, rows(), Finish(**FAST))
    assert record.before == pytest.approx(apart, rel=1e-4)
    (told,) = [one for one in quantizer.report.deviations if "the 7 likeliest tokens" in one]
    assert why in told and 7 in kept


@pytest.mark.parametrize(("classes", "most"), [(256, None), (100, 16)])
def test_a_float_model_of_other_classes_is_refused(classes, most):
    model, _, quantizer = quantized()
    before = state_of(model)
    other = tiny_llama(initializer_range=0.2, vocab_size=classes)
    with pytest.raises(
        TargetError, match=rf"gives logits \[8, 24, 128\] for .* float model \[8, 24, {classes}\]: give"
    ):
        quantizer.finish(model, other, [ids % 90 for ids in rows()], Finish(**FAST, batch_size=8, top_logits=most))
    assert same(before, state_of(model))


def test_a_batch_whose_logits_its_head_does_not_give_is_named():
    model, twin, quantizer = quantized()
    calls = []

    def scaled(_, __, output):
        calls.append(output)
        if len(calls) > 3:
            output.logits = output.logits * 0.5

    twin.register_forward_hook(scaled)
    before = state_of(model)
    with pytest.raises(
        CalibrationError, match=r"batch \d+ of the finish: the float model's logits are not what its head"
    ):
        quantizer.finish(model, twin, rows(), Finish(**FAST))
    assert same(before, state_of(model))


def test_a_model_that_is_padded_is_trained_on_what_counts_alone():
    states = []
    for filler in (5, 99):
        mask = (torch.arange(24) < torch.tensor([[24], [11], [17], [5]])).long()
        batches = [
            {"input_ids": torch.where(mask.bool(), torch.stack(rows(4, seed=n)), filler), "attention_mask": mask}
            for n in range(10)
        ]
        model, twin, quantizer = quantized()
        quantizer.finish(model, twin, batches, Finish(**FAST))
        states.append(state_of(model))
    assert same(*states)
