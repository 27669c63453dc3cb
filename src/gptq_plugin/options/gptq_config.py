"""Options as transformers' GPTQConfig (and optimum's GPTQQuantizer) names them, translated to QuantizeConfig's."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from gptq_plugin.options import fields

# Their name, and ours for the same values.
SAME = {"format": "checkpoint_format", "act_group_aware": "static_groups"}
# What chooses kernels, prepares inputs for other ways to calibrate, or tells of tools: no result depends on it.
WITHOUT_EFFECT = (
    "quant_method", "backend", "meta", "pack_dtype", "max_input_length", "pad_token_id", "cache_block_outputs",
    "module_name_preceding_first_block", "use_exllama", "disable_exllama", "exllama_config", "use_cuda_fp16", "version",
)  # fmt: skip
# What is given elsewhere, and where.
ELSEWHERE = {
    "tokenizer": "give it to the callback, or to quantize, as tokenizer=",
    "dataset": "give the callback calibration=, or quantize its batches",
}
BLOCKS = ("block_name_to_quantize", "modules_in_block_to_quantize")


def translated(values: Mapping[str, Any], known: Collection[str]) -> dict[str, Any]:
    """Returns options under the names of `known`; names of neither stay as they are.

    Args:
        values: As GPTQConfig.to_dict gives them, or as users write them for it; our own names may stand among them.
        known: Our names.

    Raises:
        ValueError: One is of another method, is given elsewhere, or contradicts another.
    """
    theirs = {*SAME, *WITHOUT_EFFECT, *ELSEWHERE, *BLOCKS} - set(known)
    found = {name: value for name, value in values.items() if name not in theirs and _is_given(name, value)}
    given = {name: value for name, value in values.items() if name in theirs and value is not None}
    method = getattr(given.get("quant_method"), "value", given.get("quant_method"))
    if method not in (None, "gptq"):
        raise ValueError(f"quant_method must be 'gptq'; got {fields.shown(method)}, a configuration of another method")
    for name, where in ELSEWHERE.items():
        if name in given:
            raise ValueError(f"{name} is no option of QuantizeConfig: {where}, and leave it out here")
    for name, own in SAME.items():
        if name in given:
            value = given[name].lower() if isinstance(given[name], str) else given[name]
            if own in found and found[own] != value:
                raise ValueError(f"{name}={fields.shown(value)} contradicts {own}={fields.shown(found[own])}")
            found[own] = value
    if given.get("act_group_aware") and found.get("desc_act"):  # GPTQConfig's own rule
        found["static_groups"] = False
    if any(name in given for name in BLOCKS):
        _select(found, *(given.get(name) for name in BLOCKS))
    return found


def _is_given(name: str, value: Any) -> bool:
    return value is not None or name not in ("model_seqlen", "checkpoint_format")


def _select(found: dict[str, Any], block: Any, inside: Any) -> None:
    """Writes the layers to quantize as rules: one for those of the block with these names, one that leaves the rest."""
    fields.optional(fields.NAME, "the whole model").check("block_name_to_quantize", block)
    listed = [name for part in _list(inside) for name in (part if fields.is_list(part) else [part])]
    for name in listed:
        fields.NAME.check("each name in modules_in_block_to_quantize", name)
    if inside is not None and not listed:
        raise ValueError("modules_in_block_to_quantize names no layer: leave it out to quantize all")
    if found.get("dynamic"):
        raise ValueError("dynamic and modules_in_block_to_quantize both choose layers: write all of it as `dynamic`")
    beginning = rf"{re.escape(block)}\." if block else ""
    ending = "|".join(map(re.escape, listed)) if listed else ".+"
    found["dynamic"] = {rf"{beginning}(?:.*\.)?(?:{ending})$": {"bits": found.get("bits", 4)}, "-:.*": {}}


def _list(value: Any) -> Any:
    kind = "a list of names, or of lists of names, such as [['self_attn.q_proj'], ['mlp.down_proj']]"
    if value is not None and not fields.is_list(value):
        raise ValueError(f"modules_in_block_to_quantize must be {kind}; got {fields.shown(value)}")
    return value or ()
