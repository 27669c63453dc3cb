"""Distributed checkpoints: tensors alone are read from them."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch

from gptq_plugin.apps.fine_tuned import fine_tuned
from gptq_plugin.errors import CheckpointError

from language_models import save_sharded


def test_a_sharded_checkpoint_cut_off_is_refused(tmp_path):
    folder = save_sharded(torch.nn.Linear(3, 2), tmp_path / "run.ckpt")
    (folder / "__0_0.distcp").write_bytes(b"")
    with pytest.raises(CheckpointError, match="cannot be read as a sharded checkpoint"):
        fine_tuned(torch.nn.Linear(3, 2), ckpt=folder)


def test_code_in_a_sharded_checkpoint_is_not_run(tmp_path):
    folder = save_sharded(torch.nn.Linear(3, 2), tmp_path / "run.ckpt")

    class Trap:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    (folder / ".metadata").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(CheckpointError, match="its index names .*which is no part of one"):
        fine_tuned(torch.nn.Linear(3, 2), ckpt=folder)
    assert not (tmp_path / "ran").exists()
