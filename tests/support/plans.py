"""Plans and calibrations of small models, as a pass gets them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from gptq_plugin.calibration.collect import Calibration, collect
from gptq_plugin.config import QuantizeConfig
from gptq_plugin.model.plan import Plan, planned

CONFIG = QuantizeConfig(group_size=16, nsamples=16, batch_size=1)


def plan_of(model: nn.Module, config: QuantizeConfig = CONFIG) -> Plan:
    """A plan; experts of one parameter are together again."""
    with planned(model, config) as plan:
        return plan


def calibration_of(batches: Iterable[Any], config: QuantizeConfig = CONFIG) -> Calibration:
    return collect(batches, config, None, 1000, alone=True)


def rows(count: int, width: int, seed: int = 0) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


class Attention(nn.Module):
    """Three layers with one input and one behind them, each used once."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias=False) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.o(torch.sigmoid(self.q(x)) * self.k(x) + self.v(x))
        return y


class Listed(nn.Module):
    """Experts in a list; the gate's largest entry chooses, and the last expert is never chosen."""

    def __init__(self, experts: int = 4, width: int = 32) -> None:
        super().__init__()
        self.gate = nn.Linear(width, experts, bias=False)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 2 * width), nn.ReLU(), nn.Linear(2 * width, width)) for _ in range(experts)
        )

    def forward(self, x: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        best = self.gate(x)[..., :-1].argmax(-1)
        for number, expert in enumerate(self.experts):
            if (best == number).any():
                out[best == number] += expert(x[best == number])
        return out
