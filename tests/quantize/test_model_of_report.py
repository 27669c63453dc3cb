"""A report is written to for its own model alone."""

from __future__ import annotations

import copy
import gc
import pickle

import torch
from torch import nn

from gptq_plugin import Finish, QuantizeModule
from gptq_plugin.quantize.model_of_report import ModelOfReport

from finish_cases import FAST, quantized, rows, state_of


def test_a_finish_of_another_model_leaves_the_report_alone():
    """As it was before: that of the model that was quantized last."""
    model, twin, quantizer = quantized()
    other = QuantizeModule(bits=2, group_size=32, nsamples=32)
    first, _, _ = quantized(bits=4)
    other.quantize(copy.deepcopy(twin), rows())
    assert first is not model
    report = copy.deepcopy(other.report)
    record = other.finish(model, twin, rows(), Finish(**FAST))
    assert record.kept and other.report.finish is None
    assert other.report.deviations == report.deviations and "finish" not in other.report.seconds
    before = state_of(model)
    other.undo_finish("not wanted")
    assert other.report.finish is None
    assert any(not torch.equal(before[name], tensor) for name, tensor in state_of(model).items())
    assert quantizer.finish(model, twin, rows(), Finish(**FAST)) is quantizer.report.finish


def test_it_does_not_keep_the_model():
    model = nn.Linear(2, 2)
    reported = ModelOfReport(model)
    assert reported.is_of(model) and not reported.is_of(nn.Linear(2, 2)) and not ModelOfReport().is_of(model)
    del model
    gc.collect()
    assert reported._model() is None and not reported.is_of(nn.Linear(2, 2))


def test_copies_know_the_copied_model_or_else_the_same_and_pickles_none():
    model = nn.Linear(2, 2)
    reported = ModelOfReport(model)
    copied, its = copy.deepcopy((model, reported))
    assert its.is_of(copied) and not its.is_of(model)
    assert copy.deepcopy(reported).is_of(model)
    assert not pickle.loads(pickle.dumps(reported)).is_of(model)
