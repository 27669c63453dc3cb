"""Checkpoint folders as old scripts use them: names on the hub, tokenizers saved beside, other names for weights."""

from __future__ import annotations

import shutil
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import huggingface_hub

from gptq_plugin.errors import CheckpointError

_NEEDED = ("*.json", "*.safetensors", "*.py", "*.jinja", "*.txt", "*.model")
_TOKENIZER_FILES = frozenset(
    {
        "added_tokens.json",
        "chat_template.jinja",
        "chat_template.json",
        "merges.txt",
        "sentencepiece.bpe.model",
        "special_tokens_map.json",
        "spiece.model",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
        "vocab.json",
        "vocab.txt",
    }
)


def local_folder(
    name_or_path: str | Path,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    force_download: bool = False,
    local_files_only: bool = False,
    subfolder: str | None = None,
) -> Path:
    """The folder itself, or the hub's checkpoint of that name, downloaded unless it is in the cache.

    Args:
        name_or_path: A folder, or ``owner/name``.
        revision, token, cache_dir, force_download, local_files_only: As for `huggingface_hub.snapshot_download`.
        subfolder: Where in it the checkpoint is.

    Raises:
        CheckpointError: There is no such folder, and the hub's checkpoint cannot be had.
    """
    folder = Path(name_or_path)
    if not folder.is_dir():
        within = f"{subfolder}/" if subfolder else ""
        try:
            folder = Path(
                huggingface_hub.snapshot_download(
                    str(name_or_path),
                    revision=revision,
                    token=token,
                    cache_dir=cache_dir,
                    force_download=force_download,
                    local_files_only=local_files_only,
                    allow_patterns=[within + pattern for pattern in _NEEDED],
                )
            )
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{name_or_path} is no folder, and huggingface_hub could not fetch a checkpoint of that name: {error}"
            ) from error
    return folder / subfolder if subfolder else folder


def check_basename(folder: Path, basename: str, stacklevel: int = 3) -> None:
    """Compares AutoGPTQ's `model_basename` with the weights in the folder.

    Raises:
        CheckpointError: The folder holds those weights and others, of which they would be chosen.
    """
    file = folder / f"{basename}.safetensors"
    weights = sorted(path.name for path in folder.glob("*.safetensors"))
    if (folder / f"{file.name}.index.json").is_file():
        return
    if not file.is_file():
        what = ", ".join(weights) or "no safetensors file"
        warnings.warn(f"model_basename={basename!r} is ignored: {folder} holds {what}", stacklevel=stacklevel)
    elif len(weights) > 1:
        raise CheckpointError(
            f"{folder} holds {', '.join(weights)}, and one folder is read as one checkpoint: put {file.name} into a "
            "folder with config.json and quantize_config.json only, and leave model_basename out"
        )


@contextmanager
def tokenizer_kept(folder: str | Path) -> Iterator[None]:
    """Tokenizer files that lie in the folder are there again after the block, which replaces it, unless that wrote its
    own. An export replaces only folders that hold nothing but an export, and old scripts save the tokenizer there
    before the model, or run twice."""
    folder = Path(folder).resolve()
    files = [path for path in folder.glob("*") if path.name in _TOKENIZER_FILES and path.is_file()]
    if not files:
        yield
        return
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", suffix=".tokenizer", dir=folder.parent) as aside:
        for file in files:
            shutil.move(file, Path(aside) / file.name)
        try:
            yield
        finally:
            for file in files:
                if not file.exists():
                    file.parent.mkdir(exist_ok=True)
                    shutil.move(Path(aside) / file.name, file)
