"""From a quantized model to a folder that GPTQ clients load: `export_model`, or `Export` while layers still come.

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
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gptq_plugin.adapters import has_adapters
from gptq_plugin.card import heading, model_card, model_facts
from gptq_plugin.checkpoint import CONFIG, QUANTIZE_CONFIG, Checkpoint, trivial_g_idx
from gptq_plugin.clients import Target, refuse
from gptq_plugin.config import QUANTIZER_NAME, QuantizeConfig, package_version
from gptq_plugin.errors import CheckpointError, ExportError, some
from gptq_plugin.kernels import reference
from gptq_plugin.load import renaming
from gptq_plugin.outline import Outline
from gptq_plugin.packing import unpack_zeros, zeros_from_disk, zeros_to_disk
from gptq_plugin.page import report_page
from gptq_plugin.pretrained import is_transformers, published_class
from gptq_plugin.qlinear import QuantLinear
from gptq_plugin.report import QuantizeReport
from gptq_plugin.shards import ShardWriter
from gptq_plugin.targets import is_linear, linear_shape

REPORT = "quantization_report.json"
PAGE = "report.html"
CARD = "README.md"
SHARD = 10**9  # bytes of quantized layers in a file; a model smaller than this is one file
MAX_SHARD = "5GB"  # of a transformers model's float tensors
_TENSORS = ("qweight", "qzeros", "scales", "g_idx", "bias")  # of a QuantLinear, in memory and on disk
_CHECKED_ROWS = 32  # output channels of every layer that are decoded again from the file
_COMPARED = 2**26  # bytes of a tensor that are compared at a time


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
    target: Target | str | Mapping[str, Any] | None = None,
) -> Path:
    """Writes a quantized model as a GPTQ checkpoint.

    A transformers model becomes what `save_pretrained` writes (config.json with a ``quantization_config``,
    generation_config.json, safetensors); any other module becomes safetensors and a config.json of our own. Up to
    1 GB of tensors are one model.safetensors, more are shards with an index. quantize_config.json (AutoGPTQ's file),
    the report (for programs, as a page, and as a model card) and the tokenizer lie beside.

    Args:
        model: With `QuantLinear` layers; not changed. Other tensors are stored in their dtypes, tied ones
            once.
        directory: Must not exist or be empty; see `overwrite`. Its parents are created.
        config: What the model was quantized with. ``desc_act`` is written as true only when some group index
            needs it.
        report: Stored as quantization_report.json, report.html and README.md (a model card).
        tokenizer: Anything with `save_pretrained`.
        overwrite: Replace an earlier export of this package; nothing else is ever replaced.
        target: The client that is to load it ("vllm", "transformers", "sglang", "gptqmodel", or as `clients.Target.of`
            takes it): what it would not take is refused.

    Returns:
        The folder, absolute.

    Raises:
        ExportError: Nothing is quantized, `config` is not what the model was quantized with, the folder
            cannot be used, `target` would not take it, or what was written does not read back as the model. The
            folder is then as it was.
    """
    with Export(model, directory, config, overwrite=overwrite, target=target) as export:
        for name, module in model.named_modules():
            if isinstance(module, QuantLinear):
                export.add(name, module)
        return export.finish(model, report=report, tokenizer=tokenizer)


class Export:
    """`export_model` in steps: finished layers are written while others are still being quantized.

    Every layer is given to `add` once, then the quantized model to `finish`. As a context manager it removes what
    it wrote when it is left without `finish`, whatever the reason; the target is then as it was.

    Args:
        model: The model that will be exported, its layers quantized or not yet; only its names are used here.
        directory, config, overwrite, target: See `export_model`. What `target` would not take is refused now, for what
            is planned, and in `finish`, for what there is.

    Raises:
        ExportError: The folder cannot be used (`check_export_dir`), or `target` would not take the export.
    """

    def __init__(
        self,
        model: nn.Module,
        directory: str | Path,
        config: QuantizeConfig,
        *,
        overwrite: bool = False,
        target: Target | str | Mapping[str, Any] | None = None,
    ) -> None:
        self._directory = Path(directory).resolve()
        self._config = config
        self._overwrite = overwrite
        self._target = Target.of(target)
        check_export_dir(self._directory, overwrite)
        self._refuse_target(model)
        self._stored_names = _stored_names(model)
        self._added: set[str] = set()
        self._over = False
        self._directory.parent.mkdir(parents=True, exist_ok=True)
        self._staging = self._directory.parent / f".{self._directory.name}.{uuid.uuid4().hex[:8]}.partial"
        self._staging.mkdir()
        self._writer = ShardWriter(self._staging, SHARD)

    def add(self, name: str, layer: QuantLinear) -> None:
        """Takes a finished layer, which is written in the background. Returns without waiting for its device; waits
        only while two shards (`SHARD`) are not on disk yet.

        Args:
            name: Its name in the model; of a shared layer, the one to store it under.
            layer: On any device. On a CPU its tensors are kept, not copied: they must not change any more.

        Raises:
            ExportError: The name is no linear layer of the model or was added before, the layer is not what the
                config says, or writing an earlier layer failed.
        """
        self._check_open()
        if name in self._added:
            raise ExportError(f"{name} was added to the export before: add every layer once")
        self.check([name])
        stored = self._stored_names[name]
        _check_config({name: layer}, self._config)
        bits, out_features, checkpoint_format = layer.bits, layer.out_features, self._config.checkpoint_format

        def with_disk_zeros(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            key = f"{stored}.qzeros"
            try:
                return {**tensors, key: zeros_to_disk(tensors[key], bits, out_features, checkpoint_format)}
            except ValueError as error:
                raise ExportError(f"{name}: {error}") from error

        tensors = {suffix: getattr(layer, suffix) for suffix in _TENSORS}
        self._writer.add({f"{stored}.{s}": t.detach() for s, t in tensors.items() if t is not None}, with_disk_zeros)
        self._added.add(name)

    def check(self, names: Iterable[str]) -> None:
        """Says now whether layers of these names could be added.

        Raises:
            ExportError: A name is no linear layer of the model, or one that cannot be stored.
        """
        impossible = [name for name in names if name not in self._stored_names]
        if impossible:
            raise ExportError(
                f"{some(impossible)} cannot be exported: no linear layer of the model, or one that transformers stores "
                "in another arrangement, which packed weights cannot follow. Name such layers in modules_to_not_convert"
            )

    def written(self, name: str) -> dict[str, Tensor] | None:
        """The tensors of an added layer mapped from its file, or None while they are not on disk.

        A layer on the CPU that takes these in place of its own needs no memory for them. They stay valid after
        `finish`, after `abort` and after the files are removed or replaced, but not if somebody writes into the files.

        Returns:
            qweight, scales, g_idx and, where there is one, bias, as `QuantLinear` describes them. Not qzeros: the
            file's may be less one; the layer keeps its own.
        """
        stored = self._stored_names[name]
        tensors = {suffix: self._writer.read(f"{stored}.{suffix}") for suffix in _TENSORS if suffix != "qzeros"}
        return {suffix: t for suffix, t in tensors.items() if t is not None} or None

    def finish(self, model: nn.Module, *, report: QuantizeReport | None = None, tokenizer: Any = None) -> Path:
        """Writes everything else, proves that the files hold the model, and puts the folder in its place.

        Args:
            model: The quantized model, with the layers that were added; not changed.
            report, tokenizer: See `export_model`.

        Returns:
            The folder, absolute.

        Raises:
            ExportError: The model's layers are not those added, a file could not be written, or what was written
                does not read back as the model. The target is then as it was.
        """
        self._check_open()
        try:
            layers = {n: m for n, m in model.named_modules(remove_duplicate=False) if isinstance(m, QuantLinear)}
            self._check_layers(model, layers)
            _check_config(layers, self._config)
            self._refuse_target(model)
            description = client_config(model, layers, self._config)
            floats = _float_state(model, layers)
            if is_transformers(model):
                files = _write_transformers(self._staging, model, floats, description)
                self._writer.finish(files, total_parameters=model.num_parameters())  # type: ignore[operator]
            else:
                _write_plain_config(self._staging, model, description)
                for name, tensor in _once(floats).items():
                    self._writer.add({name: tensor})
                self._writer.finish()
            if tokenizer is not None:
                tokenizer.save_pretrained(self._staging)
            if report is not None:
                _write_report(self._staging, report, model, description)
            _write_quantize_config(self._staging, description, self._config)
            _verify(self._staging, model, layers)
            _flush(self._staging)
            check_export_dir(self._directory, self._overwrite)  # again: much may have happened since
            _move_into_place(self._staging, self._directory)
            self._over = True
        except BaseException:
            self.abort()
            raise
        return self._directory

    def abort(self) -> None:
        """Gives up: removes everything written so far. Nothing happens to an export that is finished."""
        if not self._over:
            self._over = True
            self._writer.abort()
            shutil.rmtree(self._staging, ignore_errors=True)

    def __enter__(self) -> Export:
        return self

    def __exit__(self, *_: object) -> None:
        self.abort()

    def _check_open(self) -> None:
        if self._over:
            raise ExportError(f"the export to {self._directory} is finished or given up: make another Export")

    def _refuse_target(self, model: nn.Module) -> None:
        if self._target is not None:
            refuse(Outline.of_model(model, self._config), self._target)

    def _check_layers(self, model: nn.Module, layers: dict[str, QuantLinear]) -> None:
        if not layers:
            raise ExportError(f"{type(model).__name__} has no QuantLinear: quantize it before exporting it")
        there = {layers[name] for name in self._added if name in layers}
        lacking = [name for name, layer in layers.items() if layer not in there]
        if lacking:
            raise ExportError(
                f"{some(lacking)} were not added to the export: add every quantized layer before `finish`"
            )
        gone = sorted(self._added - set(layers))
        if gone:
            raise ExportError(f"{some(gone)} were added to the export and are not quantized in the model: swap them in")


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


def _write_report(staging: Path, report: QuantizeReport, model: nn.Module, description: dict[str, Any]) -> None:
    """The report for programs, for people and for the hub, whose README takes the place of a tokenizer's own."""
    facts = model_facts(model)
    (staging / REPORT).write_text(report.to_json(), encoding="utf-8")
    (staging / PAGE).write_text(report_page(report, heading(report, facts)), encoding="utf-8")
    (staging / CARD).unlink(missing_ok=True)  # never through a link
    (staging / CARD).write_text(model_card(report, description, facts), encoding="utf-8")


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


def _stored_names(model: Any) -> dict[str, str]:
    """{name of a linear layer: its name in the checkpoint}, by transformers' own rules for `save_pretrained`.

    A layer whose weight those rules would split, join or permute is left out.
    """
    shapes = {
        name: (module.out_features, module.in_features) if isinstance(module, QuantLinear) else linear_shape(module)
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, QuantLinear) or is_linear(module)
    }
    if not is_transformers(model):
        return {name: name for name in shapes}
    from transformers.core_model_loading import revert_weight_conversion

    # All at once: some rules take effect only after they have seen another layer's name.
    state = {f"{name}.qweight": torch.empty(shape, device="meta") for name, shape in shapes.items()}
    names = {id(tensor): name for name, tensor in zip(shapes, state.values(), strict=True)}
    reverted = revert_weight_conversion(model, dict(state))
    return {names[id(t)]: key.removesuffix(".qweight") for key, t in reverted.items() if id(t) in names}


def _float_state(model: nn.Module, layers: Iterable[str]) -> dict[str, Tensor]:
    """The entries of the state dict that belong to no quantized layer."""
    quantized = {f"{name}.{suffix}" for name in layers for suffix in _TENSORS}
    state = {name: value for name, value in model.state_dict(keep_vars=True).items() if name not in quantized}
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise ExportError(
                f"{name} is a {type(value).__name__}: safetensors holds tensors only; remove the extra state"
            )
    return state


def _write_transformers(
    staging: Path, model: Any, floats: dict[str, Tensor], description: dict[str, Any]
) -> list[Path]:
    """Everything `save_pretrained` writes; returns its safetensors files, whose index, if any, is not ours."""
    if has_adapters(model):
        raise ExportError(
            "the model carries PEFT adapters: quantize and export gptq_plugin.adapters.merged_copy(model) instead"
        )
    original = model.config
    model.config = copy.deepcopy(original)  # save_pretrained writes dtype and architectures into it
    try:
        detached = {name: tensor.detach() for name, tensor in floats.items()}
        model.save_pretrained(staging, state_dict=detached, max_shard_size=MAX_SHARD)
    finally:
        model.config = original
    config = json.loads((staging / CONFIG).read_text(encoding="utf-8"))
    config["quantization_config"] = description
    if not getattr(original, "auto_map", None):  # models with code of their own say themselves what they are
        config["architectures"] = [(published_class(model) or type(model)).__name__]
    if description["lm_head"]:
        # A quantized head cannot share the embedding's float weight.
        for part in (config, config.get("text_config") or {}):
            if "tie_word_embeddings" in part or part is config:
                part["tie_word_embeddings"] = False
    _write_json(staging / CONFIG, config)
    return sorted(staging.glob("model*.safetensors"))


def _write_plain_config(staging: Path, model: nn.Module, description: dict[str, Any]) -> None:
    kind = type(model)
    _write_json(
        staging / CONFIG,
        {"module_class": f"{kind.__module__}.{kind.__qualname__}", "quantization_config": description},
    )


def _once(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Every tensor once, tied ones under their first name, none sharing memory with another."""
    first: dict[int, str] = {}
    for name, tensor in state.items():
        first.setdefault(id(tensor), name)
    tensors: dict[str, Tensor] = {}
    for name in first.values():
        value = state[name].detach()
        part_of_more = value.untyped_storage().nbytes() != value.numel() * value.element_size()
        tensors[name] = value.clone() if part_of_more else value
    return tensors


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
            if ours is not None and not _equal(checkpoint.read(f"{stored_name}.{suffix}"), ours):
                raise ExportError(f"the export does not read back: {stored_name}.{suffix} differs from the model's")
        if not torch.equal(_decoded_rows(checkpoint, stored_name), _rows(layer)):
            raise ExportError(f"the export does not read back: {stored_name} decodes to other weights than the model's")
        if not torch.equal(
            _zeros(checkpoint, stored_name), unpack_zeros(layer.qzeros.cpu(), layer.bits, layer.out_features)
        ):
            raise ExportError(f"the export does not read back: {stored_name}.qzeros differs from the model's")
    floats = set(checkpoint.float_names)
    for name, tensor in model.state_dict().items():
        if name in floats and not _equal(checkpoint.read(name), tensor):
            raise ExportError(f"the export does not read back: {name} differs from the model's")


def _equal(stored: Tensor, ours: Tensor) -> bool:
    """torch.equal, on the device of `ours`, a piece at a time: needs little memory there and none here."""
    if stored.shape != ours.shape:
        return False
    if not ours.numel():
        return True
    stored, ours = torch.atleast_1d(stored), torch.atleast_1d(ours)
    rows = max(1, _COMPARED * ours.shape[0] // ours.nbytes)
    return all(torch.equal(s.to(o.device), o) for s, o in zip(stored.split(rows), ours.split(rows), strict=True))


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
    words = -(-rows * layer.bits // 32)
    codes = _from_bits(checkpoint.read(f"{name}.qweight")[:, :rows].T, layer.bits)[:, : layer.in_features]
    zeros = _from_bits(checkpoint.read(f"{name}.qzeros")[:, :words], layer.bits)[:, :rows]
    if checkpoint.checkpoint_format == "gptq":
        zeros = (zeros + 1) % 2**layer.bits
    scales = checkpoint.read(f"{name}.scales")[:, :rows].float()
    group = checkpoint.read(f"{name}.g_idx").long()
    return (codes - zeros.T[:, group]).float() * scales.T[:, group]


def _from_bits(words: Tensor, bits: int) -> Tensor:
    """int32 [n, w], a little-endian stream along each row, to int32 [n, w * 32 // bits]."""
    single = (words.contiguous().view(torch.uint8)[:, :, None] >> torch.arange(8, dtype=torch.uint8)) & 1
    stream = single.flatten(1)
    whole = stream.shape[1] // bits * bits
    codes = stream[:, :whole].unflatten(1, (-1, bits)) << torch.arange(bits, dtype=torch.uint8)
    return codes.sum(-1, dtype=torch.int32)


def _zeros(checkpoint: Checkpoint, name: str) -> Tensor:
    """All true zeros of a layer in the file, uint8 [G, out]."""
    layer = checkpoint.layers[name]
    stored = checkpoint.read(f"{name}.qzeros")
    true = zeros_from_disk(stored, layer.bits, layer.out_features, checkpoint.checkpoint_format)
    return unpack_zeros(true, layer.bits, layer.out_features)


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
