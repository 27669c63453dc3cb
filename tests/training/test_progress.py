"""The progress bar over layers; tests/lightning/test_progress_bar.py has the one in a trainer's display."""

from __future__ import annotations

from gptq_plugin.training.progress import tqdm_progress


def test_the_bar_shows_how_many_layers_are_done_and_which_one_is_next(capsys):
    with tqdm_progress() as progress:
        progress(0, 7, "solving, model.layers.0.mlp.up_proj")
        progress(3, 7, "solving, " + "x" * 60)
        progress(7, 7, "done")
    shown = capsys.readouterr().err
    assert shown.startswith("\rGPTQ: ") and "7/7" in shown and shown.endswith("layer/s, done]\n")
