"""Data that cannot work is refused before the first training step, by either trainer and by a loop of one's own."""

from __future__ import annotations

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from gptq_plugin import GPTQCallback, GPTQTrainerCallback, QuantizeModule
from gptq_plugin.errors import CalibrationError, TargetError

from lightning_runs import fit
from trainer_runs import Untrained as UntrainedTrainer
from trainer_runs import train

WIDE = 256


class Net(nn.Module):
    """Rows without a sequence axis; its narrowest layer has 256 inputs."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(WIDE, WIDE), nn.ReLU(), nn.Linear(WIDE, WIDE))

    def forward(self, x, y=None):
        return {"logits": self.net(x)}


class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.model = Net()

    def forward(self, x, y=None):
        return self.model(x, y)

    def training_step(self, batch, index):
        raise AssertionError("training began")

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


class Rows(Dataset):
    def __init__(self, count):
        self.x = torch.randn(count, WIDE, generator=torch.Generator().manual_seed(0))

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        return {"x": self.x[index], "y": self.x[index]}


class Stream(IterableDataset):
    def __init__(self, count):
        self.rows = Rows(count)

    def __iter__(self):
        return (self.rows[index] for index in range(len(self.rows)))


def run(kind, data, quantizer, folder, module=None):
    if kind == "Lightning":
        fit(module or Module(), DataLoader(data, batch_size=8), [GPTQCallback(quantizer)], folder)
    elif kind == "Trainer":
        model = Net() if module is None else module.model
        train(model, [GPTQTrainerCallback(quantizer)], folder, data, UntrainedTrainer, remove_unused_columns=False)
    else:
        model = Net() if module is None else module.model
        quantizer.rehearse(model, DataLoader(data, batch_size=8))
        raise AssertionError("training began")


KINDS = ["Lightning", "Trainer", "plain"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("data", "fields", "message"),
    [
        (
            lambda: Rows(512),
            {},
            "128 tokens in 128 samples.* 256 inputs.*is 128, and 256 like these are enough",
        ),
        (lambda: Rows(100), {"nsamples": 512}, "100 tokens in 100 samples"),
        (lambda: Stream(255), {"nsamples": 512}, "255 tokens in 255 samples"),
    ],
    ids=["the default", "a small dataset", "a short stream"],
)
def test_rows_that_are_too_few_for_the_layers_are_refused_before_training(kind, data, fields, message, tmp_path):
    with pytest.raises(CalibrationError, match=message):
        run(kind, data(), QuantizeModule(group_size=32, **fields), tmp_path)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("data", [lambda: Rows(300), lambda: Stream(256)], ids=["a dataset", "a stream"])
def test_rows_that_are_just_enough_are_taken(kind, data, tmp_path):
    with pytest.raises(AssertionError, match="training began"):
        run(kind, data(), QuantizeModule(group_size=32, nsamples=256), tmp_path)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layer", [0, 2])
def test_a_weight_with_nan_is_refused_by_name_before_training(kind, layer, tmp_path):
    module = Module()
    with torch.no_grad():
        module.model.net[layer].weight[3, 3] = float("nan")
    with pytest.raises(TargetError, match=rf"NaN or infinity in (?:model\.)?net\.{layer}\.weight of "):
        run(kind, Rows(512), QuantizeModule(group_size=32, nsamples=256), tmp_path, module)


@pytest.mark.parametrize("kind", KINDS)
def test_an_empty_dataset_is_refused_before_training(kind, tmp_path):
    with pytest.raises((CalibrationError, ValueError), match="empty|at least|num_samples|positive"):
        run(kind, Stream(0), QuantizeModule(group_size=32), tmp_path)
