"""Lock-step: batches walk the model together, each forward runs once, and nothing leaks between them."""

from __future__ import annotations

import contextlib
import contextvars
import gc
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from gptq_plugin.model.targets import is_linear
from gptq_plugin.walk import lockstep


def linears(model):
    return {name: module for name, module in model.named_modules() if is_linear(module)}


def walk(model, calls, change=None, layers=None, notes=None):
    """Runs all calls in lock-step; returns their outputs, the groups in order, and the inputs counted."""
    layers = layers or linears(model)
    outputs = [None] * len(calls)
    counted: dict[str, list[tuple[int, torch.Tensor]]] = {}

    def forward(number):
        def run():
            outputs[number] = calls[number]()

        return run

    groups = lockstep.plan(layers, calls[0])
    order = []

    def observe(group, number, x):
        counted.setdefault(group.names[0], []).append((number, x.clone()))

    forwards = [forward(number) for number in range(len(calls))]
    for stop in lockstep.walk(groups, layers, forwards, observe, notes=notes):
        order.append(stop.group)
        if change:
            change(stop)
    return outputs, order, counted


def hooks_left(model):
    return sum(len(module._forward_pre_hooks) for module in model.modules())


def threads_left():
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("calibration-batch")]


@pytest.fixture(autouse=True)
def nothing_is_left_behind():
    yield
    assert threads_left() == []


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


def test_layers_that_read_the_same_tensor_share_a_group_and_others_do_not():
    model = MODELS["llama"]()
    groups = lockstep.plan(linears(model), lambda: model(input_ids=torch.arange(6)[None]))
    assert [len(group.names) for group in groups] == [3, 1, 2, 1, 3, 1, 2, 1, 1]
    assert groups[0].names == tuple(f"model.layers.0.self_attn.{part}_proj" for part in "qkv")


def test_a_reused_address_is_not_a_shared_input():
    class Chain(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(8, 8, bias=False) for _ in range(50))

        def forward(self, x):
            for layer in self.layers:
                layer(torch.zeros(4, 8))  # freed at once: the next one often gets its address
                gc.collect(0)
            return x

    model = Chain()
    groups = lockstep.plan(linears(model), lambda: model(torch.zeros(1, 8)))
    assert all(len(group.names) == 1 for group in groups)


def test_an_input_changed_in_place_is_another_input():
    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            y = self.a(x)
            x.mul_(2)
            return y + self.b(x)

    model = InPlace()
    calls = [lambda: model(torch.ones(3, 8)), lambda: model(torch.full((3, 8), 3.0))]
    outputs, order, counted = walk(model, calls)
    assert [group.names for group in order] == [("a",), ("b",)]
    assert [float(x.mean()) for _, x in counted["a"]] == [1, 3]  # what a saw, not what the buffer holds later
    assert [float(x.mean()) for _, x in counted["b"]] == [2, 6]


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
    groups = lockstep.plan(layers, lambda: model(torch.ones(1, 4)))
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
    groups = [lockstep.Group(("first",)), lockstep.Group(("step",), calls=3), lockstep.Group(("never",))]
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

    model, notes = Backwards(), lockstep.Walk()
    walk(model, [lambda: model(torch.ones(1, 4)), lambda: model(-torch.ones(1, 4))], notes=notes)
    # b waits for a; the backwards batch meets a only after it was done with the forwards batch
    assert notes.late == {"a": 1}


def test_autocast_inside_the_model_does_not_leak_into_other_batches():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.inside, self.outside = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                y = self.inside(x)
            return self.outside(y.float())

    torch.manual_seed(0)
    model = Mixed()
    batches = [torch.randn(3, 8) for _ in range(3)]
    calls = [lambda x=x: model(x) for x in batches]
    with torch.no_grad():
        plain = [call() for call in calls]
    outputs, _, _ = walk(model, calls)
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(outputs, plain))
    assert not torch.is_autocast_enabled("cpu")


def test_grad_mode_dtype_and_modes_set_inside_a_forward_stay_inside_it():
    seen = []

    class Switching(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x, grad):
            seen.append(torch.is_grad_enabled())
            with torch.set_grad_enabled(grad), torch.device("meta" if grad else "cpu"):
                self.a(x)
                where = torch.empty(1).device.type
                assert torch.is_grad_enabled() == grad and where == ("meta" if grad else "cpu")
            seen.append(torch.is_grad_enabled())
            return self.b(x)

    model = Switching()
    walk(model, [lambda: model(torch.ones(1, 4), True), lambda: model(torch.ones(1, 4), False)] * 2)
    assert not any(seen) and torch.is_grad_enabled() and torch.empty(1).device.type == "cpu"


@pytest.mark.parametrize("ends", ["normally", "cancelled"])
def test_the_default_dtype_and_attention_kernels_set_inside_a_forward_stay_inside_it(ends):
    from torch.nn.attention import SDPBackend, sdpa_kernel

    class Switching(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x, wide):
            assert torch.get_default_dtype() == torch.float32
            if wide:
                torch.set_default_dtype(torch.float64)
            try:
                with sdpa_kernel(SDPBackend.MATH if wide else SDPBackend.FLASH_ATTENTION):
                    self.a(x)
                    self.b(x)
                    assert torch.get_default_dtype() == (torch.float64 if wide else torch.float32)
                    assert torch.backends.cuda.math_sdp_enabled() == wide
            finally:
                torch.set_default_dtype(torch.float32)

    model = Switching()
    layers = linears(model)
    calls = [lambda: model(torch.ones(1, 4), True), lambda: model(torch.ones(1, 4), False)] * 2
    before = (torch.backends.cuda.math_sdp_enabled(), torch.backends.cuda.flash_sdp_enabled())
    steps = lockstep.walk(lockstep.plan(layers, calls[0]), layers, calls, lambda *_: None)
    for _ in steps:
        assert torch.get_default_dtype() == torch.float32
        if ends == "cancelled":
            steps.close()
    assert torch.get_default_dtype() == torch.float32
    assert (torch.backends.cuda.math_sdp_enabled(), torch.backends.cuda.flash_sdp_enabled()) == before


def test_the_callers_autocast_and_context_variables_hold_in_every_batch():
    variable: contextvars.ContextVar[int] = contextvars.ContextVar("variable", default=0)
    variable.set(7)
    model = nn.Linear(4, 4)
    dtypes = []

    def call():
        assert variable.get() == 7
        variable.set(8)
        dtypes.append(model(torch.ones(1, 4)).dtype)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        walk(nn.Sequential(model), [call, call])
    assert set(dtypes) == {torch.bfloat16} and variable.get() == 7


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


def test_a_model_that_swallows_exceptions_is_ended_too():
    class Swallows(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            for layer in (self.a, self.b):
                try:
                    x = layer(x)
                except Exception:
                    x = x + 1
            return x

    model = Swallows()
    layers = linears(model)
    call = lambda: model(torch.ones(1, 4))  # noqa: E731
    steps = lockstep.walk(lockstep.plan(layers, call), layers, [call, call], lambda *_: None)
    next(steps)
    steps.close()
    assert hooks_left(model) == 0 and threads_left() == []


def test_a_forward_of_the_model_outside_the_walk_passes_through():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    x = torch.ones(1, 4)
    seen = []

    def look(stop):
        seen.append(model(x))  # on the consumer's thread, while hooks are in place

    walk(model, [lambda: model(x)] * 2, change=look)
    assert len(seen) == 2


def test_inputs_given_by_keyword_are_seen():
    class ByKeyword(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(4, 4)

        def forward(self, x):
            return self.a(input=x)

    model = ByKeyword()
    _, order, counted = walk(model, [lambda: model(torch.ones(2, 4))])
    assert counted["a"][0][1].shape == (2, 4)


def test_waiting_is_entered_on_the_batchs_thread_before_anybody_sees_it_wait_and_left_when_it_goes_on():
    events = []

    @contextlib.contextmanager
    def waiting(number, name):
        assert threading.current_thread().name == f"calibration-batch-{number}"
        events.append(("enter", number))
        yield
        events.append(("leave", number))

    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    layers = linears(model)
    call = lambda: model(torch.ones(1, 4))  # noqa: E731
    groups = lockstep.plan(layers, call)
    for stop in lockstep.walk(groups, layers, [call, call], lambda *_: None, waiting=waiting):
        events.append(stop.group.names)
    enter, leave = [("enter", 0), ("enter", 1)], [("leave", 0), ("leave", 1)]
    between = [event for pair in zip(leave, enter) for event in pair]
    assert events == [*enter, ("0",), *between, ("1",), *leave]


def test_a_cancelled_batch_leaves_waiting_with_an_exception():
    left = []

    @contextlib.contextmanager
    def waiting(number, name):
        try:
            yield
        except BaseException as error:
            left.append((number, isinstance(error, Exception)))
            raise

    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    layers = linears(model)
    call = lambda: model(torch.ones(1, 4))  # noqa: E731
    steps = lockstep.walk(lockstep.plan(layers, call), layers, [call] * 2, lambda *_: None, waiting=waiting)
    next(steps)
    steps.close()
    assert left == [(0, False), (1, False)]


@pytest.mark.parametrize("when", ["entered", "left"])
def test_an_error_in_waiting_is_an_error_of_the_batch(when):
    @contextlib.contextmanager
    def waiting(number, name):
        if (number, when) == (1, "entered"):
            raise MemoryError("no room")
        yield
        if (number, when) == (1, "left"):
            raise MemoryError("no room")

    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    layers = linears(model)
    call = lambda: model(torch.ones(1, 4))  # noqa: E731
    groups = lockstep.plan(layers, call)
    with pytest.raises(MemoryError, match="no room"):
        for _ in lockstep.walk(groups, layers, [call] * 3, lambda *_: None, waiting=waiting):
            pass
    assert hooks_left(model) == 0


def test_planning_enters_waiting_wherever_a_batch_would_wait():
    entered = []

    @contextlib.contextmanager
    def waiting(number, name):
        entered.append(number)
        yield

    model = MODELS["llama"]()
    groups = lockstep.plan(linears(model), lambda: model(input_ids=torch.arange(6)[None]), waiting)
    assert entered == [0] * len(groups)


def test_a_hook_of_the_users_that_changes_a_layers_input_comes_first():
    """What is observed is what the layer multiplies, rotated or scaled by a hook as it may be."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].register_forward_pre_hook(lambda module, args: (2 * args[0],))
    layers, seen = linears(model), {}
    call = lambda: model(torch.ones(1, 4))  # noqa: E731
    groups = lockstep.plan(layers, call)
    for _ in lockstep.walk(groups, layers, [call], lambda group, number, x: seen.setdefault(group.names, x.clone())):
        pass
    torch.testing.assert_close(seen[("1",)], 2 * model[0](torch.ones(1, 4)).detach())


@pytest.mark.parametrize("ends", ["going on", "closed"])
def test_a_stop_does_not_keep_the_inputs_alive(ends):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    layers = linears(model)
    call = lambda: model[1](model[0](torch.ones(1, 4)))  # noqa: E731
    steps = lockstep.walk(lockstep.plan(layers, call), layers, [call, call], lambda *_: None)
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


def test_a_thread_that_is_slow_to_end_is_waited_for_once(monkeypatch):
    """It handed back for the last time when its forward ended: to wait for more of it would be for ever."""
    run = lockstep._Batch._run

    def slow(batch, forward):
        run(batch, forward)
        time.sleep(0.2)

    monkeypatch.setattr(lockstep._Batch, "_run", slow)
    model = nn.Sequential(nn.Linear(4, 4))
    walking = threading.Thread(target=walk, args=(model, [lambda: model(torch.ones(2, 4))]), daemon=True)
    walking.start()
    walking.join(20)
    assert not walking.is_alive()
    time.sleep(0.3)  # the planning batch's own


@pytest.mark.gpu
def test_the_callers_cuda_stream_and_device_hold_in_every_batch():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).cuda()
    streams = []

    def call():
        streams.append(torch.cuda.current_stream())
        return model(torch.ones(1, 4, device="cuda"))

    with torch.cuda.stream(torch.cuda.Stream()):
        here = torch.cuda.current_stream()
        walk(model, [call, call])
    assert streams == [here] * 3 and torch.cuda.current_stream() != here
