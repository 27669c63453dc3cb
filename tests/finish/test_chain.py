"""Models whose blocks are a chain, and those that are refused."""

from __future__ import annotations

import copy
import types

import pytest
import torch
from torch import nn

from gptq_plugin import Finish, QuantizeModule, distributed
from gptq_plugin.errors import TargetError
from gptq_plugin.finish.blocks import blocks_of
from gptq_plugin.finish.chain import Call, Chain, Passage

from finish_cases import quantized, rows, same, state_of
from models import tiny_gpt2, tiny_llama

BLOCKS = Finish("blocks", steps=2, block_steps=2, tokens_per_step=100, held_out=8)


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_a_passage_gives_the_blocks_what_the_models_forward_gives_them(make):
    model, _, _ = quantized(make)
    chain = Chain.of(model)
    assert chain.names == [name for name, _ in blocks_of(model)] and len(chain.names) == 2
    with torch.no_grad(), chain.watching(model):
        wanted = []
        model.get_submodule(chain.names[-1]).register_forward_hook(lambda *given: wanted.append(given[2]))
        model(input_ids=torch.stack(rows(3)), use_cache=False)
        passage = chain.take()
        chain.check_alone(model)
        hidden = passage.hidden
        for name, call in zip(chain.names, passage.calls, strict=True):
            hidden = call.run(model.get_submodule(name), hidden)
    assert torch.equal(hidden, wanted[0][0] if isinstance(wanted[0], tuple) else wanted[0])
    assert passage.positions == 3 * 24
    assert not any(module._forward_hooks for name, module in model.named_modules() if name in chain.names[:1])


def test_blocks_are_trained_on_tokens_without_a_name():
    model, twin, quantizer = quantized()
    batches = torch.stack(rows(16)).split(4)
    assert len(quantizer.finish(model, twin, batches, BLOCKS).blocks) == 2


def refused(change, message):
    model, twin, quantizer = quantized()
    given = {}
    for one in (model, twin):
        change(one, given)
    before = state_of(model)
    with pytest.raises(TargetError, match=message):
        quantizer.finish(model, twin, rows(), BLOCKS, **given)
    assert same(state_of(model), before)


def test_blocks_that_share_modules_are_refused():
    def share(model, _):
        model.model.layers[1].mlp = model.model.layers[0].mlp

    refused(share, "model.layers.1 shares modules with a block before it.*kind='scales'")
    model, _, _ = quantized()
    model.model.layers[1].mlp.act_fn = model.model.layers[0].mlp.act_fn  # without a tensor
    assert len(Chain.of(model).names) == 2


def test_something_between_blocks_is_refused():
    def between(model, _):
        model.model.layers[1].register_forward_pre_hook(lambda _, args: (args[0] * 2, *args[1:]))

    refused(between, "model.layers.1 reads something else than what the block before it gives")


def test_a_block_that_is_called_twice_is_refused():
    def twice(model, _):
        block = model.model.layers[1]
        original = block.forward
        block.register_forward_hook(lambda *_: None)
        model.model.norm.register_forward_pre_hook(lambda _, args: (block(args[0], **kept),))
        kept = {}
        block.register_forward_pre_hook(lambda _, __, kwargs: kept.update(kwargs), with_kwargs=True)
        assert original

    refused(twice, "does not call every block of model.layers once, in one order")


class Swapping(nn.Module):
    """Blocks that are called in the order asked for."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))

    def forward(self, x, order):
        for number in order:
            x = self.layers[number](x)
        return x


def taken(chain, *order):
    model = Swapping()
    with chain.watching(model), torch.no_grad():
        model(torch.ones(1, 3, 4), order)
        return chain.take()


def test_the_order_of_calls_is_one_for_all_batches_and_ranks(monkeypatch):
    names = ["layers.0", "layers.1"]
    chain = Chain(names)
    taken(chain, 1, 0)
    assert chain.names == names[::-1]
    for one, order in ((chain, (0, 1)), (Chain(names), (0,)), (Chain(names), (0, 1, 0))):
        with pytest.raises(TargetError, match="does not call every block of layers once, in one order"):
            taken(one, *order)

    def ranks(*of_ranks):
        monkeypatch.setattr(distributed, "gather_objects", lambda mine: list(of_ranks))

    idle, walks = Chain(names), Chain(names)
    ranks((False, names), (True, names[::-1]))
    idle.agree()
    assert idle.names == names[::-1]
    taken(walks, 0, 1)
    with pytest.raises(TargetError, match="ranks call the blocks of layers in different orders"):
        walks.agree()


@pytest.mark.parametrize("other", [((1.0, 2), {}), ((1.0,), {"mask": None}), ((2.0,), {}), ((), {"mask": 1.0})])
def test_other_arguments_of_blocks_are_told(other):
    one, two = (Passage(torch.ones(1, 2, 3), (Call(args, kwargs, False),)) for args, kwargs in (((1.0,), {}), other))
    Chain([]).check_same(one, one)
    for pair in ((one, two), (two, one)):
        with pytest.raises(TargetError, match="depends on the blocks before them"):
            Chain([]).check_same(*pair)


def test_a_cache_among_the_arguments_is_refused():
    refused(
        lambda _, given: given.update(forward=lambda model, batch: model(**batch, use_cache=True)),
        "is called with, or gives, more than tensors and plain values",
    )


def test_arguments_that_depend_on_blocks_before_are_refused():
    def depend(model, _):
        first, second = model.model.layers
        original, kept = second.forward, []
        first.register_forward_hook(lambda *given: kept.append(given[2]))
        second.forward = types.MethodType(lambda self, hidden, extra=None, **rest: original(hidden, **rest), second)
        second.register_forward_pre_hook(
            lambda _, args, kwargs: (args, {**kwargs, "extra": kept[-1].mean()}), with_kwargs=True
        )

    model, twin, quantizer = quantized()
    for one in (model, twin):
        depend(one, {})
    chain = Chain.of(model)
    found = []
    with torch.no_grad():
        for one in (twin, model):
            with chain.watching(one):
                one(input_ids=torch.stack(rows(2)), use_cache=False)
                found.append(chain.take())
    with pytest.raises(TargetError, match="depends on the blocks before them"):
        chain.check_same(*found)
    chain.check_same(found[0], copy.deepcopy(found[0]))
    assert quantizer


@pytest.mark.parametrize("what", ["dtype", "weights"])
def test_a_float_model_that_differs_before_the_blocks_is_refused(what):
    model, twin, quantizer = quantized()
    if what == "dtype":
        twin.double()
    else:
        twin.model.embed_tokens.weight.data.add_(1)
    before = state_of(model)
    with pytest.raises(TargetError, match=r"the first block reads other values than in the float model.*kind='scales'"):
        quantizer.finish(model, twin, rows(), BLOCKS)
    assert same(before, state_of(model))


def test_blocks_that_keep_something_between_calls_are_refused():
    def count(model, _):
        block = model.model.layers[0]
        calls = []
        block.register_forward_hook(lambda *given: (calls.append(1), given[2] * (1 + len(calls)))[1])

    refused(count, "the blocks give other values when they are called one by one")


def test_an_encoder_with_a_decoder_is_refused_before_any_work():
    from transformers import T5Config, T5ForConditionalGeneration

    model = T5ForConditionalGeneration(T5Config(d_model=32, d_ff=32, d_kv=8, num_layers=1, num_heads=2, vocab_size=64))
    with pytest.raises(TargetError, match="an encoder and a decoder are no chain.*kind='scales'"):
        Chain.check(model)
    with pytest.raises(TargetError, match="Linear has no list of blocks with linear layers"):
        Chain.check(nn.Linear(2, 2))
    Chain.check(tiny_gpt2())


def test_a_model_without_blocks_or_another_float_model_is_refused():
    class Single(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(32, 32)

        def forward(self, x):
            return self.layer(x)

    model = Single()
    QuantizeModule(bits=4, group_size=32).round_to_nearest(model)
    with pytest.raises(TargetError, match="has no list of blocks with quantized layers"):
        Chain.of(model)
    model, _, quantizer = quantized()
    with pytest.raises(TargetError, match="the float model, has no block model.layers.1"):
        quantizer.finish(model, tiny_llama(num_hidden_layers=1), rows(), BLOCKS)
