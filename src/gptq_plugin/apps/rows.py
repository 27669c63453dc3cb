"""Cuts documents into rows of equal length: tokenize, put BOS before each document, join, cut."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from gptq_plugin.errors import DataError


def cut_rows(
    texts: Iterable[str],
    tokenizer: Any,
    seq_len: int,
    *,
    bos: bool = True,
    limit: int | None = None,
    purpose: str = "text",
) -> Tensor:
    """Returns rows without padding: every position is a token of the text.

    Args:
        texts: The documents, in order. Empty ones are left out.
        tokenizer: A transformers tokenizer; its special tokens are not added.
        seq_len: Tokens a row. A last row that is not full is left out.
        bos: Put the tokenizer's BOS token, if it has one, before each document that does not begin with it.
        limit: Most rows to return; no more text is read than they need.
        purpose: Name of the text in error messages.

    Returns:
        int64 [rows, seq_len].

    Raises:
        DataError: The text does not fill one row.
    """
    if seq_len < 2:
        raise DataError(f"seq_len must be at least 2 tokens, got {seq_len}")
    if limit is not None and limit < 1:
        raise DataError(f"at least one row of {purpose} is needed, got a limit of {limit}")
    start = [tokenizer.bos_token_id] if bos and tokenizer.bos_token_id is not None else []
    tokens: list[Tensor] = []
    count = 0
    for document in _tokenized(texts, tokenizer):
        begun = document[:1] == start  # chat templates write it
        tokens.append(torch.tensor(document if begun else start + document, dtype=torch.int32, device="cpu"))
        count += len(tokens[-1])
        if limit is not None and count >= limit * seq_len:
            break
    rows = count // seq_len
    if rows == 0:
        raise DataError(
            f"the {purpose} is too short: {count} tokens do not fill one row of {seq_len}. Give more text or "
            "a smaller data.seq_len"
        )
    rows = rows if limit is None else min(rows, limit)
    return torch.cat(tokens)[: rows * seq_len].view(rows, seq_len).long()


def _tokenized(texts: Iterable[str], tokenizer: Any, batch_size: int = 64) -> Iterator[list[int]]:
    """Yields the token ids of every document that is not empty; tokenizes batches of documents."""
    iterator = iter(texts)
    while batch := list(islice(iterator, batch_size)):
        filled = [text for text in batch if text]
        if filled:
            # verbose=False: the documents are longer than the model's context by design.
            yield from tokenizer(filled, add_special_tokens=False, verbose=False)["input_ids"]
