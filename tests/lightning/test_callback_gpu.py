"""GPTQCallback in real Trainer.fit runs on a GPU."""

from __future__ import annotations

import os
import subprocess
import sys

import peft
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader
from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainingArguments

from gptq_plugin import GPTQCallback, GPTQTrainerCallback, QuantizeModule, load_quantized

from lightning_runs import DDP, FAULTS, SMALL, Holds, fit, quantized, token_loader
from paths import SUPPORT
from ports import reserved_port

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed", "bf16-true"])
def test_a_run_on_a_gpu_is_quantized_on_it(precision, tmp_path):
    module = Holds()
    devices = []

    class Watching(GPTQCallback):
        def calibration_data(self, trainer):
            devices.append(trainer.lightning_module.device.type)
            return super().calibration_data(trainer)

    trainer = fit(
        module, token_loader(), [Watching(QuantizeModule(**SMALL), tmp_path / "out")], tmp_path,
        accelerator="gpu", precision=precision,
    )  # fmt: skip
    assert devices == ["cuda", "cuda"]  # the rehearsal before training, and the quantization after it
    assert len(quantized(module)) == 7
    assert trainer.test(module, token_loader(), verbose=False)[0]["train_loss"] > 0
    ids = torch.arange(8, device="cuda")[None]
    assert load_quantized(tmp_path / "out", device="cuda").generate(ids, max_new_tokens=2).shape == (1, 10)


@pytest.mark.parametrize("weights", ["last", "best", "path"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed", "bf16-true"])
def test_the_weights_asked_for_are_quantized_at_every_precision_on_a_gpu(precision, weights, tmp_path):
    class Worse(Holds):
        """Whose first epoch is its best: what training ends with are other weights."""

        def training_step(self, batch, batch_idx):
            self.log("worse", float(self.current_epoch), on_epoch=True)
            return self.model(**batch).loss

    saved = ModelCheckpoint(tmp_path, "{epoch}", monitor="worse", save_last=True, save_top_k=-1)
    first = fit(
        Worse(), token_loader(), [saved], tmp_path, max_epochs=2, enable_checkpointing=True, accelerator="gpu",
        precision=precision,
    )  # fmt: skip
    assert first.checkpoint_callback.best_model_path.endswith("epoch=0.ckpt")
    path = {"last": tmp_path / "last.ckpt", "best": saved.best_model_path, "path": tmp_path / "epoch=0.ckpt"}[weights]
    wanted = torch.load(path, map_location="cpu", weights_only=False)["state_dict"]
    module = Worse()
    again = ModelCheckpoint(tmp_path / "again", "{epoch}", monitor="worse", save_top_k=-1)
    callback = GPTQCallback(
        QuantizeModule(**SMALL, bits=8), weights=str(path) if weights == "path" else weights, validate=False
    )
    fit(
        module, token_loader(), [again, callback], tmp_path, max_epochs=2, enable_checkpointing=True,
        accelerator="gpu", precision=precision,
    )  # fmt: skip
    path = tmp_path / ("epoch=0.ckpt" if weights == "last" else "last.ckpt")
    other = torch.load(path, map_location="cpu", weights_only=False)["state_dict"]
    for name in quantized(module):
        found = module.get_submodule(name).dequantize(torch.float32).cpu()
        off = [(found - state[f"{name}.weight"].float()).abs().mean() for state in (wanted, other)]
        assert off[0] < off[1], name


def wide(adapters):
    """Large enough for its weights and activations to be what takes the memory."""
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model("llama", hidden_size=1024, intermediate_size=2816, num_hidden_layers=4,
                             num_attention_heads=8, num_key_value_heads=4, vocab_size=64)
    )  # fmt: skip
    return peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear")) if adapters else model


def long_samples():
    ids = torch.randint(0, 64, (64, 512), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row, "labels": row} for row in ids]


@pytest.mark.parametrize("adapters", [False, True])
def test_nor_does_it_under_a_transformers_trainer_and_the_model_is_back_on_the_gpu(adapters, tmp_path):
    peaks = {}

    class Watching(GPTQTrainerCallback):
        def on_train_end(self, *arguments, **training):
            peaks["training"] = torch.cuda.max_memory_allocated()
            super().on_train_end(*arguments, **training)
            peaks["quantization"] = torch.cuda.max_memory_allocated()

    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    callback = Watching(QuantizeModule(nsamples=64), tmp_path / "out")
    options = TrainingArguments(tmp_path / "run", max_steps=3, per_device_train_batch_size=8, report_to=[],
                                save_strategy="no", disable_tqdm=True)  # fmt: skip
    trainer = Trainer(wide(adapters), options, train_dataset=long_samples(), callbacks=[callback])
    trainer.train()
    assert peaks["quantization"] <= peaks["training"]
    assert {parameter.device.type for parameter in trainer.model.parameters()} == {"cuda"}
    report = callback.report
    told = {name: f"{value / 2**20:.0f} MiB" for name, value in peaks.items()}
    print(told, report.seconds["total"], report.batch_size)


@pytest.mark.parametrize(("adapters", "weights"), [(False, "last"), (False, "best"), (True, "last")])
def test_quantization_takes_no_more_of_a_gpu_than_training_did(adapters, weights, tmp_path):
    class Wide(Holds):
        def __init__(self):
            super().__init__()
            self.model = wide(adapters)

    peaks = {}

    class Watching(GPTQCallback):
        def on_train_end(self, trainer, pl_module):
            super().on_train_end(trainer, pl_module)
            peaks["training"] = torch.cuda.max_memory_allocated()
            torch.cuda.reset_peak_memory_stats()

        def on_fit_end(self, trainer, pl_module):
            super().on_fit_end(trainer, pl_module)
            peaks["quantization"] = torch.cuda.max_memory_allocated()  # its own look at the peak starts later

    loader = DataLoader(long_samples(), batch_size=8)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    callback = Watching(QuantizeModule(nsamples=64), tmp_path / "out", weights=weights)
    checkpoint = ModelCheckpoint(tmp_path / "checkpoints", monitor="train_loss")
    fit(Wide(), loader, [checkpoint, callback], tmp_path, enable_checkpointing=True, accelerator="gpu")
    assert peaks["quantization"] <= peaks["training"]
    assert not [d for d in callback.report.deviations if "at the peak" in d]
    report = callback.report
    told = {name: f"{value / 2**20:.0f} MiB" for name, value in peaks.items()}
    print(told, report.seconds["total"], report.batch_size)


def codes_are_those_of_one_rank(folder):
    one = torch.load(folder / "1" / "rank0.pt", map_location="cpu")
    first, second = (torch.load(folder / "2" / f"rank{rank}.pt", map_location="cpu") for rank in (0, 1))
    assert all(torch.equal(first[key], second[key]) for key in first)
    codes = [key for key in one if key.endswith("qweight")]
    assert len(codes) == 7
    same = [(one[key] == first[key]).float().mean().item() for key in codes]  # words of eight codes
    print(f"words that are the same: {min(same):.5f}")
    return min(same) > 0.99  # another order of addition may flip a near tie


def command(folder, ranks, accelerator):
    (folder / "script.py").write_text(DDP)
    return [sys.executable, folder / "script.py", SUPPORT, folder, str(ranks), accelerator, "24"]


def test_two_processes_on_one_gpu_give_the_codes_of_one(tmp_path):
    for ranks in (1, 2):
        shared = command(tmp_path, ranks, "shared gpu")
        with reserved_port() as port:
            places = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_RANK": "0"} if ranks > 1 else {}
            running = [
                subprocess.Popen(shared, cwd=tmp_path, env={**os.environ, **places, "NODE_RANK": str(rank)})
                for rank in range(ranks)
            ]
            assert [process.wait(timeout=300) for process in running] == [0] * ranks
    assert codes_are_those_of_one_rank(tmp_path / "24")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_give_the_codes_of_one(tmp_path):
    for ranks in (1, 2):
        subprocess.run(command(tmp_path, ranks, "gpu"), check=True, timeout=300, cwd=tmp_path)
    assert codes_are_those_of_one_rank(tmp_path / "24")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("phase", ["calibration", "reduction", "solve", "export"])
def test_an_error_on_one_gpu_ends_both_with_its_message(phase, tmp_path):
    (tmp_path / "run.py").write_text(FAULTS)
    (tmp_path / f"raise-{phase}").mkdir()
    faulty = 0 if phase == "export" else 1
    command = [sys.executable, tmp_path / "run.py", SUPPORT, tmp_path, "2", "gpu", f"raise-{phase}"]
    with reserved_port() as port:
        ranks = [subprocess.Popen([*command, str(rank), str(port)]) for rank in range(2)]
        assert [process.wait(timeout=120) for process in ranks] == [1, 1]
    own, other = ((tmp_path / f"raise-{phase}" / f"{rank}.txt").read_text() for rank in (faulty, 1 - faulty))
    assert other == f"RankError: rank {faulty} failed: {own}"
