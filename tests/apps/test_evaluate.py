"""The loss of a network on windows of tokens."""

from __future__ import annotations

import pytest
import torch

from gptq_plugin.apps.evaluate import mean_nll


def test_mean_nll_is_the_mean_over_every_predicted_token():
    class Known(torch.nn.Module):
        """Gives the next token (t + 1) a probability that depends on t alone."""

        def __init__(self):
            super().__init__()
            self.table = torch.nn.Parameter(torch.randn(7, 7))

        def forward(self, input_ids):
            return type("Out", (), {"logits": self.table[input_ids]})

    network = Known()
    windows = torch.randint(0, 7, (5, 6))
    expected = [-network.table.log_softmax(-1)[window[i], window[i + 1]].item() for window in windows for i in range(5)]
    for batch_size in (1, 2, 5, 9):
        assert mean_nll(network, windows, batch_size) == pytest.approx(sum(expected) / len(expected), rel=1e-5)
