"""Reading the weights of a Lightning checkpoint into the network they belong to."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from gptq_plugin.apps.fine_tuned import fine_tuned
from gptq_plugin.apps.language_model import pretrained
from gptq_plugin.apps.lightning_weights import load_lightning_weights, open_lightning_weights
from gptq_plugin.errors import CheckpointError

from language_models import same_weights, save_checkpoint, save_fsdp, save_sharded, tiny


@pytest.mark.parametrize("save", [save_checkpoint, save_sharded, save_fsdp])
def test_a_lightning_checkpoint_brings_its_weights(base, tmp_path, save):
    trained = tiny(2)
    ckpt = save(trained, tmp_path / "run.ckpt")
    for weights in (True, False):
        loaded = pretrained([], name_or_path=str(base[0]), weights=weights).network
        assert not torch.equal(loaded.lm_head.weight, trained.network.lm_head.weight)
        same_weights(fine_tuned(loaded, ckpt=ckpt), trained.network)


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    network = torch.nn.Linear(3, 2)
    torch.save({"state_dict": {"net.weight": torch.zeros(2, 4), "net.bias": torch.zeros(2)}}, tmp_path / "other.ckpt")
    torch.save({"weights": 1}, tmp_path / "none.ckpt")
    (tmp_path / "broken.ckpt").write_bytes(b"not a checkpoint")
    (tmp_path / "folder").mkdir()
    save_sharded(torch.nn.Linear(4, 2), tmp_path / "sharded")
    with pytest.raises(CheckpointError, match="does not hold the weights of Linear"):
        fine_tuned(network, ckpt=tmp_path / "other.ckpt")
    with pytest.raises(CheckpointError, match="has no state_dict"):
        fine_tuned(network, ckpt=tmp_path / "none.ckpt")
    with pytest.raises(CheckpointError, match="cannot be read as a checkpoint"):
        fine_tuned(network, ckpt=tmp_path / "broken.ckpt")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        fine_tuned(network, ckpt=tmp_path / "nowhere.ckpt")
    with pytest.raises(CheckpointError, match=r"folder without \.metadata"):
        fine_tuned(network, ckpt=tmp_path / "folder")
    with pytest.raises(CheckpointError, match=r"Give one of the checkpoints in it: broken\.ckpt, "):
        fine_tuned(network, ckpt=tmp_path)
    with pytest.raises(CheckpointError, match="does not hold the weights of Linear"):
        fine_tuned(network, ckpt=tmp_path / "sharded")


def test_an_open_checkpoint_tells_its_shapes_and_the_names_adapters_gave(tmp_path):
    state = {"net.weight": torch.ones(2, 3), "net.q.base_layer.weight": torch.ones(1), "hyper": "no tensor"}
    torch.save({"state_dict": state}, tmp_path / "run.ckpt")
    weights = open_lightning_weights(tmp_path / "run.ckpt")
    assert weights.shapes == {"net.weight": (2, 3), "net.q.base_layer.weight": (1,)}
    assert weights.adapted == ["net.q.base_layer.weight"] and weights.path == tmp_path / "run.ckpt"


def test_the_network_is_found_wherever_the_lightning_module_held_it(tmp_path):
    network, other = torch.nn.Linear(3, 2), torch.nn.Linear(3, 4)
    for prefix in ("", "model.", "a.b."):
        state = {f"{prefix}{key}": value + 1 for key, value in network.state_dict().items()}
        if prefix:  # beside another whose names end the same and whose shapes do not fit
            state = {f"teacher.{key}": value for key, value in other.state_dict().items()} | state
        torch.save({"state_dict": state}, tmp_path / "run.ckpt")
        fresh = torch.nn.Linear(3, 2)
        load_lightning_weights(fresh, open_lightning_weights(tmp_path / "run.ckpt"))
        assert torch.equal(fresh.weight, network.weight + 1) and torch.equal(fresh.bias, network.bias + 1)


def test_weights_that_the_network_has_no_place_for_are_not_dropped(tmp_path):
    state = {"net.weight": torch.zeros(2, 3), "net.bias": torch.zeros(2), "net.norm.weight": torch.ones(2)}
    torch.save({"state_dict": state}, tmp_path / "run.ckpt")
    with pytest.raises(CheckpointError, match=r"holds more than the weights of Linear: net\.norm\.weight"):
        load_lightning_weights(torch.nn.Linear(3, 2), open_lightning_weights(tmp_path / "run.ckpt"))


def test_hyperparameters_of_any_kind_are_no_obstacle(tmp_path):
    network = torch.nn.Linear(3, 2)
    state = {f"net.{key}": value + 1 for key, value in network.state_dict().items()}
    kinds = {"config": OmegaConf.create({"a": 1}), "path": Path("x"), "activation": torch.nn.GELU}
    torch.save({"hyper_parameters": kinds, "state_dict": state}, tmp_path / "run.ckpt")
    fresh = torch.nn.Linear(3, 2)
    load_lightning_weights(fresh, open_lightning_weights(tmp_path / "run.ckpt"))
    assert torch.equal(fresh.weight, network.weight + 1) and torch.equal(fresh.bias, network.bias + 1)


@pytest.mark.parametrize(
    "weight",
    [
        torch.ones(2, 3, dtype=torch.int8),
        torch.ones(2, 3, dtype=torch.bool),
        torch.ones(2, 3).to_sparse(),
        torch.ones(2, 3, device="meta"),
        torch.ones(2, 3).to(torch.float8_e4m3fn),
        torch.ones(2, 3, dtype=torch.complex64),
    ],
    ids=["int8", "bool", "sparse", "meta", "float8", "complex"],
)
def test_tensors_that_are_no_values_of_a_weight_are_refused_by_name(weight, tmp_path):
    network = torch.nn.Linear(3, 2)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    torch.save({"state_dict": {"net.weight": weight, "net.bias": torch.ones(2)}}, tmp_path / "run.ckpt")
    with pytest.raises(CheckpointError, match=r"run\.ckpt holds net\.weight .*only dense tensors are read"):
        fine_tuned(network, ckpt=tmp_path / "run.ckpt")
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
