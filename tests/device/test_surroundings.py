"""What callers have set for their thread or their process changes no result, and is as it was afterwards."""

from __future__ import annotations

import ast
import contextlib
import subprocess
import threading

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from gptq_plugin import QuantizeModule, load_quantized
from gptq_plugin.check.lint import lint
from gptq_plugin.device.precision import full_precision
from gptq_plugin.device.surroundings import alone, plain_defaults
from gptq_plugin.errors import TargetError
from gptq_plugin.export.convert import convert

from forked_python import python
from models import tiny_llama
from paths import REPOSITORY

MAKING = {"tensor", "as_tensor", "arange", "zeros", "ones", "empty", "full", "eye", "randn", "rand", "randint",
          "randperm", "linspace"}  # fmt: skip


def meta():
    return torch.device("meta")


def autocast():
    return torch.autocast("cpu", torch.bfloat16)


@contextlib.contextmanager
def bfloat16():
    torch.set_default_dtype(torch.bfloat16)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def settings():
    initial = tuple(vars(nn.init)[name] for name in ("uniform_", "normal_", "kaiming_uniform_"))
    return torch.get_default_dtype(), torch.get_float32_matmul_precision(), torch.get_default_device(), initial


def small():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 32))


def inputs():
    return [torch.randn(50, 32, generator=torch.Generator().manual_seed(n)) for n in range(2)]


def quantized(model, folder=None):
    quantizer = QuantizeModule(bits=4, group_size=16)
    quantizer.quantize(model, inputs(), export_dir=folder)
    return quantizer


def on_threads(*calls):
    """Runs all at once; returns what each returned or raised."""
    results = [None] * len(calls)

    def run(number):
        try:
            results[number] = calls[number]()
        except BaseException as error:
            results[number] = error

    threads = [threading.Thread(target=run, args=(number,), daemon=True) for number in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    return results


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder, model = tmp_path_factory.mktemp("exported") / "small", small()
    quantized(model, folder)
    return folder, model


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("around", [meta, autocast, bfloat16])
def test_files_are_read_written_checked_and_converted_as_elsewhere(around, exported, tmp_path):
    folder, model = exported
    quantizer, again, before = quantized(mine := small()), small(), settings()
    with around():
        load_quantized(folder, model=again)
        quantizer.export(mine, tmp_path / "export")
        convert(folder, tmp_path / "converted", "compressed-tensors")
        found = lint(tmp_path / "converted")
    assert settings() == before
    assert not found.findings
    assert same(again.state_dict(), model.state_dict())
    assert (tmp_path / "export/model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    assert same(load_quantized(tmp_path / "converted", model=small()).state_dict(), model.state_dict())


@pytest.mark.parametrize("around", [meta, autocast])
def test_a_transformers_model_is_loaded_as_elsewhere(around, tmp_path):
    model = tiny_llama(num_hidden_layers=1)
    QuantizeModule(bits=4, group_size=32).round_to_nearest(model)
    QuantizeModule(bits=4, group_size=32).export(model, tmp_path / "llama")
    with around():
        again = load_quantized(tmp_path / "llama")
    assert same(again.state_dict(), model.state_dict())


@pytest.mark.parametrize(("around", "where"), [(meta, "on the meta device"), (FakeTensorMode, "FakeTensorMode")])
@pytest.mark.parametrize("how", ["quantize", "rehearse", "round_to_nearest"])
def test_quantization_where_tensors_have_no_values_is_refused(how, around, where):
    model, given = small(), [inputs()] if how != "round_to_nearest" else []
    with around(), pytest.raises(TargetError, match=rf"{where}.*outside"):
        getattr(QuantizeModule(bits=4, group_size=16), how)(model, *given)
    assert same(model.state_dict(), small().state_dict())


@pytest.mark.parametrize("how", ["quantize", "rehearse", "round_to_nearest"])
def test_a_model_without_values_is_refused(how):
    given = [inputs()] if how != "round_to_nearest" else []
    for around in (meta, FakeTensorMode):
        with around():
            model = small()
        with pytest.raises(TargetError, match=r"no values|FakeTensor, which may multiply"):
            getattr(QuantizeModule(bits=4, group_size=16), how)(model, *given)


def test_files_are_neither_read_nor_written_in_fake_tensor_mode(tmp_path):
    model = small()
    quantizer = QuantizeModule(bits=4, group_size=16)
    quantizer.round_to_nearest(model)
    folder = quantizer.export(model, tmp_path / "export")
    for call in (
        lambda: load_quantized(folder, model=small()),
        lambda: lint(folder),
        lambda: convert(folder, tmp_path / "converted", "gptq_v2"),
        lambda: quantizer.export(model, tmp_path / "again"),
    ):
        with FakeTensorMode(), pytest.raises(ValueError, match="outside of PyTorch's FakeTensorMode"):
            call()
    assert [one.name for one in tmp_path.iterdir()] == ["export"]


def test_every_tensor_that_the_package_makes_has_a_device_or_that_of_another():
    """A user's default device may be a GPU, and a generator's may not."""
    lacking = []
    for file in sorted((REPOSITORY / "src").rglob("*.py")):
        calls = [node for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]
        making = [call for call in calls if isinstance(call.func, ast.Attribute) and call.func.attr in MAKING]
        lacking += [
            f"{file.name}:{call.lineno}: {ast.unparse(call)}"
            for call in making
            if ast.unparse(call.func).startswith("torch.") and all(one.arg != "device" for one in call.keywords)
        ]
    assert lacking == []


def test_plain_defaults_change_no_other_thread():
    with meta(), autocast(), plain_defaults():
        assert torch.zeros(1).device.type == "cpu" and not torch.is_autocast_enabled("cpu")
        with plain_defaults():
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32
    assert torch.zeros(1).device.type == "cpu"
    with torch.device("meta"):
        assert on_threads(lambda: torch.zeros(1).device.type) == ["cpu"]
        assert torch.zeros(1).is_meta


def test_precision_that_two_threads_lower_and_restore_is_right_in_both_and_as_before():
    """Without taking turns the first to leave would let the other compute in TF32, which then would leave float32."""
    first_is_in, first_may_go, seen = threading.Event(), threading.Event(), []

    def first():
        with alone("the first"), full_precision(torch.device("cpu")):
            first_is_in.set()
            first_may_go.wait(10)

    def second():
        first_is_in.wait(10)
        threading.Timer(0.05, first_may_go.set).start()
        with alone("the second"), full_precision(torch.device("cpu")):
            seen.append((torch.get_float32_matmul_precision(), first_may_go.is_set()))

    torch.set_float32_matmul_precision("medium")
    try:
        assert on_threads(first, second) == [None, None]
        assert seen == [("highest", True)]
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_a_turn_inside_a_turn_is_entered_at_once_and_a_failed_one_is_over():
    with pytest.raises(ValueError, match="cut"), alone("a"), alone("b"):
        raise ValueError("cut")
    with alone("a"):
        pass
    assert on_threads(lambda: alone("c").__enter__()) == [None]


def test_a_process_that_was_forked_meanwhile_has_a_turn_of_its_own():
    """In an interpreter of its own: a fork of one with the threads and locks of all other tests may crash or hang."""
    code = """
import os, signal, threading
from gptq_plugin.device.surroundings import alone

ended = []

def fork():
    child = os.fork()
    if child == 0:
        signal.alarm(5)  # ends it where it waits
        with alone("the child"):
            os._exit(0)
    ended.append(os.waitpid(child, 0)[1])

with alone("the parent"):
    thread = threading.Thread(target=fork)
    thread.start()
    thread.join()
assert ended == [0], ended
"""
    run = subprocess.run([python(), "-c", code], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr


def test_of_two_threads_on_one_model_one_quantizes_and_the_other_learns_that_it_is():
    for _ in range(2):
        model = small()
        results = on_threads(*[lambda model=model: quantized(model).report] * 2)
        refused = [result for result in results if isinstance(result, TargetError)]
        assert len(refused) == 1 and "quantized already" in str(refused[0])
        assert same(model.state_dict(), (quantized(reference := small()), reference.state_dict())[1])


def test_two_threads_quantize_two_models_as_one_does():
    models, before = [small(), small()], settings()
    results = on_threads(*[lambda model=model: quantized(model) for model in models])
    assert not any(isinstance(result, Exception) for result in results)
    quantized(reference := small())
    assert all(same(model.state_dict(), reference.state_dict()) for model in models)
    assert settings() == before


def test_threads_that_load_at_once_leave_transformers_and_pytorch_as_they_were(tmp_path):
    """transformers' own from_pretrained left the default dtype of 28 of 30 such groups at bfloat16."""
    model = tiny_llama(num_hidden_layers=1).bfloat16()
    QuantizeModule(bits=4, group_size=32).round_to_nearest(model)
    QuantizeModule(bits=4, group_size=32).export(model, tmp_path / "llama")
    before = settings()
    for _ in range(4):
        loaded = on_threads(*[lambda: load_quantized(tmp_path / "llama")] * 3)
        assert all(same(one.state_dict(), model.state_dict()) for one in loaded)
        assert settings() == before


def test_a_forward_may_take_a_turn_while_it_is_calibrated():
    """To load a part of itself, say. It runs on a thread of the walk, which has its turn already."""

    class Loading(nn.Linear):
        def forward(self, x):
            with alone("the forward"):
                return super().forward(x)

    assert len(quantized(nn.Sequential(Loading(32, 32), nn.Linear(32, 32))).report.quantized) == 2
