"""What appears in a terminal after real runs that configure no logging: the result, once, whatever bar is shown."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from forked_python import python
from paths import REPOSITORY

pytestmark = pytest.mark.slow

SCRIPT = """
import sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar
import lightning_runs
import trainer_runs
from gptq_plugin import GPTQCallback, GPTQTrainerCallback, QuantizeModule

out = Path(sys.argv[2])

def begin(name):
    for stream in (sys.stdout, sys.stderr):
        print(f"=== {name}", file=stream, flush=True)

class Module(lightning_runs.Holds):
    def val_dataloader(self):
        return lightning_runs.token_loader()

def lightning(name, bar, **options):
    begin(name)
    callback = GPTQCallback(QuantizeModule(**lightning_runs.SMALL), out / name, max_degradation={"train_loss": 1.0})
    trainer = pl.Trainer(max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_model_summary=False, default_root_dir=out, callbacks=[callback, *bar], **options)
    trainer.fit(Module(), lightning_runs.token_loader())

lightning("tqdm", [TQDMProgressBar()])
lightning("rich", [RichProgressBar()])
lightning("none", [], enable_progress_bar=False)
begin("dev")
pl.Trainer(fast_dev_run=True, accelerator="cpu", callbacks=[GPTQCallback(QuantizeModule(**lightning_runs.SMALL))]).fit(
    Module(), lightning_runs.token_loader())
for name, disabled in (("hf", False), ("hf-quiet", True)):
    begin(name)
    callback = GPTQTrainerCallback(QuantizeModule(**trainer_runs.SMALL), out / name)
    trainer_runs.train(trainer_runs.llama(), [callback], out, disable_tqdm=disabled)
begin("plain")
ids = torch.randint(0, 64, (24, 16), generator=torch.Generator().manual_seed(0))
QuantizeModule(**trainer_runs.SMALL).quantize(trainer_runs.llama(), list(ids), export_dir=out / "plain")
begin("end")
"""


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Both streams of each run, by its name."""
    out = tmp_path_factory.mktemp("runs")
    command = [python(), "-c", SCRIPT, str(REPOSITORY / "tests" / "support"), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False, env=_environment())
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, str] = {"out": str(out)}
    for stream in (done.stdout, done.stderr):
        for part in stream.split("=== ")[1:]:
            name, _, text = part.partition("\n")
            found[name] = found.get(name, "") + text
    return found


def _environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}


@pytest.mark.parametrize("run", ["tqdm", "rich", "none", "hf", "hf-quiet", "plain"])
def test_every_run_ends_with_its_result_once(run: str, seen: dict[str, str]) -> None:
    lines = seen[run].splitlines()
    folder = Path(seen["out"]) / run
    for text in (
        "GPTQ: 7 layers are 4-bit now, 1 stay float",
        f"exported to {folder}: 56.",
        f"every layer: {folder / 'report.html'}",
        "model.layers.0.mlp.down_proj    ",  # its line of the table
        "largest relative error: ",
        "of the model's 156 kB stay float",
    ):
        assert sum(text in line for line in lines) == 1, (text, seen[run])
    measured = sum(line.startswith("train_loss: ") and "quantized (" in line for line in lines)
    assert measured == (run in ("tqdm", "rich", "none"))
    assert (folder / "report.html").exists()


def test_a_dev_run_tells_that_it_does_nothing(seen: dict[str, str]) -> None:
    assert seen["dev"].count("fast_dev_run: nothing is quantized or exported") == 1
