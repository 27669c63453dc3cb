"""A run that is killed at any phase: the user's checkpoints stay, and no half-written export is left in place."""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap

import pytest
import torch

from gptq_plugin import QuantizeModule, load_quantized

from lightning_runs import SMALL, llama
from paths import SUPPORT

RUN = """
import os, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[1])
import gptq_plugin.export.export as export
import gptq_plugin.quantize.one_pass as job
import gptq_plugin.export.staging as placing
from gptq_plugin import GPTQCallback, QuantizeModule
from gptq_plugin.walk import lockstep
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning_runs import SMALL, Holds, fit, token_loader

def killed(module, name, after=0):
    calls, original = [], getattr(module, name)
    def dies(*args, **kwargs):
        calls.append(1)
        if len(calls) > after:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)
    setattr(module, name, dies)

class Kill(ModelCheckpoint):
    def __init__(self, where, **options):
        super().__init__(**options)
        self.where = where

    def on_train_end(self, trainer, pl_module):  # from here on the run's own work is done
        super().on_train_end(trainer, pl_module)
        killed(*self.where)

where = {"calibration": (lockstep, "walk", 0), "solve": (job, "solve_shared", 3),
         "write": (export, "verify", 0), "rename": (placing, "_exchange", 0),
         "removal": (placing, "_remove_earlier", 0)}
for phase in sys.argv[2:]:  # a process each: what takes long is the imports above
    out, child = Path(phase), os.fork()
    if child == 0:
        fit(Holds(), token_loader(), [GPTQCallback(QuantizeModule(**SMALL), out / "export", overwrite=True),
            Kill(where[phase], dirpath=out / "ckpt", save_last=True)], out / "run", enable_checkpointing=True)
        os._exit(0)
    (out / "exit").write_text(str(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])))
"""

PHASES = ["calibration", "solve", "write", "rename", "removal"]


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """A folder for each phase, in which a run was killed then, and the export that was there before it."""
    folder, earlier = tmp_path_factory.mktemp("killed"), llama()
    quantizer = QuantizeModule(**SMALL)
    quantizer.quantize(earlier, list(torch.randint(0, 64, (16, 16))))
    for phase in PHASES:
        quantizer.export(earlier, folder / phase / "export")
    before = {phase: _files(folder / phase / "export") for phase in PHASES}
    (folder / "train.py").write_text(textwrap.dedent(RUN))
    run = subprocess.run([sys.executable, "train.py", SUPPORT, *PHASES], check=False,
                         capture_output=True, text=True, timeout=300, cwd=folder)  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    return folder, before


def _files(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.slow
@pytest.mark.parametrize("phase", PHASES[:-1])
def test_a_kill_leaves_the_checkpoints_and_an_earlier_export_as_they_were(phase, killed):
    folder, before = killed[0] / phase, killed[1][phase]
    assert int((folder / "exit").read_text()) == -signal.SIGKILL
    assert _files(folder / "export") == before
    assert load_quantized(folder / "export") is not None
    state = torch.load(folder / "ckpt" / "last.ckpt", weights_only=False)["state_dict"]
    assert "model.model.layers.0.mlp.up_proj.weight" in state
    left = [file for file in folder.iterdir() if file.name.startswith(".")]
    assert all(file.name.endswith(".partial") for file in left)  # hidden, and never under the export's name


@pytest.mark.slow
def test_a_kill_once_the_names_are_exchanged_leaves_the_new_export_and_the_earlier_one_hidden(killed):
    folder, before = killed[0] / "removal", killed[1]["removal"]
    assert int((folder / "exit").read_text()) == -signal.SIGKILL
    assert _files(folder / "export") != before and load_quantized(folder / "export") is not None
    (left,) = (entry for entry in folder.iterdir() if entry.name.startswith("."))
    assert _files(left) == before
