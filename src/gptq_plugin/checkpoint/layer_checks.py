"""Compares a layer's tensors with its description: dtypes, shapes, group indices, scales."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gptq_plugin.checkpoint.files import TensorEntry
from gptq_plugin.checkpoint.formats.format import FLOAT, Format, QuantizedLayer, Read, Scheme, contiguous
from gptq_plugin.device.finite import all_finite, any_nan
from gptq_plugin.layers.packing import unpack_weight, unpack_zeros

FLOATS = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}
_HALF = "F16"
_ALL_0 = ": clients that read it compute other weights than those that do not. If the tool left it empty, remove it"


@dataclass(frozen=True)
class StoredLayer:
    """A layer's tensors in the files.

    Attributes:
        name: The layer's.
        format: How it is stored.
        entries: Its tensors, by suffix.
        read: Reads one, by suffix.
    """

    name: str
    format: Format
    entries: Mapping[str, TensorEntry]
    read: Read


def described_layer(stored: StoredLayer, scheme: Scheme, problems: list[str]) -> QuantizedLayer | None:
    """Returns the layer as the description and its tensors have it.

    Args:
        stored: Its tensors, all that the format needs among them.
        scheme: Its description.
        problems: Gets a sentence for everything that does not fit; the layer is then None.
    """
    found = list(_wrong_kinds(stored, scheme))
    if found:
        problems += found
        return None
    shapes = {suffix: entry.shape for suffix, entry in stored.entries.items()}
    try:
        in_features, out_features = stored.format.sizes(shapes, scheme.bits, stored.read)
    except ValueError as error:
        problems.append(f"{stored.name}: {error}")
        return None
    if in_features < 1 or out_features < 1:
        problems.append(f"{stored.name} has {in_features} inputs and {out_features} outputs")
        return None
    groups = 1 if scheme.group_size == -1 else -(-in_features // scheme.group_size)
    layer = QuantizedLayer(
        stored.name,
        scheme.bits,
        scheme.group_size,
        in_features,
        out_features,
        groups,
        stored.format.g_idx in stored.entries,
        "bias" in stored.entries,
        scheme.sym,
        scheme.desc_act,
    )
    found = list(_wrong_shapes(stored, layer)) or list(_wrong_values(stored, layer))
    problems += found
    return None if found else layer


def _wrong_kinds(stored: StoredLayer, scheme: Scheme) -> Iterator[str]:
    kinds = stored.format.expected(1, 1, 1, scheme.bits, scheme.sym)
    for suffix, entry in stored.entries.items():
        if suffix not in kinds:
            yield f"{stored.name}.{suffix} is stored, and the description has sym=True ({entry.file.name})"
            continue
        kind, dimensions = kinds[suffix][0], len(kinds[suffix][1])
        if (FLOAT if entry.dtype in FLOATS else entry.dtype) != kind:
            yield f"{stored.name}.{suffix} is {entry.dtype}, not {kind} ({entry.file.name})"
        elif len(entry.shape) != dimensions:
            yield f"{stored.name}.{suffix} has shape {list(entry.shape)}, not {dimensions} dimensions"


def _wrong_shapes(stored: StoredLayer, layer: QuantizedLayer) -> Iterator[str]:
    name, layout = stored.name, stored.format
    expected = layout.expected(layer.in_features, layer.out_features, layer.groups, layer.bits, layer.sym)
    for suffix, (_, shape) in expected.items():
        entry = stored.entries.get(suffix)
        if entry is None:
            if suffix not in (layout.g_idx, "bias"):
                yield f"{name}.{suffix} is missing, and the description has sym=False"
        elif entry.shape != shape:
            yield (
                f"{name}.{suffix} has shape {list(entry.shape)}; bits={layer.bits}, group_size={layer.group_size} with "
                f"{layer.in_features} inputs and {layer.out_features} outputs needs {list(shape)} ({entry.file.name})"
                + layout.hint(suffix, entry.shape, layer.in_features, layer.bits)
            )
    if not layer.has_g_idx and layer.groups > 1 and layer.desc_act:
        yield f"{name}.{layout.g_idx} is missing, and with desc_act=true the groups cannot be told without it"


def damage_of(name: str, value: Tensor) -> str:
    """Tells what a tensor that is not quantized must not hold and does, "NaN" or "infinity"; empty if nothing.

    Masks may hold infinity, and have other names than weights and biases.
    """
    if any_nan(value):
        return "NaN"
    return "infinity" if name.endswith(("weight", "bias")) and not all_finite(value) else ""


def _wrong_values(stored: StoredLayer, layer: QuantizedLayer) -> Iterator[str]:
    g_idx, scales = (f"{stored.name}.{suffix}" for suffix in (stored.format.g_idx, stored.format.scales))
    entry = stored.entries.get(stored.format.g_idx)
    if entry is not None:
        low, high = (int(value) for value in stored.read(stored.format.g_idx).aminmax())
        if low < 0 or high >= layer.groups:
            yield (
                f"{g_idx} holds values from {low} to {high}; with {layer.groups} groups they must lie in "
                f"0..{layer.groups - 1} ({entry.file.name})"
            )
            return
        found = stored.read(stored.format.g_idx)
        counts = found.bincount()
        size, most = layer.group_size, int(counts.max())
        if size != -1 and most > size:
            yield (
                f"{g_idx} puts {most} channels into group {int(counts.argmax())}, and a group has group_size={size} "
                f"({entry.file.name})" + (_ALL_0 if most == layer.in_features else "")
            )
            return
        if not layer.desc_act and not contiguous(found, size):
            act_order = stored.format.act_order
            yield (
                f"{g_idx} puts channels into other groups than i // group_size, as only {act_order} allows: clients "
                "that go by the description compute other weights than those that read it. If the layer was quantized "
                f"in act-order, state {act_order} ({entry.file.name})"
            )
            return
    if layer.has_bias and not all_finite(stored.read("bias")):
        yield f"{stored.name}.bias holds NaN or infinity ({stored.entries['bias'].file.name})"
    entry, values = stored.entries[stored.format.scales], stored.read(stored.format.scales)
    if not all_finite(values):
        yield f"{scales} holds NaN or infinity ({entry.file.name})"
    elif entry.dtype != _HALF and not torch.equal(values.half().to(values.dtype), values):
        yield f"{scales} is {entry.dtype} with values float16 cannot hold ({entry.file.name})"
    elif bool((values < 0).any()):
        yield f"{scales} holds negative values, which no quantizer writes ({entry.file.name})"
    else:
        yield from _wrong_grid(stored, layer, entry.file.name)


def _wrong_grid(stored: StoredLayer, layer: QuantizedLayer, file: str) -> Iterator[str]:
    """Zeros that are not symmetric where that is promised, and codes whose scale is 0."""
    read = stored.format.from_file(stored.read, replace(layer, has_bias=False)) if _needs_codes(stored, layer) else None
    if read is None:
        return
    zeros = unpack_zeros(read["qzeros"], layer.bits, layer.out_features)
    middle = 2 ** (layer.bits - 1)
    wrong = zeros[zeros != middle]
    if layer.sym and len(wrong):
        value = int(wrong.mode().values)
        yield (
            f"{stored.name}: sym=True promises zeros of {middle}, and most others are {value}"
            + stored.format.zeros_hint(value - middle)
            + ": weights are off by whole steps. Correct sym, or the format"
        )
    elif bool((read["scales"] == 0).any()):
        codes = unpack_weight(read["qweight"], layer.bits, layer.in_features)  # [out, in]
        group = read["g_idx"].long()
        lost = (read["scales"] == 0).T[:, group] & (codes != zeros.T[:, group])
        if bool(lost.any()):
            yield f"{stored.name}.{stored.format.scales} is 0 for weights whose codes are not ({file})"


def _needs_codes(stored: StoredLayer, layer: QuantizedLayer) -> bool:
    """True if zeros or scales are such that they must be looked at one by one."""
    if bool((stored.read(stored.format.scales) == 0).any()):
        return True
    return layer.sym and not stored.format.has_symmetric_zeros(stored.read, layer)
