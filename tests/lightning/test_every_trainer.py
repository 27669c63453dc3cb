"""Callbacks for trainers that somebody else builds: only where they are asked for."""

from __future__ import annotations

import lightning.pytorch as newer
import pytest
import pytorch_lightning as older

from gptq_plugin import GPTQCallback, QuantizeModule
from gptq_plugin.lightning.every_trainer import in_every_trainer


def callbacks_of(root, **options):
    trainer = root.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, **options)
    return [callback for callback in trainer.callbacks if isinstance(callback, GPTQCallback)]


def make():
    return GPTQCallback(QuantizeModule())


@pytest.mark.parametrize("root", [newer, older])
def test_a_trainer_built_in_the_block_has_a_callback_of_its_own_and_others_have_none(root):
    assert callbacks_of(root) == []
    with in_every_trainer(make):
        (one,), (other,) = callbacks_of(root), callbacks_of(root)
        assert one is not other
        assert len(callbacks_of(root, callbacks=[make()])) == 2  # beside those it was given
    assert callbacks_of(root) == []


def test_it_ends_with_the_block_also_after_an_error():
    with pytest.raises(KeyError), in_every_trainer(make):
        raise KeyError
    assert callbacks_of(newer) == []
