"""GPTQ's two formats, ``gptq`` (v1, AutoGPTQ's) and ``gptq_v2`` (GPTQModel's), which differ in the zeros alone.

With b bits and G groups, a layer NAME is stored in int32 words as

- NAME.qweight [in·b/32, out],
- NAME.qzeros [G, out·b/32]: in v1 less one, in v2 as they are,
- NAME.scales [G, out],
- NAME.g_idx [in], and a bias [out] where there is one.

Codes and zeros are little-endian bit streams (`packing`). A description's own fields hold for every layer, with the
first ``dynamic`` rule whose regular expression matches its name on top (GPTQModel).
"""

from __future__ import annotations

import re
from collections import ChainMap
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptq_plugin.checkpoint.formats.dynamic_rules import rules_in_any_order
from gptq_plugin.checkpoint.formats.format import (
    FLOAT,
    INT32,
    Contents,
    Format,
    QuantizedLayer,
    RawRows,
    Read,
    Scheme,
    Shapes,
    check_expressions,
    trivial_g_idx,
)
from gptq_plugin.config import QuantizeConfig
from gptq_plugin.errors import CheckpointError, ExportError
from gptq_plugin.kernels.reference import words_for
from gptq_plugin.layers.packing import add_to_zeros, are_all, are_symmetric, unpack_zeros
from gptq_plugin.options.fields import shown
from gptq_plugin.options.rules import RuleTable, rule_regex


class GPTQ(Format):
    """``gptq`` or ``gptq_v2``.

    Args:
        name: One of the two.
        less: Is subtracted from a zero before it is stored.
    """

    quant_method = "gptq"
    marks = ("qweight", "qzeros", "g_idx")
    needed = ("qweight", "qzeros", "scales")
    suffixes = ("qweight", "qzeros", "scales", "g_idx", "bias")
    codes, scales, zeros, g_idx = "qweight", "scales", "qzeros", "g_idx"
    in_memory = ("qweight", "scales", "g_idx", "bias")
    always_g_idx = float16_scales = has_rules = True
    repeated = ("quant_method", "bits", "group_size", "desc_act", "sym", "checkpoint_format", "format", "lm_head")

    def __init__(self, name: str, less: int) -> None:
        self.name = name
        self._less = less

    def sizes(self, shapes: Mapping[str, tuple[int, ...]], bits: int, read: Read) -> tuple[int, int]:
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
        return {**tensors, "qzeros": self.zeros_to_file(tensors["qzeros"], bits, out_features)}

    def from_file(self, read: Read, layer: QuantizedLayer) -> dict[str, Tensor]:
        return {
            "qweight": read("qweight"),
            "qzeros": self.zeros_from_file(read("qzeros"), layer.bits, layer.out_features),
            "scales": read("scales").to(torch.float16),
            "g_idx": read("g_idx") if layer.has_g_idx else trivial_g_idx(layer.in_features, layer.group_size),
            **({"bias": read("bias")} if layer.has_bias else {}),
        }

    def zeros_to_file(self, qzeros: Tensor, bits: int, out_features: int) -> Tensor:
        """Converts packed true zeros, int32 [G, ceil(out_features * bits / 32)], to those stored.

        Raises:
            ExportError: A zero is 0, which v1 cannot hold: readers treat the -1 differently, and some corrupt
                neighbours.
        """
        if not self._less:
            return qzeros
        symmetric = are_symmetric(qzeros, bits, out_features)
        empty = 0 if symmetric else int((unpack_zeros(qzeros, bits, out_features) == 0).sum())
        if empty:
            raise ExportError(
                f"{empty} of {len(qzeros) * out_features} zeros are 0, and checkpoint_format='gptq' (v1) stores "
                "zero - 1, which tools read differently: export with checkpoint_format='gptq_v2' or quantize with "
                "sym=True"
            )
        return add_to_zeros(qzeros, -self._less, bits, out_features)

    def zeros_from_file(self, stored: Tensor, bits: int, out_features: int) -> Tensor:
        """The inverse of `zeros_to_file`; a v1 value of 2^bits - 1 is read as a zero of 0 (-1 in `bits` bits)."""
        if not self._less:
            return stored
        return add_to_zeros(stored, self._less, bits, out_features)

    def has_symmetric_zeros(self, read: Read, layer: QuantizedLayer) -> bool:
        return are_all(read(self.zeros), 2 ** (layer.bits - 1) - self._less, layer.bits, layer.out_features)

    def zeros_hint(self, off: int) -> str:
        if off == -1 and not self._less:
            return ", as in a gptq (v1) file labelled gptq_v2"
        if off == 1 and self._less:
            return ", as in a gptq_v2 file labelled gptq (v1)"
        return ""

    def first_rows(self, read: Read, layer: QuantizedLayer, rows: int) -> RawRows:
        words = -(-rows * layer.bits // 32)
        return RawRows(
            codes=read("qweight")[:, :rows].T,
            scales=read("scales")[:, :rows].T,
            zeros=read("qzeros")[:, :words],
            less=self._less,
            group_of=read("g_idx") if layer.has_g_idx else None,
        )

    def stated(self, quantization: Mapping[str, Any], source: Path) -> str:
        """AutoGPTQ's files predate the key and are v1; `format` is GPTQModel's alias of it."""
        packing = quantization.get("pack_dtype", "int32")
        if packing not in ("int32", "torch.int32"):
            raise CheckpointError(f"{source}: pack_dtype is {shown(packing)}; this package reads int32 words")
        dynamic = quantization.get("dynamic") or {}
        if not isinstance(dynamic, dict):
            raise CheckpointError(f"{source}: dynamic must map regular expressions to overrides")
        check_expressions((rule_regex(pattern) for pattern in dynamic), f"{source}: dynamic")
        names = [quantization[key] for key in ("checkpoint_format", "format") if quantization.get(key)]
        if quantization.get("is_marlin_format"):
            names.append("marlin")
        if len(set(names)) > 1:
            raise CheckpointError(
                f"{source}: checkpoint_format and format disagree ({' and '.join(map(shown, names))}), and the "
                "zeros of one read as the other are off by one: correct the wrong one"
            )
        return names[0] if names else "gptq"

    def contradiction(self, inside: Mapping[str, Any], beside: Mapping[str, Any]) -> str | None:
        """optimum 2.3.0's `GPTQQuantizer.save` writes v1 zeros, and states v1 in quantize_config.json only."""
        one, other = (content.get("checkpoint_format") or content.get("format") for content in (inside, beside))
        if not one or not other or one == other:
            return None
        return (
            f"has the format {shown(one)} and quantize_config.json has {shown(other)}, and the zeros of one read as "
            "the other are off by one. Correct the wrong one: symmetric zeros are stored as 2^(bits-1) - 1 in 'gptq' "
            "(0x77777777 at 4 bits) and as 2^(bits-1) in 'gptq_v2' (0x88888888)"
        )

    def fields(self, quantization: Mapping[str, Any]) -> Callable[[str], Scheme]:
        dynamic = quantization.get("dynamic") or {}
        rules = RuleTable(dynamic)

        def of(name: str) -> Scheme:
            first = next(iter(rules.matching(name)), None)
            found = ChainMap({} if first is None else dynamic[first] or {}, quantization)  # type: ignore[arg-type]
            return Scheme(
                found.get("bits"),  # type: ignore[arg-type]
                found.get("group_size", -1),
                bool(found.get("sym", True)),
                bool(found.get("desc_act", False)),
            )

        return of

    def describe(self, contents: Contents, config: QuantizeConfig) -> dict[str, Any]:
        """Only keys that GPTQModel, transformers and vLLM all take.

        Linears left float inside the blocks are told twice: GPTQModel wants ``dynamic`` rules, transformers a list of
        those that are quantized.
        """
        layers, floats = contents.schemes, contents.floats
        dynamic = rules_in_any_order(contents, _grid(vars(config)), config.dynamic)
        description: dict[str, Any] = {
            "quant_method": self.quant_method,
            "bits": config.bits,
            "group_size": config.group_size,
            "desc_act": any(scheme.desc_act for scheme in layers.values()),
            "sym": config.sym,
            "lm_head": contents.head in layers,
            "checkpoint_format": self.name,
            "format": self.name,
            "pack_dtype": "int32",
        }
        if dynamic:
            description["dynamic"] = dynamic
        if floats:
            description["modules_in_block_to_quantize"] = [_kept_suffixes(floats, layers)]
        return description

    def settings(self, description: Mapping[str, Any], config: QuantizeConfig) -> Mapping[str, Any]:
        return description

    def loaded(self, quantization: Mapping[str, Any], contents: Callable[[], Contents]) -> dict[str, Any]:
        changed = {**quantization, "checkpoint_format": "gptq_v2", "format": "gptq_v2"}
        if quantization.get("dynamic"):
            rules = rules_in_any_order(contents(), _grid(quantization), quantization["dynamic"])
            changed["dynamic"] = rules
        return changed


FORMATS = (GPTQ("gptq", 1), GPTQ("gptq_v2", 0))


def _grid(values: Mapping[str, Any]) -> dict[str, Any]:
    """The grid of layers that no rule matches."""
    return {"bits": values.get("bits"), "group_size": values.get("group_size", -1), "sym": values.get("sym", True)}


def _kept_suffixes(floats: list[str], layers: Iterable[str]) -> list[str]:
    """Ends of the quantized layers' names: the part below the block, unless a float layer shares it."""
    suffixes: dict[str, None] = {}
    for name in layers:
        below = re.sub(r"^.*?\.\d+\.", "", name)
        suffixes[name if any(other.endswith(below) for other in floats) else below] = None
    return list(suffixes)
