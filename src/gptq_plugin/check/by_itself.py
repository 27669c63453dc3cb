"""Faults of a quantized layer that show without its float weight."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from gptq_plugin.check.findings import Finding, error, warning
from gptq_plugin.checkpoint.formats.format import trivial_g_idx
from gptq_plugin.clients.inventory import LayerEntry
from gptq_plugin.layers.packing import unpack_weight, unpack_zeros
from gptq_plugin.layers.qlinear import QuantLinear

# Of |mean(code − zero)| of a layer, in steps: weights average to nearly nothing, and a zero that is off by one to 1. In
# the quantizations of `comparison` it was at most 0.06 at 2 to 4 bits; at 8 bits, where steps are small, 0.48.
_OFF_CENTER = 0.5
_SAMPLED_ROWS = 256
_HUGE = 1000.0  # a scale over the layer's median


def layer_findings(
    entry: LayerEntry, layer: QuantLinear, checkpoint_format: str, *, compared: bool = False
) -> Iterator[Finding]:
    """Compares a layer with its description: zeros, groups, scales, padding and codes.

    Args:
        entry: Its name and grid, as its tensors have them.
        layer: On the CPU, with true zeros.
        checkpoint_format: Of the files.
        compared: With its float weight, which shows whether codes that are unusual are right.
    """
    zeros = unpack_zeros(layer.qzeros, layer.bits, layer.out_features)
    yield from _zeros(entry, zeros, checkpoint_format)
    yield from _groups(entry, layer)
    yield from _scales(layer, zeros)
    yield from _padding(layer)
    if not compared:
        yield from _codes(layer, zeros)


def _zeros(entry: LayerEntry, zeros: Tensor, checkpoint_format: str) -> Iterator[Finding]:
    if not entry.sym and checkpoint_format == "gptq" and bool((zeros == 0).any()):
        yield warning("some zeros are 0, which format gptq (v1) stores as -1, and clients read differently")


def _groups(entry: LayerEntry, layer: QuantLinear) -> Iterator[Finding]:
    counts = torch.bincount(layer.g_idx.long(), minlength=layer.scales.shape[0])
    natural = trivial_g_idx(entry.in_features, entry.group_size)
    if not torch.equal(counts, torch.bincount(natural.long(), minlength=len(counts))):
        yield error("g_idx puts more channels into some groups than group_size allows, and fewer into others")


def _scales(layer: QuantLinear, zeros: Tensor) -> Iterator[Finding]:
    values = layer.scales.float()
    if bool((values == 0).any()):
        yield warning("some scales are 0: their groups are all zeros")
    middle = values.abs().median()
    huge = values.abs() > _HUGE * middle
    rows = huge.any(0).nonzero().flatten()
    if middle > 0 and len(rows):
        group = layer.g_idx.long()
        codes = unpack_weight(layer.qweight[:, rows].contiguous(), layer.bits, layer.in_features)
        used = codes != zeros[:, rows].T[:, group]  # any scale fits a group of zeros
        if bool((used & huge[:, rows].T[:, group]).any()):
            yield warning(f"some scales are more than {_HUGE:.0f} times the layer's median")


def _padding(layer: QuantLinear) -> Iterator[Finding]:
    """Bits after the last code of a stream."""
    used = layer.in_features * layer.bits % 32
    if used and bool((layer.qweight[-1] & ~((1 << used) - 1)).any()):
        yield warning("the bits after the last code are not zero: another packing, or damage")


def _codes(layer: QuantLinear, zeros: Tensor) -> Iterator[Finding]:
    step = -(-layer.out_features // _SAMPLED_ROWS)
    codes = unpack_weight(layer.qweight[:, ::step].contiguous(), layer.bits, layer.in_features)
    if codes.numel() > 1 and bool((codes == codes.flatten()[0]).all()):
        yield warning(
            f"every code is {int(codes.flatten()[0])}: a layer of zeros or of one constant, or a file that was not "
            "written; compare with the float model (--float)"
        )
        return
    mean = float((codes.float() - zeros[:, ::step].float().T[:, layer.g_idx.long()]).mean())
    if layer.bits <= 4 and abs(mean) > _OFF_CENTER:
        yield warning(
            f"codes average {mean:+.1f} from their zeros, where weights average to nearly nothing: zeros off by one "
            "look so; compare with the float model (--float)"
        )
