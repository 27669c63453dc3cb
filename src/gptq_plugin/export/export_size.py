"""The size of an export: by its files, of a quantized model, and of a planned one."""

from __future__ import annotations

import json
from collections.abc import Set
from pathlib import Path

import torch
from torch import nn

from gptq_plugin.checkpoint.sizes import target_bytes
from gptq_plugin.device.modules import modules_of
from gptq_plugin.model.hf_models import is_transformers, tied_weights
from gptq_plugin.model.plan import Plan
from gptq_plugin.report.coverage import Coverage
from gptq_plugin.report.report import ExportSize


def export_size(folder: Path, quantized: Set[str]) -> ExportSize:
    """Bytes of the safetensors files in a folder, and of their float tensors.

    Args:
        folder: The export.
        quantized: Names of the quantized layers in the files. Their biases are float.
    """
    files = sorted(folder.glob("*.safetensors"))
    floats = 0
    for file in files:
        for name, size in _tensor_bytes(file).items():
            layer, _, suffix = name.rpartition(".")
            floats += size if layer not in quantized or suffix == "bias" else 0
    return ExportSize(sum(file.stat().st_size for file in files), floats)


def tensor_bytes(model: nn.Module) -> int:
    """Bytes of a quantized model's tensors: about those of its export. Tied ones count once."""
    tensors = {id(tensor): tensor for tensor in model.state_dict(keep_vars=True).values() if torch.is_tensor(tensor)}
    return sum(tensor.nbytes for tensor in tensors.values())


def planned_bytes(plan: Plan) -> int:
    """Bytes of the parameters in the export of a planned quantization, g_idx left out."""
    packed = sum(map(target_bytes, plan.targets))
    return Coverage.of(plan, packed).exported_bytes + _stored_again(plan)


def _stored_again(plan: Plan) -> int:
    """Bytes of the float parameters of a transformers model in further places, such as replicated blocks: each is
    stored for itself (`model_files`), unless its class ties it."""
    if not is_transformers(plan.model):
        return 0
    tied, quantized = tied_weights(plan.model), {target.module for target in plan.targets}
    found: set[int] = set()
    again = 0
    for name, module in modules_of(plan.model, once=False).items():
        for key, parameter in module._parameters.items():
            if parameter is None or f"{name}.{key}" in tied or (key == "weight" and module in quantized):
                continue
            again += parameter.nbytes if id(parameter) in found else 0
            found.add(id(parameter))
    return again


def _tensor_bytes(file: Path) -> dict[str, int]:
    """The bytes of every tensor in a file, from its header (https://huggingface.co/docs/safetensors)."""
    with file.open("rb") as opened:
        header = json.loads(opened.read(int.from_bytes(opened.read(8), "little")))
    offsets = {name: entry["data_offsets"] for name, entry in header.items() if name != "__metadata__"}
    return {name: stop - start for name, (start, stop) in offsets.items()}
