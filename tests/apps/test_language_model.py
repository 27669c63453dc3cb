"""The LightningModule that gptq-finetune trains."""

from __future__ import annotations

import itertools

import pytest
import torch

from gptq_plugin.apps.language_model import LanguageModel


def test_the_learning_rate_rises_to_its_peak_and_falls_to_a_tenth():
    network = torch.nn.Linear(2, 2)
    model = LanguageModel(network, None, warmup_steps=4)
    model._trainer = type("T", (), {"estimated_stepping_batches": 24})()  # the property only forwards
    model._fabric = None
    shares = [model._share_of_peak(step) for step in range(25)]
    assert shares[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert shares[-1] == pytest.approx(0.1)
    assert all(a > b for a, b in itertools.pairwise(shares[4:]))
