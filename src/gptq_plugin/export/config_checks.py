"""Compares quantized layers with the configuration that an export describes them by.

Tested by tests/export/test_export.py: a config that is not the model's.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from gptq_plugin.config import QuantizeConfig
from gptq_plugin.errors import ExportError
from gptq_plugin.layers.packing import are_symmetric
from gptq_plugin.layers.qlinear import QuantLinear


def check_config(layers: Mapping[str, QuantLinear], config: QuantizeConfig) -> None:
    """Refuses layers with other bits or groups than the config gives them, or that it leaves float.

    Raises:
        ExportError: It names the layer.
    """
    for name, layer in layers.items():
        asked = config.for_module(name)
        if asked is None or (asked.bits, asked.group_size_for(layer.in_features)) != (layer.bits, layer.group_size):
            wanted = "leaves it float" if asked is None else f"has bits={asked.bits}, group_size={asked.group_size}"
            raise ExportError(
                f"{name} is quantized with bits={layer.bits}, group_size={layer.group_size}, and the given config "
                f"{wanted}: pass the config the model was quantized with"
            )


def check_symmetry(name: str, qzeros: Tensor, layer: QuantLinear, config: QuantizeConfig) -> None:
    """Refuses a layer whose zeros are not those of sym=True where the config asks for it.

    Args:
        name: Its name.
        qzeros: Its packed zeros; on a GPU, they would be waited for.
        layer: The layer.
        config: As given for the export.

    Raises:
        ExportError: It names the layer.
    """
    own = config.for_module(name)
    if own is not None and own.sym and not are_symmetric(qzeros, layer.bits, layer.out_features):
        raise ExportError(
            f"{name} is quantized with sym=False, and the given config has sym=True for it: pass the config the model "
            "was quantized with, its rules for the names that layers have in what is exported"
        )
