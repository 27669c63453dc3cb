"""Uploads an export to the Hugging Face hub, in one commit: `Repository`.

A repository is treated as the folder of an export is: only an earlier export of this package is replaced, and it is
private unless the user publishes it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub import CommitOperationAdd, CommitOperationDelete
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from gptq_plugin.checkpoint.checkpoint import Checkpoint
from gptq_plugin.checkpoint.files import QUANTIZE_CONFIG
from gptq_plugin.errors import ExportError, brief, some
from gptq_plugin.export.export_dir import files_in, manifest
from gptq_plugin.options import fields

log = logging.getLogger(__name__)

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".onnx", ".h5", ".msgpack")
_AS_WRITTEN = "'owner/name', or {'repo_id': 'owner/name', 'private': false, 'revision': 'branch'}"


@dataclass(frozen=True)
class Repository:
    """A model repository on the hub.

    Attributes:
        repo_id: ``owner/name``.
        private: Make it private, and refuse one that is public; False makes it public.
        revision: Branch to commit to; None is the main one.

    Raises:
        ValueError: The name is none, or an option has another type.
    """

    repo_id: str
    private: bool = True
    revision: str | None = None

    def __post_init__(self) -> None:
        fields.NAME.check("push_to_hub's repo_id", self.repo_id)
        fields.SWITCH.check("push_to_hub's private", self.private)
        fields.optional(fields.NAME, "the main branch").check("push_to_hub's revision", self.revision)
        try:
            validate_repo_id(self.repo_id)
            named = self.repo_id.count("/") == 1
        except HFValidationError:
            named = False
        if not named:
            raise ValueError(f"push_to_hub names a repository, owner/name; got {fields.shown(self.repo_id)}")

    @classmethod
    def of(cls, value: Repository | str | Mapping[str, Any] | None) -> Repository | None:
        """Reads a repository as users write it: ``"owner/name"``, a mapping of the attributes, or None.

        Raises:
            ValueError: It is neither, or has other keys.
        """
        if value is None or isinstance(value, cls):
            return value
        given = {"repo_id": value} if isinstance(value, str) else value
        if not isinstance(given, Mapping) or "repo_id" not in given or set(given) - {"repo_id", "private", "revision"}:
            raise ValueError(f"push_to_hub must be {_AS_WRITTEN}; got {fields.shown(value)}")
        return cls(**given)

    def __str__(self) -> str:
        return self.repo_id if self.revision is None else f"{self.repo_id} (revision {self.revision})"

    def claim(self, token: str | bool | None = None) -> _Contents:
        """Makes the repository unless it is there, and refuses one that must not be written to.

        Args:
            token: As for `huggingface_hub`; None is the one of ``hf auth login`` or HF_TOKEN.

        Raises:
            ExportError: It cannot be made or read, is public, or holds weights that are no export of this package.
        """
        hub = huggingface_hub.HfApi(token=token)
        try:
            hub.create_repo(self.repo_id, private=self.private, exist_ok=True)
            if self.revision is not None:
                hub.create_branch(self.repo_id, branch=self.revision, exist_ok=True)
            info = hub.model_info(self.repo_id, revision=self.revision)
            names = [file.rfilename for file in info.siblings or ()]
            earlier = self._earlier(hub, info.sha) if QUANTIZE_CONFIG in names else set()
        except Exception as error:
            raise ExportError(
                f"cannot write to {self} on the hub: {brief(error).rstrip('.')}. Log in with `hf auth login`, as a "
                "user who may write there. Without a network, export alone, and run `gptq-plugin push` later"
            ) from error
        if self.private and not info.private:
            raise ExportError(
                f"{self} on the hub is public, and push_to_hub is private unless told otherwise: give "
                f"{{'repo_id': '{self.repo_id}', 'private': false}} (gptq-plugin push: --public), or another name"
            )
        if not self.private and info.private:
            log.warning("%s is private on the hub and stays so: publish it in its settings", self.repo_id)
        others = [name for name in names if name.endswith(_WEIGHTS) and name not in earlier]
        if others:
            raise ExportError(
                f"{self} on the hub holds weights that this package did not write ({some(others)}): choose another "
                "name; only earlier exports are replaced"
            )
        return _Contents(info.sha, frozenset(_visible(earlier & set(names))), frozenset(set(names) - earlier))

    def push(self, folder: str | Path, token: str | bool | None = None) -> str:
        """Uploads an export, in one commit that also deletes what only an earlier export had.

        Args:
            folder: The export. Files whose name begins with a dot stay behind.
            token: As for `claim`.

        Returns:
            The commit's address.

        Raises:
            CheckpointError: The folder holds no whole checkpoint.
            ExportError: It is no export of this package, holds links, or the repository cannot be written to.
        """
        names = published_files(folder)
        there = self.claim(token)
        added = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=str(Path(folder) / name)) for name in names]
        stale = [CommitOperationDelete(path_in_repo=name) for name in sorted(there.earlier - set(names))]
        replaced = sorted(there.others & set(names) - {QUANTIZE_CONFIG})
        if replaced:
            log.warning("%s: replacing %s, which no earlier export wrote: see its history", self, some(replaced))
        hub = huggingface_hub.HfApi(token=token)
        try:
            done = hub.create_commit(
                self.repo_id,
                [*added, *stale],
                commit_message="Upload a quantized model",
                revision=self.revision,
                parent_commit=there.commit,
            )
        except Exception as error:
            raise ExportError(
                f"{folder} could not be uploaded to {self}: {brief(error)}. A commit is taken whole or not at all; try "
                f"again with `gptq-plugin push {folder} {self.repo_id}`"
            ) from error
        return str(done.commit_url)

    def _earlier(self, hub: huggingface_hub.HfApi, commit: str | None) -> set[str]:
        """The files of an earlier export that is there."""
        file = hub.hf_hub_download(self.repo_id, QUANTIZE_CONFIG, revision=commit)
        return manifest(Path(file).parent) or set()


@dataclass(frozen=True)
class _Contents:
    """A repository as it was found: its last commit, the files of an earlier export in it, and all others."""

    commit: str | None
    earlier: frozenset[str]
    others: frozenset[str]


def published_files(folder: str | Path) -> list[str]:
    """The files of an export that are uploaded, by relative name.

    Raises:
        CheckpointError: The folder holds no whole checkpoint.
        ExportError: It is no export of this package, or holds links, which may lead to other files of yours.
    """
    Checkpoint.open(folder)
    folder = Path(folder)
    written = manifest(folder)
    if written is None:
        raise ExportError(f"{folder} is no export of this package (`gptq-plugin convert` makes one of other tools')")
    names = _visible(files_in(folder))
    links = [name for name in names if (folder / name).is_symlink()]
    if links:
        raise ExportError(f"{folder} holds links ({some(links)}), whose targets would be published: copy them there")
    added = [name for name in names if name not in written and name != QUANTIZE_CONFIG]
    if added:
        log.info("%s: also uploading what was added after the export: %s", folder, some(added))
    return sorted(names)


def _visible(names: Iterable[str]) -> list[str]:
    return [name for name in names if not any(part.startswith(".") for part in name.split("/"))]
