"""The size of an export by its files, and what of it is float."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from gptq_plugin import QuantizeModule
from gptq_plugin.export import export
from gptq_plugin.export.export_size import export_size

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


@pytest.mark.parametrize("network", [Plain, tiny_llama, lambda: tiny_llama(tie_word_embeddings=True)])
@pytest.mark.parametrize("shard", [10**9, 4_000])
def test_a_real_export_reports_its_files(
    network: Any, shard: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "SHARD", shard)
    model, quantizer = network(), QuantizeModule(group_size=16)
    report = quantizer.round_to_nearest(model)
    folder = quantizer.export(model, tmp_path / "out")
    files = list(folder.glob("*.safetensors"))
    tensors = {name: tensor for file in files for name, tensor in load_file(file).items()}
    packed = [name for name in tensors if name.endswith((".qweight", ".qzeros", ".scales", ".g_idx"))]
    assert report.size is not None and (len(files) > 1) == (shard < 10**9)
    assert report.size.bytes == sum(file.stat().st_size for file in files)
    assert report.size.float_bytes == sum(tensor.nbytes for name, tensor in tensors.items() if name not in packed)
