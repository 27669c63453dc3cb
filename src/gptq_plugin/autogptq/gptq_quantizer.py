"""optimum's `GPTQQuantizer` and `load_quantized_model`."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from gptq_plugin.autogptq.folders import tokenizer_kept
from gptq_plugin.autogptq.options import (
    IGNORED_LOADING,
    IGNORED_QUANTIZING,
    IGNORED_SAVING,
    REFUSED_LOADING,
    REFUSED_SAVING,
    sort_out,
)
from gptq_plugin.autogptq.samples import computing_device, longest, named_samples, positions, token_samples
from gptq_plugin.calibration.tokenizer import as_tokenizer
from gptq_plugin.checkpoint.load import load_quantized
from gptq_plugin.config import QuantizeConfig
from gptq_plugin.errors import TargetError, some
from gptq_plugin.quantize.module import QuantizeModule


class GPTQQuantizer:
    """optimum's quantizer of transformers models; forwards to `QuantizeModule`.

    Args:
        bits: 2, 3, 4 or 8.
        dataset: Texts, rows with texts or chats (such as a `datasets.Dataset`), tokenized dicts (``input_ids``,
            ``attention_mask``), or the name of a data set: ``"wikitext2"``, ``"c4"`` or ``"c4-new"``, of which 128
            windows are drawn. All texts, rows and dicts are used.
        group_size: Input channels that share a scale; -1 is one group a row.
        damp_percent: Share of the mean of diag(H) added to it, in [0, 1).
        desc_act: Visit columns in order of activation, which is done in any case while `act_group_aware` holds.
        act_group_aware: Keep groups contiguous while columns are visited in order of activation
            (``static_groups=True`` of `QuantizeConfig`). False takes the original order: natural, or with
            ``desc_act=True`` groups along the order of activation.
        sym: Symmetric grid.
        true_sequential: Only True: lock-step calibration gives it in one pass.
        model_seqlen: Tokens in a sample: longer texts are cut, windows of a named data set are as long. 2048 when
            None; for named data sets no more than the model takes.
        block_name_to_quantize: Quantize layers in this module only, such as ``"model.decoder.layers"``; all but the
            output embedding when None.
        modules_in_block_to_quantize: Quantize layers with these names in their block only. Lists of lists, as they
            come; their order has no meaning, since every layer sees what the ones before it give.
        batch_size: Samples of one length in a forward; `QuantizeConfig`'s when None (optimum: 1). Changes no result
            beyond rounding.
        format: `checkpoint_format`, by its other name.
        checkpoint_format: Of the export: ``"gptq"``, ``"gptq_v2"`` or ``"compressed-tensors"``.
        options: Those that choose kernels or prepare inputs are ignored with a warning.

    Raises:
        ValueError: An option is unknown or has a value that cannot work.
    """

    def __init__(
        self,
        bits: int,
        dataset: str | Iterable[Any] | None = None,
        group_size: int = 128,
        damp_percent: float = 0.1,
        desc_act: bool = False,
        *,
        act_group_aware: bool = True,
        sym: bool = True,
        true_sequential: bool = True,
        model_seqlen: int | None = None,
        block_name_to_quantize: str | None = None,
        modules_in_block_to_quantize: Sequence[Sequence[str] | str] | None = None,
        batch_size: int | None = None,
        format: str | None = None,
        checkpoint_format: str | None = None,
        **options: Any,
    ) -> None:
        sort_out(GPTQQuantizer.__init__, options, ignored=IGNORED_QUANTIZING)
        fields = {"model_seqlen": model_seqlen, "batch_size": batch_size}
        self.config = QuantizeConfig(
            bits=bits,
            group_size=group_size,
            damp_percent=damp_percent,
            desc_act=desc_act,
            static_groups=act_group_aware,
            sym=sym,
            true_sequential=true_sequential,
            checkpoint_format=(format or checkpoint_format or "gptq").lower(),
            **{name: value for name, value in fields.items() if value is not None},  # type: ignore[arg-type]
        )
        self.dataset = dataset
        self.model_seqlen = model_seqlen
        self.block_name_to_quantize = block_name_to_quantize
        self.modules_in_block_to_quantize = modules_in_block_to_quantize
        self._quantizer = QuantizeModule(self.config)
        self._tokenizer: Any = None

    def quantize_model(self, model: nn.Module, tokenizer: Any = None) -> nn.Module:
        """Quantizes the model in place, on the GPU if there is one.

        Args:
            model: The float model.
            tokenizer: Needed for texts and named data sets: a tokenizer, or the folder or name to load it from. Saved
                with the model.

        Returns:
            The same model.

        Raises:
            ValueError: There is no dataset, or no tokenizer for it.
            TargetError: No layer is left by `block_name_to_quantize` and `modules_in_block_to_quantize`.
            CalibrationError: See `QuantizeModule.quantize`.
        """
        tokenizer = as_tokenizer(tokenizer)
        config = dataclasses.replace(self.config, modules_to_not_convert=self._left_float(model))
        samples = self._samples(model, tokenizer)
        config = dataclasses.replace(config, nsamples=max(config.nsamples, len(samples)))
        if self.model_seqlen is None:
            config = dataclasses.replace(config, model_seqlen=max(config.model_seqlen, longest(samples)))
        quantizer = QuantizeModule(config)
        quantizer.quantize(model, samples, tokenizer=tokenizer, device=computing_device(model))
        self._quantizer, self._tokenizer = quantizer, tokenizer
        return model

    def save(
        self, model: nn.Module, save_dir: str | Path, max_shard_size: str | int | None = None, **options: Any
    ) -> Path:
        """Exports the quantized model, with the tokenizer it was quantized with; see `QuantizeModule.export`. An
        earlier export is replaced, and tokenizer files in the folder stay.

        Args:
            model: What `quantize_model` returned.
            save_dir: The folder: new, empty, or an earlier export.
            max_shard_size: Ignored with a warning.
            options: safe_serialization and use_safetensors, which must be True.

        Raises:
            ValueError: An option is unknown, or would write pickled weights.
            ExportError: See `QuantizeModule.export`.
        """
        if max_shard_size is not None:
            options["max_shard_size"] = max_shard_size
        sort_out(GPTQQuantizer.save, options, ignored=IGNORED_SAVING, refused=REFUSED_SAVING)
        with tokenizer_kept(save_dir):
            return self._quantizer.export(model, save_dir, tokenizer=self._tokenizer, overwrite=True)

    def to_dict(self) -> dict[str, Any]:
        """Its options by name; `from_dict` takes them."""
        names = ("bits", "group_size", "damp_percent", "desc_act", "sym", "true_sequential", "checkpoint_format")
        return {
            **{name: getattr(self.config, name) for name in names},
            "act_group_aware": self.config.static_groups,
            "dataset": self.dataset,
            "model_seqlen": self.model_seqlen,
            "batch_size": self.config.batch_size,
            "block_name_to_quantize": self.block_name_to_quantize,
            "modules_in_block_to_quantize": self.modules_in_block_to_quantize,
        }

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any]) -> GPTQQuantizer:
        """A quantizer with these options."""
        return cls(**config_dict)

    def _samples(self, model: nn.Module, tokenizer: Any) -> list[Any]:
        if self.dataset is None:
            raise ValueError("there is nothing to calibrate on: give GPTQQuantizer(dataset=...), a list of texts")
        if isinstance(self.dataset, str):
            seqlen = self.model_seqlen or min(self.config.model_seqlen, positions(model) or self.config.model_seqlen)
            return list(named_samples(self.dataset, tokenizer, self.config.nsamples, seqlen, self.config.seed))
        return token_samples(self.dataset)

    def _left_float(self, model: nn.Module) -> tuple[str, ...]:
        """The layers that `block_name_to_quantize` and `modules_in_block_to_quantize` leave out."""
        block, inside = self.block_name_to_quantize, self.modules_in_block_to_quantize
        if block is None and inside is None:
            return ()
        listed = [name for part in inside or () for name in ([part] if isinstance(part, str) else part)]
        ending = "|".join(map(re.escape, listed)) if inside is not None else ".*"
        beginning = rf"{re.escape(block)}\." if block else ""
        wanted = re.compile(rf"{beginning}(.*\.)?({ending})")
        names = [target.name for target in QuantizeModule(self.config).check(model)[0]]
        left = tuple(name for name in names if not wanted.fullmatch(name))
        if len(left) == len(names):
            raise TargetError(
                f"no layer of the model is in block_name_to_quantize={block!r} with a name in "
                f"modules_in_block_to_quantize={inside!r}; its layers are {some(names)}"
            )
        return left


def load_quantized_model(
    model: nn.Module,
    save_folder: str | Path,
    *,
    device_map: str | Mapping[str, Any] | None = None,
    **options: Any,
) -> Any:
    """Loads a checkpoint by `load_quantized`.

    Args:
        model: For a transformers checkpoint only its kind matters, and a model without weights will do: another is
            built and returned. Any other module is filled in place.
        save_folder: The checkpoint.
        device_map: As for `load_quantized`; the GPU, or the CPU without one, when None.
        options: Those that choose kernels or offload are ignored with a warning.

    Returns:
        The quantized model.

    Raises:
        CheckpointError: See `load_quantized`.
        ValueError: An option is unknown or not supported.
    """
    sort_out(load_quantized_model, options, ignored=IGNORED_LOADING, refused=REFUSED_LOADING)
    where: dict[str, Any] = {"device_map": device_map}
    if device_map is None:
        where = {"device": "cuda" if torch.cuda.is_available() else "cpu"}
    return load_quantized(save_folder, model=None if isinstance(model, PreTrainedModel) else model, **where)
