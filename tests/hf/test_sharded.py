"""GPTQTrainerCallback where accelerate shards the model: real runs of two gloo processes on the CPU, one on a GPU."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace

import peft
import pytest
import sharded_trainer_runs as runs
import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from safetensors.torch import load_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM
from two_processes import launch

from gptq_plugin import load_quantized
from gptq_plugin.errors import TargetError
from gptq_plugin.finish.options import NONE, Finish
from gptq_plugin.hf.sharded import Whole, back_on, refuse_for_shards, sharding_of
from gptq_plugin.training.sharding import Sharding

pytestmark = pytest.mark.slow

DEEPSPEED = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="needs DeepSpeed and a C++ compiler"
)
KINDS = ["fsdp1", "fsdp2", pytest.param("zero3", marks=DEEPSPEED)]


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """Returns a function that runs a kind once, and gives the folder of all runs."""
    folder, done = tmp_path_factory.mktemp("sharded"), set()

    def of(kind):
        if kind not in done:
            more = {"DS_ACCELERATOR": "cpu", "ACCELERATE_USE_DEEPSPEED": "true"} if kind == "zero3" else {}
            launch("sharded_trainer_runs", "main", folder, kind, **more)
            done.add(kind)
        return folder

    return of


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The same weights quantized in a run on one rank."""
    folder = tmp_path_factory.mktemp("whole")
    runs.alone(folder)
    return folder / "alone"


def told(folder, name):
    return [json.loads(path.read_text()) for path in sorted((folder / name).glob("rank*.json"))]


def assert_is_export_of(folder, whole):
    here, there = (load_file(at / "export" / "model.safetensors") for at in (folder, whole))
    assert here.keys() == there.keys()
    for key in there:
        if key.endswith(".qweight"):  # another order of addition may flip a near tie
            assert (here[key] == there[key]).float().mean() >= 0.97, key
        elif not key.endswith(("scales", "qzeros")):
            assert torch.equal(here[key], there[key]), key


@pytest.mark.parametrize("kind", KINDS)
def test_the_export_is_that_of_the_whole_model(kind, out, whole):
    assert_is_export_of(out(kind) / kind, whole)
    for one in told(out(kind), kind):
        assert one["error"] == "" and one["samples"] == 17 and one["folders"] == 0
        assert one["kind"] == ("DEEPSPEED" if kind == "zero3" else "FSDP")
    assert load_quantized(out(kind) / kind / "export").generate(torch.arange(4)[None], max_new_tokens=2).shape == (1, 6)


@pytest.mark.parametrize("kind", KINDS)
def test_calibration_runs_on_plain_modules_whose_weights_lie_in_files(kind, out):
    for one in told(out(kind), kind):
        assert one["seen"]["kinds"] == ["Tensor"] and one["seen"]["mapped"]
        assert not any("FSDP" in name or "Wrapper" in name for name in one["seen"]["classes"])


@pytest.mark.parametrize("kind", KINDS)
def test_metrics_before_and_after_are_those_of_the_whole_model_and_it_computes_as_before(kind, out, whole):
    (reference,) = told(whole.parent, "alone")
    for one in told(out(kind), kind):
        found, expected = one["metrics"]["eval_loss"], reference["metrics"]["eval_loss"]
        assert found["float"] == pytest.approx(expected["float"], rel=1e-5)
        assert found["gptq"] != found["float"] and found["gptq"] == pytest.approx(expected["gptq"], rel=1e-3)
        assert one["loss"] == pytest.approx(found["float"], rel=1e-4) and one["left"] == 0


def test_the_model_stays_sharded_and_is_saved_by_the_trainer(out):
    assert [one["kinds"] for one in told(out("fsdp2"), "fsdp2")] == [["DTensor"]] * 2
    saved, expected = AutoModelForCausalLM.from_pretrained(out("fsdp2") / "fsdp2" / "saved"), runs.llama()
    for (name, ours), theirs in zip(saved.named_parameters(), expected.parameters(), strict=True):
        assert torch.equal(ours, theirs), name


def test_mixed_precision_and_evaluation_data_are_those_of_the_run_and_metrics_are_of_the_weights_dtype(out, whole):
    (reference,) = told(whole.parent, "alone")
    for one in told(out("fsdp2"), "bf16-val"):
        found, expected = one["metrics"]["eval_loss"], reference["metrics"]["eval_loss"]
        assert found["float"] == pytest.approx(expected["float"], rel=1e-6) and found["gptq"] != expected["gptq"]
        assert one["error"] == "" and one["samples"] == 17 and one["folders"] == one["left"] == 0
    assert (out("fsdp2") / "bf16-val" / "export" / "model.safetensors").exists()


def test_a_failure_after_training_leaves_the_model_as_training_had_it_and_saves_it_whole(out):
    for one in told(out("fsdp2"), "nan"):
        assert "NaN or infinity" in one["error"] and "(rank 1)" in one["error"]
        assert one["steps"] == 2 and one["kinds"] == ["DTensor"] and one["left"] == one["folders"] == 0
    assert not (out("fsdp2") / "nan" / "export").exists()
    saved = AutoModelForCausalLM.from_pretrained(out("fsdp2") / "nan" / "run" / "trained-2")
    assert all(torch.equal(a, b) for a, b in zip(saved.parameters(), runs.llama().parameters(), strict=True))


def test_every_attempt_of_an_escalation_begins_with_the_float_weights(out):
    for one in told(out("fsdp2"), "never-good"):
        assert "QualityError" in one["error"] and "nor is the other one tried within max_bits=5" in one["error"]
        assert one["left"] == one["folders"] == 0 and one["kinds"] == ["DTensor"]


def test_what_needs_a_whole_model_is_refused_before_training_on_every_rank(out):
    for one in told(out("fsdp2"), "swap"):
        assert one["steps"] == 0 and "leave swap out" in one["error"]


@pytest.mark.parametrize(
    ("values", "message"),
    [({"export_dir": None}, "give an export_dir"), ({"finish": Finish()}, "model.name_or_path=DIR finish=")],
)
def test_an_export_folder_is_needed_and_a_finish_refused_where_the_model_is_sharded(values, message, monkeypatch):
    AcceleratorState()
    given, model = {"swap": None, "export_dir": Path("out"), "finish": NONE, **values}, runs.llama()
    refuse_for_shards(model, **given)
    monkeypatch.setitem(PartialState._shared_state, "distributed_type", DistributedType("FSDP"))
    with pytest.raises(ValueError, match=message):
        refuse_for_shards(model, **given)


def test_a_whole_model_is_on_its_device_again_also_after_an_error_and_a_sharded_one_stays():
    model = nn.Linear(2, 2)
    with pytest.raises(KeyError), back_on(Whole(model), torch.device("cpu")):
        moves, model.to = [], lambda device: moves.append(device)
        raise KeyError
    with back_on(Whole(model, files=object()), torch.device("cpu")):
        pass
    assert moves == [torch.device("cpu")]


def test_sharded_tensors_that_accelerate_did_not_make_and_its_other_kinds_are_refused(tmp_path, monkeypatch):
    AcceleratorState()
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = runs.llama()
        assert sharding_of(model) is None
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        with pytest.raises(NotImplementedError, match=r"another kind \(NO\).*save_model"):
            sharding_of(model)
        monkeypatch.setitem(PartialState._shared_state, "distributed_type", DistributedType("FSDP"))
        assert type(sharding_of(model)) is Sharding
        with pytest.raises(NotImplementedError, match=r"another kind \(FSDP compiled\)"):
            sharding_of(torch.compile(model))
        monkeypatch.setitem(AcceleratorState._shared_state, "parallelism_config", SimpleNamespace(tp_enabled=True))
        with pytest.raises(NotImplementedError, match=r"another kind \(FSDP, tp\)"):
            sharding_of(model)
    finally:
        torch.distributed.destroy_process_group()


def test_adapters_on_a_sharded_model_are_refused(tmp_path, monkeypatch):
    AcceleratorState()
    model = peft.get_peft_model(runs.llama(), peft.LoraConfig(target_modules=["q_proj"]))
    refuse_for_shards(model, None, tmp_path, NONE)
    monkeypatch.setitem(PartialState._shared_state, "distributed_type", DistributedType("FSDP"))
    with pytest.raises(TargetError, match="adapter=DIR; or train with DDP"):
        refuse_for_shards(model, None, tmp_path, NONE)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["fsdp1", "fsdp2"])
def test_the_export_on_gpus_is_that_of_the_whole_model_on_one(kind, tmp_path):
    launch("sharded_trainer_runs", "main", tmp_path, kind, ranks=min(2, torch.cuda.device_count()))
    launch("sharded_trainer_runs", "alone", tmp_path, ranks=1)
    assert_is_export_of(tmp_path / kind, tmp_path / "alone")
    assert all(one["error"] == "" and one["kind"] == "FSDP" for one in told(tmp_path, kind))
