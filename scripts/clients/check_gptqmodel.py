"""check_gptqmodel.py FOLDER...: GPTQModel's own loading, in float16, with the kernel it chooses.

It starts threads at import, which a forked process would lack and wait for.
"""

from __future__ import annotations

import os
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", TORCHDYNAMO_DISABLE="1", GPTQMODEL_CPU_WORKERS="2")

import torch
from checks import run
from gptqmodel import BACKEND, GPTQModel
from gptqmodel.nn_modules.qlinear import BaseQuantLinear


def check(folder: Path, tokens: list[int]) -> torch.Tensor:
    """Log-probabilities of the model that `GPTQModel.load` returns."""
    model = GPTQModel.load(str(folder), device="cpu", backend=BACKEND.AUTO, dtype=torch.float16)
    if not any(isinstance(module, BaseQuantLinear) for module in model.model.modules()):
        raise ValueError("nothing was loaded as a quantized layer")
    with torch.no_grad():
        return model.model(input_ids=torch.tensor([tokens])).logits[0].float().log_softmax(-1)


if __name__ == "__main__":
    run(check, 0.25, ("gptqmodel", "transformers", "torch"))
