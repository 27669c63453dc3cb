"""Which of a run's weights are quantized, without any quantization: checkpoints are loaded and given back."""

from __future__ import annotations

import os
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from omegaconf import OmegaConf

from gptq_plugin import distributed
from gptq_plugin.errors import CheckpointError
from gptq_plugin.lightning.which_weights import check_weights, float_checkpoint, uncompiled, weights_of

from lightning_runs import Normed as WithBuffers
from lightning_runs import pair_loader


class Normed(WithBuffers):
    """And with a metric that is best after the first of its epochs."""

    def on_train_epoch_end(self):
        self.log("epoch", float(self.current_epoch))


def trained(tmp_path, *checkpoints, module=None, epochs=2):
    trainer = pl.Trainer(max_epochs=epochs, accelerator="cpu", logger=False, enable_progress_bar=False,
                         enable_model_summary=False, enable_checkpointing=bool(checkpoints), callbacks=[*checkpoints],
                         default_root_dir=tmp_path, limit_train_batches=3)  # fmt: skip
    module = Normed() if module is None else module
    trainer.fit(module, pair_loader())
    return trainer, module


def state(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def load(trainer, module, weights):
    with weights_of(trainer, module, weights):
        pass


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("keep", [False, True])
def test_a_checkpoints_parameters_and_buffers_are_there_for_the_block_and_stay_only_when_asked(keep, tmp_path):
    best = ModelCheckpoint(dirpath=tmp_path, monitor="epoch", mode="min")
    trainer, module = trained(tmp_path, ModelCheckpoint(dirpath=tmp_path / "all"), best)
    last, saved = state(module), torch.load(best.best_model_path, weights_only=False)["state_dict"]
    tensors = dict(module.named_parameters())
    assert not torch.equal(last["norm.running_mean"], saved["norm.running_mean"])
    with weights_of(trainer, module, "best") as keep_weights:
        assert same(state(module), saved)
        if keep:
            keep_weights()
    assert same(state(module), saved if keep else last)
    assert all(tensors[name] is parameter for name, parameter in module.named_parameters())


def test_the_last_weights_are_left_as_they_are_and_an_error_gives_the_modules_own_back(tmp_path):
    trainer, module = trained(tmp_path, ModelCheckpoint(dirpath=tmp_path, monitor="epoch", mode="min"))
    last = state(module)
    with weights_of(trainer, module, "last") as keep_weights:
        assert same(state(module), last)
        keep_weights()
    with pytest.raises(RuntimeError, match="in the block"), weights_of(trainer, module, "best"):
        raise RuntimeError("in the block")
    assert same(state(module), last)


def test_a_checkpoint_is_loaded_as_lightning_loads_one(tmp_path, monkeypatch):
    class Renamed(Normed):
        def on_load_checkpoint(self, checkpoint):
            checkpoint["state_dict"] = {n.removeprefix("old."): v for n, v in checkpoint["state_dict"].items()}

    trainer, module = trained(tmp_path)
    wanted = {name: value + 1 for name, value in state(module).items()}
    torch.save({"state_dict": {f"old.{n}": v for n, v in wanted.items()}, "pytorch-lightning_version": "2.6.6"},
               tmp_path / "old.ckpt")  # fmt: skip
    monkeypatch.setenv("HOME", str(tmp_path))
    renamed = Renamed()
    with weights_of(trainer, renamed, "~/old.ckpt"):
        assert same(state(renamed), wanted)
    before = state(module)
    with pytest.raises(CheckpointError, match=r"(?s)old\.ckpt cannot be loaded into Normed: .*old\.norm"):
        load(trainer, module, "~/old.ckpt")
    module.strict_loading = False
    with weights_of(trainer, module, "~/old.ckpt"):
        assert same(state(module), before)


def test_ranks_take_the_checkpoint_that_the_first_found_best(tmp_path, monkeypatch):
    best, latest = ModelCheckpoint(dirpath=tmp_path, monitor="epoch", mode="min"), ModelCheckpoint(tmp_path / "all")
    trainer, module = trained(tmp_path, best, latest)
    monkeypatch.setattr(distributed, "object_from_first", lambda own: latest.best_model_path)
    fresh = Normed()
    with weights_of(trainer, fresh, "best"):
        assert same(state(fresh), state(module))
    monkeypatch.undo()
    with weights_of(trainer, fresh, "best"):
        assert not same(state(fresh), state(module))


def test_what_cannot_be_found_is_reported(tmp_path):
    def trainer(*callbacks):
        return pl.Trainer(accelerator="cpu", logger=False, callbacks=[*callbacks], default_root_dir=tmp_path,
                          enable_checkpointing=bool(callbacks))  # fmt: skip

    for nothing in (trainer(), trainer(ModelCheckpoint(dirpath=tmp_path))):
        with pytest.raises(CheckpointError, match="none of this trainer's monitors a metric"):
            check_weights(nothing, "best")
        check_weights(nothing, "last")
    never = trainer(ModelCheckpoint(dirpath=tmp_path, monitor="never"))
    check_weights(never, "best")
    with pytest.raises(CheckpointError, match="saved no checkpoint, since its metric was never logged"):
        load(never, Normed(), "best")
    with pytest.raises(CheckpointError, match=r"weights='none\.ckpt': the checkpoint does not exist"):
        load(never, Normed(), "none.ckpt")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"save_last": True}, "last_model_path"),
        ({"save_last": True, "monitor": "epoch", "mode": "max"}, "last_model_path"),
        ({}, "best_model_path"),  # without a metric, the latest counts as the best
        ({"monitor": "epoch", "mode": "max"}, "best_model_path"),
        ({"monitor": "epoch", "mode": "min"}, None),  # the best is not what training ended with
        ({"save_last": True, "monitor": "epoch", "mode": "min"}, None),  # nor is the last that was saved
    ],
)
def test_the_float_checkpoint_is_the_one_that_holds_what_was_quantized(options, expected, tmp_path):
    checkpoint = ModelCheckpoint(dirpath=tmp_path / "ckpt", **options)
    trainer, module = trained(tmp_path, checkpoint)
    found = float_checkpoint(trainer, "last", module.state_dict())
    assert found == (getattr(checkpoint, expected) if expected else "")
    if found:
        assert same(torch.load(found, weights_only=False)["state_dict"], state(module))
    if "monitor" in options:
        assert float_checkpoint(trainer, "best", None) == checkpoint.best_model_path != ""
    assert float_checkpoint(trainer, checkpoint.best_model_path, None) == checkpoint.best_model_path


def test_compiled_modules_are_bare_for_the_block_and_compiled_again_even_after_an_error():
    module = Normed()
    bare, norm = module.net[2], module.norm
    module.net[2], module.norm = torch.compile(bare, backend="eager"), torch.compile(norm, backend="eager")
    compiled = module.net[2], module.norm
    with pytest.raises(RuntimeError, match="in the block"), uncompiled(module):
        assert module.net[2] is bare and module.norm is norm
        assert not any("_orig_mod" in name for name, _ in module.named_modules())
        raise RuntimeError("in the block")
    assert (module.net[2], module.norm) == compiled


class Configured(Normed):
    """With the hyperparameters that Hydra users save."""

    def __init__(self, options, folder, kind):
        super().__init__()
        self.save_hyperparameters()


HYDRA = [OmegaConf.create({"width": 64, "path": "${width}"}), Path("data") / "x", torch.nn.GELU]


def test_hyperparameters_of_any_kind_are_no_obstacle_to_a_checkpoints_weights(tmp_path):
    best = ModelCheckpoint(dirpath=tmp_path, monitor="epoch", mode="min")
    trainer, module = trained(tmp_path, best, module=Configured(*HYDRA))
    saved = torch.load(best.best_model_path, weights_only=False)
    assert [type(saved["hyper_parameters"][key]) for key in ("options", "folder", "kind")] == [*map(type, HYDRA)]
    assert not same(state(module), saved["state_dict"])
    for weights in ("best", best.best_model_path):
        with weights_of(trainer, module, weights):
            assert same(state(module), saved["state_dict"])


def test_a_hostile_checkpoint_runs_nothing(tmp_path):
    class Hostile:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    trainer, module = trained(tmp_path)
    torch.save({"state_dict": module.state_dict(), "hyper_parameters": Hostile()}, tmp_path / "x.ckpt")
    load(trainer, module, str(tmp_path / "x.ckpt"))
    assert not (tmp_path / "ran").exists()


def test_a_hook_that_needs_more_than_weights_is_told_what_was_not_read(tmp_path):
    class Curious(Normed):
        def on_load_checkpoint(self, checkpoint):
            self.width = checkpoint["hyper_parameters"].width

    trainer, module = trained(tmp_path, module=Curious())
    torch.save({"state_dict": module.state_dict(), "hyper_parameters": HYDRA[0]}, tmp_path / "x.ckpt")
    with pytest.raises(CheckpointError, match="DictConfig of the checkpoint was not built, so it has no 'width'"):
        load(trainer, module, str(tmp_path / "x.ckpt"))
