"""Hessians and solutions as plain values and tensors, and back.

Tested by tests/quantize/test_kept_pass.py: in passes that take what others kept.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gptq_plugin.cache.digests import tensor_digest
from gptq_plugin.cache.files import Kept
from gptq_plugin.config import QuantizeConfig
from gptq_plugin.gptq.grid import QuantizedWeight
from gptq_plugin.gptq.solver import Solution
from gptq_plugin.walk.expert_hessians import Evidence

Content = tuple[dict[str, Any], Mapping[str, Tensor]]

_WEIGHT = ("codes", "scales", "zeros", "g_idx")
_SOLUTION = ("loss", "rtn_loss", "output_power")


@dataclass(frozen=True)
class Solved:
    """The solution of layers, their rows one below the other.

    Attributes:
        solution: On the CPU, if an earlier pass found it.
        tokens, deviations: Of the evidence it was found with.
    """

    solution: Solution
    tokens: int
    deviations: tuple[str, ...]


def solution_content(found: Solved) -> Content:
    """What to keep of a solution."""
    solution, weight = found.solution, found.solution.weight
    facts = {
        "method": solution.method,
        "damp_percent": solution.damp_percent,
        "deviations": list(solution.deviations),
        "tokens": found.tokens,
        "of_evidence": list(found.deviations),
    }
    tensors = {name: getattr(weight, name) for name in _WEIGHT} | {name: getattr(solution, name) for name in _SOLUTION}
    return facts, tensors


def kept_solution(kept: Kept, config: QuantizeConfig) -> Solved:
    """The inverse of `solution_content`, for layers of a configuration."""
    tensors = kept.tensors
    weight = QuantizedWeight(
        **{name: tensors[name] for name in _WEIGHT}, bits=config.bits, group_size=config.group_size
    )
    solution = Solution(
        weight=weight,
        **{name: tensors[name] for name in _SOLUTION},
        method=kept.facts["method"],
        damp_percent=kept.facts["damp_percent"],
        deviations=tuple(kept.facts["deviations"]),
    )
    return Solved(solution, kept.facts["tokens"], tuple(kept.facts["of_evidence"]))


def solution_on(device: torch.device, solution: Solution) -> Solution:
    """The solution on a device."""
    weight = {name: getattr(solution.weight, name).to(device) for name in _WEIGHT}
    sums = {name: getattr(solution, name).to(device) for name in _SOLUTION}
    return dataclasses.replace(solution, weight=dataclasses.replace(solution.weight, **weight), **sums)


def kept_evidence(kept: Kept) -> Evidence:
    """The inverse of `evidence_content`."""
    tensors, facts = kept.tensors, kept.facts
    deviations = tuple(facts["deviations"])
    return Evidence(tensors["mean"], facts["tokens"], facts["damp_percent"], deviations, tensors.get("drift"))


def evidence_content(evidence: Evidence) -> Content:
    """What to keep of evidence."""
    tensors = {"mean": evidence.mean} | ({} if evidence.drift is None else {"drift": evidence.drift})
    facts = {
        "tokens": evidence.tokens,
        "damp_percent": evidence.damp_percent,
        "deviations": list(evidence.deviations),
    }
    return facts, tensors


def weight_digests(weight: QuantizedWeight) -> list[str]:
    """Digests of all that later layers see of a quantized weight."""
    return [tensor_digest(getattr(weight, name).cpu()) for name in _WEIGHT]
