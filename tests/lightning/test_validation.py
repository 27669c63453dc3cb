"""The user's own validation outside of Lightning's loops: everything is as in `trainer.validate`."""

from __future__ import annotations

import json
import math
import subprocess
import textwrap

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.utilities import CombinedLoader
from torch.utils.data import DataLoader
from torchmetrics import MeanMetric, SumMetric

from gptq_plugin.lightning.validation import _batches_of_ranks, validate, validation_loaders

from forked_python import python
from lightning_runs import Plain, Validated, fit, pair_loader, rows
from paths import SUPPORT

HOOKS = ("on_validation_epoch_start", "on_validation_batch_start", "on_before_batch_transfer",
         "transfer_batch_to_device", "on_after_batch_transfer", "on_validation_batch_end",
         "on_validation_epoch_end")  # fmt: skip


class Recording(Validated):
    """Notes every hook, and in which state steps run."""

    def __init__(self, loaders=1):
        super().__init__(loaders)
        self.events = []

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        x = batch[0]
        autocast = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu")
        state = (self.training, self.net.training, torch.is_grad_enabled(), torch.get_default_dtype(), autocast)
        self.events.append(("step", tuple(x.shape), x.dtype, batch_idx, dataloader_idx, *state))
        super().validation_step(batch, batch_idx)
        return batch_idx


def _noting(name):
    def hook(self, *args, **kwargs):
        plain = [a for a in (*args, *kwargs.values()) if isinstance(a, int)]
        self.events.append((name, *plain))
        return getattr(super(Recording, self), name)(*args, **kwargs)

    return hook


for _name in HOOKS:
    setattr(Recording, _name, _noting(_name))


def lightnings(module, **options):
    """What Lightning's own validation leaves in `callback_metrics`, but for the values of single steps."""
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False,
                         enable_model_summary=False, **options)  # fmt: skip
    trainer.validate(module, verbose=False)
    return {name: float(value) for name, value in trainer.callback_metrics.items() if "_step" not in name}


@pytest.mark.parametrize(
    "options",
    [{}, {"limit_val_batches": 2}, {"limit_val_batches": 0.7}, {"precision": "bf16-mixed"}, {"precision": "bf16-true"}],
)
@pytest.mark.parametrize("loaders", [1, 2])
def test_every_hook_runs_in_the_order_and_state_that_lightning_runs_it_in(options, loaders, tmp_path):
    module = Recording(loaders)
    trainer = fit(module, None, [], tmp_path, **options)
    module.train()
    module.events.clear()
    ours = validate(trainer, module, by_sample=False)
    events = list(module.events)
    module.events.clear()
    theirs = lightnings(module, **options)
    assert events == module.events and len(events) > 8
    assert ours == pytest.approx(theirs, rel=1e-5) and len(ours) == loaders
    assert module.training and module.net.training


@pytest.mark.parametrize("limit", [2, 1.0])
@pytest.mark.parametrize("mode", ["sequential", "min_size", "max_size_cycle", "max_size"])
def test_the_batches_of_several_dataloaders_are_put_together_as_the_module_asks(mode, limit, tmp_path):
    class Several(Recording):
        def val_dataloader(self):
            parts = {"short": rows(13)[:3], "long": rows(13)[3:]}
            return CombinedLoader({name: DataLoader(part, batch_size=2) for name, part in parts.items()}, mode)

        def validation_step(self, batch, batch_idx, dataloader_idx=0):
            parts = [batch] if mode == "sequential" else [part for part in batch.values() if part is not None]
            self.events.append(("step", [len(part[0]) for part in parts], batch_idx, dataloader_idx))
            self.log("val_loss", sum(map(self.error, parts)), batch_size=1)

    module = Several()
    trainer = fit(module, None, [], tmp_path, limit_val_batches=limit)
    module.events.clear()
    ours = validate(trainer, module, by_sample=False)
    events = list(module.events)
    module.events.clear()
    assert ours == pytest.approx(lightnings(module, limit_val_batches=limit), rel=1e-5)
    assert events == module.events
    steps = sum(event[0] == "step" for event in events)
    assert (
        steps
        == _batches_of_ranks(trainer)
        == {"sequential": 4 if limit == 2 else 7, "min_size": 2}.get(mode, 2 if limit == 2 else 5)
    )


def test_every_way_to_log_gives_lightnings_names_and_values(tmp_path):
    class Logging(Validated):
        def __init__(self):
            super().__init__(loaders=2)
            self.mean = MeanMetric()
            self.sum = SumMetric()

        def validation_step(self, batch, batch_idx, dataloader_idx=0):
            error = self.error(batch)
            self.log("mean", error)
            self.log("weighted", error, batch_size=1 + batch_idx)
            for how in ("min", "max", "sum"):
                self.log(how, error, reduce_fx=how)
            self.log_dict({"both": error, "other": 2 * error}, on_step=True, on_epoch=True)
            self.log("no_step_value", error, on_step=True, on_epoch=False)
            self.log(f"own_name_{dataloader_idx}", error, add_dataloader_idx=False)
            self.mean.update(error, len(batch[0]))
            self.sum.update(error)

        def on_validation_epoch_end(self):
            self.log("at_the_end", self.mean)
            self.log("sum_at_the_end", self.sum)
            self.log("at_the_end_too", 3.0)

    module = Logging()
    trainer = fit(module, None, [], tmp_path)
    ours = [validate(trainer, module) for _ in range(2)]  # nothing is left over from the first time
    theirs = lightnings(module)
    assert ours == [pytest.approx(theirs, rel=1e-5)] * 2
    assert {"at_the_end", "own_name_1", "both/dataloader_idx_1", "both_epoch/dataloader_idx_0"} <= set(theirs)


def test_a_log_of_the_users_own_is_back_afterwards_even_when_validation_fails(tmp_path):
    class Failing(Validated):
        fails = False

        def validation_step(self, batch, batch_idx):
            if self.fails:
                raise RuntimeError("out of batches")
            super().validation_step(batch, batch_idx)

    module = Failing()
    trainer = fit(module, None, [], tmp_path)
    seen = []
    own = module.__dict__["log"] = lambda name, value, **_: seen.append(name)
    module.fails = True
    with pytest.raises(RuntimeError, match="out of batches"):
        validate(trainer, module)
    assert module.log is own and "log_dict" not in module.__dict__
    module.fails = False
    assert set(validate(trainer, module)) == {"val_loss"} and seen == [] and module.log is own


def test_there_is_something_to_validate_only_with_a_step_and_a_dataloader(tmp_path):
    class NoStep(Validated):
        validation_step = pl.LightningModule.validation_step

    for module, options, expected in (
        (Validated(), {}, True),
        (Validated(), {"limit_val_batches": 0}, False),
        (NoStep(), {}, False),
        (Plain(), {}, False),
    ):
        trainer = fit(module, pair_loader(), [], tmp_path, **options)
        assert bool(validation_loaders(trainer)) == expected


RANKS = """
import json, sys
from pathlib import Path
import lightning.pytorch as pl, torch
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[1])
from lightning_runs import Validated, rows
from gptq_plugin import GPTQCallback, QuantizeModule
from lightning.pytorch.utilities import CombinedLoader
from torch.utils.data import DataLoader
out = Path(sys.argv[2])
class Uneven(Validated):
    meets = None  # the dataloader in whose steps ranks wait for each other
    def val_dataloader(self):  # 8 samples on the first rank, 5 on the second
        mine = rows(13)[:8] if self.global_rank == 0 else rows(13)[8:]
        return DataLoader(mine, batch_size=3)
    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        error = self.error(batch)
        if dataloader_idx == self.meets:
            self.all_gather(error)  # waits for the other rank
        self.log("mean", error)
        self.log("most", error, reduce_fx="max")
        self.log("first", float(self.global_rank) + 1, rank_zero_only=True)
        self.log(f"rank{self.global_rank}", error)
    def on_validation_epoch_end(self):
        self.times = getattr(self, "times", 0.0) + 1
        self.log("times", self.times)  # no result is good enough
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)
module = Uneven()
callback = GPTQCallback(QuantizeModule(bits=2, group_size=32, nsamples=128), max_degradation={"times": 0.5},
    on_fail="escalate", max_bits=3.0)
trainer = pl.Trainer(max_epochs=1, accelerator="cpu", devices=2, strategy="ddp", logger=False,
    enable_progress_bar=False, enable_checkpointing=False, enable_model_summary=False, callbacks=[callback],
    use_distributed_sampler=False)
try:
    trainer.fit(module)
    said = "passed"
except Exception as error:
    said = f"{type(error).__name__}: {error}"
from gptq_plugin.lightning import validation
from gptq_plugin.training.paired import Pairs
found = validation.validate(trainer, module)
def drawn(one):
    pairs = Pairs.of(one, one)
    return pairs.unit, pairs.why, list(pairs.before), list(pairs.weights)
def of_loaders(*parts, size):
    loaders = [DataLoader(rows(13)[slice(*part[trainer.global_rank])], batch_size=size) for part in parts]
    trainer.fit_loop.epoch_loop.val_loop._combined_loader = CombinedLoader(loaders, "sequential")
    return {name: drawn(one) for name, one in validation.validate(trainer, module).items() if name.startswith("mean")}
uneven = drawn(found["mean"])
module.meets = 0
meeting = of_loaders(((0, 6), (6, 11)), size=4)["mean"]
module.meets = 1
several = of_loaders(((0, 7), (7, 10)), ((0, 5), (5, 11)), size=2)
(out / f"rank{trainer.global_rank}.json").write_text(json.dumps([found, said, uneven, meeting, several]))
"""


@pytest.mark.slow
def test_ranks_validate_their_shares_and_agree_on_the_values_and_on_what_to_do(tmp_path):
    (tmp_path / "train.py").write_text(textwrap.dedent(RANKS))
    command = [python(), tmp_path / "train.py", SUPPORT, tmp_path]
    subprocess.run(command, check=True, timeout=200, cwd=tmp_path)
    ranks = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    assert ranks[0] == ranks[1]
    first, said, uneven, meeting, several = ranks[0]
    assert said.startswith("QualityError: the quantized model is not good enough: times went from")
    assert set(first) == {"mean", "most", "first", "rank0", "times"} and first["first"] == 1.0
    model, samples = Validated().eval(), rows(13)  # the float weights are back
    with torch.no_grad():
        errors = [float(model.error([part[None] for part in sample])) for sample in samples]
    assert first["mean"] == pytest.approx(sum(errors) / 13, rel=1e-5)
    batches = [errors[:3], errors[3:6], errors[6:8], errors[8:11], errors[11:]]
    assert first["most"] == pytest.approx(max(sum(batch) / len(batch) for batch in batches), rel=1e-5)
    # All samples are known, also where a step waits for the other rank, whose batch has more of them.
    # Of several dataloaders, one with more batches on a rank, they meet in each one's steps.
    of_first, of_second = several["mean/dataloader_idx_0"], several["mean/dataloader_idx_1"]
    known = ((uneven, errors), (meeting, errors[:11]), (of_first, errors[:10]), (of_second, errors[:11]))
    for drawn, of in known:
        assert drawn[:2] == ["samples", ""] and drawn[2] == pytest.approx(of, rel=1e-5) and drawn[3] == [1.0] * len(of)


def test_batches_are_counted_as_far_as_dataloaders_know_and_limits_tell(tmp_path, monkeypatch):
    class Endless(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(rows(13))

    class Streamed(Validated):
        def val_dataloader(self):
            return [torch.utils.data.DataLoader(Endless(), batch_size=5), pair_loader()]

        def validation_step(self, batch, batch_idx, dataloader_idx=0):
            super().validation_step(batch, batch_idx)

    counts = {
        limit: _batches_of_ranks(fit(Streamed(), None, [], tmp_path, limit_val_batches=limit)) for limit in (2, 20, 1.0)
    }
    assert counts == {2: 4, 20: 20 + 16, 1.0: math.inf}
    trainer = fit(Validated(), None, [], tmp_path)
    alone = _batches_of_ranks(trainer)
    monkeypatch.setattr(pl.Trainer, "world_size", 3)
    assert _batches_of_ranks(trainer) == 3 * alone > 0
