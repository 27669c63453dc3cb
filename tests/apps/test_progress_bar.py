"""The progress bar of gptq-finetune."""

from __future__ import annotations

import pytest

from gptq_plugin.apps.progress_bar import StepsBar

from lightning_runs import Holds, fit, token_loader


@pytest.mark.parametrize(
    ("ends", "shown"),
    [
        ({"max_steps": 5, "max_epochs": -1}, ["Epoch 0, step 3 of 5", "Epoch 1, step 5 of 5"]),
        ({"max_epochs": 2}, ["Epoch 0:", "Epoch 1:"]),
    ],
)
def test_the_bar_tells_how_far_a_run_is_that_ends_by_steps(ends, shown, tmp_path, capsys):
    fit(Holds(), token_loader(), [StepsBar()], tmp_path, **ends, enable_progress_bar=True)
    printed = capsys.readouterr()
    for words in shown:
        assert words in printed.out + printed.err
    assert "/-2" not in printed.out + printed.err
