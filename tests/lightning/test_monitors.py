"""A limit for the direction that the run itself calls better is refused: it would never be reached."""

from __future__ import annotations

import lightning.pytorch as pl
import pytest
from lightning.pytorch.callbacks import EarlyStopping, LearningRateMonitor, ModelCheckpoint

from gptq_plugin import GPTQCallback, QuantizeModule
from gptq_plugin.lightning.monitors import check_directions
from gptq_plugin.training.quality_gate import QualityGate

from lightning_runs import Validated, fit, pair_loader


def trainer(tmp_path, *callbacks):
    return pl.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
                      default_root_dir=tmp_path, callbacks=[*callbacks])  # fmt: skip


@pytest.mark.parametrize(
    ("monitor", "limits", "message"),
    [
        (ModelCheckpoint(monitor="val_loss"), {"val_loss": -1}, r"fall by 1, and ModelCheckpoint.*{'val_loss': 1}"),
        (EarlyStopping("val_loss"), {"val_loss": "-2%"}, r"fall by '2%', and EarlyStopping.*{'val_loss': '2%'}"),
        (ModelCheckpoint(monitor="val_acc", mode="max"), {"val_acc": 0.01}, r"rise by 0\.01.*{'val_acc': -0\.01}"),
    ],
)  # fmt: skip
def test_a_limit_for_the_better_direction_is_refused_with_the_right_one(monitor, limits, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        check_directions(trainer(tmp_path, monitor), QualityGate(limits).limits)


@pytest.mark.parametrize(
    ("monitors", "limits"),
    [
        ([ModelCheckpoint(monitor="val_loss")], {"val_loss": 1, "val_acc": -1}),
        ([ModelCheckpoint(monitor="val_acc", mode="max")], {"val_acc": "-1%"}),
        ([ModelCheckpoint(), LearningRateMonitor.__new__(pl.Callback)], {"val_loss": -1}),  # nothing is known
        ([], {"val_loss": -1}),
        ([EarlyStopping("val_loss")], {}),
    ],
)
def test_other_limits_pass(monitors, limits, tmp_path):
    check_directions(trainer(tmp_path, *monitors), QualityGate(limits).limits)


def test_it_is_refused_before_training(tmp_path):
    class Untrained(Validated):
        def training_step(self, batch, index):
            raise AssertionError("training began")

    callback = GPTQCallback(QuantizeModule(group_size=32), max_degradation={"val_loss": -0.1})
    with pytest.raises(ValueError, match=r"write max_degradation={'val_loss': 0\.1}"):
        fit(Untrained(), pair_loader(), [EarlyStopping("val_loss"), callback], tmp_path)
