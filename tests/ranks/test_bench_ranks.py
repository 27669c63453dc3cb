"""scripts/bench_ranks.py on CPUs, tiny: every subcommand runs to its end, and finds what it is there to find."""

from __future__ import annotations

import re
import subprocess

import pytest
import torch

from forked_python import python
from paths import REPOSITORY

pytestmark = pytest.mark.slow

TINY = ["--width", "256", "--vocab", "512", "--tokens", "64", "--layers", "2", "--samples", "16", "--batch-size", "4"]


def bench(*arguments, check=True):
    command = [python(), REPOSITORY / "scripts" / "bench_ranks.py", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert not check or done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout


def test_the_bytes_are_the_same_on_one_rank_and_three_and_others_with_more_samples():
    printed = bench("blocks", "--ranks", "1", "3", "--more", *TINY)
    lines = re.findall(r"^ +(\d) +(\d+) +(True|False).*(\[.*\])$", printed, re.M)
    kinds = [("1", "16", "False"), ("1", "16", "True"), ("3", "16", "True"), ("3", "48", "True")]
    assert [line[:3] for line in lines] == kinds
    digests = [digest for *_, digest in lines]
    assert digests[1] == digests[2] != digests[3]
    assert all("," not in digest for digest in digests)  # all ranks of a run have one


@pytest.mark.parametrize("how", ["fsdp", "tp"])
def test_a_sharded_model_is_trained_quantized_and_exported(how):
    printed = bench("sharded", "--how", how, "--ranks", "2", *TINY)
    assert printed.count("weights put together in files; GB") == 2  # for the rehearsal, and after the fit
    assert "export's files verified; GB" in printed and "14 layers quantized" in printed
    assert float(re.search(r"from the end of the fit to the verified export: ([0-9.]+) s", printed)[1]) > 0


def test_the_others_end_when_one_of_three_ranks_is_killed():
    printed = bench("kill", "--ranks", "3", "--phases", "reduction", "rows", *TINY)
    assert len(re.findall(r"rank [01] ended after [0-9.]+ s: RankError: .*cannot reach the others", printed)) == 4


def test_a_rank_that_does_not_die_is_a_failure():
    """Else `kill` would hold whatever happened."""
    assert "no rank was killed" in bench("kill", "--phases", "rows", *TINY, "--layers", "0", check=False)


def test_words_are_timed_beside_a_ring():
    printed = bench("words", "--ranks", "2", "3", "--words", "3", "--rounds", "1")
    assert re.findall(r"^(\d) ranks, ([a-z-]+): \d+ us", printed, re.M) == [
        ("2", "check-in"), ("2", "ring"), ("3", "check-in"), ("3", "ring"),
    ]  # fmt: skip


def test_a_trainers_ranks_export_what_one_does():
    printed = bench("trainer", *TINY, "--width", "64", "--tokens", "16")
    alone, ddp = printed.splitlines()
    assert "words that are one rank's: 1.0000 (14 layers)" in ddp
    losses = [re.search(r"loss (.*), quantized ([0-9.]+)", one).groups() for one in (alone, ddp)]
    assert losses[0] == losses[1] and losses[0][0] != losses[0][1]


def test_a_trainers_export_that_differs_is_a_failure(monkeypatch):
    monkeypatch.syspath_prepend(REPOSITORY / "scripts")
    from rank_benches.trainer import compared

    whole = {"a.qweight": torch.arange(100), "a.scales": torch.ones(4), "norm": torch.ones(4)}
    near, far = torch.arange(100), torch.arange(100)
    near[0], far[:4] = -1, -1
    assert "0.9900 (1 layers)" in compared({**whole, "a.qweight": near}, whole)
    for other, what in (
        ({**whole, "a.qweight": far}, "only 0.9600 of the words of a.qweight"),
        ({**whole, "norm": torch.zeros(4)}, "not quantized differ: .'norm'"),
        ({"norm": torch.ones(4)}, "other names: .'a.qweight', 'a.scales'"),
    ):
        with pytest.raises(ValueError, match=what):
            compared(other, whole)


def test_kinds_that_accelerate_has_for_gpus_alone_are_refused_on_cpus():
    if not torch.cuda.is_available():
        command = [python(), REPOSITORY / "scripts" / "bench_ranks.py", "trainer", "--kinds", "fsdp2"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=240)
        assert done.returncode == 1 and "takes DDP in the place of other kinds" in done.stderr
