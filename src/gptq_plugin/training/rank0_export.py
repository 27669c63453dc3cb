"""The export of a training run: checked before, and at the end written by rank 0, of which all ranks learn.

No name stops it: the folder's may be taken while the run goes on.
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from gptq_plugin import distributed
from gptq_plugin.clients.client import Client
from gptq_plugin.errors import ExportError
from gptq_plugin.export.staging import check_export_dir
from gptq_plugin.quantize.module import QuantizeModule

log = logging.getLogger(__name__)


def from_first(export_dir: Path) -> Path:
    """Rank 0's folder, on every rank: a name made of the time is another one on each. Every rank calls it."""
    if not distributed.active():
        return export_dir
    folder: Path = distributed.object_from_first(export_dir.absolute())
    return folder


def check_own_folders(export_dir: Path, own: Iterable[tuple[str, Any]]) -> None:
    """The export replaces its folder as a whole, so a run's own files must not lie in it.

    Args:
        export_dir: Where the export goes.
        own: What each of the run's folders is, and where; None is nowhere.

    Raises:
        ExportError: `export_dir` is one of them, or holds one.
    """
    target = export_dir.resolve()
    for what, folder in own:
        if folder is not None and (target == Path(folder).resolve() or target in Path(folder).resolve().parents):
            raise ExportError(
                f"export_dir {export_dir} is or holds {what} ({folder}), where this run writes other files: choose "
                "a folder beside or below it"
            )


def export_from_first(
    quantizer: QuantizeModule,
    module: nn.Module,
    directory: Path,
    *,
    tokenizer: Any = None,
    overwrite: bool = False,
    target: Client | str | Mapping[str, Any] | None = None,
) -> Path:
    """Exports on rank 0. In a process group every rank calls it.

    Args:
        quantizer: What quantized the module; its report is exported with it.
        module: The quantized module.
        directory: Where to; a folder beside it when somebody else took the name during training.
        tokenizer, overwrite, target: As for `QuantizeModule.export`.

    Returns:
        The folder that was written.

    Raises:
        Exception: What stopped rank 0; RankError with its message on the others.
    """
    with distributed.ending_together():
        if distributed.rank() == 0:
            directory = _free_name(quantizer, directory, overwrite)
            quantizer.export(module, directory, tokenizer=tokenizer, overwrite=overwrite, target=target)
        return directory.with_name(distributed.object_from_first(directory.name))


def _free_name(quantizer: QuantizeModule, directory: Path, overwrite: bool) -> Path:
    try:
        check_export_dir(directory, overwrite=overwrite)
    except ExportError as error:
        # It was free when training began. Days of work are not thrown away over a name.
        directory = directory.with_name(f"{directory.name}-{uuid.uuid4().hex[:8]}")
        log.warning("%s: exporting to %s instead", error, directory)
        assert quantizer.report is not None
        quantizer.report.deviations.append(f"{error}: exported to {directory.name} instead")
    return directory
