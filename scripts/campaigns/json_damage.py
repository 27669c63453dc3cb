"""Mutations of a checkpoint's JSON files: values of other kinds and sizes anywhere, and text that is hardly JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

from campaigns.damage import NOTHING, Damage

DELETED = "(deleted)"
ODD: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2, 3, 8, 16, 4.0, 0.5, 1e308, float("nan"), float("inf"), 10**6, 2**31, 2**63, 10**30,
    10**400, "", "4", "int", "gptq", "gptq_v2", "true", "__name__", "__class__", "../x", "/etc/passwd", "\0", "\ud800",
    "é" * 300, "x" * 10**5, [], {}, [1], [None], {"a": 1}, [[]], {"": {}}, {"0": None}, "(a+)+!", "re:(a+)+!", [["x"]],
    [{"x": 1}], [0] * 10**4,
)  # fmt: skip
_EXPRESSIONS = (
    "(a+)+!", "(.*)*!", ".*" * 9 + "!", "(" * 200 + ")" * 200, "(", "-:.*q_proj", "+:.*", ".*", "-:", "(?P<a>x)(?P=a)",
    "(?=.*)*", r"model\.layers\.\d+\.mlp", "a{0,99999}", "[" + "a-z" * 500 + "]", "(?i).*PROJ", "\\", "x" * 10**5, "",
    "(?:a|a)*(?:a|a)*!", "(?<=x)y", "(?>a+)!",
)  # fmt: skip
_RULES = ({}, None, {"bits": 4.0}, {"bits": 8}, {"bits": 4}, 3, "x", {"group_size": 7}, {"dynamic": {}}, [], {"sym": 0})
# Fields of config.json whose values a checkpoint's tensors prove, or that change no number.
_PROVED = {
    "architectures", "auto_map", "bos_token_id", "eos_token_id", "hidden_size", "initializer_range",
    "intermediate_size", "num_hidden_layers", "quantization_config", "tie_word_embeddings", "transformers_version",
    "use_cache", "vocab_size",
}  # fmt: skip
_FIELDS = (
    *sorted(_PROVED - {"quantization_config"}), "model_type", "num_attention_heads", "num_key_value_heads", "head_dim",
    "max_position_embeddings", "rope_scaling", "rope_parameters", "torch_dtype", "dtype", "text_config", "hidden_act",
    "layer_types", "rms_norm_eps", "num_local_experts", "num_experts_per_tok", "sliding_window", "pad_token_id",
    "quantization_config", "is_encoder_decoder", "attn_implementation", "_attn_implementation", "id2label",
    "num_labels", "return_dict", "output_attentions", "tp_plan", "base_model_tp_plan", "_name_or_path", "vision_config",
)  # fmt: skip
_DESCRIBED = (
    "bits", "group_size", "sym", "desc_act", "dynamic", "meta", "ignore", "config_groups", "lm_head", "format",
    "checkpoint_format", "quant_method", "modules_in_block_to_quantize", "model_file_base_name", "sparsity_config",
    "transform_config", "pack_dtype", "is_marlin_format", "static_groups", "modules_to_not_convert", "kv_cache_scheme",
)  # fmt: skip


def field(folder: Path, rng: Random) -> Damage:
    """Changes, or deletes, a value anywhere in a JSON file."""
    file = rng.choice(json_files(folder))
    content = _content(file)
    places = list(_places(content))
    if not places:
        return NOTHING
    place = rng.choice(places)
    value = rng.choice(ODD) if rng.random() < 0.85 else DELETED
    _set(content, place, value)
    file.write_text(json.dumps(content))
    return _damage(folder, file, place, value)


def quantization_field(folder: Path, rng: Random) -> Damage:
    """Changes or adds a field of the description, in one file or in both."""
    file = folder / "config.json"
    content = _content(file)
    described = content.get("quantization_config") if isinstance(content, dict) else None
    if not isinstance(described, dict):
        return NOTHING
    key = rng.choice([*described, *_DESCRIBED])
    value = rng.choice(ODD)
    if key == "dynamic":
        value = {rng.choice(_EXPRESSIONS): rng.choice(_RULES) for _ in range(rng.choice([1, 1, 2]))}
    if key == "meta":
        value = rng.choice([value, {"gptq_plugin": value}, {"gptq_plugin": {"taken_over": value, "files": value}}])
    if key == "ignore":
        value = [rng.choice(["re:", "", "re:"]) + rng.choice(_EXPRESSIONS)]
    if key == "config_groups" and isinstance(described.get(key), dict):
        group = next((one for one in described[key].values() if isinstance(one, dict)), {})
        group[rng.choice([*group, "targets", "format"])] = rng.choice([*ODD, ["re:" + rng.choice(_EXPRESSIONS)]])
        value = described[key]
    described[key] = value
    file.write_text(json.dumps(content))
    beside = folder / "quantize_config.json"
    if beside.is_file() and rng.random() < 0.5:
        beside.unlink()
    return _damage(folder, file, ("quantization_config", key), value)


def model_field(folder: Path, rng: Random) -> Damage:
    """Changes or adds a field of config.json that describes the model."""
    file = folder / "config.json"
    content = _content(file)
    if not isinstance(content, dict):
        return NOTHING
    key, value = rng.choice(_FIELDS), rng.choice(ODD)
    content[key] = value
    file.write_text(json.dumps(content))
    return _damage(folder, file, (key,), value)


def text(folder: Path, rng: Random) -> Damage:
    """Changes a file's text."""
    file = rng.choice(json_files(folder))
    data = file.read_bytes()
    kinds = {
        "cut": data[: rng.randrange(len(data) + 1)],
        "100,000 deep": b"[" * 100_000,
        "100,000 deep in a field": data.replace(b"{", b'{"x": ' + b'{"a":' * 100_000 + b"1" + b"}" * 100_000 + b",", 1),
        "latin-1": b'{"a": "\xff"}',
        "UTF-16": data.decode("utf-8", "replace").encode("utf-16"),
        "empty": b"",
        "a list": b"[1]",
        "null": b"null",
        "a byte order mark": b"\xef\xbb\xbf" + data,
        "half a letter": data.replace(b"{", b'{"x": "\\ud800", ', 1),
        "a number of 6,000 digits": data.replace(b"{", b'{"num_hidden_layers": ' + b"9" * 6000 + b",", 1),
        "a field twice": data.replace(b"{", b'{"bits": 8, "architectures": ["x"],', 1),
        "NaN": data.replace(b"{", b'{"x": NaN,', 1),
        "zeros": bytes(len(data)),
        "20 MB": data + b" " * (20 << 20),
        "other spaces": json.dumps(json.loads(data), indent=7).encode() if _is_json(data) else data,
    }
    kind = rng.choice(sorted(kinds))
    file.write_bytes(kinds[kind])
    return Damage(f"{file.name}: {kind}", changes=kind == "a number of 6,000 digits")


def json_files(folder: Path) -> list[Path]:
    """The files to damage; not those that were made large."""
    return [file for file in sorted(folder.glob("*.json")) if not file.is_symlink() and _is_small(file)]


def _content(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8")) if _is_small(file) else None
    except (ValueError, RecursionError):  # an earlier mutation's
        return None


def _is_small(file: Path) -> bool:
    return file.is_file() and file.stat().st_size < 16 << 20


def _is_json(data: bytes) -> bool:
    try:
        json.loads(data)
    except (ValueError, RecursionError):
        return False
    return True


def _places(value: Any, inside: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    for key, own in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield (*inside, key)
        yield from _places(own, (*inside, key))


def _set(content: Any, place: tuple[Any, ...], value: Any) -> None:
    for key in place[:-1]:
        content = content[key]
    if value is DELETED:
        del content[place[-1]]
    else:
        content[place[-1]] = value


def _damage(folder: Path, file: Path, place: tuple[Any, ...], value: Any) -> Damage:
    told = f"{file.name} {'.'.join(map(str, place))} = {str(value)[:60]!r}"
    if file.name != "config.json":
        return Damage(told, changes=place[-1] in ("format", "checkpoint_format"))
    if place[0] != "quantization_config" or len(place) < 2:
        return Damage(told, changes=place[0] not in _PROVED)
    # v1 and v2 differ in what asymmetric zeros mean.
    return Damage(told, changes=place[1] in ("format", "checkpoint_format"), field=str(place[1]))
