"""corrupt.py FOLDER OUT KIND: copies a checkpoint with one error in one layer, which no check may pass."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

KINDS = ("zeros", "scales", "rows", "missing")
LAYER = "model.layers.1.mlp.up_proj"


def corrupt(folder: Path, out: Path, kind: str, layer: str = LAYER) -> str:
    """Writes the copy and returns the name of the wrong tensor.

    Args:
        folder: A 4-bit checkpoint in one file.
        out: The copy's folder, which must not exist.
        kind: "zeros" (all one more), "scales" (5 % larger), "rows" (inputs exchanged) or "missing" (no codes).
        layer: The layer to corrupt.
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}; got {kind!r}")
    tensors = load_file(folder / "model.safetensors")
    compressed = f"{layer}.weight_packed" in tensors
    codes, scales, zeros = (
        ("weight_packed", "weight_scale", "weight_zero_point") if compressed else ("qweight", "scales", "qzeros")
    )
    name = f"{layer}.{ {'zeros': zeros, 'scales': scales}.get(kind, codes) }"
    tensor = tensors.pop(name)
    if kind == "zeros":  # adds one to each of a word's eight codes; the sum wraps as words do
        tensors[name] = (tensor.long() + 0x11111111).to(torch.int32)
    elif kind == "scales":
        tensors[name] = (tensor.float() * 1.05).to(tensor.dtype)
    elif kind == "rows":
        tensors[name] = tensor.roll(1, 1 if compressed else 0).contiguous()
    shutil.copytree(folder, out)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return name


if __name__ == "__main__":
    print(corrupt(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]))
