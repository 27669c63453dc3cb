"""A run that is killed at any phase: the user's checkpoints stay, and no half-written export is left in place."""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from test_callback import SMALL, llama

from gptq_plugin import QuantizeModule, load_quantized

RUN = """
import os, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[1])
out, phase = Path(sys.argv[2]), sys.argv[3]
import gptq_plugin.export as export
import gptq_plugin.job as job
from gptq_plugin import GPTQCallback, QuantizeModule, lockstep
from lightning.pytorch.callbacks import ModelCheckpoint
from test_callback import SMALL, Holds, fit, token_loader

def killed(module, name, after=0):
    calls, original = [], getattr(module, name)
    def dies(*args, **kwargs):
        calls.append(1)
        if len(calls) > after:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)
    setattr(module, name, dies)

class Kill(ModelCheckpoint):
    def on_train_end(self, trainer, pl_module):  # from here on the run's own work is done
        super().on_train_end(trainer, pl_module)
        where = {"calibration": (lockstep, "walk", 0), "solve": (job, "solve_shared", 3),
                 "write": (export, "_verify", 0), "rename": (export, "_move_into_place", 0)}[phase]
        killed(*where)

fit(Holds(), token_loader(), [GPTQCallback(QuantizeModule(**SMALL), out / "export", overwrite=True),
    Kill(dirpath=out / "ckpt", save_last=True)], out / "run", enable_checkpointing=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["calibration", "solve", "write", "rename"])
def test_a_kill_leaves_the_checkpoints_and_an_earlier_export_as_they_were(phase, tmp_path):
    earlier = llama()
    quantizer = QuantizeModule(**SMALL)
    quantizer.quantize(earlier, list(torch.randint(0, 64, (16, 16))))
    quantizer.export(earlier, tmp_path / "export")
    before = {file.name: file.read_bytes() for file in (tmp_path / "export").iterdir()}
    (tmp_path / "train.py").write_text(textwrap.dedent(RUN))
    run = subprocess.run([sys.executable, tmp_path / "train.py", Path(__file__).parent, tmp_path, phase], check=False,
                         capture_output=True, text=True, timeout=300, cwd=tmp_path)  # fmt: skip
    assert run.returncode == -signal.SIGKILL, run.stderr[-3000:]
    assert {file.name: file.read_bytes() for file in (tmp_path / "export").iterdir()} == before
    assert load_quantized(tmp_path / "export") is not None
    state = torch.load(tmp_path / "ckpt" / "last.ckpt", weights_only=False)["state_dict"]
    assert "model.model.layers.0.mlp.up_proj.weight" in state
    left = [file for file in tmp_path.iterdir() if file.name.startswith(".")]
    assert all(file.name.endswith(".partial") for file in left)  # hidden, and never under the export's name
