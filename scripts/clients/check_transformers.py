"""check_transformers.py FOLDER...: transformers' own loading, GPTQ through optimum and GPTQModel's kernel in torch.

Computes in float32. Loading must report no missing, unexpected or mismatched keys.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", TORCHDYNAMO_DISABLE="1", GPTQMODEL_CPU_WORKERS="2")

import torch
import transformers
from checks import run


def check(folder: Path, tokens: list[int]) -> torch.Tensor:
    """Log-probabilities of the model that `from_pretrained` returns."""
    description = json.loads((folder / "config.json").read_text())["quantization_config"]
    gptq = description["quant_method"] == "gptq"
    if gptq:  # only the backend is read; the rest comes from the checkpoint
        options = {"dtype": torch.float32, "quantization_config": transformers.GPTQConfig(bits=4, backend="torch")}
    else:  # with another dtype, compressed-tensors leaves renamed tensors (Mixtral's routers) in the file's
        options = {"dtype": "auto"}
    model, found = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **options)
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if found.get(kind):
            raise ValueError(f"{kind}: {sorted(map(str, found[kind]))[:4]}")
    with torch.no_grad():
        if not gptq:
            torch.nn.Module.float(model)  # `model.float()` refuses quantized models
        return model.eval()(input_ids=torch.tensor([tokens])).logits[0].float().log_softmax(-1)


if __name__ == "__main__":
    run(check, 0.03, ("transformers", "optimum", "gptqmodel", "compressed-tensors", "torch"))
