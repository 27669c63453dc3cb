"""Whatever starts the ranks, there is one export, in the first one's folder, and one answer."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_module
from hydra.core.hydra_config import HydraConfig

from gptq_plugin import load_quantized
from gptq_plugin.apps.sweeps import run_alone

from forked_python import python
from paths import SUPPORT
from ports import reserved_port

pytestmark = pytest.mark.slow

# Every rank names its folder otherwise, as a time in a name does it.
FIT = """
import json, os, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[1])
import lightning.pytorch as pl
from lightning_runs import Holds, SMALL, token_loader
from gptq_plugin import GPTQCallback, QuantizeModule

callback = GPTQCallback(QuantizeModule(**SMALL), f"export-{os.getpid()}")
trainer = pl.Trainer(max_steps=2, accelerator="cpu", devices=2, strategy="ddp", logger=False, callbacks=[callback],
                     enable_progress_bar=False, enable_checkpointing=False, enable_model_summary=False)
module = Holds()
trainer.fit(module, token_loader())
torch.save(module.state_dict(), f"rank{trainer.global_rank}.pt")
said = {"pid": os.getpid(), "export_dir": str(callback.export_dir), "samples": callback.report.samples,
        "environment": type(trainer.strategy.cluster_environment).__name__}
Path(f"rank{trainer.global_rank}.json").write_text(json.dumps(said))
"""

TINY = [
    "model.vocab_size=384",
    "model.hidden_size=128",
    "model.intermediate_size=128",
    "model.num_hidden_layers=1",
    "model.num_attention_heads=2",
    "model.num_key_value_heads=2",
    "data.seq_len=32",
    "data.train_rows=32",
    "data.eval_rows=4",
    "trainer.max_steps=1",
    "trainer.enable_progress_bar=false",
    "trainer.accelerator=cpu",
    "trainer.strategy=ddp",
    "trainer.devices=2",
    "quantizer.nsamples=17",
    "evaluate=false",
]


def run(launcher: str, cwd: Path, *arguments: str | Path, interpreter: str | None = None) -> str:
    """Runs Python with these arguments on two ranks, and returns what it prints; raises if it fails."""
    interpreter = interpreter or python()
    commands = [[interpreter, *arguments]]
    environments = [{**os.environ, "OMP_NUM_THREADS": "1"}]
    if launcher == "torchrun":
        module = "torch.distributed.run"
        commands = [[interpreter, "-m", module, "--standalone", "--nproc-per-node=2", *arguments]]
    with reserved_port() as port:
        if launcher == "SLURM":  # as srun starts them
            job = {"SLURM_JOB_ID": "7", "MASTER_PORT": str(port),  # in place of one that Lightning takes from the id
                   "SLURM_JOB_NAME": "tune", "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2", "SLURM_NNODES": "1",
                   "SLURM_NODEID": "0", "SLURM_NODELIST": "127.0.0.1"}  # fmt: skip
            tasks = [{"SLURM_PROCID": str(task), "SLURM_LOCALID": str(task)} for task in range(2)]
            commands, environments = commands * 2, [environments[0] | job | task for task in tasks]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        processes = [
            subprocess.Popen(command, cwd=cwd, env=environment, **pipes)
            for command, environment in zip(commands, environments)
        ]
        try:
            printed = [process.communicate(timeout=300) for process in processes]
        finally:
            for process in processes:
                process.kill()
    for process, (out, err) in zip(processes, printed):
        assert process.returncode == 0, out[-3000:] + err[-6000:]
    return "".join(out for out, _ in printed)


def totals(export: Path) -> dict[str, float]:
    return json.loads((export / "quantization_report.json").read_text())["totals"]


@pytest.mark.parametrize(
    ("launcher", "environment", "interpreter"),
    [
        ("Lightning", "LightningEnvironment", None),
        ("torchrun", "TorchElasticEnvironment", sys.executable),  # as for a user: each rank imports for itself
        ("SLURM", "SLURMEnvironment", None),
    ],
    ids=lambda value: "" if value in (None, sys.executable) else value,
)
def test_the_callback_exports_once_and_all_ranks_have_its_codes(launcher, environment, interpreter, tmp_path):
    (tmp_path / "fit.py").write_text(FIT)
    run(launcher, tmp_path, tmp_path / "fit.py", SUPPORT, interpreter=interpreter)
    first, second = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1))
    assert first["pid"] != second["pid"] and first["environment"] == second["environment"] == environment
    (export,) = tmp_path.glob("export-*")
    assert export.name == f"export-{first['pid']}"
    assert first["export_dir"] == second["export_dir"] == str(export)
    assert first["samples"] == second["samples"] == totals(export)["samples"] == 16
    states = [torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1)]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    exported = load_quantized(export).state_dict()
    codes = [key for key in exported if key.endswith("qweight")]
    assert len(codes) == 7
    assert all(torch.equal(exported[key], states[0][f"model.{key}"]) for key in codes)


def folders(cwd: Path) -> list[Path]:
    """Those Hydra made, each named by a time."""
    return list((cwd / "outputs").glob("*/*"))


def test_a_finetune_under_slurm_leaves_one_folder(tmp_path):
    printed = run("SLURM", tmp_path, "-m", "gptq_plugin.apps.cli", *TINY)
    (folder,) = folders(tmp_path)
    assert totals(folder / "gptq")["samples"] == 17
    overrides = (folder / ".hydra" / "overrides.yaml").read_text().splitlines()
    assert overrides == [f"- {option}" for option in TINY]
    assert printed.count("weights on disk") == 1


@pytest.mark.parametrize("launcher", ["Lightning", "torchrun"])
def test_a_sweep_of_finetunes_leaves_one_folder_with_a_folder_a_run(launcher, tmp_path):
    printed = run(launcher, tmp_path, "-m", "gptq_plugin.apps.cli", "-m", *TINY, "quantizer.bits=3,8")
    (sweep,) = folders(tmp_path)
    runs = sorted(entry.name for entry in sweep.iterdir() if entry.is_dir())
    assert runs == ["0", "1"]
    bits = [json.loads((sweep / number / "gptq" / "quantize_config.json").read_text())["bits"] for number in runs]
    assert bits == [3, 8]
    assert {totals(sweep / number / "gptq")["samples"] for number in runs} == {17}
    table = (sweep / "sweep.txt").read_text()
    assert [line.split()[1] for line in table.splitlines()[2:]] == ["quantizer.bits=3", "quantizer.bits=8"]
    assert printed.count(table.strip()) == 1 and "Try next" not in printed


def test_a_sweep_ends_with_what_stopped_a_run(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(sys, "executable", python())
    with initialize_config_module("gptq_plugin.conf", version_base="1.3"):
        where = [f"hydra.runtime.cwd={tmp_path}", "hydra.job.num=3", "hydra.job.config_name=finetune"]
        cfg = compose("finetune", ["quantizer.bits=5", *where], return_hydra_config=True)
    cfg.hydra.overrides.task = ["quantizer.bits=5"]
    HydraConfig.instance().set_config(cfg)
    try:
        with pytest.raises(RuntimeError, match=r"the run in .*/3 failed \(exit status 1\): see its output above"):
            run_alone(tmp_path / "3")
    finally:
        HydraConfig.instance().cfg = None
    assert "bits must be one of 2, 3, 4, 8; got 5" in capfd.readouterr().err


def test_gptq_quantize_refuses_more_than_one_process(tmp_path):
    (tmp_path / "quantize.py").write_text("from gptq_plugin.apps.cli import quantize\nquantize()")
    with pytest.raises(AssertionError, match="gptq-quantize is one process, and 2 were started: run it without"):
        run("torchrun", tmp_path, tmp_path / "quantize.py", "model.name_or_path=nowhere", f"export_dir={tmp_path}/out")
    assert not (tmp_path / "out").exists()
