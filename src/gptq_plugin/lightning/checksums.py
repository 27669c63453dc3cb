"""Compares PyTorch's zip archives with their checksums, which PyTorch writes and does not look at.

Tested by tests/lightning/test_checkpoint_file.py: in files; by tests/apps/test_sharded_weights.py in folders.
"""

from __future__ import annotations

import sys
import zipfile
import zlib
from collections.abc import Iterable
from typing import IO

import torch
from torch import Tensor


def check_pickle(archive: zipfile.ZipFile) -> None:
    """Reads the pickle of an archive.

    Raises:
        zipfile.BadZipFile: It is not what was written.
    """
    for info in archive.infolist():
        if info.filename.endswith("/data.pkl") and info.CRC:
            archive.read(info)


def check_tensors(archive: zipfile.ZipFile, tensors: Iterable[Tensor]) -> None:
    """Compares dense tensors, as they were read from an archive, with its records. Nothing is read again.

    Raises:
        zipfile.BadZipFile: The bytes of one are not what was written.
    """
    records = {(info.file_size, info.CRC) for info in archive.infolist()}
    if not _has_sums(archive) or _has_other_byte_order(archive):
        return
    dense = [tensor for tensor in tensors if tensor.layout is torch.strided and tensor.device.type == "cpu"]
    for storage in {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in dense}.values():
        values = torch.empty(0, dtype=torch.uint8, device="cpu").set_(storage).numpy().data
        if (len(values), zlib.crc32(values)) not in records:
            raise zipfile.BadZipFile("bytes of its tensors are not those that were written")


def check_archive(file: IO[bytes]) -> None:
    """Reads all of an archive; anything else is passed over.

    Raises:
        zipfile.BadZipFile: Something in it is not what was written.
    """
    if not zipfile.is_zipfile(file):
        return
    with zipfile.ZipFile(file) as archive:
        wrong = archive.testzip() if _has_sums(archive) else None
    if wrong is not None:
        raise zipfile.BadZipFile(f"the bytes of {wrong} are not those that were written")


def _has_sums(archive: zipfile.ZipFile) -> bool:
    """False after ``torch.serialization.set_crc32_options(False)``: all are 0."""
    return any(info.CRC for info in archive.infolist())


def _has_other_byte_order(archive: zipfile.ZipFile) -> bool:
    """True if PyTorch exchanged bytes while it read."""
    orders = [info for info in archive.infolist() if info.filename.endswith("/byteorder")]
    return any(archive.read(info).decode("ascii", "replace") != sys.byteorder for info in orders)
