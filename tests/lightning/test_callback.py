"""GPTQCallback in real Trainer.fit runs, on one process and on two."""

from __future__ import annotations

import csv
import json
import runpy
import subprocess
import sys
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import (
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader

from gptq_plugin import GPTQCallback, QuantizeModule, load_quantized
from gptq_plugin.errors import CalibrationError, ExportError, TargetError

from forked_python import python
from lightning_runs import (
    DDP,
    SMALL,
    Base,
    Contains,
    Holds,
    Is,
    Normed,
    Plain,
    fit,
    llama,
    pair_loader,
    quantized,
    token_loader,
)
from paths import SUPPORT


@pytest.mark.parametrize(("kind", "where"), [(Holds, "model"), (Is, ""), (Contains, "net.backbone.0")])
def test_the_transformers_model_is_found_quantized_and_exported(kind, where, tmp_path, caplog):
    module = kind()
    callback = GPTQCallback(QuantizeModule(**SMALL), export_dir=tmp_path / "out")
    fit(module, token_loader(), [callback], tmp_path)
    model = module.get_submodule(where)
    assert len(quantized(model)) == 7 and len(callback.report.quantized) == 7
    assert callback.report.samples == 16 and callback.report.tokens == 16 * 16
    reloaded = load_quantized(tmp_path / "out")
    ids = torch.arange(12)[None]
    with torch.no_grad():
        torch.testing.assert_close(reloaded(input_ids=ids).logits, model.eval()(input_ids=ids).logits)
    assert reloaded.generate(ids, max_new_tokens=3, do_sample=False).shape == (1, 15)
    said = "net.head.weight" in caplog.text
    assert said == (kind is Contains)  # what the export leaves out is said


def test_a_plain_module_is_quantized_exported_and_loaded_into_a_fresh_one(tmp_path):
    module = Plain()
    fit(
        module,
        pair_loader(),
        [GPTQCallback(QuantizeModule(**SMALL | {"nsamples": 128}), tmp_path / "out")],
        tmp_path,
    )
    assert quantized(module) == ["net.0", "net.2"]
    fresh = load_quantized(tmp_path / "out", model=Plain())
    x = torch.randn(5, 64)
    torch.testing.assert_close(fresh(x), module(x))


def test_swap_false_exports_and_leaves_the_trained_float_weights(tmp_path):
    module, twin = Holds(), Holds()
    fit(twin, token_loader(), [], tmp_path)
    callback = GPTQCallback(QuantizeModule(**SMALL), tmp_path / "out", swap=False)
    fit(module, token_loader(), [callback], tmp_path)
    assert quantized(module) == []
    for (name, a), b in zip(module.state_dict().items(), twin.state_dict().values()):
        assert torch.equal(a, b), name
    assert len(quantized(load_quantized(tmp_path / "out"))) == 7


def test_the_trainer_tests_the_quantized_module(tmp_path):
    module = Holds()
    trainer = fit(module, token_loader(), [GPTQCallback(QuantizeModule(**SMALL))], tmp_path)
    assert len(quantized(module)) == 7
    assert trainer.test(module, token_loader(), verbose=False)[0]["train_loss"] > 0


def test_training_itself_is_not_changed_by_the_callback(tmp_path):
    """The same random numbers are drawn, so the weights that get quantized are the ones plain training gives."""
    plain, with_callback = Holds(), Holds()
    for module, callbacks in (
        (plain, []),
        (with_callback, [GPTQCallback(QuantizeModule(**SMALL), tmp_path / "o", swap=False)]),
    ):
        torch.manual_seed(5)
        fit(module, token_loader(), callbacks, tmp_path, max_epochs=2)
    assert all(torch.equal(a, b) for a, b in zip(plain.state_dict().values(), with_callback.state_dict().values()))


def test_weights_averaged_at_the_end_of_training_are_what_is_quantized(tmp_path):
    swa = lambda: StochasticWeightAveraging(swa_lrs=1e-2, swa_epoch_start=1)  # noqa: E731
    module, twin = Holds(), Holds()
    checkpoint = ModelCheckpoint(dirpath=tmp_path / "ckpt", save_last=True)
    fit(twin, token_loader(), [swa()], tmp_path, max_epochs=3)
    fit(
        module,
        token_loader(),
        [callback := GPTQCallback(QuantizeModule(**SMALL), tmp_path / "o", swap=False), swa(), checkpoint],
        tmp_path,
        max_epochs=3,
        enable_checkpointing=True,
    )
    assert Path(checkpoint.last_model_path).exists() and callback.report.float_checkpoint == ""  # saved before
    averaged = twin.model.model.layers[0].mlp.up_proj.weight
    assert torch.equal(module.model.model.layers[0].mlp.up_proj.weight, averaged)
    layer = load_quantized(tmp_path / "o").model.layers[0].mlp.up_proj
    scale = layer.scales.float().max()
    assert (layer.dequantize(torch.float32) - averaged).abs().max() < 4 * scale


def test_checkpoints_hold_the_float_weights(tmp_path):
    checkpoint = ModelCheckpoint(dirpath=tmp_path / "ckpt", save_last=True)
    fit(
        Holds(),
        token_loader(),
        [GPTQCallback(QuantizeModule(**SMALL)), checkpoint],
        tmp_path,
        enable_checkpointing=True,
    )
    for file in (tmp_path / "ckpt").iterdir():
        keys = torch.load(file, weights_only=False)["state_dict"]
        assert "model.model.layers.0.mlp.up_proj.weight" in keys and not any("qweight" in key for key in keys)


def test_gradients_are_freed_before_quantization_and_optimizers_after_it(tmp_path):
    seen = []

    class Watching(GPTQCallback):
        def calibration_data(self, trainer):
            seen.append([p.grad for p in trainer.lightning_module.parameters()])
            return super().calibration_data(trainer)

    trainer = fit(Holds(), token_loader(), [Watching(QuantizeModule(**SMALL))], tmp_path)
    assert all(gradient is None for gradient in seen[-1])  # the first is the rehearsal before training
    assert trainer.optimizers == trainer.lr_scheduler_configs == []  # they would hold the float weights


@pytest.mark.parametrize("end", ["swap=False", "a failure"])
def test_optimizers_are_left_as_they_are_where_the_module_stays_float(end, tmp_path):
    class Late(Holds):
        def calibration_step(self, batch):
            if end == "a failure" and self.trainer.global_step:
                raise RuntimeError("late")
            return self.model(**batch)

    twin, module = Holds(), Late()
    wanted = fit(twin, token_loader(), [], tmp_path).optimizers
    swap = False if end == "swap=False" else None
    callback, kept = GPTQCallback(QuantizeModule(**SMALL), tmp_path / "out", swap=swap), Kept()
    if end == "a failure":
        with pytest.raises(CalibrationError, match="raised RuntimeError .*: late"):
            fit(module, token_loader(), [kept, callback], tmp_path)
    else:
        fit(module, token_loader(), [kept, callback], tmp_path)
    (optimizer,) = kept.trainer.optimizers
    parameters = list(module.parameters())
    assert [id(p) for group in optimizer.param_groups for p in group["params"]] == [*map(id, parameters)]
    for one, other in zip(parameters, twin.parameters(), strict=True):
        assert torch.equal(optimizer.state[one]["exp_avg"], wanted[0].state[other]["exp_avg"])


class Kept(pl.Callback):
    """Keeps the trainer of a fit that fails."""

    def setup(self, trainer, pl_module, stage):
        self.trainer = trainer


def test_losses_damping_tokens_seconds_and_totals_reach_the_logger(tmp_path):
    logger = CSVLogger(tmp_path, name="log", version="run-7")
    callback = GPTQCallback(QuantizeModule(**SMALL))
    fit(Holds(), token_loader(), [callback], tmp_path, logger=logger)
    assert callback.report.run_id == "run-7"
    with open(Path(logger.log_dir) / "metrics.csv") as file:
        row = [r for r in csv.DictReader(file) if r.get("gptq/loss")][0]
    with open(Path(logger.log_dir) / "gptq" / "layers.csv") as file:
        layers = {layer["name"]: layer for layer in csv.DictReader(file)}
    for key in ("loss", "rtn_loss", "damp_percent", "tokens", "seconds"):
        assert float(layers["model.layers.0.self_attn.q_proj"][key]) > 0
    assert float(row["gptq/loss"]) == pytest.approx(callback.report.totals()["loss"])
    assert float(row["gptq/modules"]) == 7


def test_calibration_texts_and_a_tokenizer_may_be_given(tmp_path):
    callback = GPTQCallback(
        QuantizeModule(**SMALL, model_seqlen=32),
        calibration=["the quick brown fox jumps over the lazy dog"] * 8,
        tokenizer=lambda text: {"input_ids": [ord(c) % 64 for c in text]},
    )
    fit(Holds(), token_loader(), [callback], tmp_path)
    assert callback.report.samples == 8 and callback.report.tokens == 8 * 32


def test_a_calibration_step_decides_how_a_batch_is_run(tmp_path):
    class Custom(Holds):
        steps = 0

        def training_step(self, batch, batch_idx):
            return super().training_step({"input_ids": batch[0], "labels": batch[0]}, batch_idx)

        def calibration_step(self, batch):
            Custom.steps += 1
            return self.model(input_ids=batch[0])

    ids = torch.randint(0, 64, (24, 16))
    callback = GPTQCallback(QuantizeModule(**SMALL))
    fit(Custom(), DataLoader(torch.utils.data.TensorDataset(ids), batch_size=4), [callback], tmp_path)
    assert Custom.steps >= 1 + 1 + 4  # the rehearsal, one to learn the order, and four batches; others compare
    assert callback.report.tokens == 16 * 16


def test_module_chooses_what_is_quantized(tmp_path):
    module = Contains()
    fit(module, token_loader(), [GPTQCallback(QuantizeModule(**SMALL), module="")], tmp_path)
    # the head is never called by the transformers model that batches run through, and that is reported
    assert "net.backbone.0.model.layers.0.mlp.up_proj" in quantized(module)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "32-true"])
def test_the_trainers_precision_is_used(precision, tmp_path):
    dtypes = set()

    class Watching(Holds):
        def calibration_step(self, batch):
            out = self.model(**batch)
            dtypes.add(self.model.model.layers[0].mlp.up_proj(torch.ones(1, 64, dtype=self.dtype)).dtype)
            return out

    module = Watching()
    fit(
        module,
        token_loader(),
        [GPTQCallback(QuantizeModule(**SMALL), tmp_path / "out")],
        tmp_path,
        precision=precision,
    )
    assert dtypes == {torch.float32 if precision == "32-true" else torch.bfloat16}
    assert len(quantized(module)) == 7


def test_fast_dev_run_quantizes_nothing(tmp_path):
    module = Holds()
    callback = GPTQCallback(QuantizeModule(**SMALL), tmp_path / "out")
    fit(module, token_loader(), [callback], tmp_path, fast_dev_run=True)
    assert quantized(module) == [] and callback.report is None and not (tmp_path / "out").exists()


class Untrained(Holds):
    """Fails the test if a training step runs."""

    def training_step(self, batch, batch_idx):
        raise AssertionError("training began")


class TwoModels(Untrained):
    def __init__(self):
        super().__init__()
        self.teacher = llama()


class NothingToQuantize(Base):
    def __init__(self):
        super().__init__()
        self.net = nn.Conv1d(3, 3, 3)

    training_step = Untrained.training_step


@pytest.mark.parametrize(
    ("module", "fields", "options", "error", "message"),
    [
        (Untrained, {"dynamic": {"nothing": {"bits": 8}}}, {}, TargetError, "'nothing' matches none"),
        (
            Untrained,
            {},
            {"module": "body"},
            TargetError,
            "module='body' is not a submodule of Untrained, which has model",
        ),
        (NothingToQuantize, {}, {}, TargetError, "no nn.Linear"),
        (TwoModels, {}, {}, TargetError, r"several transformers models \(model, teacher\)"),
    ],
)
def test_what_cannot_work_is_refused_before_training(module, fields, options, error, message, tmp_path):
    callback = GPTQCallback(QuantizeModule(**{**SMALL, **fields}), tmp_path / "out", **options)
    with pytest.raises(error, match=message):
        fit(module(), token_loader(), [callback], tmp_path)
    assert not (tmp_path / "out").exists()


class NaNAtOnce(Untrained):
    def calibration_step(self, batch):
        return self.model(inputs_embeds=torch.full((4, 16, 64), float("nan")))


class Misfit(Untrained):
    def calibration_step(self, batch):
        return batch["input_ids"].float().mean()  # never reaches the model


@pytest.mark.parametrize(
    ("module", "calibration", "message"),
    [
        (Untrained, [], "the calibration set is empty"),
        (Untrained, iter([]), "the calibration set is empty"),
        (Untrained, ["a text"], "no tokenizer"),
        (Untrained, [[1, 2, 3]], "too short: 3 tokens in 1 samples"),
        (Untrained, [{"pixels": torch.zeros(1, 3)}], "does not fit"),
        (NaNAtOnce, None, "holds NaN or infinity in calibration batch 0"),
        (Misfit, None, "no calibration batch reached any of the 7 layers"),
    ],
    ids=["empty", "empty iterator", "texts", "short", "misfit", "NaN", "unreached"],
)
def test_calibration_that_cannot_work_is_refused_before_training(module, calibration, message, tmp_path):
    callback = GPTQCallback(QuantizeModule(**SMALL), tmp_path / "out", calibration=calibration)
    with pytest.raises(CalibrationError, match=message):
        fit(module(), token_loader(), [callback], tmp_path)
    assert not (tmp_path / "out").exists()


def test_several_train_dataloaders_are_refused_before_training_with_the_remedy(tmp_path):
    loaders = {"a": token_loader(), "b": token_loader()}
    with pytest.raises(CalibrationError, match="give the callback calibration="):
        fit(Untrained(), loaders, [GPTQCallback(QuantizeModule(**SMALL))], tmp_path)


def test_padding_in_a_tuple_batch_is_masked_by_what_the_model_is_called_with(tmp_path):
    class Tuples(Holds):
        def training_step(self, batch, batch_idx):
            return self.calibration_step(batch).logits.square().mean()

        def calibration_step(self, batch):
            return self.model(input_ids=batch[0], attention_mask=batch[1])

    ids, mask = torch.randint(0, 64, (24, 16)), torch.ones(24, 16, dtype=torch.long)
    mask[:, 8:] = 0
    loader = DataLoader(torch.utils.data.TensorDataset(ids, mask), batch_size=4)
    callback = GPTQCallback(QuantizeModule(**SMALL))
    fit(Tuples(), loader, [callback], tmp_path)
    assert callback.report.tokens == 16 * 8
    with pytest.raises(CalibrationError, match="calibration_step"):  # which element is the mask is not guessed
        fit(type("NoStep", (Untrained,), {})(), loader, [GPTQCallback(QuantizeModule(**SMALL))], tmp_path)


@pytest.mark.parametrize("samples", [13, 1 + 16])
def test_a_last_batch_of_one_sample_is_a_batch_like_the_others(samples, tmp_path):
    callback = GPTQCallback(QuantizeModule(**SMALL | {"nsamples": 100}))
    rows = [{"input_ids": row, "labels": row} for row in torch.randint(0, 64, (samples, 16))]
    fit(Holds(), DataLoader(rows, batch_size=4), [callback], tmp_path)
    assert callback.report.samples == samples


def test_modules_around_the_quantized_one_are_not_changed_by_calibration(tmp_path):
    module, twin = Normed(), Normed()
    fit(twin, pair_loader(), [], tmp_path)
    callback = GPTQCallback(QuantizeModule(**SMALL | {"nsamples": 128}), tmp_path / "o", module="net", swap=False)
    fit(module, pair_loader(), [callback], tmp_path)
    for (name, a), b in zip(module.state_dict().items(), twin.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert module.norm.training == twin.norm.training


def test_two_callbacks_that_both_leave_the_module_quantized_are_refused(tmp_path):
    both = [GPTQCallback(QuantizeModule(**SMALL)), GPTQCallback(QuantizeModule(**SMALL, bits=3))]
    with pytest.raises(ValueError, match="give all but the last swap=False"):
        fit(Untrained(), token_loader(), both, tmp_path)
    both = [GPTQCallback(QuantizeModule(**SMALL, bits=b), tmp_path / str(b), swap=False) for b in (3, 4)]
    fit(Holds(), token_loader(), both, tmp_path)
    assert [callback.report.quantized[0].bits for callback in both] == [3, 4]


@pytest.mark.parametrize("what", ["default_root_dir", "ModelCheckpoint's folder"])
def test_an_export_folder_the_run_itself_writes_to_is_refused_before_training(what, tmp_path):
    callbacks: list[pl.Callback] = [GPTQCallback(QuantizeModule(**SMALL), tmp_path / "run")]
    options = {}
    if what == "default_root_dir":
        options["default_root_dir"] = tmp_path / "run"
    else:
        callbacks.append(ModelCheckpoint(dirpath=tmp_path / "run" / "checkpoints"))
        options["enable_checkpointing"] = True
    with pytest.raises(ExportError, match=what):
        fit(Untrained(), token_loader(), callbacks, tmp_path, **options)


def test_a_folder_that_was_taken_during_training_costs_nothing(tmp_path):
    class Intruder(pl.Callback):
        def on_train_end(self, trainer, pl_module):
            (tmp_path / "out").mkdir()
            (tmp_path / "out" / "other.txt").write_text("somebody else's")

    callback = GPTQCallback(QuantizeModule(**SMALL), tmp_path / "out")
    fit(Holds(), token_loader(), [Intruder(), callback], tmp_path)
    assert (tmp_path / "out" / "other.txt").read_text() == "somebody else's"
    assert callback.export_dir.parent == tmp_path and callback.export_dir != tmp_path / "out"
    assert len(quantized(load_quantized(callback.export_dir))) == 7
    assert any("exported to" in deviation for deviation in callback.report.all_deviations())


def test_an_export_folder_that_is_not_ours_is_refused_before_training_and_kept(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("three years of work")
    with pytest.raises(ExportError, match="not an export of gptq_plugin"):
        fit(Untrained(), token_loader(), [GPTQCallback(QuantizeModule(**SMALL), tmp_path / "out")], tmp_path)
    assert (tmp_path / "out" / "thesis.txt").read_text() == "three years of work"


def test_an_earlier_export_is_replaced_only_when_asked(tmp_path):
    for overwrite in (False, True):
        fit(
            Holds(),
            token_loader(),
            [GPTQCallback(QuantizeModule(**SMALL), tmp_path / "out", overwrite=overwrite)],
            tmp_path,
        )
    with pytest.raises(ExportError, match="overwrite=True"):
        fit(Untrained(), token_loader(), [GPTQCallback(QuantizeModule(**SMALL), tmp_path / "out")], tmp_path)


def test_a_launcher_whose_modules_do_not_come_back_is_refused(tmp_path):
    with pytest.raises(Exception, match="swap=False") as caught:
        fit(
            Untrained(),
            token_loader(),
            [GPTQCallback(QuantizeModule(**SMALL))],
            tmp_path,
            devices=2,
            strategy="ddp_fork",
        )
    assert "training began" not in str(caught.value)


def test_weights_that_training_has_on_a_gpu_are_not_streamed_to_it_and_the_log_tells_before_training(monkeypatch):
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    callback = GPTQCallback(QuantizeModule(**SMALL, offload_weights=True))
    trainer.callbacks.append(callback)
    callback.setup(trainer, Holds(), "fit")  # on a CPU it only copies
    monkeypatch.setattr(type(trainer.strategy), "root_device", torch.device("cuda", 0))
    with pytest.raises(ValueError, match="leave the option out, or save a checkpoint and run gptq-quantize"):
        callback.setup(trainer, Holds(), "fit")


def test_arguments_that_contradict_are_refused():
    with pytest.raises(ValueError, match="nothing of the quantization would remain"):
        GPTQCallback(QuantizeModule(), swap=False)
    for single, message in (("a text", "give a list of texts"), ({"input_ids": [1]}, "give a list of batches")):
        with pytest.raises(CalibrationError, match=message):
            GPTQCallback(QuantizeModule(), calibration=single)
    with pytest.raises(TypeError, match="must be a QuantizeModule"):
        GPTQCallback({"bits": 4})


@pytest.mark.parametrize("failing", ["calibration", "export"])
def test_a_failure_leaves_the_trained_weights_the_checkpoint_and_no_folder(failing, tmp_path):
    class Tokenizer:
        def save_pretrained(self, directory):
            raise OSError("disk full")

    class NaN(Holds):
        def calibration_step(self, batch):
            trained = self.trainer.global_step > 0  # the rehearsal before training finds nothing
            return self.model(inputs_embeds=torch.full((4, 16, 64), float("nan") if trained else 1.0))

    module, twin = (NaN() if failing == "calibration" else Holds()), Holds()
    fit(twin, token_loader(), [], tmp_path)
    callback = GPTQCallback(QuantizeModule(**SMALL), tmp_path / "out", tokenizer=Tokenizer())
    checkpoint = ModelCheckpoint(dirpath=tmp_path / "ckpt")
    error = {"calibration": CalibrationError, "export": ExportError}[failing]
    with pytest.raises(error, match={"calibration": "NaN or infinity", "export": "disk full"}[failing]):
        fit(module, token_loader(), [callback, checkpoint], tmp_path, enable_checkpointing=True)
    assert quantized(module) == []
    assert all(torch.equal(a, b) for a, b in zip(module.state_dict().values(), twin.state_dict().values()))
    assert len(list((tmp_path / "ckpt").iterdir())) == 1
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


SAMPLES = ["16", "17", "1000"]  # 17: a last batch of one sample on rank 0


@pytest.fixture(scope="module")
def on_one_and_on_two(tmp_path_factory):
    """Runs with each number of samples, SAMPLES/RANKS/rank0.pt; the two processes are started once for all numbers."""
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "train.py").write_text(DDP)
    command = ["train.py", str(SUPPORT), str(folder)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [*command, "1", "cpu", *SAMPLES])
        patch.setattr(sys, "path", sys.path[:])
        runpy.run_path(str(folder / "train.py"))
    done = subprocess.run([python(), *command, "2", "cpu", *SAMPLES], capture_output=True, text=True, timeout=300,
                          cwd=folder)  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("samples", SAMPLES)
def test_two_ranks_give_the_codes_of_one_and_count_each_sample_once(samples, on_one_and_on_two):
    folder = on_one_and_on_two / samples
    one = torch.load(folder / "1" / "rank0.pt")
    first, second = (torch.load(folder / "2" / f"rank{rank}.pt") for rank in (0, 1))
    assert first.keys() == second.keys() == one.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    codes = [key for key in one if key.endswith("qweight")]
    assert len(codes) == 7
    for key in codes:  # another order of addition may flip a near tie
        assert (one[key] == first[key]).float().mean() > 0.97, key
    reports = [
        json.loads((folder / run).read_text())["totals"] for run in ("1/rank0.json", "2/rank0.json", "2/rank1.json")
    ]
    assert {report["samples"] for report in reports} == {min(int(samples), 24)}
    assert {report["tokens"] for report in reports} == {min(int(samples), 24) * 16}
    assert load_quantized(folder / "2" / "export").generate(torch.arange(4)[None], max_new_tokens=2).shape == (1, 6)


def test_a_budget_of_bits_is_divided_at_the_end_of_training_by_the_logits_of_all_positions(tmp_path):
    callback = GPTQCallback(QuantizeModule(target_bits=4.2, **SMALL), export_dir=tmp_path / "out")
    fit(Holds(), token_loader(), [callback], tmp_path)
    assert callback.report.bits_per_weight <= 4.2
    assert callback.report.allocation.tokens == 4 * 16  # a batch of 4 samples
    loaded = load_quantized(tmp_path / "out")
    assert {m.bits for m in callback.report.quantized} == {loaded.get_submodule(n).bits for n in quantized(loaded)}


def test_a_budget_that_cannot_be_is_refused_before_training(tmp_path):
    class Untrained(Holds):
        def training_step(self, batch, batch_idx):
            raise AssertionError("trained")

    callback = GPTQCallback(QuantizeModule(target_bits=2.1, **SMALL), export_dir=tmp_path / "out")
    with pytest.raises(TargetError, match="target_bits=2.1: the quantized layers take"):
        fit(Untrained(), token_loader(), [callback], tmp_path)
