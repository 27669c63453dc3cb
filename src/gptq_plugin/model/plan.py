"""The layers of a model to quantize and those that stay float, found once and read by every step: `Plan`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from gptq_plugin.config import QuantizeConfig
from gptq_plugin.device.modules import modules_of
from gptq_plugin.errors import TargetError, some
from gptq_plugin.model.experts import unfused
from gptq_plugin.model.structure import Structure
from gptq_plugin.model.targets import Skipped, Target, find_targets
from gptq_plugin.options import fields

MODEL = fields.of_type("a torch.nn.Module", nn.Module)


@dataclass(frozen=True)
class Plan:
    """The layers of a float model that a configuration quantizes.

    Attributes:
        structure: Structure of the model, with its experts apart.
        config: The configuration.
        targets: The layers to quantize, in the order they are registered.
        skipped: The layers that stay float, and why.
        fuse: Fuses experts that are still float, before the model is exported or used.
    """

    structure: Structure
    config: QuantizeConfig
    targets: Sequence[Target]
    skipped: Sequence[Skipped]
    fuse: Callable[[], None]

    @property
    def model(self) -> nn.Module:
        return self.structure.model

    def with_config(self, config: QuantizeConfig) -> Plan:
        """The plan of another configuration for the same model, which is not looked at again.

        Raises:
            TargetError: See `targets.find_targets`.
        """
        return Plan(self.structure, config, *find_targets(self.structure, config), self.fuse)


@contextlib.contextmanager
def planned(model: nn.Module, config: QuantizeConfig) -> Iterator[Plan]:
    """Plans the quantization of a float model, whose experts are apart inside the block.

    On exit, experts that are still float are fused again (`experts.unfused`).

    Raises:
        TargetError: See `targets.find_targets`; or a module of the model is TorchScript.
        ValueError: `model` is no module.
    """
    MODEL.check("model", model)
    _refuse_scripts(model)
    with unfused(model) as fuse:
        structure = Structure.of(model)
        yield Plan(structure, config, *find_targets(structure, config), fuse)


def _refuse_scripts(model: nn.Module) -> None:
    scripts = [
        name or "the model" for name, one in modules_of(model).items() if isinstance(one, torch.jit.ScriptModule)
    ]
    if scripts:
        raise TargetError(
            f"{some(scripts)} are compiled by TorchScript, whose modules take no hooks, so that no forward can be "
            "watched around them. Put the modules that they were made from in their places, and script the model "
            "afterwards"
        )
