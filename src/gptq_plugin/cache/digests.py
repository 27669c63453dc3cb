"""Digests of tensors, where they are: `tensor_digest`."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

_CHUNK = 2**22  # words whose multipliers are made at a time
_SEEDS = (0x5DEECE66D, 0x2545F4914F6CDD1D, 0x1B873593CC9E2D51)


def tensor_digest(tensor: Tensor) -> str:
    """A digest of a dense tensor's dtype, shape and values.

    A CPU's is a SHA-256. On a GPU, whose values would take longer to the host than to be read there, it is three sums
    of the words, each times a number of its place (multilinear hashing modulo 2^64): values that were not made for it
    share one with a probability of 2^-96 at most.
    """
    tensor = tensor.detach()
    words = _words(tensor)
    hashed = hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)} ".encode())
    hashed.update(repr(sums(words).tolist()).encode() if tensor.is_cuda else words.numpy().data)
    return hashed.hexdigest()


def sums(words: Tensor) -> Tensor:
    """Sums of integers of at most 32 bits, [n], each times a number of its place, int64 [3]."""
    total = torch.zeros(len(_SEEDS), dtype=torch.int64, device=words.device)
    for start in range(0, len(words), _CHUNK):
        part = words[start : start + _CHUNK].long()
        places = torch.arange(start, start + len(part), device=words.device)
        for number, seed in enumerate(_SEEDS):
            total[number] += (part * _mixed(places + seed)).sum()
    return total


def _mixed(places: Tensor) -> Tensor:
    """Numbers without a pattern, one for each place: the mixing of splitmix64, with signed shifts."""
    mixed = (places ^ (places >> 30)) * -0x40A7B892E31B1A47
    mixed = (mixed ^ (mixed >> 27)) * -0x6B2FB644ECCEEE15
    return mixed ^ (mixed >> 31)


def _words(tensor: Tensor) -> Tensor:
    values = tensor.resolve_conj().resolve_neg().contiguous().reshape(-1)
    if values.is_complex():
        values = torch.view_as_real(values).reshape(-1)
    return values.view({1: torch.uint8, 2: torch.int16}.get(values.element_size(), torch.int32))
