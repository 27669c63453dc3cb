"""Which positions a mask keeps, whatever its dtype, shape and sense."""

from __future__ import annotations

import pytest
import torch

from gptq_plugin.calibration.mask_values import kept_positions

T = 6
KEPT = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0], [0, 0, 1, 1, 1, 1]]).bool()  # none, right, left
CAUSAL = torch.ones(T, T).tril().bool()
ITSELF = torch.eye(T).bool()
KEYS = KEPT[:, None, None].expand(3, 1, T, T)
BOTH = CAUSAL & KEYS
LOWEST = torch.finfo(torch.float32).min
TO_THREE = CAUSAL | (torch.arange(T) < 3)  # a prefix of three, each of which attends to all three
DOCUMENTS = torch.tensor([0, 0, 0, 1, 1, 2])


def added(allowed, hidden=LOWEST, dtype=torch.float32):
    return torch.where(allowed, 0.0, hidden).to(dtype)


@pytest.mark.parametrize(
    "mask",
    [
        KEPT,
        KEPT.long(),
        KEPT.long() * torch.tensor([1, 2, 3])[:, None],  # numbers of documents
        KEPT.half(),
        added(KEPT, -1e9),
        added(KEPT, -torch.inf, torch.float16),
        added(KEPT, -100.0),  # two values
        KEPT[:, None],
        KEPT[:, None, None],
        KEPT[..., None],
        KEYS,
        BOTH,
        BOTH[:, 0],
        BOTH.expand(3, 4, T, T),
        BOTH.expand(3, 4, T, T).reshape(12, T, T),
        added(BOTH),
        added(BOTH, -1e4, torch.bfloat16),
        added(BOTH, -torch.inf),
        added(BOTH) - (torch.arange(T)[:, None] - torch.arange(T)).abs() * 0.5,  # with biases by distance
        BOTH | ~BOTH.any(-1, keepdim=True),  # padding attends to everything
        BOTH | ITSELF,  # padding attends to itself
        KEYS | ITSELF,
        BOTH & ~CAUSAL.tril(-3),  # a window of three
        TO_THREE & KEYS,
    ],
)
def test_every_form_of_a_mask_keeps_the_same_positions(mask):
    assert torch.equal(kept_positions(mask, False, 3), KEPT)
    if not mask.is_floating_point():
        assert torch.equal(kept_positions(mask == 0, True, 3), KEPT)


@pytest.mark.parametrize(
    "pairs",
    [
        CAUSAL,
        added(CAUSAL, -torch.inf),
        CAUSAL[None],
        CAUSAL.expand(3, 1, T, T),
        TO_THREE.expand(3, 1, T, T),
        (DOCUMENTS[:, None] == DOCUMENTS).expand(3, 1, T, T),
        ((DOCUMENTS[:, None] == DOCUMENTS) & CAUSAL).expand(3, 1, T, T),
        torch.zeros(3, 1, 1, T),
        torch.ones(3, 1, T, T),
    ],
)
def test_a_mask_of_pairs_without_padding_keeps_all(pairs):
    kept = kept_positions(pairs, False, 3)
    assert kept.shape == (3, T) and kept.all()


def test_keys_of_another_sequence_are_kept_where_a_query_attends_to_them():
    assert torch.equal(kept_positions(KEPT[:, None, None].expand(3, 2, 4, T), False, 3), KEPT)


@pytest.mark.parametrize("values", [torch.randn(3, T), torch.full((3, T), 0.5), torch.ones(3), torch.ones(3, 4, 5)])
def test_what_is_no_mask_of_positions_tells_nothing(values):
    assert kept_positions(values, False, 2 if values.dim() == 3 else 3) is None


def test_a_single_position_is_kept():
    assert kept_positions(torch.ones(2, 1, 1, 1), False, 2).tolist() == [[True], [True]]
