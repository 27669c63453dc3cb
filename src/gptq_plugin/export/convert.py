"""Converts a checkpoint to another `checkpoint_format`, with the same codes, scales, zeros and groups, bit for bit.

No model is built. Tensors go from file to file one by one, so that a checkpoint may be larger than memory. Everything
that is not quantized is copied: tensors of any dtype, tokenizer, code. Our report, its page and the model card are
written anew.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from gptq_plugin.checkpoint.checkpoint import Checkpoint
from gptq_plugin.checkpoint.description import describe, most_and_others
from gptq_plugin.checkpoint.files import CONFIG, QUANTIZE_CONFIG, write_json
from gptq_plugin.checkpoint.formats.format import Contents, Scheme
from gptq_plugin.checkpoint.formats.registry import FORMATS
from gptq_plugin.checkpoint.hub import local_folder
from gptq_plugin.checkpoint.layer_checks import damage_of
from gptq_plugin.config import CHECKPOINT_FORMATS, QuantizeConfig, own_config
from gptq_plugin.device.surroundings import plain_defaults
from gptq_plugin.errors import CheckpointError, ExportError, some
from gptq_plugin.export.converted_report import convert_report
from gptq_plugin.export.copied_files import check_read, copy_files, files_to_copy, occupied_bytes
from gptq_plugin.export.disk_space import disk_errors_explained, refuse_full
from gptq_plugin.export.export import SHARD
from gptq_plugin.export.export_dir import check_export_dir
from gptq_plugin.export.shard_writer import ShardWriter
from gptq_plugin.export.side_files import write_quantize_config
from gptq_plugin.export.staging import Staging
from gptq_plugin.export.verify_files import verify_same
from gptq_plugin.options.fields import shown

_HEAD = "lm_head"
_MADE = (
    "damp_percent",
    "damp_auto_increment",
    "static_groups",
    "true_sequential",
)  # readers of layers do not need these
_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", "*.pt", "*.pth", "*.gguf")


@plain_defaults()
def convert(
    directory: str | Path,
    out: str | Path,
    checkpoint_format: str,
    *,
    overwrite: bool = False,
    revision: str | None = None,
    token: str | bool | None = None,
) -> Path:
    """Writes a quantized checkpoint of any tool in another format.

    Args:
        directory: A checkpoint that `load_quantized` reads: a folder, or the id of a repository on the hub.
        out: As for `export_model`.
        checkpoint_format: One of `config.CHECKPOINT_FORMATS`.
        overwrite: Replace an earlier export in `out`.
        revision: Branch, tag or commit of the repository.
        token: For a private or gated repository.

    Returns:
        The folder that was written, absolute.

    Raises:
        CheckpointError: `directory` holds no checkpoint, it is damaged, or links lead out of it.
        ExportError: The format cannot hold it, or `out` cannot be used. Nothing is left there.
        ValueError: The format does not exist, or the checkpoint has it already.
    """
    if checkpoint_format not in CHECKPOINT_FORMATS:
        raise ValueError(
            f"checkpoint_format must be one of {', '.join(CHECKPOINT_FORMATS)}; got {shown(checkpoint_format)}"
        )
    check_export_dir(out, overwrite)
    checkpoint = Checkpoint.open(local_folder(directory, revision=revision, token=token))
    if checkpoint.checkpoint_format == checkpoint_format:
        raise ValueError(f"{directory} has checkpoint_format={checkpoint_format!r} already: copy it")
    _refuse_other_marks(checkpoint, checkpoint_format)
    schemes = {name: checkpoint.scheme(name) for name in checkpoint.layers}
    source = checkpoint.quantize_config or checkpoint.quantization
    try:
        config = _config(schemes, source, checkpoint_format)
        description = describe(Contents(schemes, _float_linears(checkpoint), _HEAD), config)
    except ValueError as error:
        raise ExportError(f"{directory} cannot be converted: {error}") from error
    meta = checkpoint.quantization.get("meta") or {}
    before = _listed(meta.get("quantizer"))
    ours = [one for one in description["meta"]["quantizer"] if one not in before]
    description["meta"] = {**meta, "quantizer": [*before, *ours]}
    files = files_to_copy(checkpoint.directory, (*_WEIGHTS, CONFIG, QUANTIZE_CONFIG, ".git", ".cache"))
    check_read(checkpoint.directory, _read_files(checkpoint))
    weights = {entry.file for entry in checkpoint.tensors.values()}
    size = sum(file.stat().st_size for file in weights) + occupied_bytes(checkpoint.directory, files)
    refuse_full(Path(out), size)
    with _writing(out, overwrite, size) as (staging, writer):
        copy_files(checkpoint.directory, files, staging.path)
        _write(checkpoint, schemes, checkpoint_format, writer)
        whole = {key: value for key, value in checkpoint.model_config.items() if key != "quantization_config"}
        if isinstance(whole.get("text_config"), dict):
            whole["text_config"] = {k: v for k, v in whole["text_config"].items() if k != "quantization_config"}
        write_json(staging.path / CONFIG, {**whole, "quantization_config": description})
        convert_report(checkpoint, staging.path, checkpoint_format, description)
        write_quantize_config(staging.path, description, _settings(config, source))
        verify_same(checkpoint, staging.path)
        staging.flush()
        staging.place()
    return staging.directory


def _refuse_other_marks(checkpoint: Checkpoint, checkpoint_format: str) -> None:
    """Refuses float tensors with names by which readers of the other format tell a quantized layer.

    Raises:
        CheckpointError: There are such.
    """
    marks = FORMATS[checkpoint_format].marks
    wrong = [name for name in checkpoint.float_names if name.rpartition(".")[2] in marks]
    if wrong:
        raise CheckpointError(
            f"{checkpoint.directory} holds {some(wrong)}, which belong to no quantized layer, and readers of "
            f"{checkpoint_format} would take them for parts of some: remove them"
        )


@contextlib.contextmanager
def _writing(out: str | Path, overwrite: bool, size: int) -> Iterator[tuple[Staging, ShardWriter]]:
    """Removes everything that was written if the block raises, and explains errors of the disk."""
    with contextlib.ExitStack() as undo:
        staging = Staging(out, overwrite)
        undo.callback(staging.remove)
        writer = ShardWriter(staging.path, SHARD)
        undo.callback(writer.abort)
        with disk_errors_explained(staging.directory, lambda: size):
            yield staging, writer
        undo.pop_all()


def _read_files(checkpoint: Checkpoint) -> list[Path]:
    described = [checkpoint.directory / name for name in (CONFIG, QUANTIZE_CONFIG)]
    return [file for file in described if file.is_file()] + sorted({e.file for e in checkpoint.tensors.values()})


def _write(checkpoint: Checkpoint, schemes: dict[str, Scheme], checkpoint_format: str, writer: ShardWriter) -> None:
    layout = FORMATS[checkpoint_format]
    for name, scheme in schemes.items():
        try:
            stored = layout.to_file(checkpoint.read_tensors(name), scheme.bits, scheme.sym)
        except ExportError as error:
            raise ExportError(f"{name}: {error}") from error
        writer.add({f"{name}.{suffix}": tensor for suffix, tensor in stored.items()})
    for name in checkpoint.float_names:
        value = checkpoint.read(name)
        damage = damage_of(name, value)
        if damage:
            raise CheckpointError(
                f"{checkpoint.tensors[name].file}: {name} holds {damage}, with which no model computes: it is damaged. "
                "Fetch it again, or export again"
            )
        writer.add({name: value})
    writer.finish()


def _config(schemes: dict[str, Scheme], source: Mapping[str, Any], checkpoint_format: str) -> QuantizeConfig:
    """The configuration the layers were quantized with, if they are ours and match it; else one derived from them."""
    own = own_config(source)
    if own is not None and all(_fits(own.for_module(name), scheme) for name, scheme in schemes.items()):
        return dataclasses.replace(own, checkpoint_format=checkpoint_format)
    most, rules = most_and_others({name: _fields(scheme) for name, scheme in schemes.items()})
    return QuantizeConfig(**most, checkpoint_format=checkpoint_format, lm_head=_HEAD in schemes, dynamic=rules)


def _fits(config: QuantizeConfig | None, scheme: Scheme) -> bool:
    grid = (scheme.bits, scheme.group_size, scheme.sym)
    return config is not None and (config.bits, config.group_size, config.sym) == grid


def _settings(config: QuantizeConfig, source: Mapping[str, Any]) -> dict[str, Any]:
    """quantize_config.json: the layers' grids from `config`, and how they were made as far as the source has it."""
    settings = {key: value for key, value in config.to_quantize_config().items() if key in source or key not in _MADE}
    made = {key: source[key] for key in _MADE if key in source}
    return {**settings, **made, "meta": source.get("meta") or {}}


def _fields(scheme: Scheme) -> dict[str, Any]:
    return {
        "bits": scheme.bits,
        "group_size": scheme.group_size,
        "sym": scheme.sym,
        "desc_act": scheme.desc_act,
        "static_groups": not scheme.desc_act,
    }


def _float_linears(checkpoint: Checkpoint) -> list[str]:
    """Names of possible linear layers left float: matrices in numbered blocks, and modules described as ignored."""
    names = []
    is_left_float = checkpoint.format.left_float(checkpoint.quantization)
    for tensor in checkpoint.float_names:
        name, _, suffix = tensor.rpartition(".")
        matrix = suffix == "weight" and len(checkpoint.tensors[tensor].shape) == 2 and name != _HEAD
        in_block = any(part.isdigit() for part in name.split("."))
        if matrix and (in_block or is_left_float(name)):
            names.append(name)
    return names


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]
