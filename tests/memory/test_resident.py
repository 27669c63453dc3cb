"""A model's tensors on another device for a time."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gptq_plugin.memory.resident import resident_on

from models import Plain


@pytest.mark.parametrize("fails", [False, True])
def test_every_tensor_is_there_once_and_the_models_own_are_back_afterwards(fails):
    model = Plain()
    own = dict((*model.named_parameters(), *model.named_buffers()))
    values = {name: tensor.clone() for name, tensor in own.items()}
    meta = torch.device("meta")

    def run():
        with resident_on(model, meta):
            assert all(one.device == meta for one in (*model.parameters(), *model.buffers()))
            assert model.head.weight is model.embed.weight and isinstance(model.embed.weight, nn.Parameter)
            assert not any(one.requires_grad for one in model.parameters())
            if fails:
                raise RuntimeError("inside")

    if fails:
        with pytest.raises(RuntimeError, match="inside"):
            run()
    else:
        run()
    after = dict((*model.named_parameters(), *model.named_buffers()))
    assert all(after[name] is own[name] and torch.equal(after[name], values[name]) for name in own)


def test_what_is_there_already_is_not_copied():
    model = Plain()
    with resident_on(model, torch.device("cpu")):
        model.embed.weight.data += 1
        inside = model.embed.weight
    assert model.embed.weight is inside
