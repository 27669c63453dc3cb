"""Text from Python's manual, from files, or from the `datasets` library.

Each function returns a `datasets.Dataset` with a column ``text``: one document a row, in the order of the source. It is
a text or a chat (see `calibration.text_rows.is_chat`); beside chats there is a column ``tools`` if the source has one.
Text from files is memory-mapped from the cache of `datasets`.
"""

from __future__ import annotations

import glob
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset, Value, concatenate_datasets, load_dataset
from datasets.exceptions import DatasetGenerationError

from gptq_plugin.apps.paths import folder_or_id, typed
from gptq_plugin.calibration.text_rows import is_chat, render_chat
from gptq_plugin.errors import CalibrationError, DataError, brief
from gptq_plugin.options import fields

TEXT = "text"
_CHAT = "messages"
_TOOLS = "tools"
# Readers of `datasets` by suffix; any other file is plain text, one document a file.
_PATHS = fields.Kind(
    "a path, a pattern, or a list of these",
    lambda value: fields.PATH.accepts(value) or (fields.is_list(value) and all(map(fields.PATH.accepts, value))),
)
_BUILDERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}


def builtin_documents() -> Dataset:
    """Python's reference manual as `help()` shows it: some 325,000 characters of English prose.

    The manual repeats paragraphs under several topics, which would leak held-out text into training: each is kept
    once. Tables are left out.
    """
    from pydoc_data.topics import topics

    seen: set[str] = set()
    documents = []
    for topic in topics.values():
        paragraphs = []
        for paragraph in topic.split("\n\n"):
            words = " ".join(paragraph.split())
            if words and words not in seen and not _is_table(paragraph):
                paragraphs.append(paragraph.strip("\n"))
            seen.add(words)
        documents.append("\n\n".join(paragraphs))
    return _refuse_empty(Dataset.from_dict({TEXT: documents}), "pydoc_data.topics")


def file_documents(path: str | Sequence[str], column: str = TEXT) -> Dataset:
    """Documents of text, JSON lines, CSV or Parquet files.

    Args:
        path: A file, a folder (all files directly in it), a glob pattern, or a list of these. Files come in the
            order given, those of a pattern or folder sorted by name.
        column: The field that holds the text, or chat messages, in files that have fields.

    Raises:
        FileNotFoundError: A path does not exist, or a pattern matches nothing.
        ValueError: `path` is no path, nor a list of these.
        DataError: The files hold no text, or no such column, or some text and some chats, or cannot be read.
    """
    _PATHS.check("data.path", path)
    paths = [path] if isinstance(path, (str, Path)) else list(path)
    if not paths:
        raise DataError("no files are given: set data.path to a file, a folder, a pattern, or a list of these")
    _check_cache()
    parts = []
    for file in (file for each in paths for file in _expand(each)):
        if file.stat().st_size == 0:
            raise DataError(f"{file} is empty")
        builder = _BUILDERS.get(file.suffix, TEXT)
        parts.append(_keep_column(_read(file, builder), column if builder != TEXT else TEXT, str(file)))
    source = ", ".join(map(str, paths))
    try:
        return _refuse_empty(concatenate_datasets(parts), source)
    except UnicodeDecodeError as error:
        raise DataError(_unreadable(source, error)) from error
    except ValueError as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"the files of {source} do not hold the same kind of {column!r}: {brief(error)}") from error


def _read(file: Path, builder: str) -> Dataset:
    whole = {"sample_by": "document"} if builder == TEXT else {}
    try:
        return load_dataset(builder, data_files=str(file), split="train", **whole)
    except (DatasetGenerationError, ValueError) as error:
        raise DataError(_unreadable(str(file), error.__cause__ or error)) from error


def _unreadable(source: str, error: BaseException) -> str:
    remedy = ". Convert it to UTF-8: iconv -f latin1 -t utf-8" if isinstance(error, UnicodeDecodeError) else ""
    return f"{source} cannot be read: {brief(error)}{remedy}"


def hub_documents(path: str, name: str | None = None, split: str = "train", column: str = TEXT) -> Dataset:
    """Documents of a data set on the Hugging Face hub, or of a local folder that `load_dataset` reads.

    Args:
        path: ``owner/dataset``, or a folder.
        name: Configuration of the data set, such as ``wikitext-2-raw-v1``.
        split: Name of the split; slices such as ``train[:10%]`` work.
        column: The field that holds the text, or chat messages.

    Raises:
        DataError: The data set cannot be read, or has no such split or column, or no text.
    """
    what = " ".join(part for part in (path, name, split) if part)
    _check_cache()
    try:
        documents = load_dataset(folder_or_id(path), name, split=split)
    except (OSError, ValueError) as error:
        raise DataError(
            f"datasets.load_dataset could not read {what}: {brief(error)}. Without a network, use a data set "
            "in its cache, a local folder (data.path=FOLDER), or files (data=text data.path=FILES)"
        ) from error
    return _refuse_empty(_keep_column(documents, column, what), what)


def _check_cache() -> None:
    """Refuses a cache of `datasets` that cannot be written: below a HOME without a folder, say.

    Raises:
        DataError: With the folder, and how to choose another.
    """
    cache = Path(datasets.config.HF_DATASETS_CACHE)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=cache):
            pass
    except OSError as error:
        raise DataError(
            f"the library `datasets` keeps what it reads in {cache}, which cannot be written ({error.strerror}): set "
            "HF_HOME, or HF_DATASETS_CACHE, to a folder that can"
        ) from error


def _expand(path: str) -> list[Path]:
    where = typed(path)
    if os.path.isfile(where):
        return [where]
    if os.path.isdir(where):
        files = sorted(file for file in where.iterdir() if file.is_file() and not file.name.startswith("."))
        if not files:
            raise DataError(f"the folder {where} holds no files")
        return files
    files = sorted(Path(file) for file in glob.glob(str(where), recursive=True) if Path(file).is_file())
    if not files:
        kind = "no file matches the pattern" if glob.has_magic(path) else "no such file or folder:"
        raise FileNotFoundError(f"{kind} {path} (looked for {where.absolute()})")
    return files


def _keep_column(documents: Dataset, column: str, source: str) -> Dataset:
    there = documents.column_names
    if column not in there:
        choice = f"={_CHAT}" if _CHAT in there else ""
        raise DataError(f"{source} has no column {column!r}: it has {', '.join(there)}. Set data.column{choice}")
    is_text = isinstance(documents.features[column], Value)
    documents = documents.select_columns([column] if is_text or _TOOLS not in there else [column, _TOOLS])
    return documents if column == TEXT else documents.rename_column(column, TEXT)


def _refuse_empty(documents: Dataset, source: str) -> Dataset:
    if not any(text.strip() if isinstance(text, str) else text for rows in _batches(documents) for text in rows[TEXT]):
        raise DataError(f"there is no text in {source}: {len(documents)} documents, all empty")
    return documents


def texts(documents: Dataset, tokenizer: Any = None) -> Iterable[str]:
    """Yields the text of each document, read on demand; a missing text is empty.

    Args:
        documents: From one of the functions above.
        tokenizer: Its chat template makes texts of chats.

    Raises:
        DataError: A document is neither text nor a chat, or a chat has no template or does not fit it.
    """
    for rows in _batches(documents):
        tools = rows.get(_TOOLS) or [None] * len(rows[TEXT])
        for document, own in zip(rows[TEXT], tools, strict=True):
            yield document if isinstance(document, str) else _text_of(document, tokenizer, own)


def _text_of(document: Any, tokenizer: Any, tools: Any) -> str:
    if not document:
        return ""
    if not is_chat(document):
        raise DataError(f"data.column holds {document!r:.80}, which is neither a text nor a list of chat messages")
    if tokenizer is None:
        raise DataError(
            "data.column holds chats, and no tokenizer with a chat template is there to make text of them: take a "
            "model that was tuned for chat (model=hf model.name_or_path=PATH_OR_HUB_ID)"
        )
    try:
        return render_chat(document, tokenizer, tools)
    except CalibrationError as error:
        raise DataError(str(error)) from error


def _batches(documents: Dataset) -> Iterator[dict[str, list[Any]]]:
    return documents.iter(batch_size=64)  # type: ignore[no-any-return]


def passages(documents: Dataset, characters: int = 2000, seed: int = 0) -> Iterator[str]:
    """Yields pieces of documents in random order, read on demand: general text to mix into calibration.

    Args:
        documents: From one of the functions above.
        characters: Length of a piece; a document's last one is left out if it is shorter, unless it is the only one.
        seed: Seed of the order of documents.

    Raises:
        DataError: `characters` is less than 1.
    """
    if characters < 1:
        raise DataError(f"characters must be at least 1, got {characters}")
    for text in texts(documents.shuffle(seed=seed)):
        for start in range(0, max(1, len(text) - characters + 1), characters):
            if piece := text[start : start + characters].strip():
                yield piece


def _is_table(paragraph: str) -> bool:
    return any(line.lstrip()[:1] in ("+", "|") for line in paragraph.splitlines())
