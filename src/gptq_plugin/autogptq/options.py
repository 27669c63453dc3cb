"""Options of the old libraries: which mean nothing here and why, which are refused and what to do instead.

Ignored options are told by `warnings.warn`, not by the log: a script shows warnings without any set-up, with the line
that gives the option, and Python shows each of them once a line.
"""

from __future__ import annotations

import difflib
import inspect
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

_KERNELS = "QuantLinear chooses its kernels by device and shape, without warm-up"
_FUSED = "the model's modules stay transformers' own"
_LAYOUT = "transformers knows how its models are divided"
_ON_THE_CPU = "the model is loaded on the CPU and copied to the GPU block by block, as memory allows"
_OFFLOAD = "quantized layers are not offloaded, and a device_map that asks for it is refused"
_HUB = "huggingface_hub decides it by itself (proxies: by the environment)"

KERNELS = dict.fromkeys(
    (
        "use_triton",
        "use_tritonv2",
        "use_qigen",
        "use_marlin",
        "warmup_triton",
        "autotune_warmup_after_quantized",
        "disable_exllama",
        "disable_exllamav2",
        "use_exllama",
        "exllama_config",
        "max_input_length",
        "backend",
    ),
    _KERNELS,
) | {"use_cuda_fp16": "kernels compute in the model's dtype"}

HUB = ("revision", "token", "cache_dir", "force_download", "local_files_only", "subfolder")

IGNORED_BY_HUB = dict.fromkeys(("resume_download", "proxies", "_commit_hash"), _HUB)

IGNORED_LOADING_FLOAT = IGNORED_BY_HUB | {
    "max_memory": _ON_THE_CPU,
    "device_map": _ON_THE_CPU,
    "low_cpu_mem_usage": "transformers always loads that way",
}

IGNORED_LOADING = (
    KERNELS
    | IGNORED_BY_HUB
    | dict.fromkeys(("inject_fused_attention", "inject_fused_mlp"), _FUSED)
    | dict.fromkeys(("offload_folder", "offload_buffers", "offload_state_dict"), _OFFLOAD)
    | {
        "low_cpu_mem_usage": "tensors are always read one by one onto their device",
        "trainable": "gradients always flow through quantized layers, to adapters and what is below",
        "no_split_module_classes": _LAYOUT,
        "state_dict_name": "the folder holds one set of weights, under whatever name",
    }
)

IGNORED_QUANTIZING = KERNELS | {
    "module_name_preceding_first_block": "calibration runs the model's own forward",
    "cache_block_outputs": "outputs are always kept, on the GPU or the CPU as memory allows",
    "pad_token_id": "samples of one length share a batch, and none is padded",
    "meta": "the export records versions, data and options by itself",
    "quant_method": "there is only gptq",
}

IGNORED_SAVING = {
    "safetensors_metadata": "config.json and quantize_config.json describe the weights",
    "max_shard_size": "shards hold 1 GB of quantized layers, so that they are written meanwhile",
}

# Accepted values, and what to do about others.
REFUSED_LOADING: dict[str, tuple[tuple[Any, ...], str]] = {
    "use_safetensors": (
        (True, None),
        "pickled weights (.bin, .pt) run code when they are read. Convert them to safetensors once, with the library "
        "that wrote them, and leave the option out",
    ),
    "max_memory": (
        (None, {}),
        "give device_map={module: device}, or load with transformers: AutoModelForCausalLM.from_pretrained(folder, "
        "config=gptq_plugin.quantized_config(folder), device_map='auto', max_memory=...)",
    ),
    "checkpoint_format": (
        (None,),
        "the format is read from the folder. Where it names none, zeros are read as 'gptq' stores them; write another "
        "format as checkpoint_format into its quantize_config.json",
    ),
    "quant_config_name": (
        ("quantize_config.json", None),
        "the description is read from config.json or quantize_config.json: rename the file",
    ),
}

REFUSED_SAVING: dict[str, tuple[tuple[Any, ...], str]] = {
    "use_safetensors": ((True, None), "weights are written as safetensors, which every loader reads: leave it out"),
    "safe_serialization": ((True, None), "weights are written as safetensors, which every loader reads: leave it out"),
}


def sort_out(
    call: Callable[..., Any],
    options: Mapping[str, Any],
    *,
    ignored: Mapping[str, str],
    refused: Mapping[str, tuple[tuple[Any, ...], str]] | None = None,
    forwarded: Iterable[str] = (),
    stacklevel: int = 3,
) -> dict[str, Any]:
    """Warns of options without a meaning here, once for all of them, and refuses those that would change the result.

    Args:
        call: What was called; its signature has the names that are understood.
        options: Those given beside them.
        ignored: Why each has no meaning here.
        refused: The values each may have all the same, and what to do about others.
        forwarded: Options that another function takes.
        stacklevel: As for `warnings.warn`; 3 is the caller's caller.

    Returns:
        The forwarded ones.

    Raises:
        ValueError: An option is unknown, and the message names the nearest; or its value is refused.
    """
    refused = refused or {}
    name = call.__qualname__.removesuffix(".__init__")
    forwarded = tuple(forwarded)
    parameters = inspect.signature(call).parameters.values()
    own = [one.name for one in parameters if one.kind is not one.VAR_KEYWORD and one.name != "self"]
    known = [*own, *forwarded]
    for option, value in options.items():
        if option in refused:
            accepted, remedy = refused[option]
            if not any(value is one or value == one for one in accepted):
                raise ValueError(f"{name} does not take {option}={value!r}: {remedy}")
        elif option not in ignored and option not in forwarded:
            near = difflib.get_close_matches(option, [*known, *ignored, *refused], n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise ValueError(f"{name}: unknown option {option!r}: {hint}It takes {', '.join(known)}")
    reasons: dict[str, list[str]] = {}
    for option in options:
        if option in ignored:
            reasons.setdefault(ignored[option], []).append(option)
    if reasons:
        told = "; ".join(f"{', '.join(names)} ({reason})" for reason, names in reasons.items())
        warnings.warn(f"{name} ignores {told}", stacklevel=stacklevel)
    return {option: value for option, value in options.items() if option in forwarded}
