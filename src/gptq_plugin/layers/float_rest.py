"""What is left float in a model with quantized layers, and a warning when training reaches nothing else: `FloatRest`.

Quantized weights take no part in training. Training on after a swap trains embeddings and norms only, which nobody
means; training adapters on quantized layers adds parameters of its own, which everybody means.
"""

from __future__ import annotations

import warnings
import weakref
from typing import Any

import torch
from torch import nn


class FloatRest:
    """The parameters of a model at the time when its layers were quantized. All its quantized layers share one.

    It does not keep the model alive. A deep copy of the model gets its own; pickled, it knows no model any more.

    Args:
        model: With its quantized layers in place.
    """

    def __init__(self, model: nn.Module | None) -> None:
        self._model = None if model is None else weakref.ref(model)
        self._names = frozenset(() if model is None else (name for name, _ in model.named_parameters()))
        self._is_checked = False

    def check_training(self) -> None:
        """Warns, once a model, if nothing can be trained but what the quantization left float.

        Call it in a forward in train mode.
        """
        if self._is_checked or not torch.is_grad_enabled():
            return
        self._is_checked = True
        model = None if self._model is None else self._model()
        trained = [] if model is None else [name for name, p in model.named_parameters() if p.requires_grad]
        if trained and self._names.issuperset(trained):
            warnings.warn(
                f"{type(model).__name__} is in train mode and its linear layers are quantized: their weights do not "
                f"change in training, only {len(trained)} float parameters do ({', '.join(trained[:3])}"
                f"{', ...' if len(trained) > 3 else ''}). To train on, load the float weights into a new model and "
                "quantize that at the end; or train adapters on the quantized layers, with all else frozen "
                "(requires_grad_(False)). To evaluate, call model.eval()",
                stacklevel=3,
            )

    def __deepcopy__(self, memo: dict[int, Any]) -> FloatRest:
        model = None if self._model is None else self._model()
        copied = FloatRest(None)
        if id(model) in memo:  # the model is being copied, not the layer alone
            copied._model, copied._names = weakref.ref(memo[id(model)]), self._names
            copied._is_checked = self._is_checked
        return copied

    def __reduce__(self) -> tuple[type[FloatRest], tuple[None]]:
        return FloatRest, (None,)
