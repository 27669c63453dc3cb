"""Explains why a batch does not run: `failures_explained`."""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Iterator
from types import FrameType
from typing import Any

import torch
from torch import nn

from gptq_plugin.calibration.forward import REMEDY, describe
from gptq_plugin.calibration.takes import receiver
from gptq_plugin.device.memory import is_shortage
from gptq_plugin.errors import CalibrationError, brief

# Not of the batch: memory, the device, other ranks, files.
_OTHERS = (MemoryError, OSError, torch.AcceleratorError, torch.distributed.DistError)
_MODES = ("__torch_function__", "__torch_dispatch__")


@contextlib.contextmanager
def failures_explained(model: nn.Module, batch: Any, *, by_user: bool) -> Iterator[None]:
    """Raises a CalibrationError, which names the batch and the error, for an error of the forward in the block.

    Errors of this package, also those in its hooks, and errors that no batch causes (memory, the device, other ranks,
    files) are left as they are.

    Args:
        model: The module that runs.
        batch: What it is given.
        by_user: A function of the user's runs the batch, such as a `calibration_step`.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, _OTHERS) or is_shortage(error) or _is_of_this_package(error):
            raise
        runner = "forward(model, batch)" if by_user else f"{type(receiver(model)).__name__}.forward"
        raise CalibrationError(
            f"{runner} raised {type(error).__name__} for a calibration batch ({describe(batch)}): {brief(error)}. "
            + ("Mend it, or give batches that it takes" if by_user else REMEDY)
        ) from error


def _is_of_this_package(error: Exception) -> bool:
    """True for errors of this package's classes, and for those that its code inside the forward raised: in hooks."""
    if _is_in("gptq_plugin", type(error).__module__):
        return True
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    around = 0  # this package's frames that call the forward
    while around < len(frames) and _is_in("gptq_plugin", _module_of(frames[around])):
        around += 1
    inside = [frame for frame in _until_mode(frames[around:]) if not _is_in("torch", _module_of(frame))]
    return bool(inside) and _is_in("gptq_plugin", _module_of(inside[-1]))


def _until_mode(frames: list[FrameType]) -> list[FrameType]:
    """The frames before this package hands on the call of a function that its modes watch: the caller's function."""
    modes = (n for n, frame in enumerate(frames) if frame.f_code.co_name in _MODES)
    return frames[: next(modes, len(frames))]


def _module_of(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", ""))


def _is_in(package: str, module: str) -> bool:
    return module == package or module.startswith(f"{package}.")
