"""What the campaigns against runs would call a fault: their judges can fail."""

from __future__ import annotations

import functools
import os
import shutil
import time
import warnings

import pytest
import torch

from gptq_plugin import QuantizeModule

from lightning_runs import llama
from paths import REPOSITORY


@pytest.fixture(autouse=True)
def scripts(monkeypatch):
    """scripts/campaigns importable."""
    monkeypatch.syspath_prepend(REPOSITORY / "scripts")


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    """An export at 8 bits, as trainings find it."""
    folder = tmp_path_factory.mktemp("earlier") / "export"
    model, quantizer = llama(), QuantizeModule(bits=8, group_size=32)
    quantizer.round_to_nearest(model)
    quantizer.export(model, folder)
    return folder


def test_an_export_that_is_not_whole_is_wrong(export, tmp_path):
    from campaigns.campaign import Wrong
    from campaigns.kills import nothing_hidden, whole

    for name in ("model.safetensors", "config.json", "quantize_config.json", "report.html"):
        copy = shutil.copytree(export, tmp_path / name)
        whole(copy, export)
        (copy / name).unlink()
        with pytest.raises(Wrong):
            whole(copy, export)
    (copy / "report.html").write_text("another")
    with pytest.raises(Wrong, match="the earlier export has changed"):
        whole(copy, export)
    (tmp_path / "export" / ".12345678.partial").mkdir(parents=True)
    with pytest.raises(Wrong, match="hidden folders are left"):
        nothing_hidden(tmp_path)


def test_a_model_that_is_not_as_before_is_wrong():
    from campaigns.campaign import Wrong
    from campaigns.scenes import Model

    def bit(model):
        weight = model.lm_head.weight.data
        weight[3, 5] = torch.nextafter(weight[3, 5], torch.tensor(9.0))

    def other_parameter(model):
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())

    changes = {
        "lm_head.weight has other values": bit,
        "lm_head.weight is another tensor": other_parameter,
        "hooks differ": lambda model: model.model.norm.register_forward_hook(lambda *_: None),
        "forwards differ": lambda model: setattr(model.lm_head, "forward", model.lm_head.forward),
        "training flags differ": lambda model: model.lm_head.eval(),
        "grad flags differ": lambda model: model.lm_head.requires_grad_(False),
        "configurations differ": lambda model: setattr(model.config, "quantization_config", {}),
        "modules differ": lambda model: setattr(model.model, "norm", torch.nn.Identity()),
    }
    for told, change in changes.items():
        model = Model(llama().train())
        model.check_is_back()
        change(model.model)
        if told == "modules differ":
            told = "other tensors"
        with pytest.raises(Wrong, match=told):
            model.check_is_back()


def test_a_fault_happens_at_the_call_that_is_named():
    from campaigns.faults import Calls, PowerCut

    def run():
        QuantizeModule(bits=4, group_size=32).round_to_nearest(torch.nn.Sequential(torch.nn.Linear(64, 64)))

    with Calls() as calls:
        run()
    for name in ("gptq.grid.round_to_nearest", "layers.packing.pack_weight"):
        assert calls.counts[name] == 1
        with pytest.raises(PowerCut), Calls((name, 0), PowerCut("cut")) as failing:
            run()
        assert failing.has_failed
    assert any(" -> " in name for name in calls.counts)


def test_state_that_changed_and_what_grows_with_every_cycle_are_wrong():
    from campaigns.campaign import Wrong
    from campaigns.soak import GROWTH, _check_leaks, _compare, _global_state

    changes = {
        "random numbers of torch": lambda: torch.rand(1),
        "default dtype": lambda: torch.set_default_dtype(torch.float64),
        "environment": lambda: os.environ.update(GPTQ_CAMPAIGN="1"),
        "warnings": lambda: warnings.simplefilter("ignore"),
    }
    with torch.random.fork_rng(), warnings.catch_warnings():
        for what, change in changes.items():
            before = _global_state()
            _compare(before, _global_state())
            try:
                change()
                with pytest.raises(Wrong, match=what):
                    _compare(before, _global_state())
            finally:
                torch.set_default_dtype(torch.float32)
                os.environ.pop("GPTQ_CAMPAIGN", None)
    steady = {"threads": ["main"], "open files": [], "temporary files": [], "tensors": 7, "memory": 0}
    _check_leaks([steady] * 6)
    _check_leaks([steady, steady, *[{**steady, "tensors": 8}] * 4])  # what an option made once
    _check_leaks([*[steady] * 3, *[{**steady, "memory": 3 * GROWTH}] * 3])  # a module that was imported
    for what, size in (("threads", 1), ("open files", 1), ("temporary files", 1), ("memory", GROWTH)):
        grown = [{**steady, what: [""] * n if isinstance(steady[what], list) else n * size} for n in range(6)]
        with pytest.raises(Wrong, match="grown"):
            _check_leaks(grown)


def test_tensors_count_as_held_unless_a_cache_of_limited_size_holds_them(tmp_path):
    from campaigns.soak import _held

    limited, endless = functools.lru_cache(maxsize=8)(torch.ones), functools.lru_cache(maxsize=None)(torch.ones)
    before = _held(tmp_path)["tensors"]
    for size in range(1, 6):
        limited(size)
    assert _held(tmp_path)["tensors"] == before
    for size in range(1, 6):
        endless(size)
    assert _held(tmp_path)["tensors"] == before + 5
    kept = [torch.ones(size) for size in range(1, 6)]
    assert _held(tmp_path)["tensors"] == before + 5 + len(kept)


def test_ranks_that_end_without_the_cause_or_leave_an_export_are_wrong(tmp_path):
    from campaigns.campaign import Wrong
    from campaigns.ranks import CAMPAIGN, _judge

    cells = list(CAMPAIGN.given(0, 90))
    assert len(set(cells)) == 90 and {cell[0] for cell in cells[:2]} == {"torchrun", "Lightning"}
    (tmp_path / "output.txt").write_text("MemoryError: no room")
    (tmp_path / "0.txt").write_text("RankError: rank 1 failed: MemoryError: no room")
    lost = (1, "by hand", "raise", "solve")
    _judge(tmp_path, *lost)
    with pytest.raises(Wrong, match="ended with 0"):
        _judge(tmp_path, 0, *lost[1:])
    (tmp_path / ".export.12345678.other").mkdir()
    with pytest.raises(Wrong, match="left behind"):
        _judge(tmp_path, *lost)
    (tmp_path / "0.txt").write_text("RankError: something")
    with pytest.raises(Wrong, match=r"0\.txt has no cause"):
        _judge(tmp_path, *lost)
    (tmp_path / "export").mkdir()
    (tmp_path / "0.txt").unlink()
    with pytest.raises(Wrong, match="there is an export"):
        _judge(tmp_path, *lost)


def test_orphans_are_seen_and_ended(tmp_path):
    """In a fork, which stays the one that adopts."""
    child = os.fork()
    if not child:
        from campaigns.offspring import adopt, end_offspring, offspring

        adopt()
        if not os.fork():
            if not os.fork():
                os.setsid()
                time.sleep(60)
            os._exit(0)
        os.wait()
        seen = len(offspring())
        end_offspring()
        os._exit(0 if seen == 1 and not offspring() else 1)
    assert os.waitpid(child, 0)[1] == 0
