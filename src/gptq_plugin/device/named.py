"""The device that users name: `device_named`."""

from __future__ import annotations

from typing import Any

import torch

from gptq_plugin.device.memory import with_index
from gptq_plugin.options import fields


def device_named(device: Any) -> torch.device:
    """The device of that name, a GPU with its index.

    Args:
        device: As `torch.device` takes it.

    Raises:
        ValueError: It is no name of a device, or this process has no such device.
    """
    try:
        named = torch.device("cuda", device) if type(device) is int else torch.device(device)
    except (RuntimeError, TypeError, ValueError, OverflowError) as error:
        raise ValueError(
            f"device={fields.shown(device)} is no device: give 'cpu', 'cuda' or 'cuda:1' ({_brief(error)})"
        ) from error
    if named.type == "cuda":
        _refuse_without_gpu(device, named.index)
    return with_index(named)


def _refuse_without_gpu(device: Any, index: int | None) -> None:
    if not torch.cuda.is_available():
        built = torch.version.cuda or getattr(torch.version, "hip", None)
        why = "it sees no GPU (nvidia-smi, CUDA_VISIBLE_DEVICES)" if built else "it is built without CUDA"
        raise ValueError(
            f"device={str(device)!r}, and PyTorch {torch.__version__} has no GPU here: {why}. Leave device out, or "
            "give 'cpu'"
        )
    count = torch.cuda.device_count()
    if index is not None and index >= count:
        raise ValueError(
            f"device={str(device)!r}, and there are {count} GPUs here: give 'cuda:0' to 'cuda:{count - 1}'"
        )


def _brief(error: Exception) -> str:
    return str(error).splitlines()[0][:200]
