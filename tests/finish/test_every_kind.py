"""What holds for a finish of every kind."""

from __future__ import annotations

import pytest
import torch

from gptq_plugin import Finish

from finish_cases import KINDS, changed, kinds_of, quantized, rows, same, state_of

every_kind = pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)


@every_kind
def test_two_runs_of_one_seed_give_the_same_bytes_and_another_seed_does_not(options):
    states = []
    for seed in (0, 0, 1):
        model, twin, quantizer = quantized()
        quantizer.finish(model, twin, rows(), Finish(**options, seed=seed))
        states.append(state_of(model))
    assert same(states[0], states[1]) and not same(states[0], states[2])


@every_kind
def test_padding_is_neither_trained_nor_judged_on(options):
    """Batches whose padding holds other tokens give the same bytes."""
    states = []
    for filler in (5, 99):
        mask = (torch.arange(24) < torch.tensor([[24], [11], [17], [5]])).long()
        batches = []
        for number in range(10):
            ids = torch.stack(rows(4, seed=number))
            batches.append({"input_ids": torch.where(mask.bool(), ids, filler), "attention_mask": mask})
        model, twin, quantizer = quantized(data=batches)
        record = quantizer.finish(model, twin, batches, Finish(**options))
        assert record.kept and record.held_out_tokens == 2 * (24 + 11 + 17 + 5)
        assert all(block.best_step > 0 for block in record.blocks)
        states.append(state_of(model))
    assert same(*states)


@every_kind
def test_norms_stay_where_their_rate_is_0(options):
    model, twin, quantizer = quantized()
    before = state_of(model)
    assert quantizer.finish(model, twin, rows(), Finish(**options, norm_learning_rate=0)).kept
    codes = {"qweight"} if "kind" in options else set()
    assert kinds_of(changed(before, state_of(model))) == {"scales"} | codes
