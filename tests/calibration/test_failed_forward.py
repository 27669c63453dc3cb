"""A batch that a forward does not take is told with the error, the batch and what to change; other errors are left."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn

from gptq_plugin import QuantizeModule
from gptq_plugin.errors import CalibrationError
from gptq_plugin.walk import groups

X = torch.randn(16, 32)
GOOD = [X] * 8


class Keyed(nn.Module):
    """Takes a mapping whole."""

    def __init__(self) -> None:
        super().__init__()
        self.net = plain()

    def forward(self, batch):
        return self.net(batch["x"])


def plain() -> nn.Module:
    return nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32))


@pytest.mark.parametrize(
    ("make", "batches", "message"),
    [
        (plain, [{"a": X}], r"Sequential\.forward raised TypeError for a calibration batch \(keys a\).*not dict"),
        (plain, [["a", 2.5]], r"batch \(list of 2, the first a str\).*not str"),
        (plain, [b"a"], r"batch \(bytes\).*not bytes"),
        (plain, [object()], r"batch \(object\)"),
        (plain, [X[:, :31]], r"batch \(tensor \(16, 31\) torch\.float32\): mat1 and mat2 shapes cannot be multiplied"),
        (plain, [X.half()], r"torch\.float16\).*same dtype"),
        (plain, [X.to(torch.complex64)], r"torch\.complex64\)"),
        (plain, [torch.randn(32, 32), *GOOD[1:], {"a": X}], r"batch \(keys a\).*not dict"),
        (Keyed, [{"y": X}], r"Keyed\.forward raised KeyError for a calibration batch \(keys y\): 'x'\. Give batches"),
        (plain, [{"k" * 10**5: X}], r"keys k{200}…\)"),
    ],
    ids=["mapping", "texts", "bytes", "object", "width", "dtype", "complex", "a later one", "another key", "long key"],
)  # fmt: skip
def test_a_batch_that_a_plain_module_does_not_take_is_told(make, batches, message):
    quantizer, model = QuantizeModule(group_size=16, nsamples=10**6), make()
    with pytest.raises(CalibrationError, match=message) as told:
        quantizer.quantize(model, batches)
    assert "forward=lambda model, batch" in str(told.value) and len(str(told.value)) < 2000
    assert told.value.__cause__ is not None and isinstance(model[0] if make is plain else model.net[0], nn.Linear)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (torch.nested.nested_tensor([X[:3], X[:4]], layout=torch.jagged), "nested tensor.*pad them"),
        ({"x": X.to("meta")}, "meta device, .*which has no values"),
    ],
    ids=["nested", "meta"],
)
def test_tensors_without_values_or_shape_are_refused(batch, message):
    for call in ("quantize", "rehearse"):
        with pytest.raises(CalibrationError, match=message):
            getattr(QuantizeModule(group_size=16), call)(plain(), [batch])


def test_a_layer_that_gets_sparse_tensors_stays_float_with_the_reason():
    model = plain()
    report = QuantizeModule(group_size=16).quantize(model, [X.to_sparse()] * 8)
    assert isinstance(model[0], nn.Linear) and not isinstance(model[2], nn.Linear)
    assert "torch.sparse_coo" in next(module.reason for module in report.modules if module.name == "0")


def test_a_forward_of_the_users_own_is_named():
    with pytest.raises(CalibrationError, match=r"^forward\(model, batch\) raised ZeroDivisionError .*: division"):
        QuantizeModule(group_size=16).quantize(plain(), GOOD, forward=lambda model, batch: 1 / 0)


NO_ROOM = RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")


def failed(error):
    def fails(*_):
        raise error

    with pytest.raises((type(error), torch.OutOfMemoryError)) as told:
        QuantizeModule(group_size=16).quantize(plain(), GOOD, forward=fails)
    return told.value


@pytest.mark.parametrize("error", [MemoryError("no room"), OSError("no disk")])
def test_errors_that_no_batch_causes_are_left_as_they_are(error):
    assert failed(error) is error


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no room"), NO_ROOM])
def test_a_forward_without_room_is_not_blamed_on_the_batch(error):
    told = failed(error)
    assert type(told) is torch.OutOfMemoryError and told.__cause__ is error and str(error) in str(told)
    assert str(told).startswith("a forward of calibration samples (16) lacked memory on cpu; the model is as it was")


def test_an_error_of_this_packages_hooks_is_not_blamed_on_the_batch(monkeypatch):
    for mistake in (functools.partial(int, "x"), functools.partial(torch.utils.weak.TensorWeakRef, 1)):
        monkeypatch.setattr(groups, "SeenInput", mistake)
        with pytest.raises(TypeError) as told:
            QuantizeModule(group_size=16).quantize(plain(), GOOD)
        assert type(told.value) is TypeError
