"""Fixtures of the Lightning tests."""

from __future__ import annotations

import lightning.pytorch as pl
import pytest
import torch.distributed as dist


@pytest.fixture
def group(tmp_path):
    """A process group of one rank, in which modules can be sharded."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def trainer(tmp_path):
    """trainer(ROOT, **options): a Trainer on the CPU that writes and shows nothing."""

    def make(root=pl, **options):
        values = {"accelerator": "cpu", "devices": 1, "logger": False, "enable_checkpointing": False,
                  "enable_progress_bar": False, "enable_model_summary": False,
                  "default_root_dir": tmp_path}  # fmt: skip
        return root.Trainer(**{**values, **options})

    return make
