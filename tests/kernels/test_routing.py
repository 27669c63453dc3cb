"""Pairs of tokens and experts that are sorted, and rows that are added up again, against PyTorch's operations."""

from __future__ import annotations

import pytest
import torch

from kernel_cases import INTERPRETED, triton_device

DTYPES = [torch.float16, torch.float32] if INTERPRETED else [torch.float16, torch.bfloat16, torch.float32]


def chosen_of(tokens, each, experts, device, beyond=False):
    generator = torch.Generator().manual_seed(tokens)
    chosen = torch.stack([torch.randperm(experts, generator=generator)[:each] for _ in range(tokens)])
    if beyond:
        chosen[::2, 0] = experts  # of no expert here
    return chosen.to(device)


@triton_device
@pytest.mark.parametrize("beyond", [False, True])
@pytest.mark.parametrize("tokens, each, experts", [(1, 8, 128), (4, 2, 8), (16, 8, 128), (32, 8, 60), (3, 1, 2)])
@pytest.mark.parametrize("how", ["sort_pairs", "sort_many"])
def test_pairs_are_sorted_by_expert_in_their_order(how, tokens, each, experts, beyond, device):
    from gptq_plugin.kernels.product import routing

    chosen = chosen_of(tokens, each, experts, device, beyond)
    found = getattr(routing, how)(chosen, experts)
    order = chosen.flatten().sort(stable=True).indices
    counts = torch.bincount(chosen.flatten(), minlength=experts + 1)[:experts]
    assert torch.equal(found.ends, counts.cumsum(0).int())
    assert torch.equal(found.tokens.long(), order // each)
    assert torch.equal(order[found.places.long()], torch.arange(tokens * each, device=device))
    assert found.ends.dtype == torch.int32 and found.ends.is_contiguous()


@triton_device
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("in_float", [False, True])
@pytest.mark.parametrize("width", [96, 700])
def test_rows_are_added_up_by_weights(dtype, in_float, width, device):
    from gptq_plugin.kernels.product.routing import combine, sort_pairs

    chosen = chosen_of(5, 4, 12, device)
    y = torch.randn(20, width).to(device, dtype)
    weights = torch.rand(5, 4).to(device, torch.float32 if in_float else dtype)
    found = combine(y, sort_pairs(chosen, 12).places, weights)
    order = chosen.flatten().sort(stable=True).indices
    sorted_weights = weights.flatten()[order]
    back = torch.empty_like(y, dtype=(y * sorted_weights[:, None]).dtype)
    back[order] = y * sorted_weights[:, None]
    wanted = back.view(5, 4, width).sum(1).to(dtype)
    assert found.dtype == dtype
    torch.testing.assert_close(found, wanted, rtol=1e-5 if dtype == torch.float32 else 1e-2, atol=1e-5)


@triton_device
def test_what_they_cannot_take_is_refused(device):
    from gptq_plugin.kernels.product.routing import MOST_PAIRS, combine, sort_pairs

    with pytest.raises(ValueError, match=f"at most {MOST_PAIRS}"):
        sort_pairs(torch.zeros(MOST_PAIRS, 2, dtype=torch.long, device=device), 4)
    y, places = torch.zeros(4, 8, device=device), torch.zeros(4, dtype=torch.int32, device=device)
    with pytest.raises(ValueError, match="contiguous"):
        combine(y.T.contiguous().T, places, torch.ones(2, 2, device=device))
    with pytest.raises(ValueError, match="of all pairs"):
        combine(y, places, torch.ones(3, 2, device=device))
