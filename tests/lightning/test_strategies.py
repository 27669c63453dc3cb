"""Lightning strategies the callback supports only in part, or not at all, are refused under either import root."""

from __future__ import annotations

import lightning.pytorch as newer
import peft
import pytest
import pytorch_lightning as older
from lightning.pytorch.strategies import DeepSpeedStrategy, ModelParallelStrategy

from gptq_plugin import GPTQCallback, QuantizeModule
from gptq_plugin.finish.options import NONE, Finish
from gptq_plugin.lightning.strategies import refuse_for_shards, refuse_sharded_adapters, refuse_strategy

import sharded_runs as runs
from lightning_runs import Holds

ROOTS = pytest.mark.parametrize("root", [older, newer], ids=["older", "newer"])


@ROOTS
def test_launchers_whose_modules_do_not_come_back_are_refused(root, trainer):
    callback = GPTQCallback(QuantizeModule())
    spawning = trainer(root, devices=2, strategy="ddp_spawn", callbacks=[callback])
    spawning.strategy._configure_launcher()
    with pytest.raises(ValueError, match=r"strategy 'spawn' trains in processes.*swap=False"):
        callback.setup(spawning, Holds(), "fit")
    refuse_strategy(spawning, swap=False)


@pytest.mark.parametrize("options", [{}, {"devices": 2, "strategy": "ddp"}])
def test_launchers_whose_modules_come_back_are_not_refused(options, trainer):
    launching = trainer(**options)
    launching.strategy._configure_launcher()
    refuse_strategy(launching, swap=True)


@ROOTS
@pytest.mark.parametrize("name", ["ModelParallelStrategy", "FSDPStrategy"])
def test_strategies_that_shard_leave_nothing_quantized(root, name, trainer):
    callback = GPTQCallback(QuantizeModule(), swap=True)
    sharded = trainer(root, callbacks=[callback])
    sharded._accelerator_connector.strategy = getattr(root.strategies, name)()
    with pytest.raises(ValueError, match=f"{name} keeps it in parts: leave swap out"):
        callback.setup(sharded, Holds(), "fit")


@pytest.mark.parametrize("strategy", [ModelParallelStrategy, DeepSpeedStrategy])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"swap": True}, "leave swap out"),
        ({"export_dir": None}, "give an export_dir"),
        ({"weights": "best"}, "gptq-quantize ckpt="),
        ({"weights": "some.ckpt"}, "gptq-quantize ckpt="),
    ],
)
def test_options_that_need_a_whole_module_are_refused_before_training(strategy, options, message, trainer, tmp_path):
    sharded = trainer()
    sharded.strategy.__class__ = strategy  # DeepSpeed is not installed
    callback = GPTQCallback(QuantizeModule(), **{"export_dir": tmp_path / "out", **options})
    with pytest.raises(ValueError, match=message):
        callback.setup(sharded, runs.Model(), "fit")


def test_no_option_is_refused_where_modules_are_whole(trainer, tmp_path):
    refuse_for_shards(trainer(), True, None, "best", Finish())
    sharded = trainer(strategy=ModelParallelStrategy())
    for swap in (None, False):
        refuse_for_shards(sharded, swap, tmp_path, "last", NONE)


def test_adapters_on_sharded_parameters_are_refused_before_training(trainer, tmp_path):
    sharded, module = trainer(strategy=ModelParallelStrategy()), runs.Model()
    refuse_sharded_adapters(sharded, module)
    module.model = peft.get_peft_model(module.model, peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="gptq-quantize ckpt=... adapter=..."):
        GPTQCallback(QuantizeModule(), tmp_path / "out").on_fit_start(sharded, module)
    refuse_sharded_adapters(trainer(), module)
