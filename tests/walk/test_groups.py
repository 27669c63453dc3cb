"""Groups: layers that read the very same tensor, in the order they are called."""

from __future__ import annotations

import contextlib
import threading

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForSeq2SeqLM

from gptq_plugin.walk.groups import find_groups
from gptq_plugin.walk.kept_state import KeptState

from models import tiny_llama
from walks import linears, walk


def test_layers_that_read_the_same_tensor_share_a_group_and_others_do_not():
    model = tiny_llama()
    groups = find_groups(linears(model), lambda: model(input_ids=torch.arange(6)[None]))
    assert [len(group.names) for group in groups] == [3, 1, 2, 1, 3, 1, 2, 1, 1]
    assert groups[0].names == tuple(f"model.layers.0.self_attn.{part}_proj" for part in "qkv")


def test_an_encoder_decoder_shares_the_encoders_output_among_all_cross_attentions():
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "t5", d_model=32, d_kv=16, d_ff=48, num_layers=2, num_heads=2, vocab_size=64, decoder_start_token_id=0
    )
    model = AutoModelForSeq2SeqLM.from_config(config).eval()
    calls = [
        lambda n=n: model(input_ids=torch.arange(n)[None], decoder_input_ids=torch.arange(n - 2)[None]).logits
        for n in (6, 9)
    ]
    with torch.no_grad():
        plain = [call() for call in calls]
    outputs, order, _ = walk(model, calls)
    assert all(torch.equal(a, b) for a, b in zip(outputs, plain))
    cross = next(group for group in order if "decoder.block.0.layer.1.EncDecAttention.k" in group.names)
    assert sorted(cross.names) == sorted(
        f"decoder.block.{block}.layer.1.EncDecAttention.{part}" for block in (0, 1) for part in "kv"
    )


def test_planning_enters_waiting_wherever_a_batch_would_wait():
    entered = []

    @contextlib.contextmanager
    def waiting(number, name):
        assert threading.current_thread().name == f"calibration-batch-{number}"
        entered.append((number, name))
        yield

    model = tiny_llama()
    for given in ({}, {"number": 3}):
        groups = find_groups(linears(model), lambda: model(input_ids=torch.arange(6)[None]), waiting, **given)
        assert entered == [(given.get("number", 0), group.names[0]) for group in groups]
        entered.clear()


def test_layers_that_the_forward_does_not_call_follow_the_layer_registered_before_them():
    model = nn.ModuleDict({name: nn.Linear(4, 4) for name in ("first", "early", "late", "unused", "last")})
    layers = {"before": nn.Linear(4, 4), **linears(model)}

    def forward():
        x = model["last"](model["late"](model["early"](torch.ones(1, 4))))
        return model["first"](model["first"](x))

    groups = find_groups(layers, forward)
    assert [group.names for group in groups] == [("before",), ("early",), ("late",), ("unused",), ("last",), ("first",)]
    assert [group.calls for group in groups] == [1, 1, 1, 1, 1, 2]


class Remembers(nn.Module):
    """Keeps its input while it runs, and how often it ran for ever."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.given, self.runs = None, 0

    def forward(self, x):
        self.runs += 1
        self.given = x
        x = self.b(self.a(x))
        self.given = None
        return x


def test_the_state_learns_what_the_forward_keeps_and_what_it_keeps_only_between_layers():
    model = Remembers()
    state = KeptState(model)
    find_groups(linears(model), lambda: model(torch.ones(1, 4)), state=state)
    assert sorted(map(str, state.initial)) == [".given", ".runs"]
    assert model.runs == 0
