"""QuantLinear, a linear layer whose weights stay quantized.

On a GPU a layer that computes again with the tensors of a checkpoint takes them into the layout of the kernels
(`kernel_layout`), in which one copy stays; `kernels.matmul` serves the first time, and layers which that layout does
not take. A CPU has ways of its own (`cpu_product`); elsewhere plain PyTorch multiplies tile by tile.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from gptq_plugin.kernels import reference
from gptq_plugin.layers.cpu_product import CpuProduct
from gptq_plugin.layers.float_rest import FloatRest
from gptq_plugin.layers.packing import pack_weight, pack_zeros, traceable_weight
from gptq_plugin.layers.product_function import product
from gptq_plugin.layers.product_op import arranged_linear
from gptq_plugin.layers.stored_weight import StoredWeight

if TYPE_CHECKING:
    from typing_extensions import Self

    from gptq_plugin.gptq.grid import QuantizedWeight

_State = tuple[tuple[Tensor, int | None], ...]


class _Placeholder(Tensor):
    """Stands for a weight. Modules of PyTorch that would read weights in place of calling their layers, as
    `nn.TransformerEncoder` does, leave that alone where one is no plain tensor."""


class QuantLinear(StoredWeight):
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
        super().__init__(in_features, out_features, bits, group_size, device)
        self._prepared: _Prepared | None = None
        self.float_rest: FloatRest | None = None  # of the model it is in, see `note_float_rest`
        self._dtype = dtype
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
        layer._buffers.update(
            qweight=pack_weight(weight.codes, weight.bits),
            qzeros=pack_zeros(weight.zeros, weight.bits),
            scales=weight.scales.detach().clone(memory_format=torch.contiguous_format),
        )
        layer.g_idx = weight.g_idx.clone()
        layer.bias = None if bias is None else bias.detach().clone()
        reference.check_weight(layer.qweight, layer.qzeros, layer.scales, layer.g_idx, layer.bits)
        return layer

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the bias and of the placeholder `weight`."""
        return self._dtype

    @property
    def weight(self) -> Tensor:
        """A placeholder, [out, in] of NaN, for models that read a weight's dtype, device or shape. It takes one number
        in memory; `dequantize` gives the values."""
        nan = torch.full((), torch.nan, dtype=self._dtype, device=self.device)
        return nan.expand(self.out_features, self.in_features).as_subclass(_Placeholder)

    def forward(self, input: Tensor) -> Tensor:  # the name under which nn.Linear's callers know it
        """Maps [..., in_features] to [..., out_features], in the input's dtype or, if autocast is on, in autocast's.

        Raises:
            ValueError: The input has the wrong number of channels, is not floating, or is on another device.
        """
        x = input.to(output_dtype(input))
        if torch.compiler.is_compiling():
            return self._traceable(input, x)
        if self.training and self.float_rest is not None:
            self.float_rest.check_training()
        y: Tensor | None = None if self.siblings is None else self.siblings.part(self, input, x)
        return product(x, self) if y is None else y

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """W as [out_features, in_features] in `dtype`: exact in float32, otherwise rounded once."""
        if self.device.type == "cuda" and dtype != torch.float64:
            arranged = self.arranged()
            if arranged is not None:
                from gptq_plugin.kernels.product import products  # imported here: needs Triton

                return products.weight(arranged.layout, arranged.tensors, dtype, arranged.order)
            from gptq_plugin.kernels import matmul  # imported here: needs Triton

            return matmul.dequantize(*self.packed(), self.bits, dtype)  # reading g_idx first would synchronize
        return reference.dequantize(*self.packed(), self.bits, dtype)

    def extra_repr(self) -> str:
        shown = (
            f"in_features={self.in_features}, out_features={self.out_features}, bits={self.bits}, "
            f"group_size={self.group_size}, bias={self.bias is not None}"
        )
        arranged = self.arranged()
        if arranged is None:
            return shown
        from gptq_plugin.kernels.product import products  # imported here: needs Triton

        stacked = None if self.siblings is None else self.siblings.stacked()
        if stacked is not None:
            shown = f"{shown}, fused={len(stacked.starts)}"
        layout = arranged.layout if stacked is None else stacked.weight.layout
        return f"{shown}, kernels=({products.described(layout, self._dtype, self.device)})"

    def product(self, x: Tensor) -> Tensor:
        """x Wᵀ + bias in x's dtype, without a gradient."""
        if x.device.type == "cuda":
            return self._product_on_gpu(x)
        cpu = self._prepare().cpu if x.device.type == self.device.type == "cpu" else None
        if cpu is not None:
            return cpu.matmul(x, self.bias)
        return reference.matmul(x, *self.packed(), self.bits, self.bias)

    def _product_on_gpu(self, x: Tensor) -> Tensor:
        from gptq_plugin.kernels import matmul  # imported here: needs Triton

        arranged = self.arranged()
        if arranged is None:
            prepared = self._prepare()
            # Tensors that were here before are here to stay: offloaded ones come anew for every product.
            if prepared.served and prepared.can_be_arranged and not torch.cuda.is_current_stream_capturing():
                prepared.can_be_arranged = self.arrange()
                arranged = self.arranged()
            prepared.served = True
            if arranged is None:
                return matmul.quant_matmul(x, *self.packed(), self.bits, self.bias, group_size=prepared.group_size)
        return arranged.product(x, self.bias)

    def _traceable(self, input: Tensor, x: Tensor) -> Tensor:
        """The product in operations that `torch.compile` and `torch.export` trace: none depends on a buffer's values,
        so that a graph stays right whatever g_idx is loaded into it."""
        layout = self._layout
        if layout is not None:
            y = None if self.siblings is None else self.siblings.traced(self, input, x.dtype)
            if y is not None:
                return y
            (words, scales, zeros), order = self._arranged_tensors()
            return arranged_linear(  # type: ignore[no-any-return]
                x, words, scales, zeros, order, self.bias,
                layout.bits, layout.group, layout.n_in, layout.n_out, layout.group_size,
            )  # fmt: skip
        packed = (self.qweight, self.qzeros, self.scales, self.g_idx, self.bits)
        reference.check_weight(*packed)
        reference.check_input(x, self.qweight, self.g_idx, self.bias)
        weight = traceable_weight(*packed).to(x.dtype)
        return nn.functional.linear(x, weight, None if self.bias is None else self.bias.to(x.dtype))

    def _prepare(self) -> _Prepared:
        """Derives what forward needs from the buffers; cached until a buffer changes."""
        packed = self.packed()
        state = tuple((t, None if t.is_inference() else t._version) for t in packed)
        prepared = self._prepared
        if prepared is None or not _unchanged(prepared.state, state):
            channels = self.channels_per_group()
            natural = torch.arange(self.in_features, dtype=torch.int32, device=packed.g_idx.device) // channels
            group_size = channels if torch.equal(packed.g_idx, natural) else None
            cpu = CpuProduct(packed, self.bits, channels) if packed.qweight.device.type == "cpu" else None
            prepared = _Prepared(state, group_size, cpu)
            self._prepared = prepared
        return prepared

    def release(self) -> None:
        """Frees what forwards derived from the buffers, on a CPU up to a byte a weight. The next derives it again."""
        self._prepared = None

    def arrange(self) -> bool:
        done = super().arrange()
        if done:
            self._prepared = None  # it holds the tensors
        return done

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
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
        return {**super().__getstate__(), "_prepared": None}  # copies and pickles derive it again


@dataclass
class _Prepared:
    state: _State  # the buffers it was derived from, with their versions
    group_size: int | None  # channels per group; None unless g_idx[i] is i // group_size
    cpu: CpuProduct | None  # its product if it is on a CPU
    served: bool = False  # a product on a GPU
    can_be_arranged: bool = True


def _unchanged(old: _State, new: _State) -> bool:
    return all(t is u and v == w for (t, v), (u, w) in zip(old, new, strict=True))


def output_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which nn.Linear maps x: x's or, if autocast is on, autocast's, which leaves float64 alone."""
    kind = x.device.type
    # is_autocast_available breaks the graph of torch.compile in PyTorch 2.11
    has_autocast = kind in ("cpu", "cuda") or torch.amp.is_autocast_available(kind)
    if x.dtype == torch.float64 or not has_autocast or not torch.is_autocast_enabled(kind):
        return x.dtype
    return torch.get_autocast_dtype(kind)


def note_float_rest(model: nn.Module) -> None:
    """Lets the quantized layers of a complete model warn when it is trained as if they could be; see `FloatRest`."""
    rest = FloatRest(model)
    for layer in model.modules():
        if isinstance(layer, QuantLinear):
            layer.float_rest = rest
