"""What goes wrong on one rank ends all ranks, within seconds, with the cause, and leaves the checkpoints."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

# On CPUs it forks its ranks, since importing takes longer than a case.
FAULTS = """
import json, os, signal, sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[1])
import lightning.pytorch as pl
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint
from test_callback import SMALL, Holds, token_loader
import gptq_plugin.lightning.callback as training
import gptq_plugin.export.export as exporting
from gptq_plugin import GPTQCallback, QuantizeModule
from gptq_plugin.quantize import solve_on_ranks as dealing
from gptq_plugin.walk import hessian

def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

def fail(message):
    def failing(*_, **__):
        raise MemoryError(message)
    return failing

class Faulty(Holds):
    fault = None

    def calibration_step(self, batch):
        if self.fault is not None:
            return self.fault(batch)
        return self.model(**batch)

def spoil(original):
    def spoilt(*args):
        args[0].sum[3, 3] = float("nan")
        return original(*args)
    return spoilt

def inject(module, kind, phase):
    if phase == "calibration":
        nan = lambda batch: module.model(inputs_embeds=torch.full((4, 16, 64), float("nan"), device=module.device))
        module.fault = {"raise": fail("a bad sample"), "kill": die, "nan": nan}[kind]
    elif phase == "setup":
        training.check_export_dir = fail("not on this node")
    elif phase == "reduction" and kind == "nan":
        hessian.Hessian.over_ranks = spoil(hessian.Hessian.over_ranks)
    elif phase == "reduction" and kind == "raise":
        hessian.Hessian.over_ranks = fail("out of memory")
    elif phase == "reduction":
        dist.all_reduce = die  # in the middle of the exchange
    elif phase == "solve":
        solve = dealing.solve
        nan = lambda weight, *others: solve(weight * float("nan"), *others)
        dealing.solve = {"raise": fail("no room for the factor"), "kill": die, "nan": nan}[kind]
    elif phase == "export":
        exporting.verify = {"raise": fail("disk full"), "kill": die}[kind]

class Inject(pl.Callback):
    def __init__(self, kind, phase):
        self.kind, self.phase = kind, phase

    def setup(self, trainer, module, stage):
        if trainer.global_rank == 1 and self.phase in ("setup", "rehearsal"):
            inject(module, self.kind, "calibration" if self.phase == "rehearsal" else "setup")

    def on_train_end(self, trainer, module):
        if trainer.global_rank == (0 if self.phase == "export" else 1):  # only rank 0 writes
            inject(module, self.kind, self.phase)

def run(rank, case, port):
    folder = out / case
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), LOCAL_RANK=str(rank),
        WORLD_SIZE=str(size), TORCHELASTIC_RUN_ID=case)
    try:
        callback = GPTQCallback(QuantizeModule(**SMALL), folder / "export")
        trainer = pl.Trainer(max_epochs=1, accelerator=accelerator, devices=size, strategy="ddp", logger=False,
            enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder,
            callbacks=[Inject(*case.split("-")), callback, ModelCheckpoint(folder / "ckpt", save_last=True)])
        trainer.fit(Faulty(), token_loader())
    except BaseException as error:
        (folder / f"{rank}.txt").write_text(f"{type(error).__name__}: {error}")
        os._exit(1)
    os._exit(0)

out, size, accelerator, cases, results = Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4], sys.argv[5:], {}
if accelerator == "gpu":  # which does not survive a fork: a case and a rank
    run(int(cases[1]), cases[0], 29990)
for number, case in enumerate(cases):
    started, children = time.time(), {}
    (out / case).mkdir()
    for rank in range(size):
        pid = os.fork()
        if not pid:
            run(rank, case, 29830 + number)
        children[pid] = rank
    ends = {}
    while children:
        pid, status = os.wait()
        ends[children.pop(pid)] = os.waitstatus_to_exitcode(status)
    results[case] = {"seconds": time.time() - started, "ends": [ends[rank] for rank in range(size)]}
(out / "results.json").write_text(json.dumps(results))
"""

RANKS = 3
CASES = {
    "raise-setup": "MemoryError: not on this node",
    "raise-rehearsal": "MemoryError: a bad sample",
    "raise-calibration": "MemoryError: a bad sample",
    "nan-calibration": "holds NaN or infinity in calibration batches [0, 1] (rank 1)",
    "kill-calibration": "cannot reach the others",
    "raise-reduction": "MemoryError: out of memory",
    "nan-reduction": "the sum over all batches",
    "kill-reduction": "cannot reach the others",
    "raise-solve": "MemoryError: no room for the factor",
    "nan-solve": "the weight holds NaN",
    "kill-solve": "cannot reach the others",
    "raise-export": "MemoryError: disk full",
    "kill-export": "cannot reach the others",
}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    out = tmp_path_factory.mktemp("faults")
    (out / "run.py").write_text(FAULTS)
    command = [sys.executable, out / "run.py", Path(__file__).parent, out, str(RANKS), "cpu", *CASES]
    subprocess.run(command, check=True, timeout=400, cwd=out)
    return out, json.loads((out / "results.json").read_text())


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(__import__("os"), "fork"), reason="needs os.fork")
@pytest.mark.parametrize("case", CASES)
def test_all_ranks_end_with_the_cause_and_the_checkpoints_stay(case, outcomes):
    out, results = outcomes
    kind, phase = case.split("-")
    faulty = 0 if phase == "export" else 1
    ends, cause = results[case]["ends"], CASES[case]
    assert results[case]["seconds"] < 30
    assert ends.pop(faulty) == (-9 if kind == "kill" else 1) and ends == [1] * (RANKS - 1)
    own = "" if kind == "kill" else (out / case / f"{faulty}.txt").read_text()
    assert kind == "kill" or cause in own
    for rank in {*range(RANKS)} - {faulty}:
        message = (out / case / f"{rank}.txt").read_text()
        assert cause in message
        if kind == "raise":
            assert message == f"RankError: rank {faulty} failed: {own}"
    if phase in ("setup", "rehearsal"):
        assert not (out / case / "ckpt").exists()  # before training
        return
    checkpoint = torch.load(out / case / "ckpt" / "last.ckpt", weights_only=False)
    assert all(torch.isfinite(value).all() for value in checkpoint["state_dict"].values())
    assert not (out / case / "export").exists()
