"""The state of a Trainer and its module around quantization, and that it is restored, also after errors."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path

import peft
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import FSDPStrategy
from torch import nn

from gptq_plugin.lightning import surroundings
from gptq_plugin.lightning.surroundings import (
    drop_optimizers,
    evaluating_eagerly,
    forward_device,
    is_dev_run,
    run_folders,
    trained,
    whole,
    without_adapters,
    without_training_state,
)
from gptq_plugin.model.adapters import base_copy, merged_in_place
from gptq_plugin.training.sharding import FlatParameters

from lightning_runs import Holds, Plain, fit, llama, pair_loader

GPU = torch.device("cuda", 3)


PLACE = {"device": GPU, "node": 3, "local_rank": 0}


@pytest.fixture
def sharded(trainer, monkeypatch):
    """A trainer whose strategy shards, on a device of its own; `sharded.calls` has those of `unsharded`."""

    class OnGPU(FSDPStrategy):
        root_device, node_rank, local_rank = GPU, 3, 0

    @contextmanager
    def unsharded(module, sharding, beside, **place):
        made.calls.append((module, type(sharding), beside, place))
        yield "files"
        made.calls.append("end")

    made = trainer()
    made.strategy.__class__, made.calls = OnGPU, []
    made.strategy._model = nn.Linear(1, 1)
    monkeypatch.setattr(surroundings, "unsharded", unsharded)
    return made


def test_the_module_is_evaluated_without_compiled_code_and_then_as_before():
    runs = []

    def backend(graph, inputs):
        def run(*args):
            runs.append(1)
            return graph(*args)

        return run

    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5).eval())
    compiled = torch.compile(model, backend=backend)
    compiled(torch.ones(1, 4))
    assert len(runs) == 1
    with pytest.raises(KeyError), evaluating_eagerly(model):
        assert not any(module.training for module in model.modules())
        compiled(torch.ones(1, 4))
        raise KeyError
    assert len(runs) == 1 and model.training and [module.training for module in model] == [True, False]
    compiled(torch.ones(1, 4))
    assert len(runs) == 2


def test_only_a_sharded_module_is_put_together(trainer, sharded, tmp_path):
    module = Holds()
    with whole(trainer(), module, None) as files:
        assert files is None
    with whole(sharded, module, tmp_path) as files:
        assert files == "files" and sharded.calls == [(module, FlatParameters, tmp_path, PLACE)]
    assert sharded.calls[1:] == ["end"]


def test_forwards_run_where_the_module_is_unless_its_weights_lie_in_files(trainer, sharded):
    assert forward_device(trainer()) is None and forward_device(sharded) == GPU


class Adapted(Holds):
    def __init__(self):
        super().__init__()
        config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
        self.model = peft.get_peft_model(llama(), config)


@pytest.mark.parametrize("copy", [base_copy, merged_in_place])
def test_a_copy_without_adapters_stands_in_for_the_module_also_when_the_block_fails(copy, trainer):
    module = Adapted()
    adapted = module.model
    with pytest.raises(KeyError), without_adapters(trainer(), module, adapted, copy) as plain:
        assert module.model is plain is not adapted
        assert not any("lora" in name for name, _ in plain.named_modules())
        raise KeyError
    assert module.model is adapted


def test_a_module_without_adapters_is_yielded_itself(trainer):
    module = Holds()

    def copy(_):
        raise AssertionError("copied")

    with without_adapters(trainer(), module, module.model, copy) as plain:
        assert plain is module.model


def test_the_other_weights_are_streamed_to_where_forwards_run(sharded, monkeypatch):
    calls = []

    @contextmanager
    def streamed_to(*arguments, **options):
        calls.append((arguments, options))
        yield

    monkeypatch.setattr(surroundings, "streamed_to", streamed_to)
    module = Adapted()
    with without_adapters(sharded, module, module.model, base_copy) as plain:
        assert calls == [((module, GPU), {"besides": plain})]


def test_gradients_are_freed_and_optimizers_only_where_the_module_stays_quantized(tmp_path):
    module = Plain()
    fitted = fit(module, pair_loader(), [], tmp_path)
    module(torch.ones(1, 64)).sum().backward()
    assert fitted.optimizers and all(parameter.grad is not None for parameter in module.parameters())
    before = fitted.optimizers
    with without_training_state(fitted, module):
        assert all(parameter.grad is None for parameter in module.parameters())
    assert fitted.optimizers is before and len(before[0].state) == 4
    drop_optimizers(fitted)
    assert fitted.optimizers == fitted.lr_scheduler_configs == []


def test_a_dev_run_is_known(trainer):
    assert not is_dev_run(trainer()) and is_dev_run(trainer(fast_dev_run=True)) and is_dev_run(trainer(fast_dev_run=3))


def test_every_folder_the_run_writes_to_is_named(trainer, tmp_path):
    callbacks = [ModelCheckpoint(dirpath=tmp_path / "a"), ModelCheckpoint(dirpath=tmp_path / "b", monitor="x")]
    logger = CSVLogger(tmp_path / "logs", name="", version="")
    writing = trainer(callbacks=callbacks, enable_checkpointing=True, logger=logger)
    assert [(name, Path(path)) for name, path in run_folders(writing)] == [
        ("default_root_dir", tmp_path),
        ("the logger's folder", tmp_path / "logs"),
        ("ModelCheckpoint's folder", tmp_path / "a"),
        ("ModelCheckpoint's folder", tmp_path / "b"),
    ]


# --- after training ---


@pytest.mark.parametrize("keep", [True, False])
def test_the_chosen_weights_are_there_for_the_block_and_stay_only_when_asked(keep, trainer, tmp_path):
    chosen, module, saving = Plain(), Plain(), trainer()
    with torch.no_grad():
        chosen.net[0].weight += 1
    saving.strategy.connect(chosen)
    saving.save_checkpoint(tmp_path / "x.ckpt", weights_only=True)
    before = module.net[0].weight.clone()
    with trained(trainer(), module, str(tmp_path / "x.ckpt"), None) as state:
        assert state.files is None and torch.equal(module.net[0].weight, chosen.net[0].weight)
        assert not module.training
        if keep:
            state.keep_weights()
    assert module.training and torch.equal(module.net[0].weight, chosen.net[0].weight if keep else before)


def test_compiled_parts_have_their_own_names_for_the_block(trainer):
    module = Plain()
    module.net = torch.compile(module.net, backend="eager")
    with trained(trainer(), module, "last", None):
        assert "net.0.weight" in dict(module.named_parameters())
    assert "net._orig_mod.0.weight" in dict(module.named_parameters())


class Moving(Plain):
    def __init__(self):
        super().__init__()
        self.moves = []

    def to(self, device):
        self.moves.append(device)
        return self


def test_the_module_is_on_the_training_device_for_the_block_also_when_that_fails(trainer, monkeypatch):
    module, training = Moving(), trainer()
    monkeypatch.setattr(type(training.strategy), "root_device", GPU)
    with pytest.raises(KeyError), trained(training, module, "last", None):
        assert module.moves == [GPU]
        raise KeyError
    assert module.moves == [GPU, torch.device("cpu")]


def test_a_sharded_module_stays_where_its_whole_weights_are(sharded, tmp_path):
    module = Moving()
    with trained(sharded, module, "last", tmp_path) as state:
        assert state.files == "files"
    assert module.moves == []
