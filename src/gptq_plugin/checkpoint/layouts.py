"""A quantized layer's tensors in a file, in each `checkpoint_format`, and as `QuantLinear` holds them.

All three formats store the same codes as the same little-endian bit stream (`packing`); they differ in names, in
orientation and in the zeros:

==================  ======================================================================  ================
checkpoint_format   tensors of NAME                                                         zeros
==================  ======================================================================  ================
gptq (v1)           qweight [in·b/32, out], qzeros [G, out·b/32], scales [G, out], g_idx    stored minus one
gptq_v2             the same                                                                as they are
compressed-tensors  weight_packed [out, in·b/32], weight_zero_point [out·b/32, G] (only     as they are
                    asymmetric), weight_scale [out, G], weight_shape int64 [out, in]
==================  ======================================================================  ================

with b bits, G groups, and a bias [out] in each. Words are int32. The third is ``pack-quantized`` as the library
compressed-tensors 0.19 writes it; before 0.18 it put ten 3-bit codes into a word, which is refused, and knew act-order
with groups along it (``weight_g_idx``), which is read and not written.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gptq_plugin.config import QuantizeConfig
from gptq_plugin.errors import ExportError
from gptq_plugin.gptq.grid import group_width
from gptq_plugin.kernels.reference import words_for
from gptq_plugin.layers.packing import pack_zeros, zeros_from_disk, zeros_to_disk

INT32, INT64, FLOAT = "I32", "I64", "floating point"  # safetensors' names; any floating dtype
Shapes = dict[str, tuple[str, tuple[int, ...]]]  # suffix -> kind of dtype, shape
_ITEM_BYTES = {INT32: 4, FLOAT: 2}  # as written: scales are float16


@dataclass(frozen=True)
class QuantizedLayer:
    """One quantized Linear of a checkpoint, under the name it has there.

    `sym` says that the checkpoint promises a symmetric grid; `desc_act` that groups need not be contiguous.
    """

    name: str
    bits: int
    group_size: int
    in_features: int
    out_features: int
    groups: int
    has_g_idx: bool
    has_bias: bool
    sym: bool
    desc_act: bool


class Layout(ABC):
    """One format's way to store a layer. Suffixes are names below the layer's, such as ``"qweight"``."""

    marks: tuple[str, ...]  # no float layer has a tensor of such a name
    needed: tuple[str, ...]  # tensors that every layer has
    suffixes: tuple[str, ...]  # all that a layer may have
    codes: str  # suffixes of the codes, the scales and the zeros
    scales: str
    zeros: str
    g_idx: str

    @abstractmethod
    def sizes(self, shapes: Mapping[str, tuple[int, ...]], bits: int, read: Callable[[str], Tensor]) -> tuple[int, int]:
        """(in_features, out_features) of a layer, from its tensors' shapes or, where that does not tell, values."""

    @abstractmethod
    def expected(self, in_features: int, out_features: int, groups: int, bits: int, sym: bool) -> Shapes:
        """What each tensor must be; one that is not named here must not be there."""

    def hint(self, suffix: str, shape: tuple[int, ...], in_features: int, bits: int) -> str:
        """What another shape than the expected one may come from: a sentence's end, or nothing."""
        return ""

    @abstractmethod
    def to_file(self, tensors: Mapping[str, Tensor], bits: int, sym: bool) -> dict[str, Tensor]:
        """A QuantLinear's tensors (qweight, qzeros, scales, g_idx and, where it has one, bias) as they are stored.

        Raises:
            ExportError: The format cannot hold them.
        """

    @abstractmethod
    def from_file(self, read: Callable[[str], Tensor], layer: QuantizedLayer) -> dict[str, Tensor]:
        """The inverse: the tensors of a QuantLinear, from `read`, which gives those stored by their suffix."""

    def stored_bytes(self, in_features: int, out_features: int, groups: int, bits: int, sym: bool) -> int:
        """Bytes of the codes, scales and zeros that `to_file` gives; see `stored_bytes`."""
        expected = self.expected(in_features, out_features, groups, bits, sym)
        counted = (expected[suffix] for suffix in (self.codes, self.scales, self.zeros) if suffix in expected)
        return sum(_ITEM_BYTES[kind] * math.prod(shape) for kind, shape in counted)


class GPTQ(Layout):
    """``gptq`` and ``gptq_v2``."""

    marks = ("qweight", "qzeros", "g_idx")
    needed = ("qweight", "qzeros", "scales")
    suffixes = ("qweight", "qzeros", "scales", "g_idx", "bias")
    codes, scales, zeros, g_idx = "qweight", "scales", "qzeros", "g_idx"

    def __init__(self, checkpoint_format: str) -> None:
        self._format = checkpoint_format

    def sizes(self, shapes: Mapping[str, tuple[int, ...]], bits: int, read: Callable[[str], Tensor]) -> tuple[int, int]:
        rows, out_features = shapes["qweight"]
        return (shapes["g_idx"][0] if "g_idx" in shapes else rows * 32 // bits), out_features

    def expected(self, in_features: int, out_features: int, groups: int, bits: int, sym: bool) -> Shapes:
        return {
            "qweight": (INT32, (words_for(in_features, bits), out_features)),
            "qzeros": (INT32, (groups, words_for(out_features, bits))),
            "scales": (FLOAT, (groups, out_features)),
            "g_idx": (INT32, (in_features,)),
            "bias": (FLOAT, (out_features,)),
        }

    def to_file(self, tensors: Mapping[str, Tensor], bits: int, sym: bool) -> dict[str, Tensor]:
        out_features = tensors["scales"].shape[1]
        return {**tensors, "qzeros": zeros_to_disk(tensors["qzeros"], bits, out_features, self._format)}

    def from_file(self, read: Callable[[str], Tensor], layer: QuantizedLayer) -> dict[str, Tensor]:
        return {
            "qweight": read("qweight"),
            "qzeros": zeros_from_disk(read("qzeros"), layer.bits, layer.out_features, self._format),
            "scales": read("scales").to(torch.float16),
            "g_idx": read("g_idx") if layer.has_g_idx else trivial_g_idx(layer.in_features, layer.group_size),
            **({"bias": read("bias")} if layer.has_bias else {}),
        }


class CompressedTensors(Layout):
    """``compressed-tensors``, which is its pack-quantized."""

    marks = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx")
    needed = ("weight_packed", "weight_scale", "weight_shape")
    suffixes = (*marks, "bias")
    codes, scales, zeros, g_idx = "weight_packed", "weight_scale", "weight_zero_point", "weight_g_idx"

    def sizes(self, shapes: Mapping[str, tuple[int, ...]], bits: int, read: Callable[[str], Tensor]) -> tuple[int, int]:
        out_features, in_features = read("weight_shape").tolist()
        return in_features, out_features

    def expected(self, in_features: int, out_features: int, groups: int, bits: int, sym: bool) -> Shapes:
        expected: Shapes = {
            "weight_packed": (INT32, (out_features, words_for(in_features, bits))),
            "weight_scale": (FLOAT, (out_features, groups)),
            "weight_shape": (INT64, (2,)),
            "weight_g_idx": (INT32, (in_features,)),
            "bias": (FLOAT, (out_features,)),
        }
        if not sym:
            expected["weight_zero_point"] = (INT32, (words_for(out_features, bits), groups))
        return expected

    def hint(self, suffix: str, shape: tuple[int, ...], in_features: int, bits: int) -> str:
        if suffix == "weight_packed" and shape[1] == -(-in_features // (32 // bits)):
            return f": written by compressed-tensors before 0.18, {32 // bits} codes a word; compress the model anew"
        return ""

    def to_file(self, tensors: Mapping[str, Tensor], bits: int, sym: bool) -> dict[str, Tensor]:
        groups, out_features = tensors["scales"].shape
        in_features = len(tensors["g_idx"])
        if in_features % groups:
            raise ExportError(
                f"its {in_features} inputs are no multiple of its group size, which compressed-tensors asks for; "
                "export with checkpoint_format='gptq'"
            )
        if not contiguous(tensors["g_idx"], in_features // groups):
            raise ExportError(
                "its groups are not contiguous (desc_act=True without static_groups), which compressed-tensors cannot "
                "hold; export with checkpoint_format='gptq', or quantize with desc_act=False"
            )
        stored = {
            "weight_packed": tensors["qweight"].t().contiguous(),
            "weight_scale": tensors["scales"].t().contiguous(),
            "weight_shape": torch.tensor([out_features, in_features]),
        }
        if not sym:
            stored["weight_zero_point"] = tensors["qzeros"].t().contiguous()
        elif not torch.equal(tensors["qzeros"], symmetric_zeros(bits, groups, out_features)):
            raise ExportError(f"its zeros are not all {2 ** (bits - 1)}, as sym=True promises; give sym=False")
        return {**stored, **({"bias": tensors["bias"]} if "bias" in tensors else {})}

    def from_file(self, read: Callable[[str], Tensor], layer: QuantizedLayer) -> dict[str, Tensor]:
        zeros = (
            symmetric_zeros(layer.bits, layer.groups, layer.out_features)
            if layer.sym
            else read("weight_zero_point").t().contiguous()
        )
        return {
            "qweight": read("weight_packed").t().contiguous(),
            "qzeros": zeros,
            "scales": read("weight_scale").t().to(torch.float16).contiguous(),
            "g_idx": read("weight_g_idx") if layer.has_g_idx else trivial_g_idx(layer.in_features, layer.group_size),
            **({"bias": read("bias")} if layer.has_bias else {}),
        }


LAYOUTS: dict[str, Layout] = {
    "gptq": GPTQ("gptq"),
    "gptq_v2": GPTQ("gptq_v2"),
    "compressed-tensors": CompressedTensors(),
}


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
    layout = LAYOUTS[config.checkpoint_format]
    return layout.stored_bytes(in_features, out_features, groups, config.bits, config.sym)


def symmetric_zeros(bits: int, groups: int, out_features: int) -> Tensor:
    """Packed true zeros of a symmetric grid, int32 [groups, ceil(out_features · bits / 32)]."""
    return pack_zeros(torch.full((groups, out_features), 2 ** (bits - 1), dtype=torch.uint8), bits)


def trivial_g_idx(in_features: int, group_size: int, device: torch.device | None = None) -> Tensor:
    """int32 [in_features]: contiguous groups, i // group_size; all 0 for group_size -1."""
    return torch.arange(in_features, dtype=torch.int32, device=device) // (
        group_size if group_size > 0 else in_features
    )


def contiguous(g_idx: Tensor, group_size: int) -> bool:
    """Whether input channel i is in group i // group_size, so that no client needs the g_idx."""
    return torch.equal(g_idx, trivial_g_idx(len(g_idx), group_size, g_idx.device))
