"""Judges layers by value: a forward's real output against x·Wᵀ + b on its real input. `Judgement`.

A class tells little: a subclass may scale its weight, a forward may be set on the instance, a tensor may multiply in
its own way. All rows of all outputs are compared, in a few of the matmul's operations: with random vectors R,
y R = x (Wᵀ R) + b R costs in + out multiplications a row and vector, where x·Wᵀ costs in · out
(Freivalds, 1977, Probabilistic machines can use less running time).

Hooks are not judged. They go on around the layer that takes the place (`layers.hooks.share_hooks`); what is compared is
the forward between them, on the input that the last of them leaves.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from gptq_plugin.device.precision import full_precision
from gptq_plugin.errors import TargetError
from gptq_plugin.layers.qlinear import output_dtype
from gptq_plugin.model.experts import ExpertLinear
from gptq_plugin.model.targets import Target
from gptq_plugin.walk.layer_inputs import SeenInput

_VECTORS = 8
_PIECE = 2**24  # entries converted to float32 at a time
_TRIAL_ROWS = 8
_ALONE = "it is called with {}, and a quantized layer takes its input alone"
# Tolerated differences, relative to the norms of a row's output and of its terms. 16-bit outputs are rounded at 2^-9,
# and float32 products that PyTorch may compute in fewer bits (TF32, bfloat16) as far.
_TOLERANCE = {torch.float64: 1e-7, torch.float32: 1e-4}
_FEWER_BITS = 1e-2
_ALONG = 0.2  # tolerated differences along the outputs, in parts of those in any direction


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
        self._apart: list[tuple[str, Tensor]] = []
        self._reasons: dict[str, str] = {}
        self.reached: set[str] = set()

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Judges every call of the layers. To be entered when all other hooks that may change inputs are registered."""

        def judge(name: str, found: Tensor | str) -> None:
            self.reached.add(name)
            if isinstance(found, str):
                self._reasons.setdefault(name, found)
            else:
                self._apart.append((name, found))

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

        def judge(name: str, found: Tensor | str) -> None:
            if waiting.pop(name, None) is None:
                return
            reason = found if isinstance(found, str) else _reason(self._targets[name], found.tolist())
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
            x = _random(_TRIAL_ROWS, weight.shape[1]).to(weight.device, weight.dtype)
            try:
                with torch.no_grad():
                    pending = self._checks[name].before((x,), {})
                    found = pending if isinstance(pending, str) else pending(target.module.forward(x))
            except Exception as error:  # noqa: BLE001 - whatever a forward does with an input of its width alone
                found = f"its forward does not run on its input alone ({type(error).__name__}: {error})"
            if isinstance(found, str):
                self._reasons.setdefault(name, found)
            else:
                self._apart.append((name, found))

    def reasons(self) -> dict[str, str]:
        """Why layers have to stay float, by name. Waits for the device."""
        if self._apart:
            values = torch.stack([value for _, value in self._apart]).tolist()
            for (name, _), value in zip(self._apart, values, strict=True):
                reason = _reason(self._targets[name], value)
                if reason is not None:
                    self._reasons.setdefault(name, reason)
            self._apart.clear()
        return dict(self._reasons)

    def replaced_forwards(self) -> list[str]:
        """Names of the layers with a forward set on the instance (accelerate's hooks do that)."""
        return [name for name, target in self._targets.items() if "forward" in vars(target.module)]


Judge = Callable[[str, "Tensor | str"], None]


@contextlib.contextmanager
def _hooked(checks: dict[str, _Check], judge: Judge, *, afterwards: bool = False) -> Iterator[None]:
    """Calls judge(name, `_apart` or a reason) after each forward of the layers, before their own forward hooks.

    Args:
        checks: By the layer's name.
        judge: Called on the thread of the forward.
        afterwards: Look at the input and the weight after the forward too: batches may wait before it until the weight
            is another. Otherwise before it, since it may write to its input.
    """
    pending: dict[str, list[Any]] = {name: [] for name in checks}

    def before(name: str) -> Any:
        return lambda module, args, kwargs: pending[name].append(checks[name].before(args, kwargs))

    def after(name: str) -> Any:
        def hook(module: Any, args: Any, kwargs: Any, output: Any) -> None:
            expected = checks[name].before(args, kwargs) if afterwards else pending[name].pop()
            judge(name, expected if isinstance(expected, str) else expected(output))

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
        self._made: tuple[SeenInput, torch.dtype] | None = None  # the weight, which may go home meanwhile
        self._weight = self._bias = self._norm = torch.empty(0, device="cpu")

    def before(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[[Any], Tensor | str] | str:
        """The arguments that the forward is about to get.

        Returns:
            Why they cannot be a quantized layer's; or a function that takes the output and returns `_apart`, or
            why the output cannot be a quantized layer's.
        """
        if len(args) + len(kwargs) != 1:
            return _ALONE.format(f"{len(args) + len(kwargs)} arguments")
        if kwargs and "input" not in kwargs:
            return _ALONE.format(f"the keyword {next(iter(kwargs))!r}")
        x = args[0] if args else kwargs["input"]
        rows, columns = self.target.weight.shape
        if not isinstance(x, Tensor) or x.is_nested or not x.is_floating_point() or x.shape[-1:] != (columns,):
            return f"it is called with {_described(x)}, not with {columns} channels of a floating dtype"
        dtype, shape, tolerance = output_dtype(x), (*x.shape[:-1], rows), _tolerance(output_dtype(x))
        with full_precision(x.device):
            expected, terms = self._expected(x.detach().to(dtype).reshape(-1, columns))

        def difference(output: Any) -> Tensor | str:
            if not isinstance(output, Tensor) or output.shape != shape or output.dtype != dtype:
                return f"it returns {_described(output)}, where x·Wᵀ + b is {dtype} {list(shape)}"
            with full_precision(x.device):
                found = _projected(output.detach().reshape(-1, rows), _vectors(rows, x.device))
                return _apart(found, expected, terms, tolerance, overflows=dtype == torch.float16)

        return difference

    def _expected(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (Wᵀ R) + b R, [rows, vectors], and the size of what each row's outputs are sums of, [rows]."""
        self._multiply(x.dtype, x.device)
        expected = _projected(x, self._weight) + self._bias
        norms = torch.linalg.vector_norm(x, dim=-1, dtype=_exact(x.dtype))
        return expected, norms * self._norm  # above the outputs' norm where their terms cancel, and rounding shows more

    def _multiply(self, dtype: torch.dtype, device: torch.device) -> None:
        """Makes Wᵀ R, [in, vectors], b R, [vectors], and the norm of W over √in, unless W is the same as before."""
        parameter, bias = self.target.parameter, self.target.bias
        if self._made is not None and self._made[0].is_same(parameter) and self._made[1] == dtype:
            return
        weight = self.target.weight.to(device, dtype)
        vectors = _vectors(len(weight), device)
        self._weight = _projected(weight.T, vectors)
        self._norm = torch.linalg.vector_norm(weight, dtype=_exact(dtype)) / weight.shape[1] ** 0.5
        self._bias = self._weight.new_zeros(_VECTORS)
        if bias is not None:
            self._bias = _projected(bias.detach().to(device, dtype)[None], vectors)[0]
        self._made = SeenInput(parameter), dtype


def _projected(matrix: Tensor, vectors: Tensor) -> Tensor:
    """The product [rows, vectors] of a matrix, [rows, columns], in float32, or in float64 for such a matrix.

    Args:
        matrix: In the dtype that the layer computes in.
        vectors: [columns, vectors]. Those of `_vectors` are exact in every dtype.
    """
    exact = _exact(matrix.dtype)
    if matrix.is_cuda and matrix.dtype == torch.bfloat16 and vectors.dtype == torch.bfloat16:
        return torch.mm(matrix, vectors, out_dtype=exact)  # type: ignore[call-overload, no-any-return]
    vectors = vectors.to(exact)
    pieces = matrix.split(max(1, _PIECE // max(1, matrix.shape[1])))
    return torch.cat([piece.to(exact) @ vectors for piece in pieces])


def _apart(found: Tensor, expected: Tensor, terms: Tensor, tolerance: float, *, overflows: bool) -> Tensor:
    """How far outputs are from the expected ones, [2]: in tolerances, and relative to the expected ones.

    The first is the larger of two: the largest difference of a row, and the part of all differences together that goes
    along with the outputs, which for rounding is small (a forward that scales by 1.01 in bfloat16 shows there).

    Rows that are not finite by x·Wᵀ + b are left out, since padding may hold anything, and where sums overflow those
    that are not finite in the output, which are refused elsewhere.
    """
    counted = expected.isfinite().all(-1)
    if overflows:
        counted &= found.isfinite().all(-1)
    difference = torch.where(counted[:, None], found - expected, 0)
    expected, terms = torch.where(counted[:, None], expected, 0), torch.where(counted, terms, 1)
    tiny = torch.finfo(terms.dtype).tiny
    sizes, of_rows = expected.square().mean(-1).sqrt(), difference.square().mean(-1).sqrt()
    allowed = (sizes + terms) * tolerance
    along = (difference * expected).mean(-1).sum().abs() / (allowed * sizes).sum().clamp(min=tiny)
    most = (of_rows / allowed.clamp(min=tiny)).nan_to_num(nan=torch.inf).amax() if len(found) else along * 0
    relative = difference.square().sum().sqrt() / expected.square().sum().sqrt().clamp(min=tiny)
    return torch.stack([torch.maximum(most, along.nan_to_num(nan=torch.inf) / _ALONG), relative])


def _reason(target: Target, apart: Sequence[float]) -> str | None:
    excess, relative = apart
    if excess <= 1:
        return None
    module = target.module
    which = "the forward set on it" if "forward" in vars(module) else f"{type(module).__name__}.forward"
    return f"{which} computes something else than x·Wᵀ + b: its outputs differ by {relative:.2g} of them"


def _tolerance(dtype: torch.dtype) -> float:
    exact = dtype == torch.float64 or torch.get_float32_matmul_precision() == "highest"
    return _TOLERANCE.get(dtype, _FEWER_BITS) if exact else _FEWER_BITS


def _exact(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


@functools.lru_cache(maxsize=64)
def _vectors(length: int, device: torch.device) -> Tensor:
    """Random vectors in bfloat16, [length, vectors], the same for the same length."""
    return _random(length, _VECTORS).to(device, torch.bfloat16)


def _random(rows: int, columns: int) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(rows)
    return torch.randn(rows, columns, generator=generator, device="cpu", dtype=torch.float32)


def _described(value: Any) -> str:
    return (
        f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) and not value.is_nested else str(type(value))
    )
