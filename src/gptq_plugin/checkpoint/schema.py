"""The JSON files of a checkpoint: the types of the fields that this package reads, checked before any of them is used.

A field that is not listed here is not read. Validated by huggingface_hub, as transformers' own configurations are.
"""
# Without `from __future__ import annotations`: the validator reads the types as objects.

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypedDict

from huggingface_hub.dataclasses import validate_typed_dict
from huggingface_hub.errors import StrictDataclassFieldValidationError

from gptq_plugin.checkpoint.files import read_json
from gptq_plugin.config import QUANTIZER_NAME
from gptq_plugin.errors import CheckpointError, brief
from gptq_plugin.options.fields import shown

_Object = dict[str, Any]
_MOST_RULES = 2**17  # of `dynamic`; the largest models have fewer layers

_LONGEST_TEXT = 200


class ModelConfig(TypedDict, total=False):
    """config.json."""

    architectures: list[str] | None
    auto_map: dict[str, str | list[str | None] | None] | None
    model_type: str | None
    module_class: str
    quantization_config: _Object | None
    text_config: _Object | None
    tie_word_embeddings: bool | None


class Description(TypedDict, total=False):
    """quantization_config of config.json, or quantize_config.json."""

    bits: int | None
    checkpoint_format: str | None
    config_groups: dict[str, _Object] | None
    desc_act: bool | None
    dynamic: dict[str, _Object | None] | None
    format: str | None
    group_size: int | None
    ignore: list[str] | None
    is_marlin_format: bool | None
    lm_head: bool | None
    meta: _Object | None
    model_file_base_name: str | None
    pack_dtype: str | None
    quant_method: str | None
    sparsity_config: _Object | None
    sym: bool | None
    transform_config: _Object | None


class Rule(TypedDict, total=False):
    """What a `dynamic` rule overrides."""

    bits: int
    desc_act: bool
    group_size: int
    sym: bool


class ConfigGroup(TypedDict, total=False):
    """One of compressed-tensors' ``config_groups``."""

    format: str | None
    input_activations: _Object | None
    output_activations: _Object | None
    targets: list[str]
    weights: _Object | None


class GroupWeights(TypedDict, total=False):
    """``weights`` of a config group."""

    actorder: str | bool | None
    dynamic: bool | None
    group_size: int | None
    num_bits: int | None
    strategy: str | None
    symmetric: bool | None
    type: str | None


class Meta(TypedDict, total=False):
    """``meta`` of a description."""

    gptq_plugin: _Object | None  # `QUANTIZER_NAME`


class Ours(TypedDict, total=False):
    """Our part of a description's ``meta``."""

    taken_over: list[str] | None


class Index(TypedDict, total=False):
    """model.safetensors.index.json."""

    weight_map: dict[str, str]


def read_checked(file: Path, check: Callable[[dict[str, Any], Path], None]) -> dict[str, Any] | None:
    """The content of a JSON file, checked by one of the functions below; None if there is none.

    Raises:
        CheckpointError: It cannot be read, or is refused.
    """
    if not os.path.lexists(file):
        return None
    content = read_json(file)
    check(content, file)
    return content


def check_model_config(content: _Object, file: Path) -> None:
    """Checks config.json, less its description of the quantization.

    Raises:
        CheckpointError: A field has another type; the message names file and field.
    """
    _check(ModelConfig, content, file)
    _check(ModelConfig, content.get("text_config") or {}, file, "text_config")


def check_description(content: _Object, file: Path) -> None:
    """Checks a quantization_config, or quantize_config.json.

    Raises:
        CheckpointError: A field has another type; the message names file and field.
    """
    _check(Description, content, file)
    rules = content.get("dynamic") or {}
    if len(rules) > _MOST_RULES:
        raise CheckpointError(
            f"{file}: dynamic has {len(rules):,} rules; at most {_MOST_RULES:,} are read, and no model has as many "
            "layers. Write one rule for all layers that are alike"
        )
    for pattern, rule in {repr(rule): (pattern, rule) for pattern, rule in rules.items()}.values():  # most are alike
        _check(Rule, rule or {}, file, f"dynamic[{shown(pattern)}]")
    for name, group in (content.get("config_groups") or {}).items():
        _check(ConfigGroup, group, file, f"config_groups[{shown(name)}]")
        _check(GroupWeights, group.get("weights") or {}, file, f"config_groups[{shown(name)}].weights")
    meta = content.get("meta") or {}
    _check(Meta, meta, file, "meta")
    _check(Ours, meta.get(QUANTIZER_NAME) or {}, file, f"meta.{QUANTIZER_NAME}")


def check_index(content: _Object, file: Path) -> None:
    """Checks the index of shards.

    Raises:
        CheckpointError: A field has another type; the message names file and field.
    """
    _check(Index, content, file)


def _check(schema: type, content: _Object, file: Path, inside: str = "") -> None:
    outlines = {key: _outline(content[key]) for key in schema.__annotations__ if key in content}
    try:
        validate_typed_dict(schema, outlines)
    except StrictDataclassFieldValidationError as error:
        causes: list[str] = []
        cause: BaseException | None = error.__cause__
        while cause is not None:
            causes.append(str(cause))
            cause = cause.__cause__
        what = brief(": ".join(causes) or error, 300)
        where = f"{file}, {inside}" if inside else str(file)
        raise CheckpointError(f"{where}: {what}. Correct it, or fetch the file again") from error


def _outline(value: Any, levels: int = 3) -> Any:
    """A value as deep as the types above look, with texts cut: an error holds all of it several times."""
    if isinstance(value, str):
        return value[:_LONGEST_TEXT]
    if isinstance(value, list):
        return [_outline(one, levels - 1) for one in value] if levels else []
    if isinstance(value, dict):
        return {key[:_LONGEST_TEXT]: _outline(one, levels - 1) for key, one in value.items()} if levels else {}
    return value
