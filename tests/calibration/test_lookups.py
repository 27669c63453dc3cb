"""A lookup beyond a table is told by the table's name, its rows and the row that was looked up."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from gptq_plugin import QuantizeModule
from gptq_plugin.calibration.lookups import lookups_explained
from gptq_plugin.errors import CalibrationError

from models import Plain


class Positioned(nn.Module):
    """A model with learned positions, looked up as a function."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(32, 32)
        self.places = nn.Parameter(torch.randn(8, 32))
        self.layer = nn.Linear(32, 32)

    def forward(self, tokens):
        places = functional.embedding(torch.arange(tokens.shape[1]).expand_as(tokens), self.places)
        return self.layer(self.words(tokens) + places)


@pytest.mark.parametrize(
    ("model", "tokens", "message"),
    [
        (Plain, [[1, 40, 3]], r"looks up row 40 of embed\.weight, which has the rows 0 to 31: its ids"),
        (Plain, [[1, -2, 3]], r"looks up row -2 of embed\.weight"),
        (Positioned, [[1, 33]], r"row 33 of words\.weight"),
        (Positioned, [[1] * 9], r"row 8 of places, which has the rows 0 to 7.*longer than the model's positions"),
    ],
    ids=["beyond", "negative", "beyond beside positions", "long"],
)
def test_ids_and_positions_beyond_a_plain_modules_tables_are_told_by_name(model, tokens, message):
    for run in (
        lambda quantizer, data: quantizer.quantize(model(), data),
        lambda quantizer, data: quantizer.rehearse(model(), data),
        lambda quantizer, data: quantizer.quantize(model(), data, forward=lambda module, batch: module(batch)),
    ):
        with pytest.raises(CalibrationError, match=message):
            run(QuantizeModule(group_size=16), [torch.tensor(tokens)])


def test_an_index_error_of_the_users_own_is_left_as_it_is():
    with pytest.raises(IndexError, match="list index"), lookups_explained(Plain()):
        _ = list(Plain().children())[9]
    with pytest.raises(IndexError, match="index 9 is out of bounds"), lookups_explained(Plain()):
        _ = torch.ones(3)[9]
