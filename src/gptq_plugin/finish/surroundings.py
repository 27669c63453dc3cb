"""Where a finish runs, and its float model: `Surroundings`, `Teacher`.

Tested by tests/finish/test_finish_model.py: with whole finishes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gptq_plugin.gptq.grid import QuantizedWeight
from gptq_plugin.layers.qlinear import QuantLinear

# Called with the name of a part, or "" for the whole: its context is the float model's part where it is, in evaluation
# mode; that of the model to finish is quantized again behind it.
Teacher = Callable[[str], contextlib.AbstractContextManager[nn.Module]]

# Solves a layer, called as solver(name, layer, float weight, Hessian, drift) with what `gptq.solver.solve` reads; None
# leaves its codes alone. In a process group all ranks call it with the same arguments, and get the same result.
Solver = Callable[[str, QuantLinear, Tensor, Tensor, Tensor], QuantizedWeight | None]


@dataclass(frozen=True)
class Surroundings:
    """Where and how a finish runs.

    Attributes:
        run: Runs the data of a batch, with all its logits.
        solver: Solves layers of blocks anew.
        device: Where.
        where: The same, if models are to be brought there; None if they are there.
        memory: Bytes of it that may be used; None is all.
        token_weighting: Which positions count, as in QuantizeConfig.
        progress: Called as progress(steps done, steps at most, what held-out samples tell).
        task: Gives the run's own loss of the data of a batch, a scalar; None without a `task_weight`.
    """

    run: Callable[[nn.Module, Any], Any]
    solver: Solver
    device: torch.device
    where: torch.device | None = None
    memory: int | None = None
    token_weighting: str = "all"
    progress: Callable[[int, int, str], None] | None = None
    task: Callable[[nn.Module, Any], Tensor] | None = None
