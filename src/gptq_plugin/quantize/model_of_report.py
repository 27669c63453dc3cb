"""The model that a report is of: `ModelOfReport`."""

from __future__ import annotations

import weakref
from typing import Any

from torch import nn


class ModelOfReport:
    """Knows a model without keeping it.

    A copy made together with the model, in one `copy.deepcopy`, knows the model's copy; any other one knows the same
    model. One that was pickled knows none.

    Args:
        model: None is none.
    """

    def __init__(self, model: nn.Module | None = None) -> None:
        self._model = None if model is None else weakref.ref(model)

    def is_of(self, model: nn.Module) -> bool:
        return self._model is not None and self._model() is model

    def __deepcopy__(self, memo: dict[int, Any]) -> ModelOfReport:
        model = None if self._model is None else self._model()
        return ModelOfReport(memo.get(id(model), model))

    def __reduce__(self) -> tuple[type[ModelOfReport], tuple[()]]:
        return ModelOfReport, ()
