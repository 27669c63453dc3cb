"""`Uploads`: what QuantizeModule exported goes to the Hugging Face hub.

Tested by tests/export/test_upload.py: with the upload itself.
"""

from __future__ import annotations

from pathlib import Path

from gptq_plugin.errors import ExportError
from gptq_plugin.export.upload import Repository


class Uploads:
    """The part of QuantizeModule that uploads.

    Attributes:
        exported: The folder of the last export; None before.
    """

    exported: Path | None = None

    def push_to_hub(
        self,
        repo_id: str,
        directory: str | Path | None = None,
        *,
        private: bool = True,
        revision: str | None = None,
        token: str | bool | None = None,
    ) -> str:
        """Uploads an export to the Hugging Face hub, in one commit; see `export.upload.Repository`. On rank 0 only.

        Args:
            repo_id: ``owner/name``; made if it is not there.
            directory: Folder of the export; None is the last one's.
            private: False publishes it.
            revision: Branch to commit to; None is the main one.
            token: None is the one of ``hf auth login``, or HF_TOKEN.

        Returns:
            The commit's address.

        Raises:
            ExportError: Nothing was exported yet, or the repository cannot be written to.
        """
        repository, folder = Repository(repo_id, private, revision), directory or self.exported
        if folder is None:
            raise ExportError("nothing was exported yet: call export first, or give the folder of an export")
        return repository.push(folder, token)
