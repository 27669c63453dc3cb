"""What a checkpoint format defines, `Format`, and the values it speaks in: schemes, layers, contents."""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptq_plugin.config import QuantizeConfig
from gptq_plugin.errors import CheckpointError
from gptq_plugin.kernels.reference import BITS
from gptq_plugin.model.experts import block_of_experts
from gptq_plugin.options.expressions import check_expression, is_name
from gptq_plugin.options.fields import shown

INT32, INT64, FLOAT = "I32", "I64", "floating point"  # safetensors' names; any floating dtype
Shapes = dict[str, tuple[str, tuple[int, ...]]]  # suffix -> kind of dtype, shape
_MOST_EXPRESSIONS, _MOST_LETTERS = 2**14, 2**18  # of a file; parsed in up to six seconds
_WIDE, _DEAR = re.compile(r"[^\x00-\xff]|\\[uUN]"), 1000  # letters beyond Latin-1; in a class they take milliseconds
_ITEM_BYTES = {INT32: 4, FLOAT: 2}  # as written: scales are float16
Read = Callable[[str], Tensor]  # a layer's tensor as stored, by its suffix


@dataclass(frozen=True)
class Scheme:
    """How a module is quantized: fields of `QuantizeConfig`. `desc_act`: its groups need not be contiguous."""

    bits: int
    group_size: int
    sym: bool
    desc_act: bool


@dataclass(frozen=True)
class QuantizedLayer:
    """One quantized Linear of a checkpoint, under the name it has there.

    `sym`: the checkpoint promises a symmetric grid. `desc_act`: its groups need not be contiguous.
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


@dataclass(frozen=True)
class Contents:
    """What a description is made of. A layer whose name in the checkpoint is not the model's has both: clients look for
    either.

    Attributes:
        schemes: Of every quantized layer, by name.
        floats: Linear layers left float, less the output embedding.
        head: Name of the output embedding, or None.
        routers: Of experts, where they are no linear layers. Servers make some of them.
    """

    schemes: Mapping[str, Scheme]
    floats: list[str]
    head: str | None = None
    routers: Sequence[str] = ()

    def units(self) -> dict[str, str]:
        """The name that stands for each layer: its own, or its block of experts' where these are all alike."""
        kinds: dict[str | None, set[Scheme | None]] = defaultdict(set)
        blocks = {name: block_of_experts(name) for name in (*self.schemes, *self.floats)}
        for name, block in blocks.items():
            kinds[block].add(self.schemes.get(name))
        return {name: block if block and len(kinds[block]) == 1 else name for name, block in blocks.items()}


@dataclass(frozen=True)
class RawRows:
    """A layer's first output channels as a file holds them, for a decoder that shares no code with `Format.from_file`.

    Attributes:
        codes: int32 [rows, words], a bit stream along the inputs.
        scales: Floating point [rows, G].
        zeros: int32 [G, words], a bit stream along the outputs; None where 2^(bits-1) is meant.
        less: What is subtracted from a zero before it is stored.
        group_of: int32 [in], the group of each input; None where groups are contiguous.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    less: int
    group_of: Tensor | None


class Format(ABC):
    """One `checkpoint_format`: a layer's tensors in a file, and the ``quantization_config`` that describes them.

    Suffixes are names below the layer's, such as ``"qweight"``.

    Attributes:
        name: The `checkpoint_format`.
        quant_method: That of its descriptions.
        marks: Suffixes that no float layer has.
        needed: Suffixes that every layer has.
        suffixes: All that a layer may have.
        codes, scales, zeros, g_idx: Suffixes of these tensors.
        in_memory: Suffixes that mean the same bytes in a file and in a `QuantLinear`.
        act_order: States that groups need not be contiguous.
        always_g_idx: Writers store a g_idx for every layer; readers of the format expect it.
        float16_scales: Readers of the format expect scales in float16.
        has_rules: A description holds `dynamic` rules.
        repeated: Keys of a description that quantize_config.json repeats for clients that read only that.
    """

    name: str
    quant_method: str
    marks: tuple[str, ...]
    needed: tuple[str, ...]
    suffixes: tuple[str, ...]
    codes: str
    scales: str
    zeros: str
    g_idx: str
    in_memory: tuple[str, ...] = ()
    always_g_idx = False
    act_order = "desc_act=true"
    float16_scales = False
    has_rules = False
    repeated: tuple[str, ...] = ()

    # --- a layer's tensors

    @abstractmethod
    def sizes(self, shapes: Mapping[str, tuple[int, ...]], bits: int, read: Read) -> tuple[int, int]:
        """(in_features, out_features) of a layer, from its tensors' shapes or, where these do not tell, values."""

    @abstractmethod
    def expected(self, in_features: int, out_features: int, groups: int, bits: int, sym: bool) -> Shapes:
        """The kind and shape of each tensor that a layer may have."""

    def hint(self, suffix: str, shape: tuple[int, ...], in_features: int, bits: int) -> str:
        """The end of a sentence about an unexpected shape whose origin is known, or nothing."""
        return ""

    @abstractmethod
    def to_file(self, tensors: Mapping[str, Tensor], bits: int, sym: bool) -> dict[str, Tensor]:
        """Turns a QuantLinear's tensors (qweight, qzeros, scales, g_idx and, where it has one, bias) into those stored.

        Raises:
            ExportError: The format cannot hold them.
        """

    @abstractmethod
    def from_file(self, read: Read, layer: QuantizedLayer) -> dict[str, Tensor]:
        """The inverse of `to_file`."""

    def has_symmetric_zeros(self, read: Read, layer: QuantizedLayer) -> bool:
        """True if every stored zero of a layer is 2^(bits-1), as far as words tell; if False, zeros are decoded."""
        return False

    def zeros_hint(self, off: int) -> str:
        """A part of a sentence about symmetric zeros that are off by this much, where the origin is known."""
        return ""

    @abstractmethod
    def first_rows(self, read: Read, layer: QuantizedLayer, rows: int) -> RawRows:
        """Cuts `rows` output channels out of a layer, at most as many as it has; shares no code with `from_file`."""

    def stored_bytes(self, in_features: int, out_features: int, groups: int, bits: int, sym: bool) -> int:
        """Bytes of the codes, scales and zeros that `to_file` gives; see `sizes.stored_bytes`."""
        expected = self.expected(in_features, out_features, groups, bits, sym)
        counted = (expected[suffix] for suffix in (self.codes, self.scales, self.zeros) if suffix in expected)
        return sum(_ITEM_BYTES[kind] * math.prod(shape) for kind, shape in counted)

    # --- the description

    @abstractmethod
    def stated(self, quantization: Mapping[str, Any], source: Path) -> str:
        """Checks a description with this `quant_method`, and returns the `checkpoint_format` it states.

        Raises:
            CheckpointError: It contradicts itself, or describes what this package does not read.
        """

    def contradiction(self, inside: Mapping[str, Any], beside: Mapping[str, Any]) -> str | None:
        """Returns how the description in config.json and quantize_config.json contradict each other, or None."""
        return None

    def schemes(self, quantization: Mapping[str, Any]) -> Callable[[str], Scheme]:
        """Returns a function that tells, by name, how a quantized module is described.

        It raises ValueError where a module is not described at all, or with values that cannot be.
        """
        fields = self.fields(quantization)
        return lambda name: _possible(fields(name))

    @abstractmethod
    def fields(self, quantization: Mapping[str, Any]) -> Callable[[str], Scheme]:
        """The same with whatever values the description has."""

    def left_float(self, quantization: Mapping[str, Any]) -> Callable[[str], bool]:
        """Returns a function that tells, by name, whether a description has a module among those left float."""
        return lambda name: False

    @abstractmethod
    def describe(self, contents: Contents, config: QuantizeConfig) -> dict[str, Any]:
        """The ``quantization_config`` of these contents.

        Args:
            contents: What is quantized, and how.
            config: bits, group_size, sym and dynamic are read.
        """

    @abstractmethod
    def settings(self, description: Mapping[str, Any], config: QuantizeConfig) -> Mapping[str, Any]:
        """How the layers are quantized, in `QuantizeConfig`'s terms, for people.

        Args:
            description: What `describe` made.
            config: What the layers were quantized with.

        Returns:
            bits, group_size, sym, desc_act, lm_head, checkpoint_format and, where there are rules, dynamic.
        """

    def loaded(self, quantization: Mapping[str, Any], contents: Callable[[], Contents]) -> dict[str, Any] | None:
        """The description of the layers once they are in memory, where `save_pretrained` writes gptq_v2.

        Args:
            quantization: The description that was loaded.
            contents: Called for the contents of the model.

        Returns:
            None where it must be made anew from the layers.
        """
        return None


def _possible(scheme: Scheme) -> Scheme:
    """The scheme.

    Raises:
        ValueError: No module can be quantized so.
    """
    if type(scheme.bits) is not int or scheme.bits not in BITS:
        raise ValueError(f"bits is {shown(scheme.bits)}; it must be one of {', '.join(map(str, BITS))}")
    size = scheme.group_size
    if not isinstance(size, int) or isinstance(size, bool) or (size < 1 and size != -1):
        raise ValueError(f"group_size is {shown(size)}; it must be -1 or a positive integer")
    return scheme


def check_expressions(expressions: Iterable[str], where: str) -> None:
    """Checks regular expressions of a file.

    Args:
        expressions: Any number of escaped names, and as many others as are parsed in seconds.
        where: File and field.

    Raises:
        CheckpointError: There are too many, or one is none (`check_expression`).
    """
    parsed = [expression for expression in expressions if not is_name(expression)]
    letters = sum(len(one) + _DEAR * len(_WIDE.findall(one)) for one in parsed)
    if len(parsed) > _MOST_EXPRESSIONS or letters > _MOST_LETTERS:
        raise CheckpointError(
            f"{where}: {len(parsed):,} regular expressions that are no escaped names, of {letters:,} letters; at most "
            f"{_MOST_EXPRESSIONS:,} of {_MOST_LETTERS:,} letters are read. Write fewer or shorter ones, or names with "
            "their dots escaped"
        )
    for expression in parsed:
        try:
            check_expression(expression)
        except ValueError as error:
            raise CheckpointError(f"{where}: {error}") from error


def trivial_g_idx(in_features: int, group_size: int, device: torch.device | None = None) -> Tensor:
    """int32 [in_features]: contiguous groups, i // group_size; all 0 for group_size -1."""
    return torch.arange(in_features, dtype=torch.int32, device=device) // (
        group_size if group_size > 0 else in_features
    )


def contiguous(g_idx: Tensor, group_size: int) -> bool:
    """True if input channel i is in group i // group_size, so that no client needs the g_idx."""
    return torch.equal(g_idx, trivial_g_idx(len(g_idx), group_size, g_idx.device))
