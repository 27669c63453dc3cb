"""Verifies that a folder holds a model: `verify` reads it back and compares it with the model in memory.

Every quantized tensor is read back by its format and compared: with the model's and, since a layer of the model may map
the file itself, with a checksum from before it was written. Some rows of every layer are also decoded bit by bit, by
code that shares nothing with the code that wrote them.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from gptq_plugin.checkpoint.checkpoint import Checkpoint
from gptq_plugin.errors import CheckpointError, ExportError, brief
from gptq_plugin.kernels import reference
from gptq_plugin.layers.qlinear import QuantLinear
from gptq_plugin.layers.stored_weight import TENSORS

_CHECKED_ROWS = 32  # output channels of every layer that are decoded again from the file
_THREADS = 4  # which verify a layer each: small operations leave most of a CPU idle
_COMPARED = 2**26  # bytes of a tensor that are compared at a time


def verify(
    directory: Path,
    layers: Mapping[str, QuantLinear],
    floats: Mapping[str, Tensor],
    renamed: Callable[[str], str] = str,
    written: Mapping[str, Mapping[str, int]] | None = None,
) -> None:
    """Compares the checkpoint in `directory` with the model it should hold.

    Args:
        directory: A checkpoint.
        layers: Every quantized layer by its name in the model; a shared one may have several.
        floats: Other tensors by name. Names that the checkpoint does not have are skipped.
        renamed: Turns a layer's name in the checkpoint into its name in the model.
        written: `checksums` of layers before they were written, by their names in the checkpoint.

    Raises:
        ExportError: Something differs; the message names the tensor.
    """
    checkpoint, before = _opened(directory, "export"), written or {}
    stored_names = {name if name in layers else renamed(name): name for name in checkpoint.layers}
    found = {layers[name] for name in stored_names if name in layers}
    lost = [name for name, layer in layers.items() if layer not in found]
    if lost or len(stored_names) != len(checkpoint.layers):
        raise ExportError(f"the export does not read back: {', '.join(lost) or 'a layer'} is not in it")
    with ThreadPoolExecutor(_THREADS, "verify") as pool:  # of an error, the first in their order is raised
        pool.submit(torch.get_num_threads).result()  # in a fork, threads that begin together race for PyTorch's own
        verified = ((stored, layers[name], before.get(stored, {})) for name, stored in stored_names.items())
        for _ in pool.map(lambda one: _verify_layer(checkpoint, *one), verified):
            pass
    there = set(checkpoint.float_names)
    for name, tensor in floats.items():
        if name in there and not _equal(checkpoint.read(name), tensor):
            raise ExportError(f"the export does not read back: {name} differs from the model's")


def _opened(directory: Path, what: str) -> Checkpoint:
    try:
        return Checkpoint.open(directory)
    except CheckpointError as error:
        raise ExportError(f"the {what} does not read back: {brief(error)}") from error


def checksums(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """A checksum of the bytes of each tensor on a CPU."""
    return {key: zlib.crc32(_bits(torch.atleast_1d(tensor)).numpy().data) for key, tensor in tensors.items()}


def _verify_layer(checkpoint: Checkpoint, name: str, layer: QuantLinear, before: Mapping[str, int]) -> None:
    stored = checkpoint.read_tensors(name)
    for suffix in TENSORS:
        ours = getattr(layer, suffix)
        if (ours is None) != (suffix not in stored) or (ours is not None and not _equal(stored[suffix], ours)):
            raise ExportError(f"the export does not read back: {suffix} of {name} differs from the model's")
    now = checksums({suffix: stored[suffix] for suffix in before})
    for suffix in before:
        if now[suffix] != before[suffix]:
            raise ExportError(f"the export does not read back: {suffix} of {name} differs from what was written")
    if not torch.equal(decoded_rows(checkpoint, name, _CHECKED_ROWS), _rows(layer)):
        raise ExportError(f"the export does not read back: {name} decodes to other weights than the model's")


def _equal(stored: Tensor, ours: Tensor) -> bool:
    """True if both have the same bits, NaN included. Compared on the device of `ours`, in pieces, so that it needs
    little memory there."""
    if stored.shape != ours.shape or stored.dtype != ours.dtype:
        return False
    if not ours.numel():
        return True
    stored, ours = torch.atleast_1d(stored), torch.atleast_1d(ours)
    rows = max(1, _COMPARED * ours.shape[0] // ours.nbytes)
    pieces = zip(stored.split(rows), ours.split(rows), strict=True)
    return all(torch.equal(_bits(one.to(other.device)), _bits(other)) for one, other in pieces)


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)


def _rows(layer: QuantLinear) -> Tensor:
    """The weights of the layer's first output channels in memory, float32 [rows, in]."""
    rows = min(_CHECKED_ROWS, layer.out_features)
    words = reference.words_for(rows, layer.bits)
    pieces = (layer.qweight[:, :rows], layer.qzeros[:, :words], layer.scales[:, :rows], layer.g_idx)
    return reference.dequantize(*(piece.cpu() for piece in pieces), layer.bits, torch.float32)


def decoded_rows(checkpoint: Checkpoint, name: str, rows: int) -> Tensor:
    """Decodes a layer's first output channels from the file, float32 [rows, in], bit by bit, without
    `Format.from_file`, `packing` and the kernels."""
    layer = checkpoint.layers[name]
    rows = min(rows, layer.out_features)
    raw = checkpoint.format.first_rows(lambda suffix: checkpoint.read(f"{name}.{suffix}"), layer, rows)
    codes = _from_bits(raw.codes, layer.bits)[:, : layer.in_features]
    if raw.zeros is None:
        zeros = torch.full((raw.scales.shape[1], rows), 2 ** (layer.bits - 1), device="cpu")
    else:
        zeros = (_from_bits(raw.zeros, layer.bits)[:, :rows] + raw.less) % 2**layer.bits
    size = layer.group_size if layer.group_size > 0 else layer.in_features
    group = torch.arange(layer.in_features, device="cpu") // size if raw.group_of is None else raw.group_of.long()
    return (codes - zeros.T[:, group]).float() * raw.scales.float()[:, group]


def _from_bits(words: Tensor, bits: int) -> Tensor:
    """Decodes int32 [n, w], a little-endian bit stream along each row, into codes, int32 [n, w * 32 // bits]."""
    words = words.clone(memory_format=torch.contiguous_format)  # a view of one column may pass for contiguous
    single = (words.view(torch.uint8)[:, :, None] >> torch.arange(8, dtype=torch.uint8, device="cpu")) & 1
    stream = single.flatten(1)
    whole = stream.shape[1] // bits * bits
    codes = stream[:, :whole].unflatten(1, (-1, bits)) << torch.arange(bits, dtype=torch.uint8, device="cpu")
    return codes.sum(-1, dtype=torch.int32)


def verify_same(source: Checkpoint, directory: Path) -> None:
    """Compares the checkpoint in `directory` with `source`, which may have another format.

    Raises:
        ExportError: Something differs; the message names the tensor.
    """
    copy = _opened(directory, "copy")
    if copy.layers.keys() != source.layers.keys() or set(copy.float_names) != set(source.float_names):
        raise ExportError("the copy does not read back: it has other layers or other tensors than its source")
    for name, layer in source.layers.items():
        ours, stored = source.read_tensors(name), copy.read_tensors(name)
        differs = [suffix for suffix in ours if suffix not in stored or not _equal(stored[suffix], ours[suffix])]
        rows = min(_CHECKED_ROWS, layer.out_features)
        if differs or not _equal(decoded_rows(copy, name, rows), decoded_rows(source, name, rows)):
            raise ExportError(f"the copy does not read back: {name} differs ({', '.join(differs) or 'its weights'})")
    for name in source.float_names:
        if not _equal(copy.read(name), source.read(name)):
            raise ExportError(f"the copy does not read back: {name} differs")
