"""Python looks for cycles rarely while a model is quantized, and as before afterwards."""

from __future__ import annotations

import contextlib
import gc
import threading
import weakref

import pytest
import torch
from torch import nn

from gptq_plugin import QuantizeModule
from gptq_plugin.device import cycles
from gptq_plugin.device.cycles import collect, rarely_collected


@pytest.fixture(autouse=True)
def nothing_frozen():
    """The processes of the tests have frozen what they imported."""
    frozen = gc.get_freeze_count() > 0
    gc.unfreeze()
    yield
    if frozen:
        gc.freeze()


class Cycle:
    def __init__(self) -> None:
        self.own = self


def test_inside_few_objects_cause_no_collection_and_afterwards_all_is_as_before():
    before, ran = gc.get_threshold(), []
    gc.callbacks.append(lambda phase, info: ran.append(phase))
    try:
        with rarely_collected():
            kept = [[number] for number in range(20_000)]
            assert ran == [] and gc.get_freeze_count() > 0
            assert kept
    finally:
        gc.callbacks.pop()
    assert gc.get_threshold() == before and gc.get_freeze_count() == 0


def test_what_was_left_before_is_collected_on_demand():
    one = weakref.ref(Cycle())
    with rarely_collected():
        other = weakref.ref(Cycle())
        collect()
        assert one() is None and other() is None and gc.get_freeze_count() > 0
    collect()
    assert gc.get_freeze_count() == 0


def test_many_new_objects_are_looked_at_once():
    ran = []
    gc.callbacks.append(lambda phase, info: ran.append(info["generation"]) if phase == "start" else None)
    try:
        with rarely_collected():
            found = weakref.ref(Cycle())
            kept = [[number] for number in range(2_000_000)]
            assert found() is None and kept
    finally:
        gc.callbacks.pop()
    assert len(ran) > 10 and set(ran) == {0}


def test_callers_who_collect_nothing_or_freeze_objects_keep_that():
    before = gc.get_threshold()
    gc.set_threshold(0)
    gc.freeze()
    try:
        with rarely_collected():
            assert gc.get_threshold()[0] == 0
        assert gc.get_freeze_count() > 0 and gc.get_threshold()[0] == 0
    finally:
        gc.unfreeze()
        gc.set_threshold(*before)


def test_a_collection_on_demand_leaves_what_callers_froze_and_freezes_no_more():
    """Cycles that are frozen are never freed, and models with hooks are such."""
    frozen = weakref.ref(Cycle())
    gc.freeze()
    try:
        before = gc.get_freeze_count()
        for block in (contextlib.nullcontext, rarely_collected):
            with block():
                kept, found = [[number] for number in range(1000)], weakref.ref(Cycle())
                collect()
                assert found() is None and frozen() is not None and kept
                assert gc.get_freeze_count() <= before
    finally:
        gc.unfreeze()


def test_a_collection_that_ends_a_block_left_open_leaves_all_as_it_was():
    before, done = gc.get_threshold(), []

    def leave_open() -> None:
        block = rarely_collected()
        block.__enter__()
        holder = Cycle()
        holder.block = block

    def run() -> None:
        leave_open()
        collect()
        done.append(gc.get_freeze_count())

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(20)
    assert done == [0] and gc.get_threshold() == before


@pytest.mark.parametrize("fails", [False, True])
def test_quantization_leaves_it_as_it_was(fails):
    before = gc.get_threshold()
    model, data = nn.Sequential(nn.Linear(32, 32)), [torch.randn(64, 16 if fails else 32)]
    if fails:
        with pytest.raises(Exception, match="16"):
            QuantizeModule(bits=8, group_size=32).quantize(model, data)
    else:
        QuantizeModule(bits=8, group_size=32).quantize(model, data)
    assert gc.get_threshold() == before and gc.get_freeze_count() == 0


def test_blocks_of_two_threads_that_overlap_leave_all_as_it_was() -> None:
    before = gc.get_threshold(), gc.get_freeze_count()
    first_in, second_in, first_out = threading.Event(), threading.Event(), threading.Event()
    between: list[int] = []

    def first() -> None:
        with rarely_collected():
            first_in.set()
            second_in.wait(10)
        first_out.set()

    def second() -> None:
        first_in.wait(10)
        with rarely_collected():
            second_in.set()
            first_out.wait(10)
            between.append(gc.get_threshold()[0])

    threads = [threading.Thread(target=run) for run in (first, second)]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert between == [max(before[0][0], cycles._NEW)]
        assert (gc.get_threshold(), gc.get_freeze_count()) == before
    finally:
        gc.set_threshold(*before[0])
