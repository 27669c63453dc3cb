"""How strategies shard, and gathering one tensor at a time, here on one rank.

tests/lightning/test_unsharded.py does it on two, DeepSpeed's too where it is installed.
"""

from __future__ import annotations

import lightning.pytorch as newer
import pytest
import pytorch_lightning as older
import torch
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor

from gptq_plugin.lightning.sharding import is_sharded, sharding_of
from gptq_plugin.memory.slots import Slot
from gptq_plugin.training.sharding import Sharding

CPU = torch.device("cpu")


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Linear(7, 3))


def slots(root):
    return [
        Slot(f"{name}.{key}", module, key)
        for name, module in root.named_modules()
        for key in [*module._parameters, *module._buffers]
        if isinstance(module, (nn.Linear, nn.BatchNorm1d))
    ]


@pytest.mark.parametrize("root", [older, newer], ids=["older", "newer"])
@pytest.mark.parametrize("name", ["ModelParallelStrategy", "FSDPStrategy", "DDPStrategy", "SingleDeviceStrategy"])
def test_strategies_that_shard_are_known_under_either_root(root, name, trainer):
    asked = trainer(root)
    asked.strategy.__class__ = getattr(root.strategies, name)
    assert is_sharded(asked) == (name in ("ModelParallelStrategy", "FSDPStrategy"))


def test_each_strategy_has_its_kind_of_sharding(trainer):
    kinds = []
    for strategy in (ModelParallelStrategy, FSDPStrategy, DeepSpeedStrategy):
        asked = trainer()
        asked.strategy.__class__ = strategy  # DeepSpeed is not installed
        asked.strategy._model = asked.strategy._lightning_module = net()
        assert is_sharded(asked)
        kinds.append(type(sharding_of(asked)))
        assert isinstance(sharding_of(asked).root, nn.Module)
    assert len(set(kinds)) == 3 and kinds[0] is Sharding and all(issubclass(kind, Sharding) for kind in kinds)


def test_a_slot_holds_a_parameter_or_a_buffer():
    norm = nn.BatchNorm1d(7)
    assert Slot("weight", norm, "weight").tensor is norm.weight
    assert Slot("running_mean", norm, "running_mean").tensor is norm.running_mean


def gathered(sharding, wanted):
    return {name: tensor.clone() for name, tensor in sharding.gather(wanted)}


def test_dtensors_are_gathered_whole_and_other_tensors_are_whole(group):
    model, twin = net(), net()
    for layer in (model[0], model[2], model):
        fully_shard(layer, mesh=init_device_mesh("cpu", (1,)))
    assert isinstance(model[0].weight, DTensor)
    wanted = slots(model)
    found = gathered(Sharding(model), wanted)
    assert list(found) == [slot.name for slot in wanted] == [slot.name for slot in slots(twin)]
    for slot in slots(twin):
        assert torch.equal(found[slot.name], slot.tensor) and not isinstance(found[slot.name], DTensor)


def test_modules_that_a_forward_left_whole_hold_their_shards_again(group):
    model = net()
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    model(torch.ones(2, 5))  # the outermost module's parameters stay whole after a forward
    model.unshard()
    assert not isinstance(model[0].weight, DTensor)
    with Sharding(model).resharded(model, CPU):
        assert isinstance(model[0].weight, DTensor)


def test_flat_parameters_are_gathered_under_their_own_names_and_shapes(group, trainer):
    twin = net()
    wrapped = nn.Sequential(FullyShardedDataParallel(net(), device_id=CPU, use_orig_params=True))
    asked = trainer()
    asked.strategy.__class__ = FSDPStrategy
    asked.strategy._model = wrapped
    sharding, wanted = sharding_of(asked), slots(wrapped)
    with sharding.resharded(wrapped, CPU):
        found = gathered(sharding, wanted)
    assert len(found) == len(wanted) == len(slots(twin))
    for slot, expected in zip(wanted, slots(twin)):
        assert torch.equal(found[slot.name], expected.tensor)


def test_a_module_of_partitions_goes_to_the_device_and_back_also_after_an_error(trainer):
    class Moving(newer.LightningModule):
        def __init__(self):
            super().__init__()
            self.moves = []

        @property
        def device(self):
            return CPU

        def to(self, device):
            self.moves.append(device)

    asked, module = trainer(), Moving()
    asked.strategy.__class__ = DeepSpeedStrategy
    asked.strategy._model = module
    with pytest.raises(KeyError), sharding_of(asked).resharded(module, torch.device("cuda", 0)):
        raise KeyError
    assert module.moves == [torch.device("cuda", 0), CPU]
