"""Files that a stranger wrote, read up to a size and a number of values: `read_text`, `parse_json`.

A sparse file of 64 GB costs its author nothing, and a value of JSON takes up to fifty times its text in memory.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

LARGEST = 128 << 20  # bytes; the index of a model of 100,000 experts has half of them
_DEEPEST = 32  # values in each other; configurations have up to ten
_MOST_VALUES = 2**20  # ten rules, or three tensors, for each layer of the largest models
_OF_TOKENIZERS = (
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "config.json",
    "merges.txt",
    "preprocessor_config.json",
    "processor_config.json",
    "sentencepiece.bpe.model",
    "special_tokens_map.json",
    "spiece.model",
    "tekken.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
)


SPARSE = "is a sparse file, of which less than half was ever written, as where a download did not end: copy it again"
"""What to tell about a file that `is_mostly_holes`."""


def read_text(file: Path) -> str:
    """A file's text, UTF-8.

    Raises:
        OSError: It cannot be read.
        ValueError: It is too large, or no text.
    """
    with file.open("rb") as opened:
        size = os.fstat(opened.fileno()).st_size
        _refuse_large(file, size)
        return opened.read(size).decode("utf-8")


def parse_json(text: str, pairs: Callable[[list[tuple[str, Any]]], Any] | None = None) -> Any:
    """The value that a text of JSON describes.

    Args:
        text: What `read_text` returned.
        pairs: Makes objects, as ``object_pairs_hook``.

    Raises:
        ValueError: It is no JSON, or describes too many values, or some too deep in each other: libraries that read
            them take time for every value and every level.
        RecursionError: They are too deep for Python.
    """
    values = sum(map(text.count, ",[{"))
    if values > _MOST_VALUES:
        raise ValueError(f"it holds up to {values:,} values, and at most {_MOST_VALUES:,} are read")
    value = json.loads(text, object_pairs_hook=pairs)
    level = [value]
    for _ in range(_DEEPEST):
        level = [inner for one in level for inner in _inside(one)]
    if level:
        raise ValueError(f"its values are more than {_DEEPEST} deep in each other")
    return value


def _inside(value: Any) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def check_sizes(folder: str | os.PathLike[str]) -> None:
    """Checks the files of a tokenizer or processor, which other libraries read whole. No folder has none.

    Raises:
        ValueError: One is too large.
    """
    for file in (Path(folder, name) for name in _OF_TOKENIZERS):
        if os.path.isfile(file):
            _refuse_large(file, file.stat().st_size)


def written_parts(file: int) -> Iterator[tuple[int, int]]:
    """Yields where an open file's parts between holes begin and end; a file system without holes has one."""
    end, size = 0, os.fstat(file).st_size
    if not hasattr(os, "SEEK_DATA"):  # Windows
        yield 0, size
        return
    while end < size:
        try:
            start = os.lseek(file, end, os.SEEK_DATA)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            return  # a hole up to the end
        end = os.lseek(file, start, os.SEEK_HOLE)
        yield start, end


def is_mostly_holes(file: Path) -> bool:
    """True for a large file of which less than half was ever written, as where a download did not end.

    Raises:
        OSError: It cannot be read.
    """
    with file.open("rb") as opened:
        size = os.fstat(opened.fileno()).st_size
        if size <= LARGEST:
            return False
        written = 0
        for start, end in written_parts(opened.fileno()):
            written += end - start
            if 2 * written >= size:
                return False
    return True


def _refuse_large(file: Path, size: int) -> None:
    if size > LARGEST:
        raise ValueError(
            f"{file} has {size:,} bytes, and at most {LARGEST:,} of such a file are read: fetch it again, or remove it"
        )
