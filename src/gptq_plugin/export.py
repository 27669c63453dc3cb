"""From a quantized model to a folder that GPTQ clients load: `export_model`.

The folder is written beside its target under a hidden name, read back from disk and compared with the model
by a decoder of its own, flushed, and only then renamed into place: whatever fails on the way, the target is
as it was.

What each client needs to find is in `client_config`. Tensors keep their dtypes; choose the model's (vLLM
wants float16 for GPTQ, takes bfloat16 with converted scales, and refuses float32).
"""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
import stat
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from gptq_plugin.checkpoint import CONFIG, QUANTIZE_CONFIG, WEIGHTS, Checkpoint, trivial_g_idx
from gptq_plugin.config import QUANTIZER_NAME, QuantizeConfig, package_version
from gptq_plugin.errors import CheckpointError, ExportError
from gptq_plugin.kernels import reference
from gptq_plugin.load import renaming
from gptq_plugin.packing import zeros_to_disk
from gptq_plugin.pretrained import is_transformers
from gptq_plugin.qlinear import QuantLinear
from gptq_plugin.report import QuantizeReport
from gptq_plugin.targets import is_linear

REPORT = "quantization_report.json"
MAX_SHARD = "5GB"
_CHECKED_ROWS = 32  # output channels of every layer that are decoded again from the file


def check_export_dir(directory: str | Path, overwrite: bool = False) -> None:
    """Says now, before any training or quantization, whether `export_model` could write to `directory`.

    Args:
        directory: The target folder.
        overwrite: Whether an earlier export of this package may be replaced.

    Raises:
        ExportError: It is a file, is not ours, holds files this package did not write, is an export and
            `overwrite` is false, or cannot be created. Nothing is created or deleted here.
    """
    directory = Path(directory).resolve()
    parent = directory.parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise ExportError(
            f"cannot create {directory}: {parent} is not a folder one may write to; choose another target"
        )
    if not directory.exists():
        return
    if not directory.is_dir():
        raise ExportError(f"{directory} is a file: choose a folder that does not exist yet")
    present = set(_files(directory))
    if not present and not any(directory.iterdir()):
        return
    written = _manifest(directory)
    if written is None:
        raise ExportError(
            f"{directory} exists, is not empty and is no export of {QUANTIZER_NAME}: choose another "
            "folder, or move it "
            "away (it is never overwritten, whatever `overwrite` says)"
        )
    if not overwrite:
        raise ExportError(f"{directory} holds an earlier export: pass overwrite=True to replace it, or choose another")
    foreign = sorted(present - written)
    if foreign:
        raise ExportError(
            f"{directory} holds files that {QUANTIZER_NAME} did not write ({', '.join(foreign[:4])}): move "
            "them away "
            "first, replacing the export would delete them"
        )


def export_model(
    model: nn.Module,
    directory: str | Path,
    config: QuantizeConfig,
    *,
    report: QuantizeReport | None = None,
    tokenizer: Any = None,
    overwrite: bool = False,
) -> Path:
    """Writes a quantized model as a GPTQ checkpoint.

    A transformers model becomes what `save_pretrained` writes (config.json with a ``quantization_config``,
    generation_config.json, safetensors in shards of at most 5 GB); any other module becomes one
    model.safetensors and a config.json of our own. quantize_config.json (AutoGPTQ's file), the report and the
    tokenizer lie beside.

    Args:
        model: With `QuantLinear` layers; not changed. Other tensors are stored in their dtypes, tied ones
            once.
        directory: Must not exist or be empty; see `overwrite`. Its parents are created.
        config: What the model was quantized with. ``desc_act`` is written as true only when some group index
            needs it.
        report: Stored as quantization_report.json.
        tokenizer: Anything with `save_pretrained`.
        overwrite: Replace an earlier export of this package; nothing else is ever replaced.

    Returns:
        The folder, absolute.

    Raises:
        ExportError: Nothing is quantized, `config` is not what the model was quantized with, the folder
            cannot be used, or what was written does not read back as the model. The target is then as it was.
    """
    directory = Path(directory).resolve()
    layers = {name: m for name, m in model.named_modules(remove_duplicate=False) if isinstance(m, QuantLinear)}
    if not layers:
        raise ExportError(f"{type(model).__name__} has no QuantLinear: quantize it before exporting it")
    _check_config(layers, config)
    check_export_dir(directory, overwrite)
    directory.parent.mkdir(parents=True, exist_ok=True)
    staging = directory.parent / f".{directory.name}.{uuid.uuid4().hex[:8]}.partial"
    staging.mkdir()
    try:
        description = client_config(model, layers, config)
        state = _disk_state(model, layers, config)
        if is_transformers(model):
            _write_transformers(staging, model, state, description)
        else:
            _write_plain(staging, model, state, description)
        if tokenizer is not None:
            tokenizer.save_pretrained(staging)
        if report is not None:
            (staging / REPORT).write_text(report.to_json(), encoding="utf-8")
        _write_quantize_config(staging, description, config)
        _verify(staging, model, layers)
        _flush(staging)
        check_export_dir(directory, overwrite)  # again: much may have happened since
        _move_into_place(staging, directory)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    return directory


# --- what the files say -------------------------------------------------------------------------------------


def _check_config(layers: dict[str, QuantLinear], config: QuantizeConfig) -> None:
    for name, layer in layers.items():
        asked = config.for_module(name)
        if asked is None or (asked.bits, asked.group_size) != (layer.bits, layer.group_size):
            wanted = "leaves it float" if asked is None else f"says bits={asked.bits}, group_size={asked.group_size}"
            raise ExportError(
                f"{name} is quantized with bits={layer.bits}, group_size={layer.group_size}, and the given "
                "config "
                f"{wanted}: pass the config the model was quantized with"
            )


def client_config(model: nn.Module, layers: dict[str, QuantLinear], config: QuantizeConfig) -> dict[str, Any]:
    """`quantization_config` for the config.json that `export_model` writes.

    Only keys that GPTQModel, transformers and vLLM all take.
    Linears left float inside the blocks are told twice: GPTQModel wants ``dynamic`` rules, transformers a
    list of those that are quantized.
    """
    head = model.get_output_embeddings() if is_transformers(model) else None  # type: ignore[operator]
    floats = [name for name, module in model.named_modules() if is_linear(module) and module is not head]
    dynamic = {
        **{rule: {} for rule in _skip_rules(floats, layers)},
        **{k: dict(v) for k, v in config.dynamic.items()},
    }
    trivial = all(
        torch.equal(layer.g_idx, trivial_g_idx(layer.in_features, layer.group_size, layer.g_idx.device))
        for layer in layers.values()
    )
    description: dict[str, Any] = {
        "quant_method": "gptq",
        "bits": config.bits,
        "group_size": config.group_size,
        # Not config.desc_act: vLLM goes by the flag, and static act-order leaves the groups contiguous.
        "desc_act": not trivial,
        "sym": config.sym,
        "lm_head": head is not None and isinstance(head, QuantLinear),
        "checkpoint_format": config.checkpoint_format,
        "format": config.checkpoint_format,
        "pack_dtype": "int32",
        "meta": {"quantizer": [f"{QUANTIZER_NAME}:{package_version()}"]},
    }
    if dynamic:
        description["dynamic"] = dynamic
    if floats:
        description["modules_in_block_to_quantize"] = [_kept_suffixes(floats, layers)]
    return description


def _skip_rules(floats: list[str], layers: Iterable[str]) -> list[str]:
    """``-:`` rules that match exactly `floats`, one rule for all blocks where no block is quantized."""
    rules: dict[str, None] = {}
    for name in floats:
        every_block = re.sub(r"(^|\\\.)\d+(?=\\\.|$)", r"\1\\d+", re.escape(name)) + "$"
        quantized_too = any(re.match(every_block, other) for other in layers)
        rules[f"-:{re.escape(name)}$" if quantized_too else f"-:{every_block}"] = None
    return list(rules)


def _kept_suffixes(floats: list[str], layers: Iterable[str]) -> list[str]:
    """Ends of the quantized layers' names: the part below the block, unless a float layer shares it."""
    suffixes: dict[str, None] = {}
    for name in layers:
        below = re.sub(r"^.*?\.\d+\.", "", name)
        suffixes[name if any(other.endswith(below) for other in floats) else below] = None
    return list(suffixes)


def _write_quantize_config(staging: Path, description: dict[str, Any], config: QuantizeConfig) -> None:
    """AutoGPTQ's file: the same description, everything needed to quantize so again, and the list of our
    files.

    It is written last, and the list is how a later export knows what it may replace.
    """
    full = {**config.to_quantize_config(), **description}
    ours = {**config.to_quantize_config()["meta"], **description["meta"]}
    ours[QUANTIZER_NAME] = {**ours[QUANTIZER_NAME], "files": sorted([*_files(staging), QUANTIZE_CONFIG])}
    full["meta"] = ours
    _write_json(staging / QUANTIZE_CONFIG, full)


def _files(directory: Path) -> list[str]:
    """Everything in the folder that is not itself a folder, by relative name."""
    paths = (path for path in directory.rglob("*") if path.is_symlink() or not path.is_dir())
    return [path.relative_to(directory).as_posix() for path in paths]


def _manifest(directory: Path) -> set[str] | None:
    """The files an earlier export wrote into `directory`, or None when it is no export of ours."""
    try:
        description = json.loads((directory / QUANTIZE_CONFIG).read_text(encoding="utf-8"))
        return set(description["meta"][QUANTIZER_NAME]["files"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


# --- weights ------------------------------------------------------------------------------------------------


def _disk_state(model: nn.Module, layers: dict[str, QuantLinear], config: QuantizeConfig) -> dict[str, Tensor]:
    """The state dict with zeros as the file holds them."""
    state: dict[str, Tensor] = {}
    for name, value in model.state_dict(keep_vars=True).items():
        if not isinstance(value, Tensor):
            raise ExportError(
                f"{name} is a {type(value).__name__}: safetensors holds tensors only; remove the extra state"
            )
        state[name] = value
    converted: dict[int, Tensor] = {}  # a shared layer is converted once, so that its names still share one tensor
    for name, layer in layers.items():
        if id(layer) not in converted:
            try:
                converted[id(layer)] = zeros_to_disk(
                    layer.qzeros, layer.bits, layer.out_features, config.checkpoint_format
                )
            except ValueError as error:
                raise ExportError(f"{name}: {error}") from error
        state[f"{name}.qzeros"] = converted[id(layer)]
    return state


def _write_transformers(staging: Path, model: Any, state: dict[str, Tensor], description: dict[str, Any]) -> None:
    if getattr(model, "_hf_peft_config_loaded", False):
        raise ExportError("the model carries PEFT adapters: merge them (merge_and_unload) before quantizing")
    original = model.config
    model.config = copy.deepcopy(original)  # save_pretrained writes dtype and architectures into it
    try:
        detached = {name: tensor.detach() for name, tensor in state.items()}
        model.save_pretrained(staging, state_dict=detached, max_shard_size=MAX_SHARD)
    finally:
        model.config = original
    config = json.loads((staging / CONFIG).read_text(encoding="utf-8"))
    config["quantization_config"] = description
    if not getattr(original, "auto_map", None):  # models with code of their own say themselves what they are
        config["architectures"] = [_published_class(model).__name__]
    if description["lm_head"]:
        # A quantized head cannot share the embedding's float weight.
        for part in (config, config.get("text_config") or {}):
            if "tie_word_embeddings" in part or part is config:
                part["tie_word_embeddings"] = False
    _write_json(staging / CONFIG, config)


def _published_class(model: Any) -> type:
    """The class loaders know the model by: a user's subclass (a LightningModule, say) is its transformers base."""
    import transformers

    bases = (kind for kind in type(model).__mro__ if getattr(transformers, kind.__name__, None) is kind)
    return next(bases, type(model))


def _write_plain(staging: Path, model: nn.Module, state: dict[str, Tensor], description: dict[str, Any]) -> None:
    kind = type(model)
    _write_json(
        staging / CONFIG,
        {"module_class": f"{kind.__module__}.{kind.__qualname__}", "quantization_config": description},
    )
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in state.items():
        if id(tensor) in seen:
            continue  # tied: stored under its first name
        seen.add(id(tensor))
        value = tensor.detach().cpu().contiguous()
        part_of_more = value.untyped_storage().nbytes() != value.numel() * value.element_size()
        tensors[name] = value.clone() if part_of_more else value
    save_file(tensors, staging / WEIGHTS, metadata={"format": "pt"})


# --- proof and placing --------------------------------------------------------------------------------------


def _verify(staging: Path, model: nn.Module, layers: dict[str, QuantLinear]) -> None:
    """Reads the folder anew and compares it with the model: bytes of every quantized tensor and of every
    float one that keeps its name, and some rows' weights decoded here bit by bit.

    Raises:
        ExportError: Something differs; the message names the tensor.
    """
    try:
        checkpoint = Checkpoint.open(staging)
    except CheckpointError as error:
        raise ExportError(f"the export does not read back: {error}") from error
    rename = renaming(model) if is_transformers(model) else str
    stored_names = {name if name in layers else rename(name): name for name in checkpoint.layers}
    found = {layers[name] for name in stored_names if name in layers}
    lost = [name for name, layer in layers.items() if layer not in found]
    if lost or len(stored_names) != len(checkpoint.layers):
        raise ExportError(f"the export does not read back: {', '.join(lost) or 'a layer'} is not in it")
    for name, stored_name in stored_names.items():
        layer = layers[name]
        for suffix in ("qweight", "scales", "g_idx", "bias"):
            ours = getattr(layer, suffix)
            if ours is not None and not torch.equal(checkpoint.read(f"{stored_name}.{suffix}"), ours.cpu()):
                raise ExportError(f"the export does not read back: {stored_name}.{suffix} differs from the model's")
        if not torch.equal(_decoded_rows(checkpoint, stored_name), _rows(layer)):
            raise ExportError(f"the export does not read back: {stored_name} decodes to other weights than the model's")
    for name, tensor in model.state_dict().items():
        if name in checkpoint.float_names and not torch.equal(checkpoint.read(name), tensor.cpu()):
            raise ExportError(f"the export does not read back: {name} differs from the model's")


def _rows(layer: QuantLinear) -> Tensor:
    """The first output channels' weights in memory, float32 [rows, in]."""
    rows = min(_CHECKED_ROWS, layer.out_features)
    words = reference.words_for(rows, layer.bits)
    pieces = (layer.qweight[:, :rows], layer.qzeros[:, :words], layer.scales[:, :rows], layer.g_idx)
    return reference.dequantize(*(piece.cpu() for piece in pieces), layer.bits, torch.float32)


def _decoded_rows(checkpoint: Checkpoint, name: str) -> Tensor:
    """The same from the file, through single bits instead of `packing` and the kernels."""
    layer = checkpoint.layers[name]
    rows = min(_CHECKED_ROWS, layer.out_features)
    codes = _from_bits(checkpoint.read(f"{name}.qweight")[:, :rows].T, layer.bits)[:, : layer.in_features]
    zeros = _from_bits(checkpoint.read(f"{name}.qzeros"), layer.bits)[:, :rows]
    if checkpoint.checkpoint_format == "gptq":
        zeros = (zeros + 1) % 2**layer.bits
    scales = checkpoint.read(f"{name}.scales")[:, :rows].float()
    group = checkpoint.read(f"{name}.g_idx").long()
    return (codes - zeros.T[:, group]).float() * scales.T[:, group]


def _from_bits(words: Tensor, bits: int) -> Tensor:
    """int32 [n, w], a little-endian stream along each row, to int64 [n, w * 32 // bits]."""
    single = (words.contiguous()[:, :, None] >> torch.arange(32)) & 1
    stream = single.flatten(1)
    whole = stream.shape[1] // bits * bits
    return (stream[:, :whole].unflatten(1, (-1, bits)) << torch.arange(bits)).sum(-1)


def _flush(staging: Path) -> None:
    """Everything to the disk, with the permissions a new file has (safetensors makes its own private)."""
    mode = stat.S_IMODE((staging / QUANTIZE_CONFIG).stat().st_mode)
    for path in [*staging.rglob("*"), staging]:
        if not path.is_dir():
            path.chmod(mode)
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _move_into_place(staging: Path, directory: Path) -> None:
    """Renames `staging` to `directory`; an earlier export steps aside and comes back if that fails."""
    aside = directory.parent / f".{directory.name}.{uuid.uuid4().hex[:8]}.replaced"
    replaces = directory.exists()
    if replaces:
        directory.rename(aside)
    try:
        staging.rename(directory)
    except BaseException:
        if replaces:
            aside.rename(directory)
        raise
    if replaces:
        shutil.rmtree(aside)
    handle = os.open(directory.parent, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
