"""Verifies that a folder holds a model: `verify` reads it back and compares it with the model in memory.

Every quantized tensor is read back by its format and compared: with the model's and, since a layer of the model may map
the file itself, with a checksum from before it was written. Some rows of every layer are also decoded bit by bit, by
code that shares nothing with the code that wrote them.
"""

from __future__ import annotations

import functools
import zlib
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy
import torch
from torch import Tensor

from gptq_plugin.checkpoint.checkpoint import Checkpoint
from gptq_plugin.checkpoint.formats.format import QuantizedLayer, RawRows, Read
from gptq_plugin.device.raw_bytes import raw_bytes
from gptq_plugin.errors import CheckpointError, ExportError, brief
from gptq_plugin.kernels import reference
from gptq_plugin.layers.qlinear import QuantLinear
from gptq_plugin.layers.stored_weight import TENSORS

_CHECKED_ROWS = 32  # output channels of every layer that are decoded again from the file
_THREADS = 4  # which verify some layers each: small operations leave most of a CPU idle
_NEIGHBOURS = 24  # layers that a thread verifies before it takes others, those alike among them together
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
        every = ((stored, layers[name], before.get(stored, {})) for name, stored in stored_names.items())
        for _ in pool.map(functools.partial(_verify_layers, checkpoint), _some(every)):
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
    return {key: zlib.crc32(raw_bytes(tensor).numpy().data) for key, tensor in tensors.items()}


_One = tuple[str, QuantLinear, Mapping[str, int]]  # a stored name, the layer in memory, and what was written


def _some(every: Iterable[_One]) -> Iterator[list[_One]]:
    """The layers in their order, some at a time."""
    left = list(every)
    for start in range(0, len(left), _NEIGHBOURS):
        yield left[start : start + _NEIGHBOURS]


def _verify_layers(checkpoint: Checkpoint, some: Sequence[_One]) -> None:
    alike: dict[Hashable, dict[str, QuantLinear]] = defaultdict(dict)
    raw: dict[str, RawRows] = {}
    for name, layer, before in some:
        read = functools.cache(functools.partial(_read, checkpoint, name))
        _compare(checkpoint.format.from_file(read, checkpoint.layers[name]), name, layer, before)
        raw[name] = _raw_rows(checkpoint, name, _CHECKED_ROWS, read)
        one = checkpoint.layers[name]
        as_stored = one.bits, one.group_size, one.in_features, raw[name].zeros is None, raw[name].less
        alike[as_stored, layer.bits, layer.qweight.shape, layer.qzeros.shape, layer.device][name] = layer
    for layers in alike.values():
        found = _decoded(checkpoint.layers[next(iter(layers))], [raw[name] for name in layers])
        expected = _rows(list(layers.values()))
        if not torch.equal(found, expected):
            apart = zip(layers, found, expected, strict=True)
            wrong = next(name for name, one, other in apart if not torch.equal(one, other))
            raise ExportError(f"the export does not read back: {wrong} decodes to other weights than the model's")


def _read(checkpoint: Checkpoint, name: str, suffix: str) -> Tensor:
    return checkpoint.read(f"{name}.{suffix}")


def _compare(stored: Mapping[str, Tensor], name: str, layer: QuantLinear, before: Mapping[str, int]) -> None:
    """Compares all values of a layer with those of a file, as a layer holds them."""
    for suffix in TENSORS:
        ours = getattr(layer, suffix)
        if (ours is None) != (suffix not in stored) or (ours is not None and not _equal(stored[suffix], ours)):
            raise ExportError(f"the export does not read back: {suffix} of {name} differs from the model's")
    now = checksums({suffix: stored[suffix] for suffix in before})
    for suffix in before:
        if now[suffix] != before[suffix]:
            raise ExportError(f"the export does not read back: {suffix} of {name} differs from what was written")


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
    return all(_same_bits(one.to(other.device), other) for one, other in pieces)


def _same_bits(one: Tensor, other: Tensor) -> bool:
    """Compares in as few numbers as there can be: that takes as long as there are."""
    both = [raw_bytes(tensor) for tensor in (one, other)]
    if all(len(flat) % 8 == 0 and flat.storage_offset() % 8 == 0 for flat in both):
        both = [flat.view(torch.int64) for flat in both]
    return torch.equal(*both)


def _rows(layers: Sequence[QuantLinear]) -> Tensor:
    """The weights of the first output channels in memory, float32 [layers, rows, in], of layers of one shape."""
    first = layers[0]
    rows = min(_CHECKED_ROWS, first.out_features)
    words = reference.words_for(rows, first.bits)
    parts = [(one.qweight[:, :rows], one.qzeros[:, :words], one.scales[:, :rows], one.g_idx) for one in layers]
    if rows * first.bits % 32 == 0 and all(torch.equal(one.g_idx, first.g_idx) for one in layers):
        codes, zeros, scales = (torch.cat(of_all, 1) for of_all in list(zip(*parts, strict=True))[:3])
        parts = [(codes, zeros, scales, first.g_idx)]  # side by side, they are one layer's
    found = [reference.dequantize(*(one.cpu() for one in own), first.bits, torch.float32) for own in parts]
    return torch.cat(found).unflatten(0, (len(layers), rows))


def decoded_rows(checkpoint: Checkpoint, name: str, rows: int) -> Tensor:
    """Decodes a layer's first output channels from the file, float32 [rows, in], bit by bit, without
    `Format.from_file`, `packing` and the kernels."""
    raw = _raw_rows(checkpoint, name, rows, functools.partial(_read, checkpoint, name))
    return _decoded(checkpoint.layers[name], [raw])[0]


def _raw_rows(checkpoint: Checkpoint, name: str, rows: int, read: Read) -> RawRows:
    layer = checkpoint.layers[name]
    return checkpoint.format.first_rows(read, layer, min(rows, layer.out_features))


def _decoded(layer: QuantizedLayer, raw: Sequence[RawRows]) -> Tensor:
    """Rows of several layers like this one, float32 [layers, rows, in]."""
    codes = _from_bits(torch.stack([one.codes for one in raw]), layer.bits)[..., : layer.in_features]
    scales = torch.stack([one.scales for one in raw]).float()
    zeros = torch.full(scales.shape, 2 ** (layer.bits - 1), dtype=codes.dtype, device="cpu")
    if raw[0].zeros is not None:
        of_words = _from_bits(torch.stack([one.zeros for one in raw if one.zeros is not None]), layer.bits)
        zeros = ((of_words[..., : scales.shape[1]] + raw[0].less) % 2**layer.bits).mT
    size = layer.group_size if layer.group_size > 0 else layer.in_features
    natural = torch.arange(layer.in_features, device="cpu") // size
    values = torch.empty(codes.shape, dtype=torch.float32, device="cpu")
    for number, one in enumerate(raw):
        group = natural if one.group_of is None else one.group_of.long()
        values[number] = (codes[number] - zeros[number][:, group]) * scales[number][:, group]
    return values


def _from_bits(words: Tensor, bits: int) -> Tensor:
    """Decodes int32 [..., w], a little-endian bit stream along the last dimension, into int16 [..., w * 32 // bits]."""
    words = words.clone(memory_format=torch.contiguous_format)  # a view of one column may pass for contiguous
    stream = numpy.unpackbits(words.numpy().view(numpy.uint8), axis=-1, bitorder="little")
    stream = stream[..., : stream.shape[-1] // bits * bits]
    codes = stream[..., ::bits].copy()
    for bit in range(1, bits):
        codes |= stream[..., bit::bits] << bit
    return torch.from_numpy(codes).short()


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
