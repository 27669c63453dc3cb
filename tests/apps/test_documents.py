"""Documents from the built-in text, files and data sets."""

from __future__ import annotations

import json

import pytest
from datasets import Dataset

from gptq_plugin.apps import data
from gptq_plugin.apps.documents import builtin_documents, file_documents, hub_documents, passages, texts
from gptq_plugin.errors import DataError

from texts import CHATS, chat_words


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


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


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.txt", "na\xefve caf\xe9".encode("latin1"), "0xef in position 2: .* Convert it to UTF-8: iconv"),
        ("a.csv", "text\ncaf\xe9\n".encode("latin1"), "0xe9 .* Convert it to UTF-8: iconv"),
        ("a.jsonl", '{"text": "caf\xe9"}\n'.encode("latin1"), "0xe9 .* Convert it to UTF-8: iconv"),
        ("a.jsonl", b'{"text": "a"}\n{"text": b}\n', "JSON parse error: Invalid value. in row 1"),
        ("a.csv", b'text,a\n"x', "EOF inside string starting at row 1"),
        ("a.parquet", b"PAR1xx", "file size is 6 bytes"),
    ],
)
def test_a_file_that_cannot_be_read_is_named_with_the_reason(name, content, reason, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=rf"{name} cannot be read: .*{reason}"):
        file_documents(str(tmp_path / name))


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


def chat_rows(count=6):
    return [{"id": n, "messages": CHATS[n % 2]} for n in range(count)]


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "a local data set"])
def test_chats_become_text_through_the_tokenizers_template(kind, tmp_path):
    words, rows = chat_words(), chat_rows()
    if kind == "jsonl":
        documents = file_documents(write_jsonl(tmp_path / "x.jsonl", rows), column="messages")
    else:
        Dataset.from_list(rows).to_parquet(tmp_path / "train-00000-of-00001.parquet")
        path = tmp_path / "train-00000-of-00001.parquet" if kind == "parquet" else tmp_path
        documents = (file_documents if kind == "parquet" else hub_documents)(str(path), column="messages")
    expected = [words.apply_chat_template(row["messages"], tokenize=False) for row in rows]
    assert list(texts(documents, words)) == expected
    assert documents.column_names == ["text"]


def test_the_tools_beside_chats_are_told_to_the_template(tmp_path):
    tools = [{"type": "function", "function": {"name": "add"}}]
    file = write_jsonl(tmp_path / "x.jsonl", [{**row, "tools": tools} for row in chat_rows(2)])
    words = chat_words()
    expected = [words.apply_chat_template(chat, tools=tools, tokenize=False) for chat in CHATS]
    assert list(texts(file_documents(file, column="messages"), words)) == expected
    assert "add" in expected[0]


def test_chats_without_a_template_are_refused_with_the_remedy(tokenizer, tmp_path):
    documents = file_documents(write_jsonl(tmp_path / "x.jsonl", chat_rows()), column="messages")
    with pytest.raises(
        DataError, match=r"holds chats, and no tokenizer .* take a model that was tuned for chat \(model=hf"
    ):
        list(texts(documents))
    with pytest.raises(DataError, match=r"the tokenizer has no chat template: .* set tokenizer\.chat_template"):
        list(texts(documents, tokenizer))
    write_jsonl(tmp_path / "x.jsonl", [{"messages": [{"role": "critic", "content": "?"}]}])
    with pytest.raises(DataError, match="refuses a chat of critic: no such role"):
        list(texts(file_documents(str(tmp_path / "x.jsonl"), column="messages"), chat_words()))


def test_the_column_of_chats_is_named_and_other_columns_are_refused(tmp_path):
    file = write_jsonl(tmp_path / "x.jsonl", chat_rows())
    with pytest.raises(DataError, match=r"has no column 'text': it has id, messages\. Set data\.column=messages"):
        file_documents(file)
    with pytest.raises(DataError, match=r"holds 1, which is neither a text nor a list of chat messages"):
        list(texts(file_documents(file, column="id").skip(1)))
    write_jsonl(tmp_path / "y.jsonl", [{"messages": "a text"}])
    with pytest.raises(DataError, match="do not hold the same kind of 'messages'"):
        file_documents([file, str(tmp_path / "y.jsonl")], column="messages")
    write_jsonl(tmp_path / "z.jsonl", [{"messages": None}, {"messages": []}])
    with pytest.raises(DataError, match="there is no text in"):
        file_documents(str(tmp_path / "z.jsonl"), column="messages")
