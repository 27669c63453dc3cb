"""The bytes of a tensor: `raw_bytes`."""

from __future__ import annotations

import torch
from torch import Tensor


def raw_bytes(tensor: Tensor) -> Tensor:
    """A tensor's bytes, in the order of its elements, without gradients.

    PyTorch takes a tensor for contiguous whatever the strides of its dimensions of size 1, and then refuses to view it
    in another dtype: a cut from a wider tensor that leaves one column, such as zero-points of eight outputs in 4 bits.

    Args:
        tensor: Any dtype, shape and strides, on any device.

    Returns:
        uint8 [bytes] on the tensor's device, its own memory if the tensor is contiguous.
    """
    whole = tensor.detach().contiguous()
    return whole.as_strided((whole.numel(),), (1,)).view(torch.uint8)
