"""Layers in files that all ranks of a node map."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gptq_plugin import QuantizeConfig
from gptq_plugin.errors import ExportError
from gptq_plugin.memory.shared_layers import SharedLayers
from gptq_plugin.model.structure import Structure
from gptq_plugin.model.targets import find_targets

from module_tensors import rounded


@pytest.fixture
def layers():
    torch.manual_seed(0)
    model = nn.ModuleDict({"a": nn.Linear(32, 64), "b": nn.Linear(64, 32, bias=False)})
    return {
        target.name: rounded(target) for target in find_targets(Structure.of(model), QuantizeConfig(group_size=32))[0]
    }


def test_every_rank_maps_what_one_of_them_writes(layers, tmp_path):
    writer, reader = (SharedLayers(tmp_path / "layers", writes=writes) for writes in (True, False))
    for name, layer in layers.items():
        reader.add(name, layer)
        assert reader.written(name) is None  # added here, but not written there yet
        writer.add(name, layer)
        for rank in (writer, reader):
            buffers = rank.written(name)
            assert buffers.keys() == dict(layer.named_buffers()).keys()
            assert all(torch.equal(buffers[key], value) for key, value in layer.named_buffers())
    assert sorted(file.name for file in (tmp_path / "layers").iterdir()) == ["0.safetensors", "1.safetensors"]


def test_mapped_buffers_outlive_their_file(layers, tmp_path):
    shared = SharedLayers(tmp_path / "layers", writes=True)
    shared.add("a", layers["a"])
    buffers = shared.written("a")
    for file in (tmp_path / "layers").iterdir():
        file.unlink()
    assert shared.written("a") is None
    assert all(torch.equal(buffers[key], value) for key, value in layers["a"].named_buffers())


def test_a_folder_that_exists_is_not_written_to(tmp_path):
    with pytest.raises(FileExistsError):
        SharedLayers(tmp_path, writes=True)
    SharedLayers(tmp_path / "elsewhere", writes=False)
    assert not (tmp_path / "elsewhere").exists()


def test_a_layer_that_cannot_be_written_is_an_error_with_its_name_and_no_file(layers, tmp_path):
    shared = SharedLayers(tmp_path / "layers", writes=True)
    shared.add("a", layers["a"])
    (tmp_path / "layers" / "1.partial").mkdir()  # in the way of the next file
    with pytest.raises(ExportError, match=r"^b could not be written to .*1\.partial: .*choose another export_dir"):
        shared.add("b", layers["b"])
    assert shared.written("b") is None and shared.written("a") is not None
