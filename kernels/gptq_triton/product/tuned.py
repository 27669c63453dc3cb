"""What this process knows to be faster than the rule, beside the shipped tables, and its copy on disk: `Tuned`.

One file for a kind of GPU, a version of Triton and the source of the kernels. A file that cannot be read or written is
told and does no harm: the choices are then found again.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import os
import uuid
from pathlib import Path

from ..needs_triton import triton
from .choice import Choice, Gpu
from .table import Key, Table, slug

log = logging.getLogger(__name__)

_LARGEST = 1 << 24  # bytes of a file that is read

_of_process: dict[tuple[str, int], Table] = {}


def tuned(gpu: Gpu) -> Table:
    """Choices that were measured or read by this process; one table for all GPUs of a kind."""
    return _of_process.setdefault((gpu.name, gpu.processors), Table(gpu.name, gpu.processors))


@functools.cache
def version_of_kernels() -> str:
    """A digest of this folder's source: what was measured with other kernels counts no more."""
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:12]


def file_of(gpu: Gpu, folder: str | os.PathLike[str] | None) -> Path:
    """Where choices for a kind of GPU are kept.

    Args:
        gpu: The GPU.
        folder: The folder; None is one in Triton's cache, which holds the compiled kernels too.
    """
    where = Path(triton.knobs.cache.dir, "gptq_plugin") if folder is None else Path(folder)
    return where / f"{slug(gpu.name)}-{gpu.processors}-triton-{slug(triton.__version__)}-{version_of_kernels()}.json"


def read(file: Path, gpu: Gpu) -> dict[Key, Choice]:
    """Choices that a file holds; none, with a warning, where it cannot be used."""
    try:
        return _parsed(file, gpu)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        log.warning("%s holds no choices of kernels (%s): they are measured again, and it is replaced", file, error)
        return {}


def write(file: Path, table: Table, gpu: Gpu) -> None:
    """Adds choices to a file. Other processes may do the same meanwhile: whoever is last, it is whole."""
    temporary = file.with_name(f".{uuid.uuid4().hex}")
    kept: dict[Key, Choice] = {}
    with contextlib.suppress(OSError, ValueError):
        kept = _parsed(file, gpu)
    merged = Table(table.gpu, table.processors, table.made_by, kept | table.choices)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(merged.to_json(), encoding="utf-8")
        os.replace(temporary, file)
    except OSError as error:
        log.warning("%s cannot be written (%s): the next process measures its kernels again", file, error)
        with contextlib.suppress(OSError):
            temporary.unlink()


def _parsed(file: Path, gpu: Gpu) -> dict[Key, Choice]:
    if file.stat().st_size > _LARGEST:
        raise ValueError(f"it has more than {_LARGEST} bytes")
    table = Table.parse(file.read_bytes())
    if not table.is_for(gpu):
        raise ValueError(f"it is for another GPU, {table.gpu[:80]!r}")
    return table.choices
