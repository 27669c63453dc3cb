"""Runs that go on where a broken-off one of the same ended: `Resuming`."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

from gptq_plugin.quantize import arguments
from gptq_plugin.quantize.options import PassOptions
from gptq_plugin.quantize.resume_folder import resume_folder


class Resuming:
    """The part of a QuantizeModule that gives passes its options, and removes what they kept for a run after them.

    Attributes:
        resume: See `QuantizeModule`.
    """

    resume: bool
    _exports_to: str | Path | None = None  # the quantization under way, or the last

    def _options(self, given: PassOptions, **changed: Any) -> PassOptions:
        """The options with those of the object."""
        return dataclasses.replace(given, **changed, **{name: getattr(self, name) for name in arguments.OPTIONS})

    def _of_pass(self, given: PassOptions | None, export_dir: str | Path | None) -> PassOptions:
        """The options of a quantization, which may also export by itself.

        Raises:
            ValueError: There is no folder to keep layers beside.
        """
        where = {} if export_dir is None else {"export_dir": export_dir}
        chosen = self._options(given or PassOptions(), exports=export_dir is not None, **where)
        self._exports_to = chosen.export_dir
        chosen.kept()
        return chosen

    def _forget(self, is_exported: bool) -> None:
        """Removes what was kept, if the result is exported. On rank 0."""
        if is_exported and self.resume and self._exports_to is not None:
            shutil.rmtree(resume_folder(self._exports_to), ignore_errors=True)
