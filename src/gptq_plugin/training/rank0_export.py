"""Rank 0 exports and tells all ranks the folder. If the name was taken during training, a suffix is added."""

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
from gptq_plugin.export.export_dir import check_export_dir
from gptq_plugin.export.hidden_folders import beside, works_inside
from gptq_plugin.quantize.module import QuantizeModule

log = logging.getLogger(__name__)


def rank0_folder(export_dir: Path) -> Path:
    """Rank 0's folder, on every rank: a name made from the time differs between ranks. Every rank calls it."""
    if not distributed.active():
        return export_dir
    folder: Path = distributed.object_from_first(export_dir.absolute())
    return folder


def refuse_run_folders(export_dir: Path, run_folders: Iterable[tuple[str, Any]]) -> None:
    """Refuses an export folder that holds the run's own files: an export replaces its folder as a whole.

    Args:
        export_dir: Folder of the export.
        run_folders: Name and path of each folder the run writes to; a path of None is skipped.

    Raises:
        ExportError: `export_dir` is one of them, or contains one.
    """
    target = export_dir.resolve()
    for name, folder in run_folders:
        if folder is not None and (target == Path(folder).resolve() or target in Path(folder).resolve().parents):
            raise ExportError(
                f"export_dir {export_dir} is or holds {name} ({folder}), where this run writes other files: choose "
                "a folder beside or below it"
            )


def export_on_rank0(
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
        quantizer: Quantized the module; its report is exported too.
        module: The quantized module.
        directory: Folder to write; if the name was taken during training, one beside it with a suffix, or in it where
            `works_inside`.
        tokenizer, overwrite, target: As for `QuantizeModule.export`.

    Returns:
        The folder that was written.

    Raises:
        Exception: The export failed on rank 0; the others raise RankError with its message.
    """
    with distributed.ending_together():
        if distributed.rank() == 0:
            directory = _free_name(quantizer, directory, overwrite)
            quantizer.export(module, directory, tokenizer=tokenizer, overwrite=overwrite, target=target)
        folder: Path = distributed.object_from_first(directory)
        return folder


def _free_name(quantizer: QuantizeModule, directory: Path, overwrite: bool) -> Path:
    try:
        check_export_dir(directory, overwrite=overwrite)
    except ExportError as error:
        # The name was free when training began. Days of training are not lost over it.
        free = beside(directory, f"-{uuid.uuid4().hex[:8]}")
        directory = directory / free.name if works_inside(directory) else free
        log.warning("%s: exporting to %s instead", error, directory)
        assert quantizer.report is not None
        quantizer.report.deviations.append(f"{error}: exported to {directory.name} instead")
    return directory
