"""A quantized weight's tensors in a checkpoint's layout or the GPU kernels': `StoredWeight`, `arrange_layers`."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from gptq_plugin.kernels import reference
from gptq_plugin.kernels.product.layout import Arranged, Layout
from gptq_plugin.kernels.product.workspace import prepare
from gptq_plugin.layers.kernel_layout import ArrangedWeight, Packed, is_served
from gptq_plugin.layers.stacked_weight import Group

if TYPE_CHECKING:
    from typing_extensions import Self

PACKED = ("qweight", "qzeros", "scales", "g_idx")
TENSORS = (*PACKED, "bias")  # of a layer, in memory and in a GPTQ file
_STANDARD = PACKED[:3]  # what the kernels' layout stands in for
_ARRANGED = ("words", "group_scales", "group_zeros", "order")
exchanging = threading.RLock()  # of one layout for the other, while other threads compute


class StoredWeight(nn.Module):
    """The buffers of `QuantLinear`.

    They have a checkpoint's layout until `arrange` takes them into that of the kernels; one copy is in memory. State
    dicts have a checkpoint's names and bytes either way, and whoever reads or sets `qweight`, `qzeros` or `scales` has
    the layer go back to them.

    Args:
        in_features, out_features, bits, group_size, device: See `QuantLinear`.

    Raises:
        ValueError: `bits` or `group_size` is invalid.
    """

    g_idx: Tensor
    bias: Tensor | None
    siblings: Group | None = None  # layers with which one product serves it, and its place among them
    place = 0

    def __init__(
        self, in_features: int, out_features: int, bits: int, group_size: int, device: torch.device | str | None
    ) -> None:
        super().__init__()
        if group_size != -1 and group_size < 1:
            raise ValueError(f"group_size must be -1 or positive, got {group_size}")
        self.in_features = in_features
        self.out_features = out_features
        self.bits = bits
        self.group_size = group_size
        self._layout: Layout | None = None  # of the kernels, while the tensors are in it
        channels = self.channels_per_group()
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
        self._non_persistent_buffers_set.update(_ARRANGED)

    @property
    def qweight(self) -> Tensor:
        """Codes, int32 [ceil(in_features * bits / 32), out_features]."""
        return self._standard("qweight")

    @property
    def qzeros(self) -> Tensor:
        """True zeros, int32 [G, ceil(out_features * bits / 32)]."""
        return self._standard("qzeros")

    @property
    def scales(self) -> Tensor:
        """Scales, float16 [G, out_features]."""
        return self._standard("scales")

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.g_idx.device

    def packed(self) -> Packed:
        """The tensors of a checkpoint, made for the caller while the layer's are in the kernels' layout."""
        with exchanging:
            own = [self._buffers.get(name) for name in _STANDARD]
            if self._layout is not None and any(tensor is None for tensor in own):
                with torch.inference_mode(False), torch.no_grad():
                    made = ArrangedWeight(self._layout, *self._arranged_tensors()).packed(self.g_idx)
                own = [there if mine is None else mine for mine, there in zip(own, made[:3], strict=True)]
            return Packed(*own, self.g_idx)  # type: ignore[call-arg, arg-type]

    def arranged(self) -> ArrangedWeight | None:
        """The weight in the kernels' layout; None if it is not in it, or somebody has put other tensors in place."""
        with exchanging:
            if self._layout is None or any(name in self._buffers for name in _STANDARD):
                return None
            return ArrangedWeight(self._layout, *self._arranged_tensors())

    def arrange(self) -> bool:
        """Takes the tensors into the layout of the GPU's kernels; waits for the GPU.

        Returns:
            False if the kernels do not take them (`ArrangedWeight.of`); they are then as they were.
        """
        with exchanging, torch.inference_mode(False), torch.no_grad():
            if self.arranged() is not None:
                return True
            made = ArrangedWeight.of(self.packed(), self.bits, self.group_size)
            if made is None:
                return False
            prepare(self.device)
            self._exchange(_STANDARD, dict(zip(_ARRANGED, (*made.tensors, made.order), strict=True)))
            self._layout = made.layout
            return True

    def restore(self) -> None:
        """Takes the tensors back into a checkpoint's layout."""
        with exchanging:
            if self._layout is not None:
                packed = self.packed()
                self._layout = None
                self._exchange(_ARRANGED, dict(zip(PACKED, packed, strict=True)))
                if self.siblings is not None:
                    self.siblings.separate()

    def put(self, tensors: Arranged) -> None:
        """Sets the tensors of the kernels' layout, whose values it has already."""
        self._buffers.update({name: t for name, t in zip(_ARRANGED, tensors, strict=False) if t is not None})

    def holds(self, tensors: Arranged) -> bool:
        """Whether its weight is these very tensors."""
        if any(name in self._buffers for name in _STANDARD):  # in words that a compiler of PyTorch 2.11 traces
            return False
        return all(self._buffers.get(name) is t for name, t in zip(_ARRANGED, tensors, strict=False))

    def channels_per_group(self) -> int:
        """Input channels that share a scale."""
        return self.in_features if self.group_size == -1 else min(self.group_size, self.in_features)

    def _standard(self, name: str) -> Tensor:
        if self._layout is not None:
            self.restore()
        found = self._buffers.get(name)
        if found is None:
            raise AttributeError(name)  # it is being registered
        return found

    def _exchange(self, left: Iterable[str], taken: Mapping[str, Tensor | None]) -> None:
        for name in left:
            self._buffers.pop(name, None)
        self._buffers.update({name: tensor for name, tensor in taken.items() if tensor is not None})
        # torch.export takes a buffer that is None for one if others follow.
        self._buffers["bias"] = self._buffers.pop("bias")

    def _arranged_tensors(self) -> tuple[Arranged, Tensor | None]:
        words, scales, zeros, order = map(self._buffers.get, _ARRANGED)
        assert words is not None and scales is not None
        return Arranged(words, scales, zeros), order

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _STANDARD and self.__dict__.get("_layout") is not None:
            self.restore()
        super().__setattr__(name, value)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Moves every buffer; casts the bias only."""
        self.restore()
        before = {name: self.get_buffer(name) for name in PACKED}
        super()._apply(fn, recurse)
        for name, original in before.items():
            moved = self.get_buffer(name)
            if moved.dtype != original.dtype:
                setattr(self, name, original.to(moved.device))
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        if self._layout is not None:
            destination.update({f"{prefix}{name}": tensor for name, tensor in zip(PACKED, self.packed(), strict=True)})
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        self.restore()
        super()._load_from_state_dict(state_dict, prefix, *args)

    def __getstate__(self) -> dict[str, Any]:
        """A copy has tensors of its own, not those of its siblings."""
        with exchanging:
            arranged = None if self.siblings is None else self.arranged()
            if arranged is None:
                return dict(self.__dict__)
            own = dict(zip(_ARRANGED, arranged.tensors.contiguous(), strict=False))
            buffers = {name: own.get(name, tensor) for name, tensor in self._buffers.items()}
            return {**self.__dict__, "_buffers": buffers}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if self.siblings is not None:
            self.siblings.join(self)


def arrange_layers(model: nn.Module) -> None:
    """Takes the layers of a model that are on GPUs into the layout of the kernels, where these take it."""
    for module in model.modules():
        if isinstance(module, StoredWeight) and is_served(module.device):
            module.arrange()
