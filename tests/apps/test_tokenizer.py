"""The tokenizer trained on the text itself."""

from __future__ import annotations

import pytest

from gptq_plugin.apps.tokenizer import train_tokenizer

from texts import PROSE


def test_any_text_round_trips_through_the_trained_tokenizer(tokenizer):
    for text in [*PROSE, "\x00 never seen: 漢字 \r\n"]:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text
    assert len(tokenizer) <= 300
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<s>", "</s>", "<pad>")


def test_a_vocabulary_without_room_for_the_bytes_is_refused():
    with pytest.raises(ValueError, match="no room for 256 bytes and 3 special tokens"):
        train_tokenizer(PROSE, 258)
