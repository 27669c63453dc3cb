"""Checkpoints by name: a folder, or a repository of the Hugging Face hub."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from gptq_plugin.errors import CheckpointError, brief
from gptq_plugin.options import fields

# huggingface_hub looks for it among the files of its cache.
_REVISION = fields.Kind(
    "the name of a branch, a tag or a commit, or None (main)",
    lambda value: value is None or (isinstance(value, str) and ".." not in value and not value.startswith("/")),
)

log = logging.getLogger(__name__)

# Weights in safetensors and what belongs to them; no other copies of the weights.
_NEEDED = ("*.json", "*.safetensors", "*.py", "*.jinja", "*.txt", "*.model", "*.md", "LICENSE*")


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
    """Returns the folder itself, or that of the hub's checkpoint, downloaded unless it is in the cache.

    Args:
        name_or_path: A folder, or the id ``owner/name`` of a repository. A folder of that name wins.
        revision: Branch, tag or commit of the repository.
        token, cache_dir, force_download, local_files_only: As for `huggingface_hub.snapshot_download`.
        subfolder: Where in it the checkpoint is.

    Raises:
        CheckpointError: There is no such folder, and no such repository, or it cannot be fetched.
    """
    fields.PATH.check("the checkpoint", name_or_path)
    _REVISION.check("revision", revision)
    folder = Path(name_or_path)
    if not os.path.isdir(folder):
        within = f"{subfolder}/" if subfolder else ""
        try:
            validate_repo_id(str(name_or_path))
        except HFValidationError:
            raise CheckpointError(
                f"{brief(name_or_path)} is not a folder: give the folder of the checkpoint, or its id on the hub, "
                "owner/name"
            ) from None
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
        except Exception as error:
            raise CheckpointError(
                f"{brief(name_or_path)} is neither a folder (looked in {Path.cwd()}) nor a repository that "
                f"huggingface_hub could fetch from the hub: {brief(error)}"
            ) from error
    elif revision is not None:
        log.warning("%s is a folder here, so nothing is fetched from the hub: revision=%s is ignored", folder, revision)
    return folder / subfolder if subfolder else folder
