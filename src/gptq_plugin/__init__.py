"""GPTQ quantization for PyTorch models, at the end of a Lightning fine-tuning run or on its own.

Importing this package does nothing but make the names below available; each is loaded at its first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gptq_plugin.callback import GPTQCallback
    from gptq_plugin.config import QuantizeConfig
    from gptq_plugin.hf_trainer import GPTQTrainerCallback
    from gptq_plugin.load import load_quantized
    from gptq_plugin.qlinear import QuantLinear
    from gptq_plugin.quantize import QuantizeModule

__all__ = ["GPTQCallback", "GPTQTrainerCallback", "QuantLinear", "QuantizeConfig", "QuantizeModule", "load_quantized"]

_HOME = {
    "GPTQCallback": "callback",
    "GPTQTrainerCallback": "hf_trainer",
    "QuantLinear": "qlinear",
    "QuantizeConfig": "config",
    "QuantizeModule": "quantize",
    "load_quantized": "load",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
