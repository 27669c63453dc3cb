"""What the hub's libraries find in their caches without a network: data sets and checkpoints."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

C4_FILES = {"train": "en/c4-train.00000-of-01024.json.gz"}


def cache_dataset(
    cache: Path, name: str, texts: Sequence[str], config: str | None = None, data_files: dict[str, Any] | None = None
) -> None:
    """Writes a training split of one column, ``text``, as `datasets` caches it for ``owner/name``."""
    from datasets import BuilderConfig, DatasetInfo, Features, Value
    from datasets.arrow_writer import ArrowWriter

    if data_files is not None:
        config = BuilderConfig("default").create_config_id(config_kwargs={"data_files": data_files})
    owner, _, name = name.partition("/")
    folder = cache / f"{owner}___{name}" / str(config) / "0.0.0" / ("0" * 40)
    folder.mkdir(parents=True)
    features = Features({"text": Value("string")})
    with ArrowWriter(path=str(folder / f"{name}-train.arrow"), features=features) as writer:
        for text in texts:
            writer.write({"text": text})
        writer.finalize()
    split = {"name": "train", "num_examples": len(texts), "dataset_name": name}
    DatasetInfo(
        features=features, dataset_name=name, config_name=str(config), version="0.0.0", splits=[split]
    ).write_to_directory(str(folder))


def cache_checkpoint(cache: Path, name: str, folder: Path, revision: str = "main") -> None:
    """Copies a folder to where `huggingface_hub` caches the repository ``owner/name``."""
    repository = cache / f"models--{name.replace('/', '--')}"
    commit = "1" * 40
    shutil.copytree(folder, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / revision).write_text(commit)
