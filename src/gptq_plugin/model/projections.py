"""Outputs of a layer against x·Wᵀ + b, by projections: `LayerProjections`, `apart`.

All rows are compared, in a few of the product's operations: with random vectors R, y R = x (Wᵀ R) + b R takes in + out
multiplications a row and vector, where x·Wᵀ takes in · out (Freivalds, 1977, Probabilistic machines can use less
running time). The parts are operators, so that the modes in which a calibration batch runs see one operation for each.

Tested by tests/model/test_judgement.py: through the judgement of layers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gptq_plugin.device.precision import full_precision
from gptq_plugin.model.targets import Target
from gptq_plugin.walk.layer_inputs import SeenInput

_OPERATORS = torch.library.Library("gptq_plugin", "FRAGMENT")
_VECTORS = 8
_PIECE = 2**24  # entries converted to float32 at a time
# Tolerated differences, relative to the norms of a row's output and of its terms. 16-bit outputs are rounded at 2^-9,
# and float32 products that PyTorch may compute in fewer bits (TF32, bfloat16) as far.
_TOLERANCE = {torch.float64: 1e-7, torch.float32: 1e-4}
_FEWER_BITS = 1e-2
_ALONG = 0.2  # tolerated differences along the outputs, in parts of those in any direction


def _operator(schema: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Makes a function an operator. `torch.library.custom_op` takes longer for a call than most of these take."""

    def define(function: Callable[..., Any]) -> Callable[..., Any]:
        _OPERATORS.define(schema)
        name = schema.partition("(")[0]
        _OPERATORS.impl(name, function, "CompositeExplicitAutograd")
        operator: Callable[..., Any] = getattr(torch.ops.gptq_plugin, name).default
        return operator

    return define


@dataclass(frozen=True)
class _Weight:
    """A weight's projections.

    Attributes:
        seen: The parameter, which may go home meanwhile.
        vectors: R, [out, vectors], in the dtype in which the layer computes.
        addends: Those of Wᵀ R / scale, [in, addends · vectors].
        scale: [].
        bias: b R, [vectors].
        norm: Of W, over √in, [].
    """

    seen: SeenInput
    vectors: Tensor
    addends: Tensor
    scale: Tensor
    bias: Tensor
    norm: Tensor


@dataclass(frozen=True)
class Comparison:
    """What is left of the input and the output of one call.

    Attributes:
        found: y R, [rows, vectors].
        addends: Those of x (Wᵀ R) / scale, [rows, addends · vectors].
        sizes: The norm of each row of x, [rows]. By the weight's it tells the size of what a row's outputs are sums of:
            above the outputs' where their terms cancel, and rounding shows more.
        weight: That of the layer, and its bias.
    """

    found: Tensor
    addends: Tensor
    sizes: Tensor
    weight: _Weight

    @property
    def bytes(self) -> int:
        return self.found.nbytes + self.addends.nbytes + self.sizes.nbytes


class LayerProjections:
    """Projects the calls of one layer.

    Args:
        target: The layer.
    """

    def __init__(self, target: Target) -> None:
        self._target = target
        self._weight: _Weight | None = None

    def compare(self, x: Tensor, output: Tensor, dtype: torch.dtype) -> Comparison:
        """What is left of a call that has just ended.

        Args:
            x: The layer's input, [..., in].
            output: Its output, [..., out].
            dtype: In which the layer multiplies x.
        """
        with full_precision(x.device):
            weight = self._current(dtype, x.device)
            found, addends, sizes = _project_call(x, output, dtype, weight.addends, weight.vectors)
        return Comparison(found, addends, sizes, weight)

    def _current(self, dtype: torch.dtype, device: torch.device) -> _Weight:
        """The weight's projections, made anew if it is another than before."""
        parameter = self._target.parameter
        if self._weight is None or not self._weight.seen.is_same(parameter) or self._weight.vectors.dtype != dtype:
            self._weight = _projected_weight(self._target, dtype, device)
        return self._weight


def apart(comparisons: Sequence[Comparison]) -> list[Tensor]:
    """How far outputs are from the expected ones, [2] each: in tolerances, and relative to the expected ones.

    The first is the larger of two: the largest difference of a row, and the part of all differences together that goes
    along with the outputs, which for rounding is small (a forward that scales by 1.01 in bfloat16 shows there).

    Rows that are not finite by x·Wᵀ + b are left out, since padding may hold anything, and where sums overflow those
    that are not finite in the output, which are refused elsewhere.
    """
    alike: dict[object, list[int]] = {}
    for number, one in enumerate(comparisons):
        key = one.found.shape, one.addends.shape, one.weight.vectors.dtype, one.found.device
        alike.setdefault(key, []).append(number)
    found: dict[int, Tensor] = {}
    for numbers in alike.values():
        found |= zip(numbers, _apart([comparisons[number] for number in numbers]), strict=True)
    return [found[number] for number in range(len(comparisons))]


def _apart(alike: Sequence[Comparison]) -> Sequence[Tensor]:
    """`apart` of comparisons of one shape and dtype, together: their operations are many and small."""
    calls = ([one.found for one in alike], [one.addends for one in alike], [one.sizes for one in alike])
    weights = [one.weight for one in alike]
    of_weights = ([one.scale for one in weights], [one.bias for one in weights], [one.norm for one in weights])
    rows: Sequence[Tensor] = _compare(*calls, *of_weights, weights[0].vectors.dtype).unbind()
    return rows


@_operator(
    "compare_projections(Tensor[] found, Tensor[] addends, Tensor[] sizes, Tensor[] scales, Tensor[] biases,"
    " Tensor[] norms, ScalarType dtype) -> Tensor"
)
def _compare(
    found: list[Tensor],
    addends: list[Tensor],
    sizes: list[Tensor],
    scales: list[Tensor],
    biases: list[Tensor],
    norms: list[Tensor],
    dtype: torch.dtype,
) -> Tensor:
    """[comparisons, 2]; see `apart`. `dtype` is that in which the layers compute."""
    outputs, tolerance = torch.stack(found), _tolerance(dtype)
    products = torch.stack(addends).unflatten(-1, (-1, _VECTORS)).sum(-2)
    products = torch.addcmul(torch.stack(biases)[:, None], products, torch.stack(scales)[:, None, None])
    sums = torch.stack(sizes) * torch.stack(norms)[:, None]
    counted = products.isfinite().all(-1)
    if dtype == torch.float16:  # outputs may be infinite where the product is finite
        counted &= outputs.isfinite().all(-1)
    difference = torch.where(counted[..., None], outputs - products, 0)
    products, sums = torch.where(counted[..., None], products, 0), torch.where(counted, sums, 1)
    tiny = torch.finfo(sums.dtype).tiny
    of_outputs, of_rows = products.square().mean(-1).sqrt(), difference.square().mean(-1).sqrt()
    allowed = (of_outputs + sums) * tolerance
    along = (difference * products).mean(-1).sum(-1).abs() / (allowed * of_outputs).sum(-1).clamp(min=tiny)
    excess = along.nan_to_num(nan=torch.inf) / _ALONG
    if outputs.shape[1]:
        most = (of_rows / allowed.clamp(min=tiny)).nan_to_num(nan=torch.inf).amax(-1)
        excess = torch.maximum(most, excess)
    relative = difference.square().sum((1, 2)).sqrt() / products.square().sum((1, 2)).sqrt().clamp(min=tiny)
    return torch.stack([excess, relative], dim=-1)


def random_rows(rows: int, columns: int) -> Tensor:
    """Normal random numbers, float32 [rows, columns], the same for the same number of rows."""
    generator = torch.Generator("cpu").manual_seed(rows)
    return torch.randn(rows, columns, generator=generator, device="cpu", dtype=torch.float32)


def _projected_weight(target: Target, dtype: torch.dtype, device: torch.device) -> _Weight:
    vectors = _vectors(target.shape[0], dtype, device)
    addends, scale, bias, norm = _project_weight(target.weight, target.bias, vectors, dtype)
    return _Weight(SeenInput(target.parameter), vectors, addends, scale, bias, norm)


@_operator(
    "project_weight(Tensor weight, Tensor? bias, Tensor vectors, ScalarType dtype) -> (Tensor, Tensor, Tensor, Tensor)"
)
def _project_weight(
    weight: Tensor, bias: Tensor | None, vectors: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Addends, scale, bias and norm of `_Weight`."""
    weight = weight.to(vectors.device, dtype)
    projected = _projected(weight.T, vectors)
    scale = projected.new_ones(())
    if _on_tensor_cores(vectors):
        if dtype == torch.float16:  # it ends at 65504: the largest becomes 1
            scale = torch.linalg.vector_norm(projected, torch.inf).clamp(min=torch.finfo(projected.dtype).tiny)
            projected = projected / scale
        first = projected.to(dtype)  # two addends leave 2^-16 of a number
        projected = torch.cat([first, (projected - first).to(dtype)], dim=1)
    of_bias = scale.new_zeros(_VECTORS)
    if bias is not None:
        of_bias = _projected(bias.to(vectors.device, dtype)[None], vectors)[0]
    norm = torch.linalg.vector_norm(weight, dtype=_exact(dtype)) / weight.shape[1] ** 0.5
    return projected, scale, of_bias, norm


@_operator(
    "project_call(Tensor x, Tensor output, ScalarType dtype, Tensor addends, Tensor vectors)"
    " -> (Tensor, Tensor, Tensor)"
)
def _project_call(
    x: Tensor, output: Tensor, dtype: torch.dtype, addends: Tensor, vectors: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """`found`, `addends` and `sizes` of `Comparison`, of x, [..., in], and y, [..., out]."""
    rows = x.to(dtype).reshape(-1, x.shape[-1])
    found = _projected(output.reshape(-1, len(vectors)), vectors)
    return found, _projected(rows, addends), torch.linalg.vector_norm(rows, dim=-1, dtype=_exact(dtype))


def _projected(matrix: Tensor, vectors: Tensor) -> Tensor:
    """The product [rows, vectors] of a matrix, [rows, columns], in float32, or in float64 for such a matrix.

    Args:
        matrix: In the dtype that the layer computes in.
        vectors: [columns, vectors].
    """
    exact = _exact(matrix.dtype)
    if _on_tensor_cores(vectors) and matrix.dtype == vectors.dtype:
        return torch.mm(matrix, vectors, out_dtype=exact)  # type: ignore[call-overload, no-any-return]
    vectors = vectors.to(exact)
    if matrix.numel() <= _PIECE:
        return matrix.to(exact) @ vectors
    pieces = matrix.split(max(1, _PIECE // max(1, matrix.shape[1])))
    return torch.cat([piece.to(exact) @ vectors for piece in pieces])


def _on_tensor_cores(vectors: Tensor) -> bool:
    """True for vectors by which a GPU multiplies a matrix of 16 bits as it is, reading it once."""
    return vectors.is_cuda and vectors.dtype in (torch.float16, torch.bfloat16)


@functools.lru_cache(maxsize=64)
def _vectors(length: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Random vectors, [length, vectors] in `dtype`; their numbers have at most 8 significant bits."""
    return random_rows(length, _VECTORS).to(torch.bfloat16).to(device, dtype)


def _tolerance(dtype: torch.dtype) -> float:
    exact = dtype == torch.float64 or torch.get_float32_matmul_precision() == "highest"
    return _TOLERANCE.get(dtype, _FEWER_BITS) if exact else _FEWER_BITS


def _exact(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
