"""The size of a quantized layer in an exported file, the only definition: `stored_bytes`, `target_bytes`."""

from __future__ import annotations

from collections.abc import Sequence

from gptq_plugin.checkpoint.formats.registry import FORMATS
from gptq_plugin.config import QuantizeConfig
from gptq_plugin.gptq.grid import group_width
from gptq_plugin.model.targets import Target


def stored_bytes(shape: Sequence[int], config: QuantizeConfig) -> int:
    """Bytes that a layer's quantized weight takes in an exported file: its codes, scales and zeros.

    ``compressed-tensors`` stores no zeros of symmetric grids, and none are counted. Not counted either: the bias, which
    stays float, and g_idx and ``weight_shape``, which are the same at all bits and groups. So the bits per weight of a
    grid do not depend on the layer's shape: ``gptq`` takes 4 + (16 + 4) / 128 at 4 bits in groups of 128.

    Every size of quantized layers comes from here: `max_bits`, escalation, coverage, the report's table, page and card.

    Args:
        shape: (out_features, in_features).
        config: The layer's own: bits, group_size, sym and checkpoint_format are read.
    """
    out_features, in_features = shape
    groups = -(-in_features // group_width(in_features, config))
    format_ = FORMATS[config.checkpoint_format]
    return format_.stored_bytes(in_features, out_features, groups, config.bits, config.sym)


def target_bytes(target: Target) -> int:
    """Bytes of a planned layer in an export: of its quantized weight (`stored_bytes`), in all its places."""
    return target.places * stored_bytes(target.shape, target.config)
