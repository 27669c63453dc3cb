"""Documents → tokenizer → rows → data, on real files and data sets."""

from __future__ import annotations

import json

import pytest
import torch
from datasets import Dataset

from gptq_plugin.apps import data
from gptq_plugin.apps.documents import builtin_documents, file_documents, hub_documents, passages, texts
from gptq_plugin.apps.rows import cut_rows
from gptq_plugin.apps.tokenizer import train_tokenizer
from gptq_plugin.errors import DataError

PROSE = [
    "The quick brown fox jumps over the lazy dog. ",
    "Ένα — naïve\ttext,\n\nwith  odd   spaces 🙂.\n",
    "",
    "x",
]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(PROSE * 10, 300)


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


# --- documents ---


def test_the_builtin_text_is_english_prose_without_repeated_paragraphs():
    documents = list(texts(builtin_documents()))
    paragraphs = [" ".join(p.split()) for document in documents for p in document.split("\n\n") if p.strip()]
    assert sum(map(len, documents)) > 250_000
    assert len(paragraphs) == len(set(paragraphs))
    assert sum(paragraph.count(" the ") for paragraph in paragraphs) > 2000
    assert not any(line.startswith(("+--", "|  ")) for document in documents for line in document.splitlines())


def test_a_text_file_is_one_document_with_all_its_characters(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\ntwo\n", encoding="utf-8")
    assert list(texts(file_documents(str(tmp_path / "a.txt")))) == ["one\n\ntwo\n"]


def test_files_come_in_the_order_given_and_a_patterns_in_the_order_of_names(tmp_path):
    for name in ("b.txt", "a.txt", "c.md"):
        (tmp_path / name).write_text(name)
    write_jsonl(tmp_path / "d.jsonl", [{"text": "d1"}, {"text": None}, {"text": "d2"}])
    listed = file_documents([str(tmp_path / "d.jsonl"), str(tmp_path / "*.txt")])
    assert list(texts(listed)) == ["d1", "", "d2", "a.txt", "b.txt"]
    assert list(texts(file_documents(str(tmp_path)))) == ["a.txt", "b.txt", "c.md", "d1", "", "d2"]


def test_json_lines_csv_and_parquet_are_read_by_column(tmp_path):
    rows = [{"id": 1, "body": "first"}, {"id": 2, "body": "second"}]
    write_jsonl(tmp_path / "x.jsonl", rows)
    Dataset.from_list(rows).to_csv(tmp_path / "x.csv")
    Dataset.from_list(rows).to_parquet(tmp_path / "x.parquet")
    for name in ("x.jsonl", "x.csv", "x.parquet"):
        assert list(texts(file_documents(str(tmp_path / name), column="body"))) == ["first", "second"]
    with pytest.raises(DataError, match=r"x\.jsonl has no column 'text': it has id, body"):
        file_documents(str(tmp_path / "x.jsonl"))


def test_a_local_folder_is_read_as_a_data_set_with_its_splits(tmp_path):
    splits = {"train": ["a", "b"], "validation": ["c"]}
    for split, rows in splits.items():
        Dataset.from_dict({"text": rows}).to_parquet(tmp_path / f"{split}-00000-of-00001.parquet")
    assert list(texts(hub_documents(str(tmp_path)))) == ["a", "b"]
    assert list(texts(hub_documents(str(tmp_path), split="train[1:]"))) == ["b"]
    assert list(texts(hub_documents(str(tmp_path), split="validation"))) == ["c"]
    with pytest.raises(DataError, match="could not read .* test: .*test"):
        hub_documents(str(tmp_path), split="test")


def test_passages_are_pieces_of_one_length_in_an_order_of_the_seed():
    documents = Dataset.from_dict({"text": ["a" * 25, None, "b" * 9, "", *[str(n) * 10 for n in range(8)]]})
    pieces = list(passages(documents, characters=10, seed=3))
    assert sorted(pieces) == sorted(["a" * 10, "a" * 10, "b" * 9, *[str(n) * 10 for n in range(8)]])
    assert pieces == list(passages(documents, characters=10, seed=3)) != list(passages(documents, characters=10))
    with pytest.raises(DataError, match="characters must be at least 1"):
        list(passages(documents, characters=0))


def test_a_missing_file_pattern_or_data_set_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no such file or folder: .*nowhere\.txt"):
        file_documents(str(tmp_path / "nowhere.txt"))
    with pytest.raises(FileNotFoundError, match=r"no file matches the pattern .*\*\.jsonl"):
        file_documents(str(tmp_path / "*.jsonl"))
    with pytest.raises(DataError, match=r"could not read nobody/nothing-of-this-name.*data=text"):
        hub_documents("nobody/nothing-of-this-name")


def test_empty_text_is_refused_and_named(tmp_path):
    (tmp_path / "empty.txt").touch()
    (tmp_path / "blank.txt").write_text("  \n\n ")
    write_jsonl(tmp_path / "none.jsonl", [{"text": ""}, {"text": None}])
    (tmp_path / "folder").mkdir()
    for name, message in {
        "empty.txt": r"empty\.txt is empty",
        "blank.txt": r"no text in .*blank\.txt",
        "none.jsonl": r"no text in .*none\.jsonl: 2 documents, all empty",
        "folder": "holds no files",
    }.items():
        with pytest.raises(DataError, match=message):
            file_documents(str(tmp_path / name))
    with pytest.raises(DataError, match=r"data\.path"):
        data.text(path=None)
    with pytest.raises(DataError, match=r"data\.path"):
        file_documents([])


# --- tokenizer ---


def test_any_text_round_trips_through_the_trained_tokenizer(tokenizer):
    for text in [*PROSE, "\x00 never seen: 漢字 \r\n"]:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text
    assert len(tokenizer) <= 300
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<s>", "</s>", "<pad>")


def test_a_vocabulary_without_room_for_the_bytes_is_refused():
    with pytest.raises(ValueError, match="no room for 256 bytes and 3 special tokens"):
        train_tokenizer(PROSE, 258)


# --- rows ---


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


# --- data ---


def documents(count):
    return Dataset.from_dict({"text": [f"Document {i}, {i * i}: {i % 7} {PROSE[0]}" for i in range(count)]})


def test_the_end_of_the_text_is_held_out_when_there_is_no_other(tokenizer):
    whole = cut_rows(texts(documents(40)), tokenizer, 32)
    loaded = data.TextData(documents(40), seq_len=32, eval_fraction=0.25).encode(tokenizer)
    assert len(loaded.validation) == round(len(whole) / 4)
    assert torch.equal(torch.cat([loaded.train, loaded.validation]), whole)


def test_validation_text_of_its_own_leaves_all_rows_to_training(tokenizer):
    loaded = data.TextData(documents(40), documents(9), seq_len=32, eval_rows=2, train_rows=5).encode(tokenizer)
    assert torch.equal(loaded.train, cut_rows(texts(documents(40)), tokenizer, 32)[:5])
    assert torch.equal(loaded.validation, cut_rows(texts(documents(9)), tokenizer, 32)[:2])


def test_calibration_rows_keep_the_texts_order_or_are_drawn_by_the_seed(tokenizer):
    def rows(**options):
        loaded = data.TextData(documents(60), documents(9), seq_len=32, **options).encode(tokenizer)
        return torch.stack(loaded.calibration(8)), loaded.train

    in_order, train = rows(shuffle=False)
    assert torch.equal(in_order, train[:8])
    first, _ = rows(seed=1)
    again, _ = rows(seed=1)
    other, _ = rows(seed=2)
    assert torch.equal(first, again) and not torch.equal(first, other) and not torch.equal(first, in_order)
    assert len({tuple(row.tolist()) for row in first}) == 8


def test_every_training_row_comes_once_an_epoch_in_an_order_of_the_seed(tokenizer):
    def epoch(**options):
        loaded = data.TextData(documents(60), documents(9), seq_len=32, batch_size=5, **options).encode(tokenizer)
        batches = [batch["input_ids"] for batch in loaded.train_dataloader()]
        assert all(batch.shape == (5, 32) for batch in batches[:-1])
        return torch.cat(batches), loaded.train

    shuffled, train = epoch(seed=3)
    assert not torch.equal(shuffled, train)
    assert sorted(map(tuple, shuffled.tolist())) == sorted(map(tuple, train.tolist()))
    assert torch.equal(shuffled, epoch(seed=3)[0])
    assert torch.equal(*epoch(shuffle=False))


def test_text_that_leaves_nothing_to_hold_out_is_refused(tokenizer):
    tokens = cut_rows(texts(documents(2)), tokenizer, 2).numel()
    with pytest.raises(DataError, match=rf"too short to hold out .* fills 1 row of {tokens - 2} tokens"):
        data.TextData(documents(2), seq_len=tokens - 2).encode(tokenizer)
    with pytest.raises(DataError, match="eval_fraction must lie between 0 and 1"):
        data.TextData(documents(2), eval_fraction=1.0)


def test_pycodes_windows_are_those_of_the_measured_figures(shared):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(shared / "models" / "pycode-29m")
    loaded = data.text(
        str(shared / "data/pycode/calib.jsonl"),
        str(shared / "data/pycode/eval.jsonl"),
        eval_rows=200,
        shuffle=False,
    ).encode(tokenizer)
    assert loaded.validation.shape == (200, 512)
    lines = (shared / "data/pycode/calib.jsonl").read_text().splitlines()
    stream = []
    for line in lines[:40]:
        stream += [
            tokenizer.bos_token_id,
            *tokenizer(json.loads(line)["text"], add_special_tokens=False)["input_ids"],
        ]
    assert torch.stack(loaded.calibration(128)).flatten().tolist() == stream[: 128 * 512]
