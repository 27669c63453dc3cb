"""Models to finish, and how far they are from their float models."""

from __future__ import annotations

import copy
import functools

import torch

from gptq_plugin import QuantizeModule

from models import tiny_llama

FAST = {"steps": 12, "learning_rate": 0.01, "tokens_per_step": 200, "held_out": 8, "judgements": 4}
BLOCKS = {
    **FAST,
    "kind": "blocks",
    "block_steps": 20,
    "block_learning_rate": 3e-3,
    "block_code_learning_rate": 0.01,
    "code_learning_rate": 0.01,
    "top_logits": 128,
    "batch_size": 8,
    "tokens_per_step": 192,
}
KINDS = {"scales": FAST, "blocks": BLOCKS, "full": {**BLOCKS, "kind": "full"}}


def rows(count=40, length=24, seed=0):
    return list(torch.randint(4, 128, (count, length), generator=torch.Generator().manual_seed(seed)))


def quantized(make=tiny_llama, data=None, **options):
    """A quantized model, its float twin, and the quantizer."""
    if data is None:
        return copy.deepcopy(_of_rows(make, tuple(options.items())))
    return _quantized(make, data, options)


@functools.cache
def _of_rows(make, options):
    return _quantized(make, rows(), dict(options))


def _quantized(make, data, options):
    model = make(initializer_range=0.2)
    twin = copy.deepcopy(model)
    quantizer = QuantizeModule(**{"bits": 2, "group_size": 32, "nsamples": 32, **options})
    quantizer.quantize(model, data)
    return model, twin, quantizer


def state_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(state, other):
    return state.keys() == other.keys() and all(torch.equal(state[name], other[name]) for name in state)


@torch.no_grad()
def divergence(model, twin, data):
    """The mean KL(twin || model) over all positions."""
    logs = [one(input_ids=torch.stack(data)).logits.double().log_softmax(-1) for one in (twin, model)]
    return float((logs[0].exp() * (logs[0] - logs[1])).sum(-1).mean())


def changed(before, after):
    return {name for name in after if not torch.equal(after[name], before[name])}


def kinds_of(names):
    return {name.rpartition(".")[2] if "norm" not in name and "ln_" not in name else "norm" for name in names}
