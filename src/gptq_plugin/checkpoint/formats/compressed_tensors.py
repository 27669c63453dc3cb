"""``compressed-tensors``, which is that library's pack-quantized, as version 0.19 writes it.

With b bits and G groups, a layer NAME is stored in int32 words as

- NAME.weight_packed [out, in·b/32],
- NAME.weight_scale [out, G],
- NAME.weight_zero_point [out·b/32, G], where the grid is asymmetric,
- NAME.weight_shape, int64 [out, in], and a bias [out] where there is one.

Codes and zeros are the bit streams of GPTQ's formats (`packing`). Before 0.18 the library put ten 3-bit codes into a
word, which is refused, and had groups in act-order (``weight_g_idx``), which are read and not written.

For a module counts the config group with a target that is its name, else one whose regular expression (``re:``) matches
it, else one that is a class, such as ``Linear``.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptq_plugin.checkpoint.formats.format import (
    FLOAT,
    INT32,
    INT64,
    Contents,
    Format,
    QuantizedLayer,
    RawRows,
    Read,
    Scheme,
    Shapes,
    check_expressions,
    contiguous,
    trivial_g_idx,
)
from gptq_plugin.config import COMPRESSED, QuantizeConfig
from gptq_plugin.errors import CheckpointError, ExportError
from gptq_plugin.kernels.reference import words_for
from gptq_plugin.layers.packing import pack_zeros
from gptq_plugin.model.experts import block_of_experts
from gptq_plugin.options.expression_table import ExpressionTable
from gptq_plugin.options.fields import shown

_PACKED = "pack-quantized"


class CompressedTensors(Format):
    """``compressed-tensors``."""

    name = quant_method = COMPRESSED
    marks = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx")
    needed = ("weight_packed", "weight_scale", "weight_shape")
    suffixes = (*marks, "bias")
    codes, scales, zeros, g_idx = "weight_packed", "weight_scale", "weight_zero_point", "weight_g_idx"
    # llm-compressor computes scales in the model's dtype and stores them so; its readers do not read the other file.
    float16_scales, repeated = False, ()
    act_order = "actorder=group"

    def sizes(self, shapes: Mapping[str, tuple[int, ...]], bits: int, read: Read) -> tuple[int, int]:
        if shapes["weight_shape"] != (2,):
            raise ValueError(f"weight_shape has shape {list(shapes['weight_shape'])}, not [2]")
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
        size = int((tensors["g_idx"] == 0).sum())
        if size * groups != in_features and contiguous(tensors["g_idx"], size):
            raise ExportError(
                f"its {in_features} inputs are no multiple of its group size, {size}, which compressed-tensors asks "
                "for; export with checkpoint_format='gptq'"
            )
        if not contiguous(tensors["g_idx"], size):
            raise ExportError(
                "its groups are not contiguous (desc_act=True without static_groups), which compressed-tensors cannot "
                "hold; export with checkpoint_format='gptq', or quantize with desc_act=False"
            )
        stored = {
            "weight_packed": tensors["qweight"].t().contiguous(),
            "weight_scale": tensors["scales"].t().contiguous(),
            "weight_shape": torch.tensor([out_features, in_features], device="cpu"),
        }
        if not sym:
            stored["weight_zero_point"] = tensors["qzeros"].t().contiguous()
        elif not torch.equal(tensors["qzeros"], _symmetric_zeros(bits, groups, out_features)):
            raise ExportError(f"its zeros are not all {2 ** (bits - 1)}, as sym=True promises; give sym=False")
        return {**stored, **({"bias": tensors["bias"]} if "bias" in tensors else {})}

    def from_file(self, read: Read, layer: QuantizedLayer) -> dict[str, Tensor]:
        zeros = (
            _symmetric_zeros(layer.bits, layer.groups, layer.out_features)
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

    def has_symmetric_zeros(self, read: Read, layer: QuantizedLayer) -> bool:
        return True  # none are stored

    def first_rows(self, read: Read, layer: QuantizedLayer, rows: int) -> RawRows:
        words = -(-rows * layer.bits // 32)
        return RawRows(
            codes=read("weight_packed")[:rows],
            scales=read("weight_scale")[:rows],
            zeros=None if layer.sym else read("weight_zero_point")[:words].T,
            less=0,
            group_of=read("weight_g_idx") if layer.has_g_idx else None,
        )

    def stated(self, quantization: Mapping[str, Any], source: Path) -> str:
        """Refuses everything but weights of a few bits, packed."""
        groups = quantization.get("config_groups")
        if not isinstance(groups, dict) or not groups or not all(isinstance(group, dict) for group in groups.values()):
            raise CheckpointError(
                f"{source}: config_groups must describe how modules are quantized, got {shown(groups)}"
            )
        for key, group in groups.items():
            problems = list(_group_problems(group, quantization.get("format")))
            if problems:
                raise CheckpointError(
                    f"{source}: config_groups[{shown(key)}]: {'; '.join(problems)}. Load it with transformers"
                )
        targets = (target for group in groups.values() for target in group["targets"])
        check_expressions(_expressions(targets), f"{source}: targets")
        sparsity = quantization.get("sparsity_config") or {}
        if sparsity.get("format", "dense") != "dense" or quantization.get("transform_config"):
            raise CheckpointError(
                f"{source}: sparse or transformed weights are not read by this package: use transformers"
            )
        check_expressions(_expressions(quantization.get("ignore") or ()), f"{source}: ignore")
        return self.name

    def fields(self, quantization: Mapping[str, Any]) -> Callable[[str], Scheme]:
        groups = _Groups(list(quantization["config_groups"].values()))

        def of(name: str) -> Scheme:
            weights = groups.weights(name)
            size = weights.get("group_size")
            return Scheme(
                weights.get("num_bits"),  # type: ignore[arg-type]
                -1 if weights.get("strategy") == "channel" or size is None else size,
                bool(weights.get("symmetric", True)),
                weights.get("actorder") in ("group", "dynamic", True),
            )

        return of

    def left_float(self, quantization: Mapping[str, Any]) -> Callable[[str], bool]:
        ignored = quantization.get("ignore") or ()
        names, expressions = set(ignored), ExpressionTable(_expressions(ignored), "ignore")
        return lambda name: name in names or bool(expressions.matching(name))

    def describe(self, contents: Contents, config: QuantizeConfig) -> dict[str, Any]:
        """A config group for each way a layer is quantized; the most common one takes every ``Linear`` that is not
        named otherwise, since clients give a name precedence over a class. Float layers are all named in ``ignore``."""
        schemes = contents.schemes
        # transformers takes the first group's for all experts (get_experts_scheme).
        counts = Counter(schemes.values())
        of_experts = {scheme for name, scheme in schemes.items() if block_of_experts(name)}
        kinds = sorted(counts, key=lambda kind: (kind not in of_experts, -counts[kind]))
        groups = {
            f"group_{i}": {
                "targets": ["Linear"] if i == 0 else [name for name, scheme in schemes.items() if scheme == kind],
                "format": _PACKED,
                "weights": _weights_entry(kind),
                "input_activations": None,
                "output_activations": None,
            }
            for i, kind in enumerate(kinds)
        }
        head = [contents.head] if contents.head is not None and contents.head not in schemes else []
        return {
            "quant_method": self.quant_method,
            "format": _PACKED,
            "quantization_status": "compressed",
            "config_groups": groups,
            "ignore": [*_ignored(contents), *contents.routers, *head],
        }

    def settings(self, description: Mapping[str, Any], config: QuantizeConfig) -> Mapping[str, Any]:
        return {
            "bits": config.bits,
            "group_size": config.group_size,
            "sym": config.sym,
            "desc_act": False,
            "lm_head": config.lm_head,
            "checkpoint_format": self.name,
            "dynamic": config.dynamic,
        }


FORMATS = (CompressedTensors(),)


def _symmetric_zeros(bits: int, groups: int, out_features: int) -> Tensor:
    """Packed true zeros of a symmetric grid, int32 [groups, ceil(out_features · bits / 32)]."""
    return pack_zeros(torch.full((groups, out_features), 2 ** (bits - 1), dtype=torch.uint8, device="cpu"), bits)


def _group_problems(group: Mapping[str, Any], overall: Any) -> Iterator[str]:
    """Yields what this package cannot read of a config group; `overall` is the description's format."""
    weights = group.get("weights")
    stated = group.get("format") or overall
    if stated != _PACKED:
        yield f"format is {shown(stated)}; this package reads {_PACKED!r}"
    if not isinstance(weights, dict):
        yield "weights are not quantized"
    elif weights.get("type", "int") != "int" or weights.get("dynamic"):
        yield f"weights are {shown(weights.get('type'))}, dynamic {shown(weights.get('dynamic'))}, not ints"
    elif weights.get("strategy") not in (None, "group", "channel"):
        yield f"strategy is {shown(weights['strategy'])}; this package reads 'group' and 'channel'"
    if group.get("input_activations") or group.get("output_activations"):
        yield "activations are quantized too"
    targets = group.get("targets")
    if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
        yield f"targets must be a list of names, got {shown(targets)}"


class _Groups:
    """Config groups by what they are for: names, else expressions, else a class. Of several the first counts."""

    def __init__(self, groups: Sequence[Mapping[str, Any]]) -> None:
        self._by_name = {target: group for group in reversed(groups) for target in group["targets"]}
        matched = [(expression, group) for group in groups for expression in _expressions(group["targets"])]
        self._table = ExpressionTable([expression for expression, _ in matched], "targets")
        self._by_place = [group for _, group in matched]
        self._by_class = next((group for group in groups if _has_class(group["targets"])), None)

    def weights(self, name: str) -> Mapping[str, Any]:
        """The ``weights`` that count for a module.

        Raises:
            ValueError: No group is for it, or expressions take too long to be matched (`ExpressionTable`).
        """
        group = self._by_name.get(name)
        if group is None:
            group = next((self._by_place[place] for place in self._table.matching(name)), self._by_class)
        if group is None:
            raise ValueError("no config group has a target that matches it")
        found: Mapping[str, Any] = group["weights"]
        return found


def _expressions(entries: Iterable[str]) -> list[str]:
    """The regular expressions among names."""
    return [entry[3:] for entry in entries if entry.startswith("re:")]


def _has_class(targets: Iterable[str]) -> bool:
    return any(not target.startswith("re:") and "." not in target and target[:1].isupper() for target in targets)


def _weights_entry(scheme: Scheme) -> dict[str, Any]:
    channel = scheme.group_size == -1
    return {
        "num_bits": scheme.bits,
        "type": "int",
        "symmetric": scheme.sym,
        "strategy": "channel" if channel else "group",
        "group_size": None if channel else scheme.group_size,
        "dynamic": False,
        "actorder": None,
    }


def _ignored(contents: Contents) -> list[str]:
    """Names of the float layers; of experts that are all float, an expression for all."""
    unit_of = contents.units()
    units = {unit_of[name]: name for name in contents.floats}
    return [unit if unit == name else f"re:{re.escape(unit)}\\..*" for unit, name in units.items()]
