"""Digests of tensors, and the sums that stand for them on a GPU."""

from __future__ import annotations

import pytest
import torch

from gptq_plugin.cache.digests import sums, tensor_digest


def words(count=5000):
    return torch.randint(-(2**31), 2**31, (count,), generator=torch.Generator().manual_seed(0), dtype=torch.int32)


@pytest.mark.parametrize(
    "change",
    [
        lambda w: w.index_fill(0, torch.tensor([17]), 0),
        lambda w: w.roll(1),
        lambda w: torch.cat([w[1:2], w[:1], w[2:]]),
        lambda w: w ^ torch.zeros_like(w).index_fill(0, torch.tensor([3, 4]), -(2**31)),  # two signs
        lambda w: torch.cat([w[:1] + 1, w[1:2] - 1, w[2:]]),
    ],
)
def test_sums_differ_where_words_do(change):
    assert (sums(words()) != sums(change(words()))).all()


def test_sums_do_not_depend_on_the_chunks_they_are_made_in(monkeypatch):
    whole = sums(words())
    monkeypatch.setattr("gptq_plugin.cache.digests._CHUNK", 700)
    assert torch.equal(sums(words()), whole)


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.bool, torch.complex64]
)
def test_a_digest_tells_values_shapes_and_dtypes_apart(dtype):
    one = torch.arange(12).reshape(3, 4).to(dtype)
    again = one.T.contiguous().T  # other strides
    assert tensor_digest(one) == tensor_digest(again)
    others = [one.reshape(4, 3), one[:2], torch.zeros_like(one), one.real.to(torch.float16)]
    assert all(tensor_digest(other) != tensor_digest(one) for other in others)


def test_tensors_without_values_or_dimensions_have_digests():
    assert tensor_digest(torch.empty(0, 3)) != tensor_digest(torch.empty(0, 4))
    assert tensor_digest(torch.tensor(1.0)) != tensor_digest(torch.tensor(-1.0))


@pytest.mark.gpu
def test_digests_on_a_gpu_tell_values_apart():
    one = torch.randn(1000, 33, device="cuda", dtype=torch.bfloat16)
    other = one.clone()
    other[500, 7] = -other[500, 7]
    assert tensor_digest(one) == tensor_digest(one.clone()) != tensor_digest(other)
