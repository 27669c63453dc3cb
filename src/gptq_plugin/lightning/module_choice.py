"""Chooses the module of a LightningModule that is quantized: `choose_module`."""

from __future__ import annotations

from collections.abc import Callable

import lightning.pytorch as pl
from torch import nn

from gptq_plugin.errors import TargetError
from gptq_plugin.model.hf_models import transformers_models


def choose_module(pl_module: pl.LightningModule, name: str | None, warn: Callable[[str], object]) -> nn.Module:
    """Returns the submodule `name`; by default the one transformers model inside, or else the LightningModule.

    Args:
        pl_module: The LightningModule.
        name: Dotted name in it; "" is the LightningModule itself.
        warn: Told if parameters lie outside the transformers model, and so are neither quantized nor exported.

    Raises:
        TargetError: The submodule does not exist, or there are several transformers models to choose from.
    """
    if name is not None:
        try:
            return pl_module.get_submodule(name)
        except AttributeError:
            children = ", ".join(child for child, _ in pl_module.named_children())
            raise TargetError(
                f"module={name!r} is not a submodule of {type(pl_module).__name__}, which has {children}"
            ) from None
    models = dict(transformers_models(pl_module))
    if len(models) > 1:
        raise TargetError(
            f"{type(pl_module).__name__} holds several transformers models ({', '.join(models)}): choose one with "
            "module=..., or all of it with module=''"
        )
    for model_name, model in models.items():
        outside = _parameters_outside(pl_module, model)
        if outside:
            warn(
                f"only the transformers model {model_name!r} is quantized and exported; {', '.join(outside[:4])} of "
                f"{type(pl_module).__name__} are outside it. For all of it, give module=''"
            )
        return model
    return pl_module


def _parameters_outside(pl_module: nn.Module, model: nn.Module) -> list[str]:
    inside = {id(parameter) for parameter in model.parameters()}
    return [name for name, parameter in pl_module.named_parameters() if id(parameter) not in inside]
