"""The tensors modules hold, and layers quantized without calibration."""

from __future__ import annotations

from gptq_plugin.gptq.grid import round_to_nearest
from gptq_plugin.layers.qlinear import QuantLinear


def size(module):
    return sum(tensor.nbytes for tensor in {*module.parameters(), *module.buffers()})


def held_tensors(model):
    """Every parameter and buffer of every module: the object itself, whether it is persistent and wants a gradient."""
    return {
        (name, key): (id(tensor), tensor.requires_grad, key in module._non_persistent_buffers_set)
        for name, module in model.named_modules()
        for key, tensor in (*module._parameters.items(), *module._buffers.items())
        if tensor is not None
    }


def rounded(target):
    return QuantLinear.from_quantized(round_to_nearest(target.weight, target.config), target.bias)
