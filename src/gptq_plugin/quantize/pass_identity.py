"""What a pass follows from, in one hash: `PassIdentity`.

Tested by tests/quantize/test_kept_pass.py: with passes that differ in one thing.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gptq_plugin import distributed
from gptq_plugin.cache.digests import tensor_digest
from gptq_plugin.cache.fingerprint import Fingerprint, NotKnown
from gptq_plugin.cache.versions import random_states, surroundings
from gptq_plugin.calibration.collect import Calibration
from gptq_plugin.calibration.verdicts import Findings
from gptq_plugin.model.plan import Plan
from gptq_plugin.quantize.gradient_weights import GradientWeights
from gptq_plugin.quantize.options import PassOptions
from gptq_plugin.walk.groups import Group
from gptq_plugin.walk.kept_state import KeptState
from gptq_plugin.walk.layer_inputs import watch_inputs


class PassIdentity:
    """Takes in all that the inputs of a pass's layers follow from, as it becomes known.

    Two barriers stand against a change that no hash of values shows, such as one in a compiled library: the inputs of
    all layers in the float model's forward of one batch, and the inputs of the first layers in that of every batch.

    Args:
        plan: The layers, and the model as it was given.
        calibration: This rank's batches.
        options: How they run.
        device: Where they run.
        exact: Sums depend on neither order nor ranks.

    Attributes:
        problem: Why the pass cannot be told from others, on this rank; None if it can.
    """

    def __init__(
        self, plan: Plan, calibration: Calibration, options: PassOptions, device: torch.device, exact: bool
    ) -> None:
        self.problem: str | None = None
        self._device = device
        self._parts = Fingerprint()
        self._first: dict[int, list[str]] = {}  # by batch, digests of the first layers' inputs
        layers = [(target.name, list(target.shape), str(target.parameter.dtype)) for target in plan.targets]
        self._add("the surroundings", surroundings(device))
        self._add("the configuration", [plan.config.token_weighting, plan.config.lm_head, exact])
        self._add("the layers", layers)
        self._parts.read_ahead([*plan.model.parameters(), *plan.model.buffers()])
        self._add("the model", plan.model)
        self._add("the forward", options.forward)
        self._add("the calibration data", [(batch.data, batch.samples) for batch in calibration.batches])
        self._add("the batches' places", list(calibration.numbers))

    @contextlib.contextmanager
    def probing(self, layers: Mapping[str, nn.Module]) -> Iterator[None]:
        """Takes in the inputs of the layers in the one forward that runs inside the block."""
        found: list[str] = []
        before = random_states(self._device)
        with watch_inputs(layers, lambda name, x: found.append(f"{name} {tensor_digest(x)}")):
            yield
        self._add("the layers' inputs in a forward of the float model", found)
        if random_states(self._device) != before:
            self.problem = "the model's forward draws random numbers, so that no two runs have the same inputs"

    def settle(
        self,
        groups: Sequence[Group],
        findings: Findings,
        disturbance: str | None,
        state: KeptState,
        weights: GradientWeights | None,
    ) -> None:
        """Takes in what was found before the walk.

        Args:
            groups: Of layers that read one input.
            findings: Which positions count.
            disturbance: Why batches cannot take turns.
            state: What forwards keep on the model.
            weights: Of tokens, by gradients.
        """
        if disturbance is not None:
            self.problem = f"the batches cannot take turns ({disturbance})"
        self._add("the order of layers", [(group.names, group.calls) for group in groups])
        self._add("the positions that count", [repr(findings.rules), repr(findings.masks), sorted(findings.inverted)])
        self._add("what the forward keeps", {str(place): value for place, value in state.initial.items()})
        self._add("the tokens' weights", None if weights is None else weights.known())

    def see_first(self, number: int, x: Tensor) -> None:
        """Takes in an input of the first layers, of a batch."""
        self._first.setdefault(number, []).append(tensor_digest(x))

    def key(self) -> tuple[str, list[str]]:
        """The hash of what all ranks took in, and why there is none on some of them. Collective."""
        self._add("the first layers' inputs", dict(sorted(self._first.items())))
        of_all = distributed.gather_objects((self._parts.hexdigest(), self.problem))
        problems = dict.fromkeys(problem for _, problem in of_all if problem is not None)
        return hashlib.sha256(repr([digest for digest, _ in of_all]).encode()).hexdigest(), list(problems)

    def _add(self, name: str, value: Any) -> None:
        if self.problem is None:
            try:
                self._parts.add(name, value)
            except NotKnown as unknown:
                self.problem = f"{unknown} cannot be told from others"
