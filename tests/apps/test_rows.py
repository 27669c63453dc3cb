"""Rows of one length, cut from documents."""

from __future__ import annotations

import pytest
import torch

from gptq_plugin.apps.rows import cut_rows
from gptq_plugin.errors import DataError

from texts import PROSE


def test_rows_are_the_documents_joined_with_bos_before_each_and_cut(tokenizer):
    stream = []
    for text in PROSE:
        if text:
            stream += [tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]]
    for seq_len in (2, 7, len(stream)):
        rows = cut_rows(PROSE, tokenizer, seq_len)
        assert rows.dtype == torch.int64
        assert rows.shape == (len(stream) // seq_len, seq_len)
        assert rows.flatten().tolist() == stream[: rows.numel()]


def test_bos_is_not_put_before_a_document_that_begins_with_it(tokenizer):
    begun = [tokenizer.bos_token + text for text in PROSE if text]
    assert torch.equal(cut_rows(begun, tokenizer, 5), cut_rows(PROSE, tokenizer, 5))
    assert torch.equal(cut_rows(begun, tokenizer, 5, bos=False), cut_rows(PROSE, tokenizer, 5))


def test_bos_can_be_left_out_and_a_tokenizers_own_special_tokens_are_not_added(tokenizer):
    rows = cut_rows(PROSE, tokenizer, 5, bos=False)
    assert not (rows == tokenizer.bos_token_id).any()
    assert tokenizer.decode(rows.flatten()) == "".join(PROSE)[: len(tokenizer.decode(rows.flatten()))]


def test_a_limit_reads_no_more_text_than_it_needs(tokenizer):
    read = []

    def endless():
        while True:
            read.append(1)
            yield PROSE[0]

    assert cut_rows(endless(), tokenizer, 16, limit=3).shape == (3, 16)
    assert len(read) < 200
    assert torch.equal(cut_rows(PROSE * 9, tokenizer, 16, limit=3), cut_rows(PROSE * 9, tokenizer, 16)[:3])


def test_text_too_short_for_a_row_is_refused_with_its_length(tokenizer):
    with pytest.raises(DataError, match=r"the validation text is too short: \d+ tokens do not fill one row of 4096"):
        cut_rows(PROSE, tokenizer, 4096, purpose="validation text")
    with pytest.raises(DataError, match="seq_len must be at least 2"):
        cut_rows(PROSE, tokenizer, 1)
    with pytest.raises(DataError, match="limit of 0"):
        cut_rows(PROSE, tokenizer, 8, limit=0)
