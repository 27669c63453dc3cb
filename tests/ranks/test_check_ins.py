"""Check-ins of eight ranks: every rank gets every number, and learns at once that one was killed, whichever it was."""

from __future__ import annotations

import json
import subprocess

import pytest

from forked_python import python

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not hasattr(__import__("os"), "fork"), reason="needs os.fork")]

RANKS, VICTIMS = 8, (0, 3, 7)
SCRIPT = """
import json, os, signal, sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
import torch.distributed as dist
from gptq_plugin import distributed
from gptq_plugin.check_ins import check_in

def work(rank, ranks, victim, out):
    dist.init_process_group("gloo", init_method=f"file://{out}/store{victim}", rank=rank, world_size=ranks)
    numbers = check_in("numbers", 10 * rank)
    objects = distributed.gather_objects("x" * rank)
    error = ""
    try:
        with distributed.ending_together():
            for number in range(100):
                if rank == victim and number == 50:
                    (out / f"{victim}.killed").write_text(str(time.time()))
                    os.kill(os.getpid(), signal.SIGKILL)
                distributed.minimum(number)
    except Exception as caught:
        error = f"{type(caught).__name__}: {caught}"
    seconds = time.time() - float((out / f"{victim}.killed").read_text())
    (out / f"{victim}-{rank}.json").write_text(json.dumps([numbers, objects, error, seconds]))
    os._exit(0)

def grow(rank, ranks, out):
    # The first two ranks are in a group of their own before, which the others are not.
    for world in (2, ranks):
        if rank < world:
            dist.init_process_group("gloo", init_method=f"file://{out}/grow{world}", rank=rank, world_size=world)
            numbers = check_in("numbers", rank)
            dist.destroy_process_group()
    (out / f"grow-{rank}.json").write_text(json.dumps(numbers))
    os._exit(0)

def started(function, ranks, *arguments):
    children = []
    for rank in range(ranks):
        pid = os.fork()
        if not pid:
            function(rank, ranks, *arguments)
        children.append(pid)
    for pid in children:
        os.waitpid(pid, 0)

out, ranks = Path(sys.argv[1]), int(sys.argv[2])
started(grow, 3, out)
for victim in map(int, sys.argv[3:]):
    started(work, ranks, victim, out)
"""


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    out = tmp_path_factory.mktemp("check-ins")
    (out / "run.py").write_text(SCRIPT)
    subprocess.run([python(), out / "run.py", out, str(RANKS), *map(str, VICTIMS)], check=True, timeout=120)
    return out


@pytest.fixture(scope="module")
def found(out):
    """What the ranks that are left found, by the one that was killed."""
    return {
        victim: [json.loads((out / f"{victim}-{rank}.json").read_text()) for rank in range(RANKS) if rank != victim]
        for victim in VICTIMS
    }


@pytest.mark.parametrize("victim", VICTIMS)
def test_all_others_learn_within_seconds_that_a_rank_was_killed(victim, found):
    for *_, error, seconds in found[victim]:
        assert error.startswith("RankError: ") and "cannot reach the others: one was killed" in error
        assert seconds < 5


def test_every_rank_gets_the_numbers_and_values_of_all_in_the_order_of_ranks(found):
    for victim in VICTIMS:
        for numbers, objects, *_ in found[victim]:
            assert numbers == [10 * rank for rank in range(RANKS)]
            assert objects == ["x" * rank for rank in range(RANKS)]


def test_a_rank_that_was_in_a_group_before_meets_one_that_was_not(out):
    assert [json.loads((out / f"grow-{rank}.json").read_text()) for rank in range(3)] == [[0, 1, 2]] * 3
