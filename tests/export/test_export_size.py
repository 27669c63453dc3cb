"""The size of an export by its files, and what of it is float."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from gptq_plugin import QuantizeModule
from gptq_plugin.export import export
from gptq_plugin.export.export_size import export_size, planned_bytes
from gptq_plugin.model.plan import planned

from models import Plain, tiny_llama


def test_biases_and_other_layers_are_float_over_all_files(tmp_path: Path) -> None:
    save_file(
        {"a.qweight": torch.zeros(8, dtype=torch.int32), "a.bias": torch.zeros(4), "b.qweight": torch.zeros(2)},
        tmp_path / "model-1.safetensors",
    )
    save_file({"a.g_idx": torch.zeros(3, dtype=torch.int32), "norm": torch.zeros(5, dtype=torch.bfloat16)},
              tmp_path / "model-2.safetensors", metadata={"format": "pt"})  # fmt: skip
    size = export_size(tmp_path, {"a"})
    assert size.float_bytes == 16 + 8 + 10
    assert size.bytes == sum(file.stat().st_size for file in tmp_path.iterdir())


def _tied() -> Any:
    return tiny_llama(tie_word_embeddings=True)


def _with_replicated_blocks() -> Any:
    model = tiny_llama(num_hidden_layers=4, use_cache=False)
    first, second = model.model.layers[:2]
    second.input_layernorm.weight = first.input_layernorm.weight
    model.model.layers = nn.ModuleList([first, second, first, second])
    return model


@pytest.mark.parametrize(
    ("network", "lm_head"),
    [(Plain, False), (tiny_llama, False), (_tied, False), (_tied, True), (_with_replicated_blocks, False)],
)
@pytest.mark.parametrize("shard", [10**9, 4_000])
def test_a_real_export_reports_its_files_and_takes_what_was_planned(
    network: Any, lm_head: bool, shard: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "SHARD", shard)
    model, quantizer = network(), QuantizeModule(group_size=16, lm_head=lm_head)
    buffers = {name for name, _ in model.named_buffers()}
    with planned(model, quantizer.config) as plan:
        promised = planned_bytes(plan)
    report = quantizer.round_to_nearest(model)
    folder = quantizer.export(model, tmp_path / "out")
    files = list(folder.glob("*.safetensors"))
    tensors = {name: tensor for file in files for name, tensor in load_file(file).items()}
    packed = [name for name in tensors if name.endswith((".qweight", ".qzeros", ".scales", ".g_idx"))]
    assert report.size is not None and (len(files) > 1) == (shard < 10**9)
    assert report.size.bytes == sum(file.stat().st_size for file in files)
    assert report.size.float_bytes == sum(tensor.nbytes for name, tensor in tensors.items() if name not in packed)
    assert report.stored_bytes == sum(tensors[name].nbytes for name in packed if not name.endswith(".g_idx"))
    layers = [name.removesuffix(".scales") for name in packed if name.endswith(".scales")]
    assert report.weights == sum(len(tensors[f"{x}.g_idx"]) * tensors[f"{x}.scales"].shape[1] for x in layers)
    parameters = [name for name in tensors if name not in buffers and not name.endswith(".g_idx")]
    assert promised == sum(tensors[name].nbytes for name in parameters)
