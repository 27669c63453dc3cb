"""GPTQ quantization for PyTorch models, at the end of a Lightning fine-tuning run or on its own.

Importing this package loads nothing: each name below is imported at its first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gptq_plugin.checkpoint.load import load_quantized
    from gptq_plugin.config import QuantizeConfig
    from gptq_plugin.finish.options import Finish
    from gptq_plugin.hf.quantizer import quantized_config
    from gptq_plugin.hf.trainer_callback import GPTQTrainerCallback
    from gptq_plugin.layers.qlinear import QuantLinear
    from gptq_plugin.lightning.callback import GPTQCallback
    from gptq_plugin.lightning.every_trainer import in_every_trainer
    from gptq_plugin.model.adapters import merged_copy
    from gptq_plugin.quantize.module import QuantizeModule

    __version__: str

__all__ = [
    "Finish",
    "GPTQCallback",
    "GPTQTrainerCallback",
    "QuantLinear",
    "QuantizeConfig",
    "QuantizeModule",
    "in_every_trainer",
    "load_quantized",
    "merged_copy",
    "quantized_config",
]

_HOME = {
    "Finish": "finish.options",
    "GPTQCallback": "lightning.callback",
    "GPTQTrainerCallback": "hf.trainer_callback",
    "QuantLinear": "layers.qlinear",
    "QuantizeConfig": "config",
    "QuantizeModule": "quantize.module",
    "in_every_trainer": "lightning.every_trainer",
    "load_quantized": "checkpoint.load",
    "merged_copy": "model.adapters",
    "quantized_config": "hf.quantizer",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return _version()
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "__version__"})


def _version() -> str:
    """The version in the installed package's metadata, or ``"0+source"`` in a source tree."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("gptq-plugin")
    except PackageNotFoundError:
        return "0+source"
