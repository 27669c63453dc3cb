"""One folder for all ranks of a run; tests/ranks/test_launchers.py runs whole commands under torchrun and SLURM."""

from __future__ import annotations

import threading

import pytest
from omegaconf import OmegaConf

from gptq_plugin.apps import run_folder
from gptq_plugin.apps.run_folder import OneFolder, launched

from ports import reserved_port

TORCHRUN = {"LOCAL_RANK": "0", "GROUP_RANK": "0", "LOCAL_WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "1",
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}  # fmt: skip


def config(folder):
    run = {"dir": folder, "job": {"name": "cli"}, "output_subdir": ".hydra", "overrides": {"hydra": []}}
    return OmegaConf.create({"hydra": {**run, "run": {"dir": folder}, "sweep": {"dir": folder}}})


def test_a_single_process_counts_as_one_and_torchruns_are_counted(monkeypatch):
    assert launched() == 1
    for name, value in {**TORCHRUN, "RANK": "0", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    assert launched() == 2


@pytest.mark.parametrize("size", [None, 1])
def test_a_single_process_keeps_its_folder(size, monkeypatch, tmp_path):
    if size is not None:
        for name, value in {**TORCHRUN, "RANK": "0", "WORLD_SIZE": "1"}.items():
            monkeypatch.setenv(name, value)
    own = config(f"{tmp_path}/own")
    OneFolder().on_run_start(own)
    assert own == config(f"{tmp_path}/own")


class Environment:
    """Of two ranks, in threads of this process, which share its environment variables."""

    main_address = "127.0.0.1"

    def __init__(self, rank, port):
        self.global_rank, self.main_port, self.world_size = lambda: rank, port, lambda: 2


@pytest.mark.parametrize("mode", ["run", "sweep"])
def test_all_ranks_use_rank_0s_folder_and_only_that_rank_leaves_hydras_files(mode, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")  # restored after the test
    ranks = {}

    def start(rank):
        ranks[threading.get_ident()] = Environment(rank, port)
        getattr(callbacks[rank], f"on_{'multirun' if mode == 'sweep' else 'run'}_start")(configs[rank])

    monkeypatch.setattr(run_folder, "_environment", lambda: ranks[threading.get_ident()])
    configs, callbacks = [config("of rank 0"), config("of rank 1")], [OneFolder(), OneFolder()]
    threads = [threading.Thread(target=start, args=(rank,)) for rank in (0, 1)]
    with reserved_port() as port:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=60)
    first, second = configs
    assert first == config("of rank 0")
    assert second.hydra[mode].dir == str(tmp_path / "of rank 0")
    assert second.hydra.output_subdir is None and second.hydra.job.name == "rank1"
    quoted = f"hydra.{mode}.dir='{tmp_path}/of rank 0'"
    assert second.hydra.overrides.hydra == [quoted, "hydra.output_subdir=null", "hydra.job.name=rank1"]
