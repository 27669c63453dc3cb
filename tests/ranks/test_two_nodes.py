"""Two network namespaces of this machine as two nodes: other addresses, no shared loopback, one answer."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import uuid
from collections.abc import Iterator

import pytest
import torch

from gptq_plugin import load_quantized

from forked_python import python
from paths import SUPPORT

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("ip") is None or os.geteuid() != 0, reason="needs root and the command ip"),
]

PORT = "29700"  # of the first namespace: it has ports of its own, which no other run of these tests can take

# The first lines of whatever runs on a node.
JOIN = """
import ctypes, os
if "NAMESPACE" in os.environ:
    with open(f"/run/netns/{os.environ['NAMESPACE']}") as namespace:
        assert ctypes.CDLL(None).setns(namespace.fileno(), 0) == 0
"""
FIT = """
import sys
from pathlib import Path
import torch
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[1])
import lightning.pytorch as pl
from lightning_runs import Holds, SMALL, token_loader
from gptq_plugin import GPTQCallback, QuantizeModule

out, nodes = Path(sys.argv[2]), int(sys.argv[3])
callback = GPTQCallback(QuantizeModule(**SMALL | {"nsamples": 17}), out / "export")
places = {"num_nodes": nodes, "devices": 1, "strategy": "ddp" if nodes > 1 else "auto"}
trainer = pl.Trainer(max_epochs=0, accelerator="cpu", **places, logger=False, callbacks=[callback],
                     enable_progress_bar=False, enable_checkpointing=False, enable_model_summary=False)
module = Holds()
trainer.fit(module, token_loader())
torch.save(module.state_dict(), out / f"rank{trainer.global_rank}.pt")
(out / f"rank{trainer.global_rank}.json").write_text(callback.report.to_json())
"""


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, timeout=30)


@pytest.fixture
def nodes() -> Iterator[list[tuple[str, str, str]]]:
    """Two namespaces joined by a cable: (namespace, interface, address) of each."""
    tag, net = uuid.uuid4().hex[:6], os.getpid() % 250 + 1
    both = [(f"gptq-{tag}-{n}", f"gptq{tag}{n}", f"10.77.{net}.{n + 1}") for n in range(2)]
    made: list[str] = []
    try:
        try:
            for name, _, _ in both:
                ip("netns", "add", name)
                made.append(name)
            ip("link", "add", both[0][1], "netns", both[0][0], "type", "veth", "peer", both[1][1], "netns", both[1][0])
        except subprocess.CalledProcessError as error:
            pytest.skip(f"needs network namespaces: {error.stderr.decode().strip()}")
        for name, interface, address in both:
            ip("-n", name, "addr", "add", f"{address}/24", "dev", interface)
            ip("-n", name, "link", "set", "lo", "up")
            ip("-n", name, "link", "set", interface, "up")
        yield both
    finally:
        for name in made:  # the cable goes with its ends
            ip("netns", "delete", name)


@pytest.fixture(scope="module")
def one(tmp_path_factory) -> dict[str, torch.Tensor]:
    """The state that one node ends with."""
    folder = tmp_path_factory.mktemp("one")
    (folder / "fit.py").write_text(FIT)
    subprocess.run([python(), "fit.py", SUPPORT, folder, "1"], check=True, cwd=folder, timeout=200)
    return torch.load(folder / "rank0.pt")


@pytest.mark.parametrize("launcher", ["torchrun", "Lightning"])
def test_two_nodes_give_the_codes_of_one(launcher, nodes, one, tmp_path):
    (tmp_path / "fit.py").write_text(JOIN + FIT)
    script = ["fit.py", str(SUPPORT), str(tmp_path), "2"]
    first_address, processes = nodes[0][2], []
    for number, (name, interface, _) in enumerate(nodes):
        environment = {**os.environ, "GLOO_SOCKET_IFNAME": interface, "NAMESPACE": name}
        if launcher == "torchrun":
            where = ["--nnodes=2", f"--node-rank={number}", "--nproc-per-node=1"]
            where += [f"--master-addr={first_address}", f"--master-port={PORT}"]
            agent = JOIN + "import sys; from torch.distributed.run import main; main(sys.argv[1:])"
            command = [python(), "-c", agent, *where, *script]
        else:
            command = [python(), *script]
            environment |= {"MASTER_ADDR": first_address, "MASTER_PORT": PORT, "NODE_RANK": str(number)}
        options = {"cwd": tmp_path, "env": environment, "stderr": subprocess.PIPE, "text": True}
        processes.append(subprocess.Popen(command, **options, start_new_session=True))
    try:
        for process in processes:
            _, err = process.communicate(timeout=200)
            assert process.returncode == 0, err[-6000:]
    finally:
        for process in processes:  # and the ranks that torchrun started
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    first, second = (torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1))
    assert first.keys() == one.keys() and all(torch.equal(first[key], second[key]) for key in first)
    codes = [key for key in one if key.endswith("qweight")]
    assert len(codes) == 7
    assert all(torch.equal(value, first[key]) for key, value in one.items())
    reports = [json.loads((tmp_path / f"rank{rank}.json").read_text())["totals"] for rank in (0, 1)]
    assert {report["samples"] for report in reports} == {17}
    exported = load_quantized(tmp_path / "export").state_dict()
    assert all(torch.equal(exported[key.removeprefix("model.")], first[key]) for key in codes)
