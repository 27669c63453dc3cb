"""A process may end right behind an operation: no thread of gloo's then holds a tensor of Python's."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

# Rank 0 of every case ends as scripts do. Its last handler at exit keeps Python's lock for .3 s: a thread of gloo's
# that waits for it then would get it in an interpreter that ends, which aborts the process.
CASES = """
import atexit, ctypes, json, os, signal, sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
import torch.distributed as dist
from gptq_plugin import distributed

def starve():
    # From here on gloo's threads run while rank 0 sleeps only
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    for task in os.listdir("/proc/self/task"):
        if task != str(os.getpid()):
            os.sched_setaffinity(int(task), {min(os.sched_getaffinity(0))})
        if "runloop" in Path(f"/proc/self/task/{task}/comm").read_text():
            os.sched_setscheduler(int(task), os.SCHED_IDLE, os.sched_param(0))

def failure(rank):
    with distributed.ending_together():
        if rank == 0:
            raise KeyError("lost")
        distributed.minimum(0)

def sums(rank):
    distributed.sum_(torch.zeros(1000))

def interrupted(rank):
    # While rank 0 waits for the other one, which ends while it ends itself
    if rank == 1:
        return time.sleep(600)
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.setitimer(signal.ITIMER_REAL, 0.2)
    with distributed.ending_together():
        distributed.minimum(0)

def run(case, rank, group):
    dist.init_process_group("gloo", group, rank=rank, world_size=2)
    distributed.minimum(0)
    if rank == 0:
        sys.setswitchinterval(100)  # a thread that waits for the lock gets it where rank 0 gives it away
        if case is not interrupted:
            starve()
    try:
        case(rank)
    except (RuntimeError, KeyError, KeyboardInterrupt):
        pass
    if rank == 1:
        os._exit(0)

def hold(other):
    if case is interrupted:
        os.kill(other, signal.SIGKILL)
    ctypes.PyDLL(None).usleep(300_000)  # PyDLL keeps the lock

out, ended, is_rank = Path(sys.argv[1]), {}, False
for case in (failure, sums, interrupted):
    group, pids = f"file://{out / case.__name__}", []
    for rank in (1, 0):
        pid = os.fork()
        if not pid:
            if rank == 0:
                atexit.register(hold, *pids)
            is_rank = True
            run(case, rank, group)
            break
        pids.append(pid)
    if is_rank:
        break
    ended[case.__name__] = os.waitstatus_to_exitcode(os.waitpid(pids[1], 0)[1])
    os.waitpid(pids[0], 0)
if not is_rank:
    (out / "ended.json").write_text(json.dumps(ended))
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "SCHED_IDLE"), reason="needs Linux's schedulers")
def test_a_process_that_ends_right_behind_an_operation_is_not_aborted(tmp_path):
    (tmp_path / "run.py").write_text(CASES)
    subprocess.run([sys.executable, tmp_path / "run.py", tmp_path], check=True, timeout=200)
    ended = json.loads((tmp_path / "ended.json").read_text())
    assert ended == {"failure": 0, "sums": 0, "interrupted": 0}
