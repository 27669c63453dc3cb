"""Stand-ins for a parameter [experts, ., .] that leave the module's forward as it is: `ExpertWeights` calls a layer for
each expert; `WatchedWeights` learns how the parameter is used.

Indexed with an expert's number, both give an object that torch.nn.functional.linear and @ take for a matrix; PyTorch's
``__torch_function__`` lets it compute the product. So do products of all experts, batched or of rows sorted by expert.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from gptq_plugin.device.modules import module_at
from gptq_plugin.errors import TargetError
from gptq_plugin.model.experts_call import ExpertsCall

MatrixLayout = Literal["out, in", "in, out"]  # the sides of one expert's matrix


class _Experts:
    """A sequence of the experts' matrices."""

    def product(self, expert: int, x: Tensor, used_as: MatrixLayout) -> Tensor:
        """The product of x and one expert's matrix, which the calling code takes to have this layout."""
        raise NotImplementedError

    def otherwise(self, what: str) -> Any:
        """Called for any other use, described by `what`; returns the parameter or raises."""
        raise NotImplementedError

    def __len__(self) -> int:
        raise NotImplementedError

    def __getitem__(self, expert: Any) -> Any:
        number = _index(expert)
        return self.otherwise(f"an index {type(expert).__name__}")[expert] if number is None else _One(self, number)

    def __iter__(self) -> Iterator[Any]:
        return (self[expert] for expert in range(len(self)))


class ExpertWeights(_Experts):
    """Replaces the parameter [experts, ., .]: multiplying by `weights[i]` calls the layers of expert i.

    Args:
        module: The experts' module, with children ``"0"``, ``"1"``, ...
        parts: Names of each expert's layers, whose outputs are concatenated.
        shape: Shape of the parameter.
        dtype: Dtype of the parameter; of quantized layers that which they have.
        layout: The only one that it may be used in; None where the layers were not made from it.

    Attributes:
        call: Called by grouped products.
    """

    _is_hf_initialized = True  # transformers has nothing to initialise here

    def __init__(
        self,
        module: nn.Module,
        parts: list[list[str]],
        shape: torch.Size,
        dtype: torch.dtype,
        layout: MatrixLayout | None = None,
    ) -> None:
        self._module = module
        self._parts = parts
        self._layout = layout
        self.shape = shape
        self._dtype = dtype
        self.call = ExpertsCall(self.layers, len(parts), (module, parts))

    @property
    def device(self) -> torch.device:
        tensors = self._first._buffers.values() or self._first.parameters()
        return next((tensor.device for tensor in tensors if tensor is not None), torch.device("cpu"))

    @property
    def dtype(self) -> torch.dtype:
        return getattr(self._first, "dtype", self._dtype)

    @property
    def in_features(self) -> int:
        return int(self._first.in_features)  # type: ignore[arg-type]

    @property
    def _first(self) -> nn.Module:
        return module_at(self._module, self._parts[0][0])

    def dim(self) -> int:
        return len(self.shape)

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def layers(self, expert: int) -> list[nn.Module]:
        return [module_at(self._module, name) for name in self._parts[expert]]

    def names_below(self, module: str) -> tuple[tuple[str, ...], ...]:
        """Full names of each expert's layers, in a module of that name."""
        return tuple(tuple(f"{module}.{name}" for name in own) for own in self._parts)

    def data_ptr(self) -> int:
        """None: products that ask for the alignment of the memory find it as they need it."""
        return 0

    def transpose(self, *dims: int) -> _Turned:
        if {dim % 3 for dim in dims} != {1, 2}:
            self.otherwise(f"transposed along {dims}")
        return _Turned(self)

    @property
    def mT(self) -> _Turned:
        return _Turned(self)

    def product(self, expert: int, x: Tensor, used_as: MatrixLayout) -> Tensor:
        self._check(used_as)
        outputs = [layer(x) for layer in self.layers(expert)]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)

    def grouped_product(self, x: Tensor, ends: Tensor, used_as: MatrixLayout) -> Tensor:
        """The product of rows x, [rows, in], each with its expert's matrix; see `ExpertsCall`."""
        self._check(used_as)
        return self.call(x, ends)

    def _check(self, used_as: MatrixLayout) -> None:
        if used_as != (self._layout or used_as):
            self.otherwise(f"as [{used_as}], where [{self._layout}] is declared")

    def otherwise(self, what: str) -> Any:
        raise TargetError(  # Python takes a TypeError of an operator for one that does not apply
            f"{type(self._module).__name__} uses its experts' weights in a way that quantized experts do not support "
            f"({what}): name the module in modules_to_not_convert"
        )

    def __len__(self) -> int:
        return len(self._parts)

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        batched = _operands(function, _BATCHED, args, kwargs)
        if batched is not None and isinstance(batched[1], cls) and isinstance(batched[0], Tensor):
            x, weights = batched[0], batched[1]
            return torch.stack([weights.product(expert, x[expert], "in, out") for expert in range(len(weights))])
        grouped = _grouped_operands(function, cls, args, kwargs)
        if grouped is not None:
            x, weights, ends = grouped
            return weights.grouped_product(x, ends, "in, out")
        return _first(cls, args, kwargs).otherwise(_name(function))


class _Turned:
    """All experts' matrices with their sides exchanged, for a grouped product."""

    def __init__(self, weights: ExpertWeights) -> None:
        self._weights = weights

    def data_ptr(self) -> int:
        return self._weights.data_ptr()

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        grouped = _grouped_operands(function, cls, args, kwargs)
        if grouped is None:
            return _first(cls, args, kwargs)._weights.otherwise(f"{_name(function)} of the transposed")
        x, turned, ends = grouped
        return turned._weights.grouped_product(x, ends, "out, in")

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        told = name in ("dtype", "device")
        return getattr(self._weights, name) if told else self._weights.otherwise(f"{name} of the transposed")


class _One:
    """One expert's matrix, as the forward gets it by indexing, or its transpose."""

    def __init__(self, weights: Any, expert: int, turned: bool = False) -> None:
        self._weights = weights
        self._expert = expert
        self._turned = turned

    def transpose(self, *dims: int) -> _One:
        return _One(self._weights, self._expert, not self._turned)

    t = transpose
    T = mT = property(transpose)

    def to(self, *args: Any, **kwargs: Any) -> _One:
        return self

    contiguous = to

    @property
    def dtype(self) -> torch.dtype:
        return self._weights.dtype

    @property
    def device(self) -> torch.device:
        return self._weights.device

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        linear = _operands(function, (functional.linear,), args, kwargs)
        product = _operands(function, _PRODUCTS, args, kwargs)
        x, weight, *rest = linear or product or (None, None)
        if product is not None and isinstance(x, cls) and isinstance(weight, Tensor):
            return x @ weight
        if isinstance(x, Tensor) and isinstance(weight, cls):
            used_as: MatrixLayout = "out, in" if (linear is not None) != weight._turned else "in, out"
            y = weight._weights.product(weight._expert, x, used_as)
            return y if not rest or rest[0] is None else y + rest[0]

        def real(value: Any) -> Any:
            return value._really(_name(function)) if isinstance(value, cls) else value

        return function(*map(real, args), **{key: real(value) for key, value in (kwargs or {}).items()})

    def __matmul__(self, x: Any) -> Any:
        if not isinstance(x, Tensor):
            return self._really("matmul") @ x
        used_as: MatrixLayout = "in, out" if self._turned else "out, in"
        columns = x.dim() > 1  # W x = (xᵀ Wᵀ)ᵀ
        y = self._weights.product(self._expert, x.mT if columns else x, used_as)
        return y.mT if columns else y

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self._really(name), name)

    def _really(self, what: str) -> Tensor:
        matrix: Tensor = self._weights.otherwise(what)[self._expert]
        return matrix.T if self._turned else matrix


def _operator(name: str) -> Callable[..., Any]:
    """An operator of tensors, which Python looks for in the class."""

    def operate(self: _One, *others: Any) -> Any:
        return getattr(self._really(name), name)(*others)

    return operate


for _kind in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow"):
    for _side in ("", "r"):
        setattr(_One, f"__{_side}{_kind}__", _operator(f"__{_side}{_kind}__"))
for _kind in ("neg", "pos", "abs", "invert", "getitem", "len", "iter", "lt", "le", "gt", "ge"):
    setattr(_One, f"__{_kind}__", _operator(f"__{_kind}__"))


class WatchedWeights(_Experts):
    """Replaces a parameter to learn how it is used, and computes what the parameter would.

    Attributes:
        uses: The layouts in which it was used; None stands for any other use.
    """

    def __init__(self, parameter: Tensor) -> None:
        self._parameter = parameter
        self.uses: set[MatrixLayout | None] = set()

    def product(self, expert: int, x: Tensor, used_as: MatrixLayout) -> Tensor:
        self.uses.add(used_as)
        return functional.linear(x, as_linear(self._parameter[expert].to(x.device), used_as))

    def __len__(self) -> int:
        return len(self._parameter)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "_parameter":
            raise AttributeError(name)
        return getattr(self._parameter if name in _TOLD else self.otherwise(name), name)

    def otherwise(self, what: str) -> Tensor:
        """Returns the parameter, for a use that quantized experts do not support."""
        self.uses.add(None)
        return self._parameter

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        batched = _operands(function, _BATCHED, args, kwargs)
        if batched is not None and isinstance(batched[1], cls):
            batched[1].uses.add("in, out")
            return torch.bmm(batched[0], batched[1]._parameter.to(batched[0].device))

        def real(value: Any) -> Any:
            return value.otherwise(_name(function)) if isinstance(value, cls) else value

        return function(*map(real, args), **{key: real(value) for key, value in (kwargs or {}).items()})


_TOLD = ("shape", "dtype", "device", "dim", "size")  # attributes that `ExpertWeights` has too
_BATCHED = (torch.bmm, Tensor.bmm, torch.matmul, Tensor.matmul, Tensor.__matmul__)
_GROUPED = ("_grouped_mm", "grouped_mm", "grouped_mm_fallback")  # PyTorch's names, and transformers'
_PRODUCTS = (torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm)


def _operands(
    function: Any, wanted: tuple[Any, ...], args: tuple[Any, ...], kwargs: Mapping[str, Any] | None
) -> tuple[Any, ...] | None:
    """The arguments of one of the wanted functions, in order; None for any other function."""
    given = (*args, *(kwargs or {}).values())
    return given if function in wanted and len(given) >= 2 else None


def _grouped_operands(
    function: Any, kind: type, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None
) -> tuple[Any, Any, Any] | None:
    """Rows, weights and ends of a grouped product of rows with weights of this kind; None for any other call."""
    named = {key: value for key, value in (kwargs or {}).items() if value is not None}
    if _name(function) not in _GROUPED or len(args) < 2 or not isinstance(args[1], kind):
        return None
    ends = args[2] if len(args) == 3 else named.pop("offs", None)
    plain = len(args) <= 3 and not named and isinstance(ends, Tensor) and isinstance(args[0], Tensor)
    return (args[0], args[1], ends) if plain and args[0].dim() == 2 else None


def _first(kind: type, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None) -> Any:
    return next(value for value in (*args, *(kwargs or {}).values()) if isinstance(value, kind))


def _name(function: Any) -> str:
    return getattr(function, "__name__", str(function))


def _index(expert: Any) -> int | None:
    """The expert's number that an index gives; None for an index of another kind."""
    if isinstance(expert, Tensor):
        return int(expert) if expert.numel() == 1 and expert.dtype in (torch.int64, torch.int32) else None
    return expert if isinstance(expert, int) else None


def as_linear(matrix: Tensor, layout: MatrixLayout) -> Tensor:
    """The matrix as [out, in]."""
    return matrix if layout == "out, in" else matrix.T
