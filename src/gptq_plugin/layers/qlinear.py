"""QuantLinear, a linear layer whose weights stay quantized.

On CUDA one Triton kernel dequantizes and multiplies. Elsewhere plain PyTorch does so tile by tile; on a CPU, bfloat16
inputs of few rows use PyTorch's own 4-bit kernel, which for one row is faster than a float layer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from gptq_plugin.kernels import reference
from gptq_plugin.layers.float_rest import FloatRest
from gptq_plugin.layers.packing import pack_weight, pack_zeros, traceable_weight, unpack_weight, unpack_zeros

if TYPE_CHECKING:
    from gptq_plugin.gptq.grid import QuantizedWeight

_PACKED = ("qweight", "qzeros", "scales", "g_idx")
TENSORS = (*_PACKED, "bias")  # of a layer, in memory and in a GPTQ file

# torch.ops.aten._weight_int4pack_mm_for_cpu: the group sizes it takes, and the most rows at which it is faster than
# dequantizing (its time grows with every row; scripts/bench_qlinear.py measures both).
_INT4_GROUPS = (256, 128, 64, 32)
_INT4_ROWS = 128

_State = tuple[tuple[Tensor, int | None], ...]


class _Placeholder(Tensor):
    """Stands for a weight. Modules of PyTorch that would read weights in place of calling their layers, as
    `nn.TransformerEncoder` does, leave that alone where one is no plain tensor."""


class QuantLinear(nn.Module):
    """y = x Wᵀ + bias, with W[o, i] = scales[g_idx[i], o] * (q[i, o] - z[g_idx[i], o]).

    Buffers have the names and layout of GPTQ checkpoints, except that `qzeros` always holds true zeros (see `packing`).
    Casting the module (`.half()`, `.to(dtype)`) casts the bias only: codes are integers, and scales keep the file's
    float16, so that W is the same at every dtype up to its final rounding. Gradients flow to x, not to the weights.

    Args:
        in_features: Channels of x.
        out_features: Channels of y.
        bits: Width of a code: 2, 3, 4 or 8.
        group_size: Input channels that share a scale and a zero, or -1 for all.
        bias: True for a layer with a bias.
        dtype: Dtype of the bias and of the placeholder `weight`.
        device: The buffers' device; they are zero until loaded.

    Buffers, with G groups:
        qweight: int32 [ceil(in_features * bits / 32), out_features]
        qzeros: int32 [G, ceil(out_features * bits / 32)]
        scales: float16 [G, out_features]
        g_idx: int32 [in_features], the group of every input channel, in [0, G)
        bias: [out_features] in `dtype`, or None

    Raises:
        ValueError: `bits` or `group_size` is invalid.
    """

    qweight: Tensor
    qzeros: Tensor
    scales: Tensor
    g_idx: Tensor
    bias: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bits: int,
        group_size: int,
        *,
        bias: bool = False,
        dtype: torch.dtype = torch.float16,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if group_size != -1 and group_size < 1:
            raise ValueError(f"group_size must be -1 or positive, got {group_size}")
        self.in_features = in_features
        self.out_features = out_features
        self.bits = bits
        self.group_size = group_size
        self._prepared: _Prepared | None = None
        self.float_rest: FloatRest | None = None  # of the model it is in, see `note_float_rest`
        self._dtype = dtype
        channels = self._channels_per_group()
        groups = -(-in_features // channels)
        shapes = {
            "qweight": (reference.words_for(in_features, bits), out_features),
            "qzeros": (groups, reference.words_for(out_features, bits)),
        }
        reference.stream_period(bits)  # refuses other widths
        for name, shape in shapes.items():
            self.register_buffer(name, torch.zeros(shape, dtype=torch.int32, device=device))
        self.register_buffer("scales", torch.zeros(groups, out_features, dtype=torch.float16, device=device))
        # On the CPU: on the meta device PyTorch's integer division takes milliseconds.
        natural = torch.arange(in_features, dtype=torch.int32, device="cpu") // channels
        self.register_buffer("g_idx", natural.to(device))
        self.register_buffer("bias", torch.zeros(out_features, dtype=dtype, device=device) if bias else None)

    @classmethod
    def from_quantized(
        cls, weight: QuantizedWeight, bias: Tensor | None = None, dtype: torch.dtype | None = None
    ) -> QuantLinear:
        """Packs a solver's result on its device; the layer shares no memory with it.

        Args:
            weight: Codes uint8 [out, in], scales float16 [G, out], zeros uint8 [G, out], g_idx int32 [in].
            bias: [out], kept in its dtype, or None.
            dtype: Dtype of the float layer; the bias's, or float32, if None.
        """
        out_features, in_features = weight.codes.shape
        dtype = dtype or (torch.float32 if bias is None else bias.dtype)
        layer = cls(in_features, out_features, weight.bits, weight.group_size, dtype=dtype, device="meta")
        layer.qweight = pack_weight(weight.codes, weight.bits)
        layer.qzeros = pack_zeros(weight.zeros, weight.bits)
        layer.scales = weight.scales.detach().clone(memory_format=torch.contiguous_format)
        layer.g_idx = weight.g_idx.clone()
        layer.bias = None if bias is None else bias.detach().clone()
        reference.check_weight(layer.qweight, layer.qzeros, layer.scales, layer.g_idx, layer.bits)
        return layer

    @property
    def weight(self) -> Tensor:
        """A placeholder, [out, in] of NaN, for models that read a weight's dtype, device or shape. It takes one number
        in memory; `dequantize` gives the values."""
        nan = torch.full((), torch.nan, dtype=self._dtype, device=self.scales.device)
        return nan.expand(self.out_features, self.in_features).as_subclass(_Placeholder)

    def forward(self, input: Tensor) -> Tensor:  # the name under which nn.Linear's callers know it
        """Maps [..., in_features] to [..., out_features], in the input's dtype or, if autocast is on, in autocast's.

        Raises:
            ValueError: The input has the wrong number of channels, is not floating, or is on another device.
        """
        x = input.to(output_dtype(input))
        if torch.compiler.is_compiling():
            return self._traceable(x)
        if self.training and self.float_rest is not None:
            self.float_rest.check_training()
        y: Tensor = _Product.apply(x, self)
        return y

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """W as [out_features, in_features] in `dtype`: exact in float32, otherwise rounded once."""
        packed = (self.qweight, self.qzeros, self.scales, self.g_idx, self.bits)
        if self.qweight.is_cuda and dtype != torch.float64:
            from gptq_plugin.kernels import matmul  # imported here: needs Triton

            return matmul.dequantize(*packed, dtype)  # reading g_idx first would synchronize
        return reference.dequantize(*packed, dtype)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bits={self.bits}, "
            f"group_size={self.group_size}, bias={self.bias is not None}"
        )

    def _channels_per_group(self) -> int:
        return self.in_features if self.group_size == -1 else min(self.group_size, self.in_features)

    def _product(self, x: Tensor) -> Tensor:
        packed = (self.qweight, self.qzeros, self.scales, self.g_idx, self.bits)
        if x.is_cuda:
            from gptq_plugin.kernels import matmul  # imported here: needs Triton

            return matmul.quant_matmul(x, *packed, self.bias, group_size=self._prepare().group_size)
        rows = x.numel() // max(1, self.in_features)
        if x.device.type == "cpu" and x.dtype == torch.bfloat16 and 0 < rows <= _INT4_ROWS:
            int4 = self._prepare().int4
            if int4 is not None:
                reference.check_input(x, self.qweight, self.g_idx, self.bias)
                return int4.matmul(x, self.bias)
        return reference.matmul(x, *packed, self.bias)

    def _traceable(self, x: Tensor) -> Tensor:
        """The product in operations that `torch.compile` and `torch.export` trace: none depends on a buffer's values,
        so that a graph stays right whatever g_idx is loaded into it."""
        packed = (self.qweight, self.qzeros, self.scales, self.g_idx, self.bits)
        reference.check_weight(*packed)
        reference.check_input(x, self.qweight, self.g_idx, self.bias)
        weight = traceable_weight(*packed).to(x.dtype)
        return nn.functional.linear(x, weight, None if self.bias is None else self.bias.to(x.dtype))

    def _prepare(self) -> _Prepared:
        """Derives what forward needs from the buffers; cached until a buffer changes."""
        state = tuple((t, None if t.is_inference() else t._version) for t in map(self.get_buffer, _PACKED))
        prepared = self._prepared
        if prepared is None or not _unchanged(prepared.state, state):
            channels = self._channels_per_group()
            natural = torch.arange(self.in_features, dtype=torch.int32, device=self.g_idx.device) // channels
            group_size = channels if torch.equal(self.g_idx, natural) else None
            prepared = _Prepared(state, group_size, _Int4.repack(self, group_size))
            self._prepared = prepared
        return prepared

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantLinear:
        """Moves every buffer; casts the bias only."""
        before = {name: self.get_buffer(name) for name in _PACKED}
        super()._apply(fn, recurse)
        for name, original in before.items():
            moved = self.get_buffer(name)
            if moved.dtype != original.dtype:
                setattr(self, name, original.to(moved.device))
        self._prepared = None
        self._dtype = fn(torch.empty(0, dtype=self._dtype, device="cpu")).dtype
        return self

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._prepared = None
        if f"{prefix}weight" in state_dict and f"{prefix}qweight" not in state_dict:
            errors: list[str] = args[-1]
            errors.append(
                f"{prefix.rstrip('.')} is quantized, and these are the weights of the float model: load them into a "
                "module that is not quantized, such as the one MyModule.load_from_checkpoint(path) returns"
            )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_prepared": None}  # copies and pickles derive it again


@dataclass(frozen=True)
class _Prepared:
    state: _State  # the buffers it was derived from, with their versions
    group_size: int | None  # channels per group; None unless g_idx[i] is i // group_size
    int4: _Int4 | None  # the layer for PyTorch's 4-bit CPU kernel; None if that does not apply


@dataclass(frozen=True)
class _Int4:
    """A layer repacked for `_weight_int4pack_mm_for_cpu`: W = (q - 8) * scale + zero in bfloat16."""

    weight: Tensor  # uint8 [out, in / 2], in the kernel's own order
    scales_and_zeros: Tensor  # bfloat16 [in / group_size, out, 2]
    group_size: int

    @classmethod
    def repack(cls, layer: QuantLinear, group_size: int | None) -> _Int4 | None:
        """Repacks a layer; None if the kernel does not take its width, order, size or device."""
        n_in, n_out = layer.in_features, layer.out_features
        if layer.qweight.device.type != "cpu" or layer.bits != 4 or group_size is None:
            return None
        if n_out % 16 or n_in % group_size:
            return None
        # A longer group becomes several of the kernel's with the same scale.
        finer = next((g for g in _INT4_GROUPS if group_size % g == 0), None)
        if finer is None:
            return None
        codes = unpack_weight(layer.qweight, 4, n_in).int()
        scales = layer.scales.float()
        zeros = (8 - unpack_zeros(layer.qzeros, 4, n_out).float()) * scales
        pairs = torch.stack([scales, zeros], dim=-1).repeat_interleave(group_size // finer, dim=0)
        weight = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
        return cls(weight, pairs.bfloat16().contiguous(), finer)

    def matmul(self, x: Tensor, bias: Tensor | None) -> Tensor:
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        y: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(
            rows, self.weight, self.group_size, self.scales_and_zeros
        )
        if bias is not None:
            y += bias.to(y.dtype)
        return y.view(*x.shape[:-1], y.shape[1])


def _unchanged(old: _State, new: _State) -> bool:
    return all(t is u and v == w for (t, v), (u, w) in zip(old, new, strict=True))


def output_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which nn.Linear maps x: x's or, if autocast is on, autocast's, which leaves float64 alone."""
    kind = x.device.type
    if x.dtype == torch.float64 or not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return x.dtype
    return torch.get_autocast_dtype(kind)


class _Product(torch.autograd.Function):
    """The product, with a gradient for x: dL/dx = dL/dy W. Backward dequantizes W again instead of keeping it."""

    @staticmethod
    def forward(x: Tensor, layer: QuantLinear) -> Tensor:
        y = layer._product(x)
        # A view that a Function returns cannot be changed in place; PyTorch's own products end in the same operation.
        return torch.ops.aten._unsafe_view(y, y.shape)  # type: ignore[no-any-return]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, QuantLinear], output: Tensor) -> None:
        ctx.layer = inputs[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad @ ctx.layer.dequantize(grad.dtype), None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int, None], x: Tensor, layer: QuantLinear) -> tuple[Tensor, int]:
        return _Product.apply(x.movedim(in_dims[0], 0), layer), 0  # any number of dimensions leads


def note_float_rest(model: nn.Module) -> None:
    """Lets the quantized layers of a complete model warn when it is trained as if they could be; see `FloatRest`."""
    rest = FloatRest(model)
    for layer in model.modules():
        if isinstance(layer, QuantLinear):
            layer.float_rest = rest
