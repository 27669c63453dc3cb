"""Placement: free memory decides which tensors stay on the device."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gptq_plugin import QuantizeConfig
from gptq_plugin.memory import placement as placing
from gptq_plugin.memory.placement import UNLIMITED, Needs
from gptq_plugin.model.structure import Structure
from gptq_plugin.model.targets import find_targets

GIB = 2**30
CUDA = torch.device("cuda", 0)
LLAMA_8B = Needs(weights=15 * GIB, fixed=GIB // 2, solver=5 * GIB, forward=3 * GIB, activations=15 * GIB, batch=GIB)
AT_HOME = Needs(weights=0, fixed=4 * GIB, solver=5 * GIB, forward=3 * GIB, activations=15 * GIB, batch=GIB)
FEW = 2 * GIB


def place(free, needs=LLAMA_8B, weights=None, activations=None):
    return placing.place(CUDA, None if free is None else free * GIB, needs, FEW, weights, activations)


def test_what_fits_stays():
    for placement in (place(80), place(None)):
        assert placement.weights == UNLIMITED and placement.activations is None
        assert not placement.limited and "streamed" not in placement.summary


def test_weights_go_first_and_then_as_much_of_the_activations_as_must():
    roomy = place(32)
    assert roomy.streamed and roomy.activations is None and FEW <= roomy.weights < LLAMA_8B.weights
    both = place(24)
    assert both.streamed and both.weights == FEW and 0 < both.activations < LLAMA_8B.activations
    small = place(8)
    assert small.streamed and small.weights == FEW and small.activations == 0
    assert "streamed block by block" in small.summary and "8.0 GiB free" in small.summary
    assert roomy.prefetch and both.prefetch and not small.prefetch  # only if there is room for two batches
    batch_alone = placing.place(CUDA, 28 * GIB // 3, LLAMA_8B, FEW, None, None)  # and not for the blocks in use too
    assert not batch_alone.prefetch


def test_modules_are_brought_whole_up_to_a_small_part_of_the_model_and_of_what_is_free():
    model = nn.Linear(1000, 1000, bias=False)
    assert placing.unit_bytes(model, None) == placing.unit_bytes(model, GIB) == 500_000
    assert placing.unit_bytes(model, 8000) == 1000


def test_more_than_was_allowed_at_the_peak_is_told(monkeypatch):
    monkeypatch.setattr(placing, "peak_bytes", lambda device: 2**21)
    assert placing.beyond(CUDA, 2**21) == placing.beyond(CUDA, None) == []
    assert placing.beyond(CUDA, 2**20)[0].startswith("2 MiB on cuda:0 at the peak, where 1 were allowed")


@pytest.mark.parametrize("free", [12, 24, 32, 48, 80])
def test_what_is_planned_leaves_room_for_the_rest(free):
    placement = place(free)
    planned = min(placement.weights, LLAMA_8B.weights) + (
        LLAMA_8B.activations if placement.activations is None else placement.activations
    )
    rest = LLAMA_8B.fixed + LLAMA_8B.solver
    assert planned + rest <= 0.75 * free * GIB or planned == FEW  # less than a few blocks is not possible


def test_a_model_that_is_on_the_device_is_never_streamed_and_not_held_twice():
    for free in (80, 16):
        placement = place(free, AT_HOME)
        assert not placement.streamed and placement.weights == 4 * GIB and "weights stay there" in placement.summary
    assert place(80, AT_HOME).activations is None and place(16, AT_HOME).activations < AT_HOME.activations


def test_on_a_cpu_only_the_block_in_use_and_its_neighbours_have_other_weights():
    """These are memory of its own, where the float weights may be mapped from files."""
    placement = placing.place(torch.device("cpu"), None, AT_HOME, FEW, None, None)
    assert placement.weights == FEW and not placement.streamed and placement.activations is None


def test_what_is_asked_for_is_done():
    assert place(80, weights=True).weights == FEW and place(80, weights=True).activations is None
    assert place(80, activations=True).activations == 0 and place(80, activations=True).weights == UNLIMITED
    nothing = Needs(
        weights=0, fixed=0, solver=0, forward=0, activations=0, batch=0
    )  # small batches are not seen in the plan
    assert placing.place(CUDA, GIB, nothing, 0, None, True).activations == 0
    neither = place(8, weights=False, activations=False)
    assert neither.weights == UNLIMITED and neither.activations is None and not neither.limited


def test_the_solver_needs_most_where_most_is_solved_together_and_a_cpu_fits_every_model():
    model = nn.ModuleDict(
        {"a": nn.Linear(64, 32), "b": nn.Linear(64, 96), "c": nn.ModuleDict({"d": nn.Linear(64, 32)})}
    )
    targets, _ = find_targets(Structure.of(model), QuantizeConfig(group_size=32))
    one, _ = find_targets(Structure.of(model["c"]), QuantizeConfig(group_size=32))
    n = 64 * 64 * 12
    assert placing.solver_bytes(targets) == n + 64 * 128 * 30 and placing.solver_bytes(one) == n + 64 * 32 * 30
    best, _ = find_targets(Structure.of(model), QuantizeConfig(group_size=32, method="best"))
    assert placing.solver_bytes(best) == 64 * 64 * 36 + 64 * 128 * 45  # the chunk's tensors are of all rows here
    assert placing.fixed_bytes(one, torch.device("cpu"), 8) == 64 * 32 // 2
    assert placing.bytes_away(model, torch.device("cpu")) == 0 and placing.fits(model, torch.device("cpu"))
    assert placing.bytes_away(model, CUDA) == sum(p.nbytes for p in model.parameters())


def room_for(free, most, needs=LLAMA_8B, **asked):
    return placing.room_for(
        None if free is None else free * GIB, needs, most, lambda needs: place(free, needs, **asked)
    )


def test_batches_run_together_as_far_as_nothing_else_has_to_wait_for_that():
    assert room_for(1000, 8) == 8 and room_for(1000, 1) == 1 and room_for(1000, 0.3) == 1
    tight = Needs(weights=0, fixed=0, solver=0, forward=2 * GIB, activations=40 * GIB, batch=GIB)
    assert room_for(80, 16, tight) == pytest.approx(80 / 3 / 2 / 2)  # 13.3 times leave less than 40 GiB, 6.7 do not
    assert place(80, tight.joined(room_for(80, 16, tight))).activations is None
    streamed = room_for(32, 8)
    assert place(32).streamed and 1 < streamed < 8 and streamed * LLAMA_8B.forward <= 32 * GIB / 3
    assert room_for(24, 8) == 1  # activations wait on the CPU
    assert room_for(1000, 8, activations=True) == 1 and room_for(None, 8) == 1


def test_a_model_that_fits_is_not_streamed_for_larger_batches():
    needs = Needs(weights=30 * GIB, fixed=0, solver=0, forward=GIB, activations=10 * GIB, batch=GIB)
    assert not place(80, needs).streamed
    times = room_for(80, 26, needs)
    assert 1 < times < 26 and not place(80, needs.joined(times)).streamed
