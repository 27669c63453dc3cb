"""Lock-step: batches walk the model together, and each forward runs once."""

from __future__ import annotations

import contextlib
import gc
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from gptq_plugin.walk import lockstep
from gptq_plugin.walk.float_walk import Walks, serves_float
from gptq_plugin.walk.groups import Group, find_groups
from gptq_plugin.walk.kept_state import KeptState

from walks import hooks_left, linears, threads_left, walk

TINY = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "vocab_size": 64, "head_dim": 16}  # fmt: skip


MODELS = {
    "llama": lambda: AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **TINY)),
    "qwen3": lambda: AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen3", **TINY)),
    "gemma3_text": lambda: AutoModelForCausalLM.from_config(AutoConfig.for_model("gemma3_text", **TINY)),
    "gpt2": lambda: AutoModelForCausalLM.from_config(
        AutoConfig.for_model("gpt2", n_embd=32, n_layer=2, n_head=2, vocab_size=64)
    ),
    "opt": lambda: AutoModelForCausalLM.from_config(
        AutoConfig.for_model("opt", hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=2,
                             vocab_size=64, word_embed_proj_dim=32, max_position_embeddings=64)
    ),
    "mixtral": lambda: AutoModelForCausalLM.from_config(
        AutoConfig.for_model("mixtral", **TINY, num_local_experts=4, num_experts_per_tok=2)
    ),
    "bert": lambda: AutoModel.from_config(
        AutoConfig.for_model("bert", hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                             num_attention_heads=2, vocab_size=64)
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", MODELS)
def test_outputs_are_bit_identical_to_a_plain_forward_when_nothing_is_quantized(kind):
    torch.manual_seed(0)
    model = MODELS[kind]().eval()
    batches = [torch.randint(0, 64, (2, length)) for length in (7, 12, 5)]
    calls = [lambda ids=ids: model(input_ids=ids)[0] for ids in batches]
    with torch.no_grad():
        plain = [call() for call in calls]
    outputs, order, counted = walk(model, calls)
    assert all(torch.equal(a, b) for a, b in zip(outputs, plain))
    assert sorted(name for group in order for name in group.names) == sorted(linears(model))
    assert all(len(inputs) == len(batches) for inputs in counted.values())
    assert hooks_left(model) == 0


def test_later_layers_see_what_comes_out_of_changed_earlier_layers():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 4))
    batches = [torch.randn(n, 8) for n in (3, 1, 5)]

    def halve(stop):
        for name in stop.group.names:
            layer = model.get_submodule(name)
            layer.weight = nn.Parameter(layer.weight / 2)

    outputs, order, counted = walk(model, [lambda x=x: model(x) for x in batches], change=halve)
    assert [group.names for group in order] == [("0",), ("2",), ("3",)]
    with torch.no_grad():  # the model is changed now: a plain run must give the same inputs and outputs
        for number, x in enumerate(batches):
            assert torch.equal(outputs[number], model(x))
            assert torch.equal(counted["2"][number][1], model[1](model[0](x)))
            assert torch.equal(counted["3"][number][1], model[2](model[1](model[0](x))))


def test_each_forward_runs_once():
    runs = [0, 0, 0]
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))

    def call(number):
        def run():
            runs[number] += 1
            return model(torch.ones(1, 4))

        return run

    layers = linears(model)
    groups = find_groups(layers, lambda: model(torch.ones(1, 4)))
    for _ in lockstep.walk(groups, layers, [call(n) for n in range(3)], lambda *_: None):
        pass
    assert runs == [1, 1, 1]


class Experts(nn.Module):
    """Each batch reaches the expert its first value names; the last layer is reached by all."""

    def __init__(self, experts=3):
        super().__init__()
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)) for _ in range(experts))
        self.last = nn.Linear(4, 4)

    def forward(self, x):
        return self.last(self.experts[int(x[0, 0])](x))


def test_experts_that_only_some_batches_reach_are_complete_before_the_layers_after_them():
    model = Experts()
    batches = [torch.full((2, 4), float(expert)) for expert in (1, 0, 2, 1)]
    outputs, order, counted = walk(model, [lambda x=x: model(x) for x in batches])
    names = [group.names[0] for group in order]
    assert names[-1] == "last" and len(names) == 7
    assert {name: sorted(n for n, _ in inputs) for name, inputs in counted.items()} == {
        "experts.0.0": [1],
        "experts.0.1": [1],
        "experts.1.0": [0, 3],
        "experts.1.1": [0, 3],
        "experts.2.0": [2],
        "experts.2.1": [2],
        "last": [0, 1, 2, 3],
    }


def test_a_layer_no_batch_reaches_is_never_yielded():
    model = Experts(experts=2)
    _, order, counted = walk(model, [lambda: model(torch.zeros(2, 4))] * 2)
    assert "experts.1.0" not in counted and all("experts.1" not in g.names[0] for g in order)


def test_a_layer_called_twice_is_ready_at_its_last_call_with_the_inputs_of_both():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.shared, self.last = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.last(self.shared(self.shared(x)))

    torch.manual_seed(0)
    model = Twice()
    batches = [torch.randn(2, 4), torch.randn(3, 4)]
    _, order, counted = walk(model, [lambda x=x: model(x) for x in batches])
    assert [group.names for group in order] == [("shared",), ("last",)] and order[0].calls == 2
    assert sorted(number for number, _ in counted["shared"]) == [0, 0, 1, 1]


def test_a_batch_that_calls_a_layer_less_often_than_planned_is_counted_all_the_same():
    class Loop(nn.Module):
        def __init__(self):
            super().__init__()
            self.step = nn.Linear(4, 4)

        def forward(self, x):
            for _ in range(len(x)):
                x = self.step(x)
            return x

    model = Loop()
    _, order, counted = walk(model, [lambda n=n: model(torch.ones(n, 4)) for n in (3, 1, 2)])
    assert [group.names for group in order] == [("step",)]
    assert sorted(number for number, _ in counted["step"]) == [0, 0, 0, 1, 2, 2]


class AsOftenAsAsked(nn.Module):
    """Calls `step` as many times as `first` returns."""

    def __init__(self, times):
        super().__init__()
        self.first, self.step = nn.Linear(1, 1, bias=False), nn.Linear(4, 4)
        nn.init.constant_(self.first.weight, times)

    def forward(self, x):
        for _ in range(int(self.first(torch.ones(1, 1)))):
            x = self.step(x)
        return x


def test_a_layer_that_every_batch_calls_less_often_than_planned_comes_at_the_end():
    model, x = AsOftenAsAsked(3), torch.ones(1, 4)

    def fewer(stop):  # as quantized layers may send a token to other experts
        if stop.group.names == ("first",):
            nn.init.constant_(model.first.weight, 2)
        else:
            assert stop.inputs == {} and len(ended) == 3  # the planning forward, and both batches

    ended = []

    def call():
        ended.append(model(x))
        return ended[-1]

    outputs, order, counted = walk(model, [call] * 2, change=fewer)
    assert [(group.names, group.calls) for group in order] == [(("first",), 1), (("step",), 3)]
    assert sorted(number for number, _ in counted["step"]) == [0, 0, 1, 1]
    with torch.no_grad():
        assert all(torch.equal(output, model.step(model.step(x))) for output in outputs)


def test_ranks_yield_such_a_layer_together_though_only_one_of_them_called_it():
    groups = [Group(("first",)), Group(("step",), calls=3), Group(("never",))]
    positions, meeting = [0, 0], threading.Barrier(2, timeout=20)

    def rank(number, times):
        def agree(position):
            positions[number] = position
            meeting.wait()
            smallest = min(positions)
            meeting.wait()
            return smallest

        model = AsOftenAsAsked(times)
        steps = lockstep.walk(groups, linears(model), [lambda: model(torch.ones(1, 4))], lambda *_: None, agree)
        return [stop.group.names for stop in steps]

    with ThreadPoolExecutor(2) as ranks:
        assert list(ranks.map(rank, (0, 1), (0, 2))) == [[("first",), ("step",)]] * 2


def test_a_call_after_the_layer_was_done_is_noted():
    class Backwards(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.b(self.a(x)) if x[0, 0] > 0 else self.a(self.b(x))

    model, notes = Backwards(), lockstep.Notes()
    walk(model, [lambda: model(torch.ones(1, 4)), lambda: model(-torch.ones(1, 4))], notes=notes)
    # b waits for a; the backwards batch meets a only after it was done with the forwards batch
    assert notes.late == {"a": 1}
    walk(model, [lambda: model(torch.ones(1, 4)), *[lambda: model(-torch.ones(1, 4))] * 3], notes=notes)
    assert notes.late == {"a": 4}
    walk(model, [lambda: model(torch.ones(1, 4)), lambda: model(-torch.ones(1, 4))])  # or not, as nobody asks


def test_a_walk_of_no_batch_yields_nothing():
    layers = linears(nn.Sequential(nn.Linear(4, 4)))
    assert list(lockstep.walk([Group(("0",))], layers, [], lambda *_: None)) == []


def test_a_batch_waits_within_what_it_is_given_for_its_number_and_layer():
    entered = []

    @contextlib.contextmanager
    def waiting(number, name):
        entered.append((number, name))
        yield

    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    layers, call = linears(model), lambda: model(torch.ones(1, 4))
    for _ in lockstep.walk(find_groups(layers, call), layers, [call] * 2, lambda *_: None, waiting=waiting):
        pass
    assert entered == [(number, name) for name in "01" for number in (0, 1)]


@pytest.mark.parametrize("failing", ["first layer", "between layers", "end"])
def test_an_error_in_one_batch_ends_all_and_names_the_batch(failing):
    class Fails(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x, fails):
            if fails and failing == "first layer":
                raise RuntimeError("broken sample")
            y = self.a(x)
            if fails and failing == "between layers":
                raise RuntimeError("broken sample")
            y = self.b(y)
            if fails and failing == "end":
                raise RuntimeError("broken sample")
            return y

    model = Fails()
    calls = [lambda fails=fails: model(torch.ones(1, 4), fails) for fails in (False, False, True, False)]
    with pytest.raises(RuntimeError, match="broken sample") as caught:
        walk(model, calls)
    if hasattr(caught.value, "__notes__"):
        assert "calibration batch 2" in caught.value.__notes__[0]
    assert hooks_left(model) == 0 and threads_left() == []


def test_an_error_while_quantizing_ends_all_batches():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))

    def fail(stop):
        raise KeyError("solver")

    with pytest.raises(KeyError, match="solver"):
        walk(model, [lambda: model(torch.ones(1, 4))] * 3, change=fail)
    gc.collect()
    assert hooks_left(model) == 0 and threads_left() == []


def test_a_forward_of_the_model_outside_the_walk_passes_through():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    x = torch.ones(1, 4)
    seen = []

    def look(stop):
        seen.append(model(x))  # on the consumer's thread, while hooks are in place

    walk(model, [lambda: model(x)] * 2, change=look)
    assert len(seen) == 2


@pytest.mark.parametrize("ends", ["going on", "closed"])
def test_a_stop_does_not_keep_the_inputs_alive(ends):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    layers = linears(model)
    call = lambda: model[1](model[0](torch.ones(1, 4)))  # noqa: E731
    steps = lockstep.walk(find_groups(layers, call), layers, [call, call], lambda *_: None)
    first = next(steps)
    inputs = [weakref.ref(x) for x in first.inputs.values()]
    assert len(inputs) == 2 and all(x() is not None for x in inputs)
    if ends == "going on":
        next(steps)
    else:
        steps.close()
    gc.collect()
    assert not any(x() is not None for x in inputs) and first.inputs == {}
    steps.close()


def test_every_batch_has_its_own_values_where_the_state_knows_that_forwards_write():
    class Remembers(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.given = nn.Linear(4, 4), nn.Linear(4, 4), None

        def forward(self, x):
            self.given = x
            self.a(x)
            return self.b(self.given * 1)

    model, seen = Remembers(), []
    forwards = [lambda n=n: model(torch.full((1, 4), float(n))) for n in (1, 2)]
    state = KeptState(model)
    groups = find_groups(linears(model), forwards[0], state=state)
    observe = lambda group, number, x: seen.append((group.names[0], float(x[0, 0])))  # noqa: E731
    for _ in lockstep.walk(groups, linears(model), forwards, observe, state=state):
        pass
    assert seen == [("a", 1.0), ("a", 2.0), ("b", 1.0), ("b", 2.0)] and model.given is None


def test_float_forwards_come_just_before_the_others_and_only_wait_where_inputs_are_compared():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    layers, order = linears(model), []
    groups = [Group((name,)) for name in layers]
    walks = Walks(frozenset({"0", "2"}))
    forwards = walks.forwards(2, lambda batch, number: lambda: model(torch.full((3, 8), float(batch))))

    def observe(group, number, x):
        assert serves_float() == walks.is_float(number)
        order.append((group.names[0], walks.batch(number), walks.is_float(number)))

    stops = []
    for stop in lockstep.walk(groups, layers, forwards, observe, walks=walks):
        stops.append((stop.group.names[0], sorted(stop.inputs)))
    assert order == [
        ("0", 0, True), ("0", 0, False), ("0", 1, True), ("0", 1, False),
        ("2", 0, True), ("1", 0, False), ("2", 1, True), ("1", 1, False),  # float ones pass layer 1
        ("2", 0, False), ("2", 1, False),
    ]  # fmt: skip
    assert stops == [("0", [0, 1, 2, 3]), ("1", [1, 3]), ("2", [0, 1, 2, 3])]
    assert not serves_float() and threads_left() == []
