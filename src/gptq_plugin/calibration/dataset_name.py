"""The name of a dataset, for the report: `dataset_name`."""

from __future__ import annotations

import re
from typing import Any

_HUB_FILE = re.compile(r"hf://datasets/([\w.-]+/[\w.-]+)@")
_LIBRARIES = {"torch", "lightning", "pytorch_lightning", "transformers", "accelerate", "gptq_plugin"}
_FILES = {"json", "text", "csv", "parquet", "arrow", "webdataset", "pandas"}  # builders of `datasets` for any files


def dataset_name(dataset: Any) -> str:
    """A few words on where samples come from: no path, and no text of theirs.

    A dataset of `datasets` has the hub's id (or the builder's name), its configuration and its split; another its
    attribute `name`, or the name of its class. What is only a container has none: the result is empty.
    """
    while _is_wrapper(dataset):
        dataset = dataset.dataset
    info = getattr(dataset, "info", None)
    if info is not None and hasattr(info, "builder_name"):
        return _of_info(info, getattr(dataset, "split", None))
    name = getattr(dataset, "name", None)
    if isinstance(name, str) and name.strip():
        return " ".join(name.split())
    kind = type(dataset)
    return "" if kind.__module__ == "builtins" or _is_of_a_library(kind) else kind.__name__


def _is_wrapper(dataset: Any) -> bool:
    """True for what a library, this one too, puts around a dataset to give a part of it."""
    return _is_of_a_library(type(dataset)) and hasattr(dataset, "dataset")


def _is_of_a_library(kind: type) -> bool:
    return kind.__module__.partition(".")[0] in _LIBRARIES


def _of_info(info: Any, split: Any) -> str:
    addresses = " ".join(map(str, getattr(info, "download_checksums", None) or ()))
    on_hub = _HUB_FILE.search(addresses)
    name = on_hub[1] if on_hub else getattr(info, "dataset_name", None) or info.builder_name
    if not name:
        return ""
    if name in _FILES:
        return f"{name} files"
    config = info.config_name if info.config_name not in (None, "default", name) else None
    return " ".join(str(part) for part in (name, config, split) if part)
