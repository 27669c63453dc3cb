"""Writes a quantized model as a folder that clients load: `export_model`, or `Export` while layers are still solved.

The folder is written beside its target under a hidden name, read back and compared with the model (`verify_files`),
loaded and run (`verify_outputs`), flushed, and only then renamed into place (`staging`): a failure leaves the target as
it was.

`description.client_config` describes it for clients. Tensors keep their dtypes, so choose the model's: vLLM needs
float16 for GPTQ, and rounds scales to bfloat16 in a bfloat16 model.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from gptq_plugin.calibration.tokenizer import as_tokenizer
from gptq_plugin.checkpoint.description import client_config
from gptq_plugin.checkpoint.files import TAKEN_OVER
from gptq_plugin.checkpoint.formats.registry import FORMATS
from gptq_plugin.clients.client import Client
from gptq_plugin.clients.inventory import Inventory
from gptq_plugin.clients.rules import refuse
from gptq_plugin.config import QUANTIZER_NAME, QuantizeConfig
from gptq_plugin.device.cycles import rarely_collected
from gptq_plugin.device.surroundings import plain_defaults, same_random_numbers
from gptq_plugin.errors import ExportError, some
from gptq_plugin.export.config_checks import check_config, check_symmetry
from gptq_plugin.export.disk_space import disk_errors_explained
from gptq_plugin.export.export_size import export_size, tensor_bytes
from gptq_plugin.export.model_files import float_state, once, write_plain_config, write_transformers
from gptq_plugin.export.shard_writer import ShardWriter
from gptq_plugin.export.side_files import write_quantize_config, write_report
from gptq_plugin.export.staging import Staging
from gptq_plugin.export.unloaded import Unloaded
from gptq_plugin.export.verify_files import checksums, verify
from gptq_plugin.export.verify_outputs import Sample, same_outputs
from gptq_plugin.layers.qlinear import QuantLinear
from gptq_plugin.layers.stored_weight import TENSORS
from gptq_plugin.model.as_configured import refuse_other_than_configured
from gptq_plugin.model.hf_models import check_savable, is_transformers
from gptq_plugin.model.plan import MODEL
from gptq_plugin.model.stored_names import renaming
from gptq_plugin.model.structure import Structure
from gptq_plugin.report.model_card import model_facts
from gptq_plugin.report.provenance import provenance, publishable, run_stamp
from gptq_plugin.report.report import QuantizeReport

log = logging.getLogger(__name__)

SHARD = 10**9  # bytes of quantized layers in a file; a model smaller than this is one file
PIECE = 2**26  # bytes of layers on a CPU that wait in memory


@rarely_collected()
@plain_defaults()
def export_model(
    model: nn.Module,
    directory: str | Path,
    config: QuantizeConfig,
    *,
    report: QuantizeReport | None = None,
    tokenizer: Any = None,
    overwrite: bool = False,
    sample: Sample | None = None,
    target: Client | str | Mapping[str, Any] | None = None,
) -> Path:
    """Writes a quantized model as a checkpoint of the config's `checkpoint_format`.

    A transformers model becomes what `save_pretrained` writes (config.json with a ``quantization_config``,
    generation_config.json, safetensors); any other module becomes safetensors and a minimal config.json. Up to
    1 GB of tensors are one model.safetensors, more are shards with an index. Beside them are quantize_config.json
    (AutoGPTQ's file), the report (for programs, as a page, and as a model card) and the tokenizer.

    Args:
        model: With `QuantLinear` layers; not changed. Other tensors are stored in their dtypes, tied ones once.
        directory: Must not exist or be empty; see `overwrite`. Its parents are created.
        config: The model's quantization. ``desc_act`` is written as true only if some group index needs it.
        report: Stored as quantization_report.json, report.html and README.md (a model card).
        tokenizer: Anything with `save_pretrained`, or the folder or hub id to load a tokenizer from.
        overwrite: Replace an earlier export of this package; nothing else is ever replaced.
        sample: Run through the model and the export, whose outputs must agree; see `verify_outputs.same_outputs`.
        target: The client that is to load it ("vllm", "transformers", "sglang", "gptqmodel", or as
            `clients.client.Client.of` takes it): an export that it does not take is refused.

    Returns:
        The folder, absolute.

    Raises:
        ExportError: Nothing is quantized, `config` is not the one the model was quantized with, the folder cannot be
            used, `target` does not take the export, or the files do not read back as the model. The folder is
            unchanged.
        TypeError, ValueError: `tokenizer` is not one; see `calibration.tokenizer.as_tokenizer`.
    """
    MODEL.check("model", model)
    refuse_other_than_configured(model)
    tokenizer = as_tokenizer(tokenizer, saved=True)
    structure, layers, client = Structure.of_unfused(model), _quantized(model), Client.of(target)
    if client is not None and layers:
        refuse(Inventory.of_layers(structure, layers, config, report), client)
    with same_random_numbers(), Export(structure, directory, config, overwrite=overwrite) as export:
        for name, layer in layers.items():
            export.add(name, layer)
        export.finish(model, report=report, tokenizer=tokenizer, sample=sample)
        return export.place()


class Export:
    """`export_model` in steps: finished layers are written while others are still being quantized.

    Every layer is given to `add` once, then the quantized model to `finish`; `place` makes it the target. As a context
    manager it removes its files if it is left without `place`, for whatever reason; the target is then unchanged.

    Args:
        structure: The model's; its layers may be quantized already, or not yet.
        directory, config, overwrite: See `export_model`.
        target: The client that is to load the export; `finish` refuses an export that it does not take.

    Raises:
        ExportError: The folder cannot be used (`check_export_dir`), or the model could not be saved.
    """

    def __init__(
        self,
        structure: Structure,
        directory: str | Path,
        config: QuantizeConfig,
        *,
        overwrite: bool = False,
        target: Client | None = None,
    ) -> None:
        self._structure = structure
        self._config = config
        self._format = FORMATS[config.checkpoint_format]
        self._target = target
        check_savable(structure.model)
        self._places = structure.places
        self._unloaded = Unloaded.of(structure.model)
        self._added: set[str] = set()
        self._checksums: dict[str, dict[str, int]] = {}  # by stored name, from before they were written
        self._is_finished = self._over = False
        self._bytes = 0
        self._settled: Mapping[str, Any] = {}  # how the export is quantized, for its report
        self._staging = Staging(directory, overwrite)
        try:
            self._writer = ShardWriter(self._staging.path, SHARD, piece_bytes=PIECE)
        except BaseException:
            self._staging.remove()
            raise

    def add(self, name: str, layer: QuantLinear) -> None:
        """Writes a finished layer in the background. Waits for no device, for the disk while two shards are unwritten.

        Args:
            name: Its name in the model; for a shared layer, the name to store it under.
            layer: On any device. On a CPU its tensors are kept, not copied: they must not change afterwards.

        Raises:
            ExportError: The model has no linear layer of that name, it was added before, the layer contradicts the
                config, or writing an earlier one failed: zeros that contradict the config are found then.
        """
        self._check_open()
        if name in self._added:
            raise ExportError(f"{name} was added to the export before: add every layer once")
        self.check([name])
        names = self._places[name]
        check_config({name: layer}, self._config)
        bits, sym = layer.bits, (self._config.for_module(name) or self._config).sym

        def as_stored(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            check_symmetry(name, tensors["qzeros"], layer, self._config)
            self._checksums |= dict.fromkeys(names, checksums(tensors))
            try:
                on_file = self._format.to_file(tensors, bits, sym)
            except ExportError as error:
                raise ExportError(f"{name}: {error}") from error
            return {f"{stored}.{suffix}": tensor for stored in names for suffix, tensor in on_file.items()}

        tensors = {suffix: getattr(layer, suffix) for suffix in TENSORS}
        self._writer.add({suffix: t.detach() for suffix, t in tensors.items() if t is not None}, as_stored)
        self._added.add(name)

    def check(self, names: Iterable[str]) -> None:
        """Checks that layers of these names can be added.

        Raises:
            ExportError: The model has no linear layer of a name, or one that cannot be stored.
        """
        impossible = [name for name in names if name not in self._places]
        if impossible:
            raise ExportError(
                f"{some(impossible)} cannot be exported: not a linear layer of the model, or one that transformers "
                "stores rearranged, which packed weights cannot be. Name such layers in modules_to_not_convert"
            )

    def written(self, name: str) -> dict[str, Tensor] | None:
        """Maps an added layer's tensors from its file.

        A layer on the CPU that takes them in place of its own frees that memory. They stay valid after `finish` and
        `abort`, and if the files are removed or replaced, but not if the files are written to.

        Returns:
            The tensors whose bytes in the file are a `QuantLinear`'s (`Format.in_memory`); None if there are none, or
            they are not on disk yet.
        """
        stored = self._places[name][0]
        tensors = {suffix: self._writer.read(f"{stored}.{suffix}") for suffix in self._format.in_memory}
        return {suffix: t for suffix, t in tensors.items() if t is not None} or None

    def lasts(self, name: str) -> bool:
        """Returns whether `written` maps a layer from the export itself, and not from where it waits for that."""
        stored = self._places[name][0]
        return any(self._writer.is_in_shard(f"{stored}.{suffix}") for suffix in self._format.in_memory)

    @plain_defaults()
    def finish(
        self,
        model: nn.Module,
        *,
        report: QuantizeReport | None = None,
        tokenizer: Any = None,
        sample: Sample | None = None,
    ) -> None:
        """Writes everything else, verifies the files and their outputs, and flushes them to the disk.

        Args:
            model: The quantized model, with the layers that were added; not changed.
            report, tokenizer, sample: See `export_model`.

        Raises:
            ExportError: The model's layers are not those added, or the files could not be written, do not read back as
                the model, or compute something else. The export is given up.
        """
        self._check_open()
        try:
            layers = {n: m for n, m in model.named_modules(remove_duplicate=False) if isinstance(m, QuantLinear)}
            self._check_layers(model, layers)
            check_config(layers, self._config)
            if self._target is not None:
                refuse(Inventory.of_layers(self._structure, _quantized(model), self._config, report), self._target)
            folder = self._staging.path
            self._bytes = tensor_bytes(model)
            with disk_errors_explained(self._staging.directory, lambda: self._bytes):
                self._write(model, layers, report, tokenizer)
            renamed = renaming(model) if is_transformers(model) else str
            verify(folder, layers, model.state_dict(), renamed, self._checksums)
            told = same_outputs(model, folder, sample)
            if report is not None and told:
                report.deviations += [sentence for sentence in told if sentence not in report.deviations]
                self._write_report(model, report)
            with disk_errors_explained(self._staging.directory, lambda: self._bytes):
                self._staging.flush()
            self._is_finished = True
        except BaseException:
            self.abort()
            raise

    def place(self) -> Path:
        """Puts the finished folder in its target's place, and returns it, absolute.

        Raises:
            ExportError: The export is not finished, or the target can no longer be used. The export is given up, and
                the target unchanged.
        """
        self._check_open()
        try:
            if not self._is_finished:
                raise ExportError(f"the export to {self._staging.directory} is not finished: call `finish` before")
            with disk_errors_explained(self._staging.directory, lambda: self._bytes):
                self._staging.place()
            self._over = True
        except BaseException:
            self.abort()
            raise
        return self._staging.directory

    def abort(self) -> None:
        """Gives up and removes everything written so far. Does nothing to a finished export."""
        if not self._over:
            self._over = True
            self._writer.abort()
            self._staging.remove()

    def __enter__(self) -> Export:
        return self

    def __exit__(self, *_: object) -> None:
        self.abort()

    def _check_open(self) -> None:
        if self._over:
            raise ExportError(f"the export to {self._staging.directory} was finished or given up: make another Export")

    def _write(
        self, model: nn.Module, layers: dict[str, QuantLinear], report: QuantizeReport | None, tokenizer: Any
    ) -> None:
        """Writes everything but the quantized layers, and finishes their shards."""
        folder = self._staging.path
        description = client_config(self._structure, layers, self._config, self._unloaded.layers)
        settings = self._config.to_quantize_config()
        for sentence in self._unloaded.sentences():
            log.warning("%s", sentence)
            if report is not None and sentence not in report.deviations:
                report.deviations.append(sentence)
        if report is not None:
            description["meta"][QUANTIZER_NAME] = provenance(report)
            settings["meta"][QUANTIZER_NAME] |= run_stamp(report)  # not in config.json: two runs give the same
        if self._unloaded.modules:
            description["meta"].setdefault(QUANTIZER_NAME, {})[TAKEN_OVER] = self._unloaded.modules
        floats = float_state(model, layers)
        if is_transformers(model):
            files = write_transformers(folder, model, floats, description)
            for name in self._unloaded.tensors:
                self._writer.add({name: self._unloaded.read(name)})
            self._writer.finish(files, total_parameters=model.num_parameters())  # type: ignore[operator]
        else:
            write_plain_config(folder, model, description)
            for name, tensor in once(floats).items():
                self._writer.add({name: tensor})
            self._writer.finish()
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        if report is not None:
            report.size = export_size(folder, {stored for name in self._added for stored in self._places[name]})
            self._settled = self._format.settings(description, report.config)
            self._write_report(model, report)
        write_quantize_config(folder, description, settings)

    def _write_report(self, model: nn.Module, report: QuantizeReport) -> None:
        folder = self._staging.path
        write_report(folder, publishable(report), model_facts(model, folder), self._settled)

    def _check_layers(self, model: nn.Module, layers: dict[str, QuantLinear]) -> None:
        if not layers:
            raise ExportError(f"{type(model).__name__} has no QuantLinear: quantize it before exporting it")
        there = {layers[name] for name in self._added if name in layers}
        lacking = [name for name, layer in layers.items() if layer not in there]
        if lacking:
            raise ExportError(f"{some(lacking)} were not added to the export: add every one before `finish`")
        gone = sorted(self._added - set(layers))
        if gone:
            raise ExportError(f"{some(gone)} were added to the export but are not quantized in the model: swap them in")


def _quantized(model: nn.Module) -> dict[str, QuantLinear]:
    """The quantized layers by name, a shared one under its first."""
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantLinear)}
