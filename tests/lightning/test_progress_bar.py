"""A progress bar of the trainer's kind, in real fits and for trainers that show none."""

from __future__ import annotations

import pytest
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar

from gptq_plugin import GPTQCallback, QuantizeModule
from gptq_plugin.lightning.progress_bar import progress_like

from lightning_runs import SMALL, Holds, fit, token_loader


@pytest.mark.parametrize("bar", ["tqdm", "rich"])
def test_a_progress_bar_of_the_trainers_kind_is_shown(bar, tmp_path, capfd):
    kind = {"tqdm": TQDMProgressBar, "rich": RichProgressBar}[bar]
    fit(
        Holds(),
        token_loader(),
        [GPTQCallback(QuantizeModule(**SMALL)), kind()],
        tmp_path,
        enable_progress_bar=True,
    )
    out, err = capfd.readouterr()
    assert "GPTQ" in out + err and "7/7" in out + err


def test_there_is_no_bar_if_the_trainer_shows_none(trainer, monkeypatch):
    shown = trainer(enable_progress_bar=True, callbacks=[TQDMProgressBar()])
    with progress_like(shown) as progress:
        assert progress is not None
    shown.progress_bar_callback.disable()
    with progress_like(shown) as progress:
        assert progress is None
    shown.progress_bar_callback.enable()
    monkeypatch.setattr(type(shown), "is_global_zero", False)
    with progress_like(shown) as progress:
        assert progress is None
    with progress_like(trainer()) as progress:
        assert progress is None


class Display:
    """Of Rich: its tasks need a total when they are added."""

    def __init__(self):
        self.calls = []

    def add_task(self, name, total):
        self.calls.append(("add", name, total))
        return 5

    def update(self, task, completed, total):
        self.calls.append(("update", task, completed, total))

    def refresh(self):
        self.calls.append(("refresh",))


def test_a_rich_display_gets_one_task_once_its_length_is_known(trainer):
    shown = trainer(callbacks=[RichProgressBar()], enable_progress_bar=True)
    display = shown.progress_bar_callback.progress = Display()
    with progress_like(shown) as progress:
        assert display.calls == []
        progress(0, 7, "first")
        progress(3, 7, "second")
        progress(10, 100, "of a finish")
    steps = [one for done, total in ((0, 7), (3, 7), (10, 100)) for one in (("update", 5, done, total), ("refresh",))]
    assert display.calls == [("add", "GPTQ", 7), *steps]
