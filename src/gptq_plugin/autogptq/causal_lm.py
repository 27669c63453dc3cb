"""AutoGPTQ's entry: `AutoGPTQForCausalLM`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from gptq_plugin.autogptq.base_config import BaseQuantizeConfig
from gptq_plugin.autogptq.folders import check_basename
from gptq_plugin.autogptq.gptq_model import BaseGPTQForCausalLM
from gptq_plugin.autogptq.options import HUB, IGNORED_LOADING, IGNORED_LOADING_FLOAT, REFUSED_LOADING, sort_out
from gptq_plugin.checkpoint.files import CONFIG, QUANTIZE_CONFIG
from gptq_plugin.checkpoint.hub import local_folder
from gptq_plugin.checkpoint.load import load_quantized
from gptq_plugin.checkpoint.schema import check_description, read_checked
from gptq_plugin.config import QuantizeConfig
from gptq_plugin.errors import CheckpointError, brief
from gptq_plugin.quantize.module import QuantizeModule

_FOR_TRANSFORMERS = (*HUB, "attn_implementation", "code_revision", "config", "use_safetensors", "variant")


class AutoGPTQForCausalLM:
    """AutoGPTQ's entry: `from_pretrained` for a model to quantize, `from_quantized` for a checkpoint."""

    def __init__(self) -> None:
        raise TypeError("AutoGPTQForCausalLM is not made by itself: call its from_pretrained or from_quantized")

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        quantize_config: BaseQuantizeConfig,
        *,
        torch_dtype: torch.dtype | str | None = None,
        dtype: torch.dtype | str | None = None,
        trust_remote_code: bool = False,
        use_auth_token: str | bool | None = None,
        **options: Any,
    ) -> BaseGPTQForCausalLM:
        """Loads the float model onto the CPU, by transformers' `AutoModelForCausalLM.from_pretrained`.

        Args:
            pretrained_model_name_or_path: A folder, or a name on the hub.
            quantize_config: How `quantize` will do it.
            torch_dtype: `dtype`, by its old name.
            dtype: Of the model; as its checkpoint stores it when None (AutoGPTQ: float16).
            trust_remote_code: As for transformers.
            use_auth_token: `token`, by its old name.
            options: revision, token, cache_dir, force_download, local_files_only, subfolder, variant, config,
                code_revision, use_safetensors and attn_implementation go to transformers; those about placement are
                ignored with a warning.

        Raises:
            TypeError: `quantize_config` is no BaseQuantizeConfig.
            ValueError: An option is unknown, or true_sequential is False.
        """
        forwarded = sort_out(cls.from_pretrained, options, ignored=IGNORED_LOADING_FLOAT, forwarded=_FOR_TRANSFORMERS)
        if not isinstance(quantize_config, BaseQuantizeConfig):
            raise TypeError(
                f"quantize_config must be a BaseQuantizeConfig, got {type(quantize_config).__name__}. A QuantizeConfig "
                "goes to QuantizeModule(config).quantize(model, examples)"
            )
        QuantizeModule(quantize_config.forwarded())  # refuses now what it would refuse after loading
        if use_auth_token is not None:
            forwarded.setdefault("token", use_auth_token)
        model = AutoModelForCausalLM.from_pretrained(
            pretrained_model_name_or_path,
            dtype=dtype or torch_dtype or "auto",
            trust_remote_code=trust_remote_code,
            **forwarded,
        )
        return BaseGPTQForCausalLM(model.eval(), quantize_config)

    @classmethod
    def from_quantized(
        cls,
        model_name_or_path: str | Path,
        device_map: str | Mapping[str, Any] | None = None,
        *,
        device: str | int | torch.device | None = None,
        torch_dtype: torch.dtype | None = None,
        dtype: torch.dtype | None = None,
        quantize_config: BaseQuantizeConfig | None = None,
        model_basename: str | None = None,
        trust_remote_code: bool = False,
        use_auth_token: str | bool | None = None,
        **options: Any,
    ) -> BaseGPTQForCausalLM:
        """Loads a quantized checkpoint by `load_quantized`: this package's, AutoGPTQ's or another it reads.

        Args:
            model_name_or_path: A folder, or a name on the hub.
            device_map: As for `load_quantized`; ``"auto"`` when neither it nor `device` is given.
            device: Where the whole model goes; left aside beside `device_map`.
            torch_dtype: `dtype`, by its old name.
            dtype: Of what is not quantized; as stored when None (AutoGPTQ: float16).
            quantize_config: Needed by AutoGPTQ for folders without a description; here the folder's is read, and a
                given one must agree with it.
            model_basename: Name of the weights' file without its ending, where it is the only one.
            trust_remote_code: As for `load_quantized`.
            use_auth_token: `token`, by its old name.
            options: revision, token, cache_dir, force_download, local_files_only and subfolder; those that choose
                AutoGPTQ's kernels are ignored with a warning.

        Raises:
            CheckpointError: See `load_quantized`; or there are other weights beside `model_basename`.
            ValueError: An option is unknown or not supported, or `quantize_config` contradicts the folder.
        """
        if device is not None and device_map is not None:
            options["device"] = device
        hub = sort_out(
            cls.from_quantized,
            options,
            ignored=IGNORED_LOADING | {"device": "device_map places the model"},
            refused=REFUSED_LOADING,
            forwarded=HUB,
        )
        folder = local_folder(model_name_or_path, **{"token": use_auth_token, **hub})
        if model_basename is not None:
            check_basename(folder, model_basename, stacklevel=3)
        where: dict[str, Any] = {"device_map": device_map or "auto"}
        if device_map is None and device is not None:
            where = {"device": torch.device(device)}
        model = load_quantized(folder, dtype=dtype or torch_dtype, trust_remote_code=trust_remote_code, **where)
        found = _described(folder, model)
        _refuse_contradiction(folder, quantize_config, found)
        found.model_name_or_path = str(model_name_or_path)
        return BaseGPTQForCausalLM(model, found, quantized=True)


def _described(folder: Path, model: Any) -> BaseQuantizeConfig:
    """What was loaded, and what quantize_config.json tells beside it."""
    file = folder / QUANTIZE_CONFIG
    told = read_checked(file, check_description) or {}
    loaded = {**model.config.quantization_config, "checkpoint_format": told.get("checkpoint_format")}
    try:
        return BaseQuantizeConfig.from_quantize_config(QuantizeConfig.from_quantize_config({**told, **loaded}))
    except (ValueError, TypeError) as error:
        where = file if told else folder / CONFIG
        raise CheckpointError(f"{where} describes no GPTQ checkpoint: {brief(error)}") from error


def _refuse_contradiction(folder: Path, given: BaseQuantizeConfig | None, found: BaseQuantizeConfig) -> None:
    for name in ("bits", "group_size", "sym"):
        if given is not None and getattr(given, name) != getattr(found, name):
            raise ValueError(
                f"quantize_config has {name}={getattr(given, name)}, and {folder} is quantized with "
                f"{name}={getattr(found, name)}: leave quantize_config out"
            )
