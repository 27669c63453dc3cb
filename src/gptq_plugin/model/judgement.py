"""Judges layers by value: a forward's real output against x·Wᵀ + b on its real input. `Judgement`.

A class tells little: a subclass may scale its weight, a forward may be set on the instance, a tensor may multiply in
its own way. All rows of all outputs are compared, by `projections`.

Hooks are not judged. They go on around the layer that takes the place (`layers.hooks.share_hooks`); what is compared is
the forward between them, on the input that the last of them leaves.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from gptq_plugin.errors import TargetError, brief
from gptq_plugin.layers.qlinear import output_dtype
from gptq_plugin.model.experts import ExpertLinear
from gptq_plugin.model.projections import Comparison, LayerProjections, apart, random_rows
from gptq_plugin.model.targets import Target
from gptq_plugin.walk.layer_inputs import SeenInput, is_dense

_TRIAL_ROWS = 8
_TOGETHER = 2**23  # bytes of comparisons that wait to be computed together
_ALONE = "it is called with {}, and a quantized layer takes its input alone"


class Judgement:
    """Compares layers while a forward runs, on its device; nothing is read before `reasons`.

    Args:
        targets: The layers. Experts of one parameter are layers of our own making, and not judged.

    Attributes:
        reached: Names of layers that were called.
    """

    def __init__(self, targets: Sequence[Target]) -> None:
        self._targets = {one.name: one for one in targets if not isinstance(one.module, ExpertLinear)}
        self._checks = {name: _Check(target) for name, target in self._targets.items()}
        self._waiting: list[tuple[str, Comparison]] = []
        self._waiting_bytes = 0
        self._apart: list[tuple[str, Tensor]] = []
        self._reasons: dict[str, str] = {}
        self.reached: set[str] = set()

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Judges every call of the layers. To be entered when all other hooks that may change inputs are registered."""

        def judge(name: str, found: Comparison | str) -> None:
            self.reached.add(name)
            self._judge(name, found)

        with _hooked(self._checks, judge):
            yield

    def watched(self, forward: Callable[[], Any]) -> Callable[[], Any]:
        """The forward, on whichever thread it runs, with every call of the layers judged."""

        def run() -> Any:
            with self.watching():
                return forward()

        return run

    @contextlib.contextmanager
    def refusing(self, names: Collection[str]) -> Iterator[None]:
        """Judges the first call of these layers at once, which were not reached before.

        Raises:
            TargetError: In a forward, at a layer that computes something else.
        """
        waiting = {name: self._checks[name] for name in names if name in self._checks}

        def judge(name: str, found: Comparison | str) -> None:
            if waiting.pop(name, None) is None:
                return
            reason = found if isinstance(found, str) else _reason(self._targets[name], apart([found])[0].tolist())
            if reason is not None:
                raise TargetError(
                    f"{name} is called by this batch for the first time, and {reason}. It cannot stay float any more: "
                    f"leave it out with modules_to_not_convert: [{name}]"
                )

        with _hooked(dict(waiting), judge, afterwards=True):
            yield

    def try_out(self, names: Collection[str], present: Callable[[Target], object]) -> None:
        """Runs the forwards of layers that no batch reached, on a few random rows.

        Args:
            names: The layers.
            present: Brings a layer's weight to where it runs.
        """
        for name in names:
            target = self._targets.get(name)
            if target is None:
                continue
            present(target)
            weight = target.weight
            x = random_rows(_TRIAL_ROWS, weight.shape[1]).to(weight.device, weight.dtype)
            try:
                with torch.no_grad():
                    pending = self._checks[name].before((x,), {})
                    found = pending if isinstance(pending, str) else pending(target.module.forward(x))
            except Exception as error:  # noqa: BLE001 - whatever a forward does with an input of its width alone
                found = f"its forward does not run on its input alone ({type(error).__name__}: {brief(error)})"
            self._judge(name, found)

    def reasons(self) -> dict[str, str]:
        """Why layers have to stay float, by name. Waits for the device."""
        self._compare()
        if self._apart:
            values = torch.stack([value for _, value in self._apart]).tolist()
            for (name, _), value in zip(self._apart, values, strict=True):
                reason = _reason(self._targets[name], value)
                if reason is not None:
                    self._reasons.setdefault(name, reason)
            self._apart.clear()
        return dict(self._reasons)

    def _judge(self, name: str, found: Comparison | str) -> None:
        if isinstance(found, str):
            self._reasons.setdefault(name, found)
            return
        self._waiting.append((name, found))
        self._waiting_bytes += found.bytes
        if self._waiting_bytes > _TOGETHER:
            self._compare()

    def _compare(self) -> None:
        names = [name for name, _ in self._waiting]
        self._apart += zip(names, apart([one for _, one in self._waiting]), strict=True)
        self._waiting.clear()
        self._waiting_bytes = 0

    def replaced_forwards(self) -> list[str]:
        """Names of the layers with a forward set on the instance (accelerate's hooks do that)."""
        return [name for name, target in self._targets.items() if "forward" in vars(target.module)]


Judge = Callable[[str, "Comparison | str"], None]
# A batch runs in a mode that sees every attribute of a tensor that is read (`weight_reads`), and hooks read many.
_without_modes = torch._C.DisableTorchFunction


@contextlib.contextmanager
def _hooked(checks: dict[str, _Check], judge: Judge, *, afterwards: bool = False) -> Iterator[None]:
    """Calls judge(name, comparison or reason) after each forward of the layers, before their own forward hooks.

    Args:
        checks: By the layer's name.
        judge: Called on the thread of the forward.
        afterwards: Look at the input and the weight after the forward too: batches may wait before it until the weight
            is another. Otherwise before it, since it may write to its input.
    """
    pending: dict[str, list[Any]] = {name: [] for name in checks}

    def before(name: str) -> Any:
        def hook(module: Any, args: Any, kwargs: Any) -> None:
            with _without_modes():
                pending[name].append(checks[name].before(args, kwargs))

        return hook

    def after(name: str) -> Any:
        def hook(module: Any, args: Any, kwargs: Any, output: Any) -> None:
            with _without_modes():
                of_output = checks[name].before(args, kwargs) if afterwards else pending[name].pop()
                judge(name, of_output if isinstance(of_output, str) else of_output(output))

        return hook

    with contextlib.ExitStack() as hooks:
        for name, check in checks.items():
            module = check.target.module
            if not afterwards:
                hooks.callback(module.register_forward_pre_hook(before(name), with_kwargs=True).remove)
            hooks.callback(module.register_forward_hook(after(name), with_kwargs=True, prepend=True).remove)
        yield


class _Check:
    """The comparison for one layer.

    Args:
        target: The layer.
    """

    def __init__(self, target: Target) -> None:
        self.target = target
        self._projections = LayerProjections(target)

    def before(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[[Any], Comparison | str] | str:
        """The arguments that the forward is about to get.

        Returns:
            Why they cannot be a quantized layer's; or a function that takes the output and returns the comparison, or
            why the output cannot be a quantized layer's.
        """
        if len(args) + len(kwargs) != 1:
            return _ALONE.format(f"{len(args) + len(kwargs)} arguments")
        if kwargs and "input" not in kwargs:
            return _ALONE.format(f"the keyword {next(iter(kwargs))!r}")
        x = args[0] if args else kwargs["input"]
        rows, columns = self.target.shape
        if not is_dense(x) or not x.is_floating_point() or x.shape[-1:] != (columns,):
            return f"it is called with {_described(x)}, not with {columns} channels of a floating dtype"
        dtype, shape = output_dtype(x), (*x.shape[:-1], rows)
        x = x.clone() if x.is_inference() else x  # which does not tell if it is written to
        entered = SeenInput(x)

        def of_output(output: Any) -> Comparison | str:
            if not is_dense(output) or output.shape != shape or output.dtype != dtype:
                return f"it returns {_described(output)}, where x·Wᵀ + b is {dtype} {list(shape)}"
            if not entered.is_same(x):
                return "its forward writes to its input"
            return self._projections.compare(x, output, dtype)

        return of_output


def _reason(target: Target, apart: Sequence[float]) -> str | None:
    excess, relative = apart
    if excess <= 1:
        return None
    module = target.module
    which = "the forward set on it" if "forward" in vars(module) else f"{type(module).__name__}.forward"
    return f"{which} computes something else than x·Wᵀ + b: its outputs differ by {relative:.2g} of them"


def _described(value: Any) -> str:
    if not isinstance(value, Tensor):
        return str(type(value))
    if value.is_nested:
        return "a nested tensor"
    return f"{value.dtype} {list(value.shape)}" + ("" if is_dense(value) else f" ({value.layout})")
