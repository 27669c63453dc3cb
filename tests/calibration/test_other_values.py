"""What stands at chosen positions is replaced, and nothing else."""

from __future__ import annotations

import pytest
import torch

from gptq_plugin.calibration.other_values import Embedded, other_floats, other_ids

CHOSEN = torch.tensor([[False, True, True], [False, False, True]])


@pytest.mark.parametrize("x", [torch.randn(2, 3, 8) * 5, torch.zeros(2, 3, 8), torch.randn(2, 3, 8).bfloat16()])
def test_floats_at_chosen_rows_are_others_every_time_the_same(x):
    before = x.clone()
    changed = other_floats(x, CHOSEN)
    assert torch.equal(x, before) and torch.equal(changed[~CHOSEN], x[~CHOSEN])
    assert bool((changed[CHOSEN] != x[CHOSEN]).any(-1).all()) and torch.equal(changed, other_floats(x, CHOSEN))
    assert changed.dtype == x.dtype and changed.isfinite().all()


def test_ids_at_chosen_positions_are_others_that_are_known():
    ids = torch.tensor([[5, 9, 9], [7, 5, 0]])
    known = torch.tensor([5, 7, 9])
    changed = other_ids(ids, CHOSEN, known)
    assert changed.tolist() == [[5, 5, 5], [7, 5, 5]]
    assert other_ids(torch.tensor([[-100]]), torch.tensor([[True]]), known).tolist() == [[5]]
    assert torch.equal(other_ids(ids, CHOSEN, known[:0]), ids)


def test_only_the_embeddings_of_the_given_ids_change():
    ids, out, embedded = torch.tensor([[5, 9, 9], [7, 5, 0]]), torch.randn(2, 3, 8), Embedded()
    embedded.add(ids, CHOSEN)
    changed = embedded.changed(ids.clone(), out)
    assert torch.equal((changed != out).any(-1), CHOSEN)
    assert embedded.changed(ids + 1, out) is out  # positions, types of tokens
    flat = embedded.changed(ids.flatten(), out.reshape(6, 8))
    assert torch.equal((flat != out.reshape(6, 8)).any(-1), CHOSEN.flatten())
