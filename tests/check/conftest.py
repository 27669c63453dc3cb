"""Checkpoints that are quantized once for all tests of this folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from gptq_plugin import QuantizeModule
from gptq_plugin.export.export import export_model

from damage import COMPRESSED, OTHERS, WIDTHS, quantizable_llama, renamed


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("lint")


@pytest.fixture(scope="session")
def float_dir(folder: Path) -> Path:
    quantizable_llama().save_pretrained(folder / "float", max_shard_size="150KB")
    return folder / "float"


@pytest.fixture(scope="session")
def exported(folder: Path) -> Callable[[str], Path]:
    """exported(case): a checkpoint, quantized by GPTQ once."""

    def export(case: str) -> Path:
        out = folder / case.replace(" ", "-")
        if not out.exists():
            options = {"group_size": 32, **(WIDTHS | OTHERS)[case]}
            options.setdefault("checkpoint_format", "gptq" if options.get("sym", True) else "gptq_v2")
            torch.manual_seed(3)
            rows = torch.randint(0, 96, (6, 48)).tolist()
            quantizer, model = QuantizeModule(nsamples=6, **options), quantizable_llama()
            quantizer.quantize(model, rows)
            export_model(model, out, quantizer.config)
        return out

    return export


@pytest.fixture
def damaged(exported: Callable[[str], Path], tmp_path: Path) -> Callable[..., Path]:
    """damaged(case, change): a copy whose tensors went through change(tensors, bits)."""

    def copy(case: str, change: Callable[[dict[str, torch.Tensor], int], Any]) -> Path:
        out = tmp_path / "damaged"
        shutil.copytree(exported(case), out)
        tensors = renamed(load_file(out / "model.safetensors"), COMPRESSED)
        change(tensors, json.loads((out / "quantize_config.json").read_text())["bits"])
        back = {new: old for old, new in COMPRESSED.items()} if "compressed" in case else {}
        save_file(renamed(tensors, back), out / "model.safetensors")
        return out

    return copy
