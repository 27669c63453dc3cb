"""What a stranger's files may cost: a size, a number of values, and holes that take no time."""

from __future__ import annotations

import json
import os
import time
import tracemalloc
from pathlib import Path

import pytest

from gptq_plugin.calibration.tokenizer import as_tokenizer
from gptq_plugin.options.limited_files import (
    LARGEST,
    check_sizes,
    is_mostly_holes,
    parse_json,
    read_text,
    written_parts,
)

HOLE = 64 << 30


def sparse(file: Path, size: int = HOLE, begins: bytes = b"{}", ends: bytes = b"") -> Path:
    with file.open("wb") as opened:
        opened.write(begins)
        opened.truncate(size)
        opened.seek(size)
        opened.write(ends)
    return file


def test_a_file_is_text_up_to_a_size_and_a_sparse_one_takes_no_memory(tmp_path: Path) -> None:
    (tmp_path / "small").write_text("é\n", encoding="utf-8")
    assert read_text(tmp_path / "small") == "é\n"
    tracemalloc.start()
    with pytest.raises(ValueError, match=rf"large has {HOLE:,} bytes, and at most {LARGEST:,}"):
        read_text(sparse(tmp_path / "large"))
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()
    with pytest.raises(ValueError, match="utf-8"):
        read_text(sparse(tmp_path / "binary", 10, b"\xff"))


def test_the_size_is_that_of_the_file_that_is_read_not_of_one_put_in_its_place(tmp_path: Path, monkeypatch) -> None:
    file = tmp_path / "x"
    file.write_text("{}")
    real = os.fstat

    def exchanged(opened: int) -> os.stat_result:
        os.replace(sparse(tmp_path / "other"), file)
        return real(opened)

    monkeypatch.setattr(os, "fstat", exchanged)
    assert read_text(file) == "{}"


@pytest.mark.parametrize(
    "text", ["[" + "[]," * 600_000 + "0]", "[" + "0," * 1_100_000 + "0]", '{"a":' + "[" * 1_100_000]
)
def test_json_of_very_many_values_is_refused_before_it_is_parsed(text: str) -> None:
    start = time.process_time()
    with pytest.raises(ValueError, match=r"holds up to [\d,]+ values, and at most 1,048,576 are read"):
        parse_json(text)
    assert time.process_time() - start < 0.5
    assert parse_json("[" + "[]," * 1000 + "0]")[-1] == 0


def test_json_of_values_deep_in_each_other_is_refused_however_many_they_are() -> None:
    for one in ("[" * 32 + "]" * 32, '{"a":' * 31 + "[]" + "}" * 31, "3"):
        assert parse_json(one) == json.loads(one)
    for one in ("[" * 33 + "]" * 33, "[0," * 40 + "1" + "]" * 40, '{"a": 1, "b":' * 33 + "{}" + "}" * 33):
        with pytest.raises(ValueError, match="more than 32 deep in each other"):
            parse_json(one)


def test_a_tokenizers_files_are_looked_at_before_another_library_reads_them(tmp_path: Path) -> None:
    check_sizes(tmp_path)
    check_sizes("no/such-folder")
    sparse(tmp_path / "other.json")
    check_sizes(tmp_path)
    sparse(tmp_path / "tokenizer.json")
    with pytest.raises(ValueError, match=r"tokenizer\.json has 68,719,476,736 bytes"):
        as_tokenizer(tmp_path)


def test_the_parts_of_a_file_between_its_holes_are_found(tmp_path: Path) -> None:
    file = sparse(tmp_path / "x", 1 << 30, b"a" * 5, b"z" * 5)
    with file.open("rb") as opened:
        parts = list(written_parts(opened.fileno()))
    assert parts[0][0] == 0 and parts[-1][1] == (1 << 30) + 5
    assert sum(end - start for start, end in parts) < 1 << 20
    for content in (b"", b"x" * 10_000):
        (tmp_path / "full").write_bytes(content)
        with (tmp_path / "full").open("rb") as opened:
            assert sum(end - start for start, end in written_parts(opened.fileno())) == len(content)


def test_a_large_file_of_which_less_than_half_was_written_is_known(tmp_path: Path) -> None:
    assert is_mostly_holes(sparse(tmp_path / "x"))
    assert not is_mostly_holes(sparse(tmp_path / "small", 1 << 20))
    assert not is_mostly_holes(sparse(tmp_path / "full", LARGEST + 10, bytes(70 << 20)))
