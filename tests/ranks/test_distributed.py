"""Collective operations: who failed or went astray is told, rows are shared, and branches that only some ranks take."""

from __future__ import annotations

import json
import math
import subprocess

import pytest
import torch

from gptq_plugin import QuantizeConfig, distributed
from gptq_plugin.gptq.solver import solve
from gptq_plugin.quantize.solve_on_ranks import solve_shared

from forked_python import python
from paths import SUPPORT

# Every scene runs on forked ranks in a new process group, and writes what it found.
SCENES = """
import json, os, signal, sys, time
from datetime import timedelta
from pathlib import Path
import torch
torch.set_num_threads(1)
import torch.distributed as dist
from torch import nn
from gptq_plugin import QuantizeConfig, QuantizeModule, check_ins, distributed
from gptq_plugin.quantize.solve_on_ranks import solve_shared
from gptq_plugin.errors import RankError
from gptq_plugin.walk.hessian import Hessian
from gptq_plugin.walk.ranges import Ranges
from gptq_plugin.gptq.solver import solve
sys.path.insert(0, sys.argv[1])
from ports import reserved_port

def raised(call):
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"

def meetings(rank):
    tensor = torch.full((3,), float(rank))
    count = distributed.sum_(tensor, rank)
    several = [torch.full((2,), float(rank)), torch.full((1,), rank)]
    distributed.sum_each_(several)
    parts = [torch.full((2, 1), rank, dtype=torch.uint8), torch.full((2, 3), rank, dtype=torch.float64),
             torch.full((2,), rank, dtype=torch.uint8)]
    gathered = [distributed.gather_rows(parts, 2, sharers) for sharers in (3, 2, 1)]
    turned = torch.full((2, 3), float(rank)).t()
    distributed.from_first_(turned)
    return [
        tensor.tolist(), count, distributed.minimum(5 - rank), distributed.object_from_first(f"rank {rank}"),
        distributed.gather_objects(rank), [[[one.tolist() for one in part] for part in one] for one in gathered],
        [one.tolist() for one in several], turned.tolist(),
    ]

def few_bytes(rank):
    # Rows of one tensor, of which all but three are not sent: in what all gather, and in what rank 0 tells.
    sent, plain = [], distributed.check_in
    distributed.check_in = lambda call, number=0: sent.append(number) or plain(call, number)
    table = torch.arange(2**20, dtype=torch.float64).view(-1, 16) + rank
    mine = {"rows": list(table[:2]), "odd": table[5, ::3], "needs": table[7].requires_grad_()}
    gathered, first = distributed.gather_objects(mine), distributed.object_from_first(mine)
    found = [*gathered, first]
    values = [[torch.stack(one["rows"]).tolist(), one["odd"].tolist(), one["needs"].tolist()] for one in found]
    return sent, values, [one["needs"].requires_grad for one in found]

def astray(rank):
    return raised(lambda: distributed.minimum(3) if rank == 1 else distributed.sum_(torch.zeros(1)))

def failing(rank):
    def run():
        with distributed.ending_together(), distributed.ending_together():
            if rank == 2:
                raise KeyError("lost")
            distributed.minimum(0)
    started = time.time()
    found = raised(run), time.time() - started
    time.sleep(0 if rank == 2 else 3)  # still there, but not for a second word
    return found

def apart(rank):
    def run():
        with distributed.ending_together():  # in which the ranks do not meet
            if rank == 1:
                raise KeyError("lost")
    return raised(run)

def caught(rank):
    # An error of one rank that all catch: the others are in a check-in, or at the end of the block; then all go on.
    def run(meet):
        try:
            with distributed.failing_together():
                if rank == 1:
                    raise KeyError("lost")
                if meet:
                    distributed.minimum(0)
        except (KeyError, RankError) as error:
            return f"{type(error).__name__}: {error}"
    with distributed.ending_together():
        found = [run(True), run(False), distributed.minimum(rank + 5)]
        with distributed.failing_together():
            return [*found, distributed.gather_objects(rank)]

def ranking(rank):
    # Data for a second look that one rank does not have: all rank layers by noise, and go on.
    from transformers import AutoConfig, AutoModelForCausalLM
    from gptq_plugin.calibration.forward import call
    from gptq_plugin.errors import CalibrationError
    from gptq_plugin.quantize.options import PassOptions
    from gptq_plugin.training.attempts import Attempts
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(
        "llama", hidden_size=32, intermediate_size=32, num_hidden_layers=1, vocab_size=64, num_attention_heads=2,
        num_key_value_heads=1,
    )).eval()
    def data():
        if rank == 1:
            raise CalibrationError("its file is gone")
        return [{"input_ids": torch.arange(32)[None]}] * 8
    with distributed.ending_together():
        attempts = Attempts(model, data, PassOptions(call))
        found = attempts._ranking(QuantizeModule(group_size=32, nsamples=8), {"of": 1.0})
        return [found.of_layer, found.remark, distributed.minimum(rank + 5)]

def busy(rank):
    # The others are where no meeting is: the rank that failed goes its way all the same.
    check_ins._GRACE = __import__("datetime").timedelta(seconds=1)
    distributed.minimum(0)
    started = time.time()
    def run():
        with distributed.ending_together():
            if rank == 0:
                raise KeyError("lost")
            time.sleep(3)
    return [raised(run), time.time() - started]

def long(rank):
    # Rank 0 works three times as long as the group's timeout; then it fails at the same.
    found = []
    def work():
        time.sleep(3 * TIMEOUT)
        found.append("worked")
    def fails():
        raise KeyError("refused")
    distributed.first_works(work)
    found.append(distributed.minimum(rank + 5))
    started = time.time()
    found.append(raised(lambda: distributed.first_works(fails)))
    return [*found, time.time() - started]

def lost(rank):
    # Rank 0 is there, and gives no sign: its process was stopped.
    def work():
        time.sleep(2.5 * TIMEOUT)
    if rank == 0:
        check_ins._open().awaited.live = lambda: None
    started = time.time()
    return [raised(lambda: distributed.first_works(work)), time.time() - started]

def interrupted(rank, who):
    # Rank 1 comes late; one of those that wait for it, in the middle of their check-in, is interrupted.
    def run():
        with distributed.ending_together():
            if rank == 1:
                time.sleep(2.5)
            distributed.minimum(0)
    if rank == who:
        signal.signal(signal.SIGALRM, signal.default_int_handler)
        signal.setitimer(signal.ITIMER_REAL, 0.3)
    distributed.minimum(0)
    started = time.time()
    try:
        found = raised(run)
    except KeyboardInterrupt:
        found = "KeyboardInterrupt"
    seconds = time.time() - started
    time.sleep(0 if rank == 1 else 3)  # rank 0 has the store, and rank 1 is still to come
    return [found, seconds]

def interrupted_first(rank):
    return interrupted(rank, 0)

def interrupted_last(rank):
    return interrupted(rank, 2)

def hessians(rank):
    torch.manual_seed(0)
    x = torch.randn(50, 300, dtype=torch.float64)
    mine, whole = Hessian(300, "cpu", torch.float64), Hessian(300, "cpu", torch.float64)
    whole.add(x)
    mine.add([x[:20], x[20:20], x[20:]][rank])
    mine.over_ranks()
    return [mine.tokens, float((mine.mean() - whole.mean()).abs().max())]

def ranges(rank):
    # Each rank sees one layer's largest values; none sees the third.
    mine = Ranges()
    mine.read(["a", "b"][rank % 2 :][:1], torch.tensor([[rank - 9.0]]))
    if rank == 1:
        mine.read(["a"], torch.tensor([[float("nan")]]))
    return mine.over_ranks(["a", "b", "c"], torch.device("cpu"))

def rows(rank):
    torch.manual_seed(0)
    found = []
    for out in (1, 2, 7, 9):
        weight, x = torch.randn(out, 32, dtype=torch.float64), torch.randn(99, 32, dtype=torch.float64)
        config = QuantizeConfig(group_size=16)
        one, shared = (f(weight, x.T @ x / 99, config) for f in (solve, solve_shared))
        pairs = [(getattr(one, n), getattr(shared, n)) for n in ("loss", "rtn_loss", "output_power")]
        pairs += [(getattr(one.weight, n), getattr(shared.weight, n)) for n in ("codes", "scales", "zeros", "g_idx")]
        found.append(all(a.shape == b.shape and a.dtype == b.dtype and torch.allclose(a, b) for a, b in pairs))
    return found

class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.left, self.right, self.never, self.last = (nn.Linear(32, 32) for _ in range(5))

    def forward(self, x):
        x = self.first(x)
        x = self.left(x) if x[0, 0] > 0 else self.right(x)
        return self.last(x)

def branches(rank):
    # Each rank's samples take one branch only, and rank 2 has none.
    model, x = Branches(), torch.randn(400, 1, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        left = model.first(x)[:, 0, 0] > 0
    mine = [list(x[left]), list(x[~left]), []][rank]
    quantizer = QuantizeModule(group_size=32, nsamples=400, batch_size=1)
    report = quantizer.quantize(model, mine, nsamples=400)
    alone = Branches()
    tokens = {m.name: m.tokens for m in report.modules}
    return [tokens, [m.name for m in report.quantized], {k: v.sum().item() for k, v in model.state_dict().items()}]

def experts(rank):
    # The tokens of each rank go to separate experts: 0 and 1, 2 and 3, and rank 2 has no samples. 4 and 5 get none.
    from transformers import AutoConfig, AutoModelForCausalLM
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(
        "qwen3_moe", hidden_size=64, intermediate_size=64, moe_intermediate_size=32, num_hidden_layers=2, vocab_size=64,
        num_attention_heads=2, num_key_value_heads=1, num_experts=6, num_experts_per_tok=2,
    )).eval()

    def mine(router, args, outputs):
        return tuple(y if y.is_floating_point() else 2 * rank + y % 2 for y in outputs)

    for layer in model.model.layers:
        layer.mlp.gate.register_forward_hook(mine)
    ids = torch.randint(0, 64, (4, 40), generator=torch.Generator().manual_seed(rank))
    samples = [] if rank == 2 else [{"input_ids": two, "position_ids": torch.arange(40)[None]} for two in ids.split(2)]
    report = QuantizeModule(group_size=32, nsamples=8, batch_size=2).quantize(model, samples, nsamples=8)
    experts = [m for m in report.modules if "layers.1.mlp.experts" in m.name]
    found = {m.name.partition(".mlp.")[2]: (m.method, m.tokens) for m in experts}
    return [found, {k: v.double().sum().item() for k, v in model.state_dict().items()}]

TIMEOUT = 3
out, size = Path(sys.argv[2]), 3
for scene in (
    meetings, few_bytes, astray, failing, apart, busy, interrupted_first, interrupted_last, hessians, ranges, rows,
    branches, experts, caught, ranking, long, lost,
):
    with reserved_port() as port:
        children = []
        for rank in range(size):
            pid = os.fork()
            if pid:
                children.append(pid)
                continue
            limit = {"timeout": timedelta(seconds=TIMEOUT)} if scene in (long, lost) else {}
            dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=size, **limit)
            (out / f"{scene.__name__}{rank}.json").write_text(json.dumps(scene(rank)))
            os._exit(0)
        for pid in children:
            os.waitpid(pid, 0)
"""


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    out = tmp_path_factory.mktemp("scenes")
    (out / "run.py").write_text(SCENES)
    subprocess.run([python(), out / "run.py", SUPPORT, out], check=True, timeout=300)
    return lambda name: [json.loads((out / f"{name}{rank}.json").read_text()) for rank in range(3)]


pytestmark = [pytest.mark.slow, pytest.mark.skipif(not hasattr(__import__("os"), "fork"), reason="needs os.fork")]


def test_what_is_exchanged_is_the_same_on_every_rank(scenes):
    for found in scenes("meetings"):
        each = [(([[rank]] * 2), [[rank] * 3] * 2, [rank] * 2) for rank in range(3)]
        rows = [[[*of_ranks] for of_ranks in zip(*each[:sharers])] for sharers in (3, 2, 1)]
        assert found == [[3.0] * 3, 3, 3, "rank 0", [0, 1, 2], rows, [[3.0, 3.0], [3]], [[0.0] * 2] * 3]


def test_rows_of_one_tensor_travel_without_the_rest_of_it(scenes):
    table = torch.arange(2**20, dtype=torch.float64).view(-1, 16)
    own = [table, table + 1, table + 2, table]
    for rank, (sent, values, need_gradients) in enumerate(scenes("few_bytes")):
        assert len(sent) == 2 and max(sent) < 10_000 and (sent[1] > 0) == (rank == 0)
        assert values == [[one[:2].tolist(), one[5, ::3].tolist(), one[7].tolist()] for one in own]
        assert need_gradients == [True] * 4


def test_ranks_that_do_different_things_are_told_instead_of_waiting(scenes):
    for found in scenes("astray"):
        assert found.startswith(
            "RankError: the ranks do different things (rank 0 came to sum, rank 1 came to minimum, rank 2 came to sum)"
        )


def test_an_error_on_one_rank_is_raised_on_the_others_with_its_message(scenes):
    raised, seconds = zip(*scenes("failing"), strict=True)
    assert raised == (*["RankError: rank 2 failed: KeyError: 'lost'"] * 2, "KeyError: 'lost'")
    assert max(seconds) < 2  # raised once, however many blocks it leaves


def test_an_error_on_one_rank_that_all_catch_is_raised_on_all_and_they_go_on(scenes):
    others = "RankError: rank 1 failed: KeyError: 'lost'"
    for rank, found in enumerate(scenes("caught")):
        assert found == [*["KeyError: 'lost'" if rank == 1 else others] * 2, 5, [0, 1, 2]]


def test_if_one_rank_cannot_measure_layers_for_an_escalation_none_does_and_all_go_on(scenes):
    for rank, (of_layer, remark, least) in enumerate(scenes("ranking")):
        assert of_layer == {"of": 1.0} and least == 5
        why = "its file is gone" if rank == 1 else "rank 1 failed: CalibrationError: its file is gone"
        assert remark == f"; by their outputs' errors on calibration tokens: {why}"


def test_a_rank_that_failed_does_not_wait_for_others_that_are_busy(scenes):
    (error, seconds), *others = scenes("busy")
    assert error == "KeyError: 'lost'" and 0.9 < seconds < 2.5
    assert all("cannot reach the others: one was killed" in error for error, _ in others)


def test_others_wait_for_rank_0s_work_longer_than_the_timeout_and_learn_of_its_failure(scenes):
    first, *others = scenes("long")
    assert first[:3] == ["worked", 5, "KeyError: 'refused'"]
    assert [found[:2] for found in others] == [[5, "RankError: rank 0 failed: KeyError: 'refused'"]] * 2
    assert all(found[-1] < 3 for found in (first, *others))


def test_a_rank_0_that_gives_no_sign_of_life_is_not_waited_for_longer_than_the_timeout(scenes):
    _, *others = scenes("lost")
    for error, seconds in others:
        assert error.startswith("RankError: rank 0 gave no sign of life for 0:00:03") and 2.9 < seconds < 6


def test_a_block_without_a_meeting_ends_on_all_ranks_or_on_none(scenes):
    others = "RankError: rank 1 failed: KeyError: 'lost'"
    assert scenes("apart") == [others, "KeyError: 'lost'", others]


@pytest.mark.parametrize(("scene", "who"), [("interrupted_first", 0), ("interrupted_last", 2)])
def test_ranks_in_the_middle_of_a_check_in_learn_that_one_of_them_was_interrupted(scene, who, scenes):
    found = scenes(scene)
    for rank, (error, seconds) in enumerate(found):
        if rank == who:
            assert error == "KeyboardInterrupt" and seconds < 2
        else:
            assert error.startswith(f"RankError: rank {who} failed: KeyboardInterrupt") and seconds < 4
    assert found[2 - who][1] < 2.4  # before the late one comes


def test_hessians_add_up_though_half_of_each_travels_and_a_rank_has_no_tokens(scenes):
    for tokens, off in scenes("hessians"):
        assert tokens == 50 and off < 1e-12


def test_every_rank_knows_the_largest_values_of_all(scenes):
    for found in scenes("ranges"):
        assert [found[name][0] for name in "ab"] == [9, 8]
        assert all(math.isnan(value) for value in (found["a"][1], *found["c"]))


def test_every_rank_gets_the_solution_of_all_rows_however_they_divide(scenes):
    assert scenes("rows") == [[True] * 4] * 3


def test_a_branch_that_only_one_ranks_samples_take_is_quantized_on_all(scenes):
    first, *others = scenes("branches")
    tokens, quantized, sums = first
    assert quantized == ["first", "left", "right", "last"]
    assert 32 <= tokens["left"] < 400 and tokens["left"] + tokens["right"] == tokens["first"] == tokens["last"] == 400
    assert all(other == first for other in others) and "left.qweight" in sums and "never.weight" in sums


def test_one_process_meets_nobody():
    weight, x = torch.randn(5, 32), torch.randn(99, 32)
    found = solve_shared(weight, x.T @ x / 99, QuantizeConfig(group_size=16))
    assert torch.equal(found.weight.codes, solve(weight, x.T @ x / 99, QuantizeConfig(group_size=16)).weight.codes)
    assert distributed.sum_(weight, 3) == 3 and distributed.minimum(7) == 7
    with pytest.raises(KeyError), distributed.ending_together():
        raise KeyError("as it is")


def test_ranks_that_see_different_experts_end_with_the_same_layers(scenes):
    first, *others = scenes("experts")
    assert all(other == first for other in others)
    layers, _ = first
    assert len(layers) == 6 * 3
    for number in range(6):
        method, tokens = layers[f"experts.{number}.up_proj"]
        assert method == "gptq" and (tokens > 0) == (number < 4)
        method, _ = layers[f"experts.{number}.down_proj"]
        assert method == ("gptq" if number < 4 else "rtn")
