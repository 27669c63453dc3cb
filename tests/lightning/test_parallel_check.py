"""Whether a module computes the same whole and in parallel; tests/lightning/test_unsharded.py has real modules."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

from gptq_plugin import distributed
from gptq_plugin.errors import TargetError
from gptq_plugin.lightning.parallel_check import ParallelOutputs, may_differ


class Module:
    """Returns one thing in parallel and another one when it is whole."""

    def __init__(self, parallel, whole):
        self.output, self.whole, self.batches = parallel, whole, []

    def __call__(self, batch):
        self.batches.append(batch)
        if isinstance(self.output, Exception):
            raise self.output
        return self.output

    def check(self, batch=1):
        outputs = ParallelOutputs(self, batch)
        self.output = self.whole
        outputs.check()


ONES = torch.ones(16)


@pytest.mark.parametrize("factor", [1.0, 1.09, 0.91])
def test_outputs_may_differ_by_less_than_a_tenth(factor):
    module = Module(ONES, factor * ONES)
    module.check("batch")
    assert module.batches == ["batch", "batch"]


@pytest.mark.parametrize(("factor", "told"), [(1.11, "11%"), (0.8, "20%"), (-1.0, "200%")])
def test_a_larger_difference_is_refused_with_its_size_and_the_remedy(factor, told):
    with pytest.raises(
        TargetError, match=f"outputs differ by {told} from those it gives in parallel: .*number of heads"
    ):
        Module(ONES, factor * ONES).check()


def test_a_module_that_fails_with_whole_weights_is_refused_with_the_reason():
    with pytest.raises(TargetError, match=r"runs in parallel, and not with whole weights \(shape mismatch\): .*heads"):
        Module(ONES, RuntimeError("shape mismatch")).check()


def test_a_module_that_fails_in_parallel_raises_its_own_error():
    with pytest.raises(RuntimeError, match="shape mismatch"):
        Module(RuntimeError("shape mismatch"), ONES).check()


def test_every_floating_tensor_among_the_outputs_is_compared():
    nested = {"logits": ONES, "hidden": [2 * ONES, (3 * ONES.bfloat16(),)], "name": "x", "ids": torch.arange(3)}
    Module(nested, {**nested, "ids": torch.arange(3) + 7}).check()
    for changed in ({"logits": 2 * ONES}, {"hidden": [9 * ONES, (3 * ONES,)]}, {"hidden": [2 * ONES, (9 * ONES,)]}):
        with pytest.raises(TargetError, match="outputs differ"):
            Module(nested, {**nested, **changed}).check()


def test_outputs_of_another_shape_are_not_compared():
    Module(ONES, 9 * torch.ones(17)).check()


def test_without_a_batch_on_rank_0_nothing_runs(monkeypatch):
    module = Module(ONES, 9 * ONES)
    module.check(None)
    monkeypatch.setattr(distributed, "object_from_first", lambda _: None)
    module.check("this rank's")
    assert module.batches == []


def test_all_ranks_run_rank_0s_batch(monkeypatch):
    monkeypatch.setattr(distributed, "object_from_first", lambda _: "rank 0's")
    module = Module(ONES, ONES)
    module.check("this rank's")
    assert module.batches == ["rank 0's"] * 2


def test_outputs_that_are_sharded_are_gathered(group):
    mesh = init_device_mesh("cpu", (1,))
    Module(distribute_tensor(ONES, mesh, [Shard(0)]), ONES).check()
    with pytest.raises(TargetError, match="differ by 100%"):
        Module(distribute_tensor(ONES, mesh, [Shard(0)]), 2 * ONES).check()


class Trainer:
    """With a mesh of so many tensor-parallel ranks; None is a strategy without one."""

    def __init__(self, size):
        mesh = None if size is None else {"tensor_parallel": SimpleNamespace(size=lambda: size)}
        self.strategy = SimpleNamespace(_device_mesh=mesh)


def test_only_modules_in_tensor_parallel_need_the_check(trainer):
    module = nn.Sequential(nn.Linear(2, 2))
    assert [may_differ(Trainer(size), module, module[0]) for size in (None, 1, 2)] == [False, False, True]
    assert not may_differ(trainer(), module, module[0])


def test_a_module_within_an_fsdp2_module_cannot_run_first(group):
    module = nn.Sequential(nn.Sequential(nn.Linear(2, 2)))
    fully_shard(module[0][0], mesh=init_device_mesh("cpu", (1,)))
    assert may_differ(Trainer(2), module, module[0])  # which has one inside
    fully_shard(module[0], mesh=init_device_mesh("cpu", (1,)))
    assert may_differ(Trainer(2), module, module[0]) and not may_differ(Trainer(2), module, module[0][0])
