"""Which layers a quantized one can replace, by what forwards show: `Replaceable`."""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import AbstractContextManager
from typing import Any

from gptq_plugin import distributed
from gptq_plugin.errors import some
from gptq_plugin.model.experts import ExpertLinear
from gptq_plugin.model.judgement import Judgement
from gptq_plugin.model.plan import Plan
from gptq_plugin.model.targets import Target
from gptq_plugin.quantize.data_checks import check_some_left
from gptq_plugin.walk.batch_thread import Forward
from gptq_plugin.walk.weight_reads import WeightReads

_READ = "the model reads its weight by itself"


class Replaceable:
    """Judges a plan's layers by what they compute, and notices weights that are read past the layers.

    To be made before other hooks than the user's are registered; see `WeightReads`.

    Args:
        plan: The layers.
    """

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        layers = {one.name: one.module for one in plan.targets if not isinstance(one.module, ExpertLinear)}
        self._reads = WeightReads(plan.model, layers)
        self._judgement = Judgement(plan.targets)
        self._unreached: set[str] = set()

    def watched(self, forward: Forward) -> Forward:
        """The forward of a batch, watched on the thread that it runs on."""
        judged = self._judgement.watched(forward)

        def run() -> Any:
            with self._reads.watching():
                return judged()

        return run

    def left_float(self) -> dict[str, str]:
        """Why layers have to stay float, by name, as this rank's forwards showed."""
        return self._judgement.reasons() | dict.fromkeys(self._reads.names, _READ)

    def settle(self, present: Callable[[Target], object]) -> dict[str, str]:
        """Why layers have to stay float, by name, as all ranks' forwards showed, and for layers that none of them
        reached a trial. Collective.

        Args:
            present: Brings a layer's weight to where it runs.

        Raises:
            TargetError: No layer is left.
        """
        reasons: dict[str, str] = {}
        self._unreached = {target.name for target in self._plan.targets}
        for of_one, reached in distributed.gather_objects((self.left_float(), self._judgement.reached)):
            reasons |= of_one
            self._unreached -= reached
        self._unreached -= reasons.keys()
        self._judgement.try_out(self._unreached, present)
        reasons |= self._judgement.reasons()
        self._unreached -= reasons.keys()
        check_some_left(reasons, self._plan)
        return reasons

    def judging_first_calls(self) -> AbstractContextManager[None]:
        """To be entered for the walk: layers that no rank reached before are judged at their first call.

        Raises:
            TargetError: In a forward; see `Judgement.refusing`.
        """
        return self._judgement.refusing(self._unreached)

    def replaced_forwards(self, left_float: Collection[str]) -> list[str]:
        """A sentence about layers with a forward set on the instance that computes what the layer does.

        Args:
            left_float: Names of layers that keep theirs.
        """
        names = [name for name in self._judgement.replaced_forwards() if name not in left_float]
        if not names:
            return []
        return [
            f"the forward that is set on {some(names)} computes x·Wᵀ + b in calibration: the quantized layers are "
            "without it (as accelerate's hooks are set)"
        ]
