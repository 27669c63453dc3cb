"""Loads quantized checkpoints through transformers' `from_pretrained`, with `QuantLinear` layers.

    from transformers import AutoModelForCausalLM
    from gptq_plugin import quantized_config

    config = quantized_config("out")
    model = AutoModelForCausalLM.from_pretrained("out", config=config, device_map="auto")

transformers chooses a quantizer by `quant_method`, and has quantizers for ``"gptq"`` and ``"compressed-tensors"``
(which need GPTQModel and optimum, or compressed-tensors). They are not replaced: `quantized_config` names another
method, ``"gptq_plugin"``, in the configuration it returns (not in the folder), and `register` adds that method through
transformers' extension points, `register_quantizer` and `register_quantization_config`. A `quantization_config=`
argument would not do: transformers refuses one whose class is not that of the method in config.json.

Quantized tensors are read by `checkpoint`, so the same checkpoints load, and are refused, as with `load_quantized`.
transformers loads the other tensors. It shows its progress bar, and its load report only if the files hold tensors
that the model has no place for.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import transformers
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from gptq_plugin.checkpoint.checkpoint import Checkpoint
from gptq_plugin.checkpoint.files import CONFIG, INDEX, WEIGHTS
from gptq_plugin.checkpoint.hub import local_folder
from gptq_plugin.checkpoint.load import forget_quantization, refuse_foreign_kernels
from gptq_plugin.checkpoint.many_modules import refuse_many_modules
from gptq_plugin.checkpoint.reserve import fill, in_memory, refuse_missing, reserve
from gptq_plugin.config import QUANTIZER_NAME
from gptq_plugin.errors import CheckpointError, brief, some
from gptq_plugin.model.stored_names import key_renaming

_OF_THE_HUB = {"revision", "token", "cache_dir", "force_download", "local_files_only", "subfolder"}


class GPTQPluginConfig(QuantizationConfigMixin):
    """The object in ``model.config.quantization_config``; it takes no options.

    Attributes:
        quant_method: ``"gptq_plugin"``.
        description: After loading, the quantization_config of the layers in memory, with ``quant_method="gptq"``, as
            `save_pretrained` writes it into config.json.
    """

    def __init__(self, quant_method: str = QUANTIZER_NAME, description: dict[str, Any] | None = None) -> None:
        self.quant_method = quant_method  # type: ignore[assignment]
        self.description = description

    def to_dict(self) -> dict[str, Any]:
        return dict(self.description or {"quant_method": self.quant_method})


class GPTQPluginQuantizer(HfQuantizer):
    """Puts `QuantLinear` layers into a model that transformers builds, and fills them; transformers loads the rest.

    The model can be saved (`save_pretrained` writes gptq_v2) and trained with adapters: gradients flow through the
    layers, not into their weights.
    """

    requires_calibration = True  # so transformers refuses to quantize float models with it

    quantization_config: GPTQPluginConfig
    _checkpoint: Checkpoint
    _names: dict[str, str]  # module name -> name in the checkpoint

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        files = kwargs.get("checkpoint_files") or []
        if not files:
            raise CheckpointError(
                "from_pretrained has no files to load: give the checkpoint's folder or name, not a state_dict"
            )
        self._checkpoint = Checkpoint.open(Path(files[0]).parent)
        floats = set(self._checkpoint.float_names)
        _refuse_two_files(self._checkpoint)
        rename = key_renaming(model)
        renamed = {name: rename(name) for name in self._checkpoint.tensors}
        self._names = reserve(self._checkpoint, model)
        refuse_missing(self._checkpoint, model, {key for name in floats for key in (name, *renamed[name])})
        # The others are read after loading: keeps transformers from reporting them as unexpected.
        ours = {key for name in self._checkpoint.tensors if name not in floats for key in (name, *renamed[name])}
        model._keys_to_ignore_on_load_unexpected = {
            *(model._keys_to_ignore_on_load_unexpected or ()),
            *(f"^{re.escape(key)}$" for key in ours),
        }

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> None:
        if getattr(model, "_tp_size", None) is not None:
            raise CheckpointError(
                f"{self._checkpoint.directory}: quantized layers are not divided by tp_plan; give device_map instead"
            )
        fill(self._checkpoint, model, self._names)
        self.quantization_config.description = in_memory(self._checkpoint, model, self._names)

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True


def register() -> None:
    """Registers ``quant_method="gptq_plugin"`` with transformers in this process. Calling it again does nothing.

    Raises:
        ValueError: Another package has registered that name.
    """
    for mapping, add, ours in (
        (AUTO_QUANTIZATION_CONFIG_MAPPING, register_quantization_config, GPTQPluginConfig),
        (AUTO_QUANTIZER_MAPPING, register_quantizer, GPTQPluginQuantizer),
    ):
        if mapping.get(QUANTIZER_NAME) is not ours:
            add(QUANTIZER_NAME)(ours)


def quantized_config(name_or_path: str | Path, **kwargs: Any) -> Any:
    """Returns the model's configuration, for ``from_pretrained(name_or_path, config=...)``. Calls `register`.

    Args:
        name_or_path: A folder, or a name on the hub, whose files are fetched now and are in the cache afterwards.
        kwargs: Options of `AutoConfig.from_pretrained`, such as `revision`.

    Raises:
        CheckpointError: There is no such folder and no such name, the files are damaged, or config.json describes more
            modules than they can hold.
    """
    register()
    folder = local_folder(name_or_path, **{name: kwargs[name] for name in _OF_THE_HUB & kwargs.keys()})
    checkpoint = Checkpoint.open(folder)
    refuse_many_modules(checkpoint.model_config, folder / CONFIG, checkpoint.tensors.values())
    if not checkpoint.model_config.get("model_type"):
        raise CheckpointError(
            f"{folder / CONFIG} has no model_type, so transformers cannot build its model: load the export of a plain "
            "module with load_quantized(folder, model=it)"
        )
    try:
        config = transformers.AutoConfig.from_pretrained(name_or_path, **kwargs)
    except Exception as error:  # whatever values that nobody expected lead to
        raise CheckpointError(
            f"{folder / CONFIG} is not a configuration of transformers {transformers.__version__}: {brief(error)}"
        ) from error
    refuse_foreign_kernels(config, name_or_path)
    forget_quantization(config)
    config.quantization_config = {"quant_method": QUANTIZER_NAME}
    weights = _unexpected_weights_name(checkpoint)
    if weights is not None:
        config.transformers_weights = weights
    return config


def _unexpected_weights_name(checkpoint: Checkpoint) -> str | None:
    """Name of the weights' file if transformers does not expect it: AutoGPTQ put bits and group size into the name."""
    directory = checkpoint.directory
    if (directory / WEIGHTS).is_file() or (directory / INDEX).is_file():
        return None
    found = sorted(directory.glob("*.safetensors.index.json")) or [entry.file for entry in checkpoint.tensors.values()]
    return found[0].name


def _refuse_two_files(checkpoint: Checkpoint) -> None:
    """Raises CheckpointError for tensors that two files have: transformers takes the last file's, not the index's."""
    if checkpoint.shards.elsewhere:
        raise CheckpointError(
            f"{checkpoint.directory / INDEX} names one file for {some(sorted(checkpoint.shards.elsewhere))}, which "
            "another has too, and from_pretrained would take the last: load it with load_quantized, or fetch the files "
            "again"
        )
