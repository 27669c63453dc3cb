"""Checkpoint folders as old scripts use them: tokenizers saved beside, other names for weights."""

from __future__ import annotations

import shutil
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gptq_plugin.errors import CheckpointError

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
