"""Weights: modules run with copies and dequantized weights, and have their own tensors again afterwards."""

from __future__ import annotations

import contextlib
import contextvars
import copy
import threading
import weakref

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

from gptq_plugin import QuantizeConfig
from gptq_plugin.memory.weights import Weights
from gptq_plugin.model.structure import Structure
from gptq_plugin.model.targets import find_targets
from gptq_plugin.walk import float_walk, lockstep
from gptq_plugin.walk.groups import find_groups

from module_tensors import held_tensors, rounded, size

CPU = torch.device("cpu")
CONFIG = QuantizeConfig(bits=2, group_size=32)
UNLIMITED = 10**9
IDS = torch.arange(12).reshape(2, 6)


def llama(**options):
    torch.manual_seed(0)
    values = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
              "num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": True, **options}  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**values)).eval()


BLOCK = size(llama().model.layers[0])


def logits(model, ids=IDS):
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def temporary_bytes(model, homes):
    """Bytes of tensors that the modules point to and do not own."""
    now = {id(t): t for m in model.modules() for t in (*m._parameters.values(), *m._buffers.values()) if t is not None}
    return sum(tensor.nbytes for key, tensor in now.items() if key not in homes)


def quantized(model, layers):
    """The reference: a copy of the model whose parameters are the layers' weights."""
    model = copy.deepcopy(model)
    for name, target in by_name(model).items():
        if name in layers:
            target.module.weight = target.with_weight(layers[name].dequantize())
    return model


def by_name(model):
    return {target.name: target for target in find_targets(Structure.of(model), CONFIG)[0]}


class Watched(torch.Tensor):
    """Records when and where it is copied, waits for permission first, and may fail."""

    began: threading.Event
    allowed: threading.Event
    copied: threading.Event
    fails = False

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is not torch.Tensor.to:
            result = super().__torch_function__(func, types, args, kwargs)
            if func is torch.Tensor.detach:  # the same tensor to whom watches it
                result.__dict__.update(args[0].__dict__)
            return result
        args[0].began.set()
        assert args[0].allowed.wait(10) and threading.current_thread().name.startswith("weights")
        if args[0].fails:
            raise OSError("the disk is gone")
        with torch._C.DisableTorchFunctionSubclass():
            result = func(args[0].as_subclass(torch.Tensor), *args[1:], **(kwargs or {}))
        args[0].results.append(weakref.ref(result))
        args[0].copied.set()
        return result


def watched_layers(count):
    """Layers of 1 kB whose buffers can be watched; they are no part of the output."""
    model = nn.Sequential(*(nn.Linear(16, 16, bias=False) for _ in range(count)))
    for layer in model:
        layer.register_buffer("watched", torch.zeros(1).as_subclass(Watched))
        for event in ("began", "allowed", "copied"):
            setattr(layer.watched, event, threading.Event())
        layer.watched.allowed.set()
        layer.watched.results = []
    return (
        model,
        [layer.watched for layer in model],
        find_targets(Structure.of(model), QuantizeConfig(group_size=16))[0],
    )


class SharedTwice(nn.Module):
    """A layer called twice, which is also a part of a second module."""

    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(nn.Linear(32, 32), nn.GELU())
        self.second = nn.Sequential(self.first[0], nn.Linear(32, 32))

    def forward(self, x):
        return self.second(self.first(self.first(x)))


class ReadsItsChild(nn.Module):
    """As Mamba does: one projection is called, the other's weight is read."""

    def __init__(self):
        super().__init__()
        self.called, self.read = nn.Linear(32, 32), nn.Linear(32, 32, bias=False)
        self.seen = []

    def forward(self, x):
        x = self.called(x)
        self.seen.append(self.read.weight)
        return nn.functional.linear(x, self.read.weight)


class OwnTensorsLast(nn.Module):
    """Larger than a unit; it reads its own parameters after all its parts have run."""

    def __init__(self):
        super().__init__()
        self.parts = nn.Sequential(*(nn.Linear(32, 32) for _ in range(4)))
        self.scale = nn.Parameter(torch.randn(32))
        self.shifts = nn.ParameterList([nn.Parameter(torch.randn(32))])
        self.seen = []

    def forward(self, x):
        x = self.parts(x)
        self.seen += [self.scale, self.shifts[0]]
        return x * self.scale + self.shifts[0]


MODELS = {
    "llama": (llama, logits),
    "gpt2": (lambda: GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=64, n_layer=2, n_head=2)).eval(), logits),
    "lstm": (lambda: nn.Sequential(nn.Embedding(64, 8), nn.LSTM(8, 8, num_layers=2)), lambda m: m(IDS)[0]),
    "shared": (SharedTwice, lambda m: m(torch.ones(2, 32))),
    "reading": (ReadsItsChild, lambda m: m(torch.ones(2, 32))),
    "own": (OwnTensorsLast, lambda m: m(torch.ones(2, 32))),
}


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("capacity", [0, 10_000, UNLIMITED])
@pytest.mark.parametrize("unit_bytes", [0, 9_000, UNLIMITED])
@pytest.mark.parametrize("kind", MODELS)
def test_outputs_are_bit_identical_and_every_tensor_is_back_afterwards(kind, unit_bytes, capacity, stream):
    torch.manual_seed(0)
    make, run = MODELS[kind]
    model = make()
    before, contents, plain = held_tensors(model), copy.deepcopy(model.state_dict()), run(model)
    with Weights(model, CPU, stream=stream, capacity=capacity, unit_bytes=unit_bytes) as weights:
        assert all(torch.equal(run(model), plain) for _ in range(3))
    assert held_tensors(model) == before and not any(module._forward_pre_hooks for module in model.modules())
    assert all(torch.equal(value, contents[name]) for name, value in model.state_dict().items())
    assert (weights.copied_bytes > 0) == (weights.peak_bytes > 0) == stream


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("capacity", [0, BLOCK, UNLIMITED])
@pytest.mark.parametrize("unit_bytes", [0, BLOCK, UNLIMITED])
def test_each_of_two_walks_runs_with_its_own_weights_of_quantized_layers(unit_bytes, capacity, stream):
    model = llama()
    before, plain, layers = held_tensors(model), logits(model), {}
    in_float_walk = float_walk.running_as(lambda: logits(model), 0, True)
    with Weights(model, CPU, stream=stream, capacity=capacity, unit_bytes=unit_bytes, two_walks=True) as weights:
        for name, target in list(by_name(model).items())[::4]:
            layers[name] = rounded(target)
            weights.quantize([(target, layers[name], None)])
            wanted = logits(quantized(llama(), layers))
            for _ in range(2):
                assert torch.equal(contextvars.copy_context().run(in_float_walk), plain)
                assert torch.equal(logits(model), wanted)
            assert not torch.equal(plain, wanted)
            assert torch.equal(weights.present(target), layers[name].dequantize(target.parameter.dtype))
    assert held_tensors(model) == before and torch.equal(logits(model), plain)


def test_every_tensor_is_back_after_an_error_in_the_middle_of_a_forward():
    model = llama()
    before = held_tensors(model)

    def fail(*_):
        raise KeyError("solver")

    handle = model.model.layers[1].mlp.register_forward_hook(fail)
    weights = Weights(model, CPU, stream=True, capacity=BLOCK, unit_bytes=BLOCK)
    with pytest.raises(KeyError, match="solver"), weights:
        logits(model)
    handle.remove()
    assert held_tensors(model) == before and not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("capacity", [0, BLOCK, 2 * BLOCK + 1000])
def test_temporary_tensors_take_no_more_than_the_capacity_and_one_unit(capacity):
    model = llama()
    homes = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
    seen = []
    for module in model.modules():
        module.register_forward_hook(lambda *_: seen.append(temporary_bytes(model, homes)))
    with Weights(model, CPU, stream=True, capacity=capacity, unit_bytes=BLOCK) as weights:
        for target in list(by_name(model).values())[::3]:
            logits(model)
            weights.quantize([(target, rounded(target), None)])
    assert 0 < max(seen) <= weights.peak_bytes <= max(capacity, BLOCK)


def test_the_sizes_for_a_plan_are_those_of_a_pass_and_a_lower_capacity_holds_at_once():
    model = llama()
    homes = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
    with Weights(model, CPU, stream=True, capacity=UNLIMITED, unit_bytes=BLOCK) as weights:
        plain = logits(model)
        assert weights.total_bytes == weights.peak_bytes == weights.copied_bytes
        assert 2 * BLOCK < weights.min_resident_bytes <= 3 * BLOCK  # two of the blocks, and what is beside them
        weights.capacity = 2 * BLOCK
        assert BLOCK < temporary_bytes(model, homes) <= 2 * BLOCK
        assert torch.equal(logits(model), plain) and temporary_bytes(model, homes) <= 2 * BLOCK
    at_home = Weights(model, CPU, stream=False, capacity=0, unit_bytes=BLOCK)
    assert at_home.total_bytes == at_home.min_resident_bytes == 0


def test_what_a_block_reads_from_its_parts_without_calling_them_is_there_too():
    model = nn.Sequential(ReadsItsChild(), ReadsItsChild())
    own = [block.read.weight for block in model]
    with Weights(model, CPU, stream=True, capacity=0, unit_bytes=size(model[0])):
        model(torch.ones(2, 32))
    assert all(block.seen[0] is not weight and torch.equal(block.seen[0], weight) for block, weight in zip(model, own))


def test_a_shared_layer_whose_weight_is_read_is_there_for_all_who_read_it():
    model = nn.Sequential(ReadsItsChild(), ReadsItsChild())
    model[1].read = model[0].read
    own = model[0].read.weight
    with Weights(model, CPU, stream=True, capacity=0, unit_bytes=size(model[0])):
        model[1](torch.ones(2, 32))
    assert model[1].seen[0] is not own and torch.equal(model[1].seen[0], own)


def test_what_a_large_module_holds_itself_is_there_until_its_last_part_has_run():
    model = OwnTensorsLast()
    own = [model.scale, model.shifts[0]]
    with Weights(model, CPU, stream=True, capacity=0, unit_bytes=size(model.parts[0])):
        model(torch.ones(2, 32))
    assert all(seen is not tensor for seen, tensor in zip(model.seen, own))


def test_recurrent_layers_run_with_the_copies():
    model = nn.Sequential(nn.LSTM(8, 8))
    lstm, own = model[0], model[0].weight_ih_l0
    seen = []
    lstm.register_forward_hook(lambda *_: seen.append((lstm.weight_ih_l0, lstm._flat_weights[0])))
    with Weights(model, CPU, stream=True, capacity=0, unit_bytes=UNLIMITED):
        model(torch.ones(3, 1, 8))
    assert seen[0][0] is seen[0][1] is not own and lstm._flat_weights[0] is own


def test_tied_weights_are_one_copy_within_a_unit_and_one_for_each_of_two_units():
    model = llama()
    embedding, head, seen = model.model.embed_tokens, model.lm_head, []
    model.lm_head.register_forward_hook(lambda *_: seen.append((embedding.weight, head.weight)))
    with Weights(model, CPU, stream=True, capacity=UNLIMITED, unit_bytes=UNLIMITED) as weights:
        logits(model)
    assert seen[0][0] is seen[0][1] and weights.peak_bytes == size(model)
    with Weights(model, CPU, stream=True, capacity=UNLIMITED, unit_bytes=size(head)) as weights:
        logits(model)
    assert seen[1][0] is not seen[1][1] and weights.peak_bytes == size(model) + size(head)
    assert embedding.weight is head.weight


@pytest.mark.parametrize("stream", [True, False])
def test_a_quantized_layer_runs_with_its_quantized_weights_also_after_it_went_home(stream):
    model = llama()
    targets = by_name(model)
    target, other = (targets[f"model.layers.{block}.mlp.down_proj"] for block in (0, 2))
    plain, expected = logits(model), logits(quantized(model, {target.name: rounded(target)}))
    own, seen = target.parameter, []
    with Weights(model, CPU, stream=stream, capacity=0, unit_bytes=BLOCK) as weights:
        weight = weights.present(target)
        assert torch.equal(weight, own) and (weight.data_ptr() != own.data_ptr()) == stream
        weights.quantize([(target, rounded(target), None)])
        assert not torch.equal(target.parameter, own)
        weights.present(other)
        weights.quantize([(other, rounded(other), None)])
        weights.present(other)
        assert target.parameter is own  # it had to make room
        handle = target.module.register_forward_hook(lambda module, *_: seen.append(module.weight))
        outputs = logits(model)
        handle.remove()
    assert torch.equal(seen[0], rounded(target).dequantize())
    assert torch.equal(outputs, logits(quantized(model, {t.name: rounded(t) for t in (target, other)})))
    assert target.parameter is own and torch.equal(logits(model), plain) and not torch.equal(plain, expected)


def test_overlays_of_a_model_on_the_device_stay_within_the_capacity():
    model = llama()
    targets = by_name(model)
    homes = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
    largest = size(model.model.layers[0].mlp) + size(model.model.layers[0].self_attn)
    with Weights(model, CPU, stream=False, capacity=largest, unit_bytes=BLOCK) as weights:
        for target in targets.values():
            weights.present(target)
            weights.quantize([(target, rounded(target), None)])
            assert temporary_bytes(model, homes) <= largest
        assert temporary_bytes(model, homes) == weights.peak_bytes == largest and weights.copied_bytes == 0


def test_conv1d_layers_are_given_in_their_own_layout():
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=64, n_layer=2, n_head=2)).eval()
    targets = by_name(model)
    assert type(targets["transformer.h.0.attn.c_attn"].module) is Conv1D
    layers = {name: rounded(target) for name, target in targets.items()}
    expected = logits(quantized(model, layers))
    with Weights(model, CPU, stream=True, capacity=0, unit_bytes=size(model.transformer.h[0])) as weights:
        for name, target in targets.items():
            assert torch.equal(weights.present(target), target.module.weight.T)
            weights.quantize([(target, layers[name], None)])
            assert torch.equal(weights.present(target), layers[name].dequantize())
        assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("capacity", [0, BLOCK, UNLIMITED])
def test_batches_in_lock_step_see_only_quantized_layers_before_them(capacity, stream):
    model = llama()
    targets = by_name(model)
    layers = {name: rounded(target) for name, target in targets.items()}
    batches = [IDS, IDS[:, :3] + 20, IDS[:1] + 40]
    floats = {name: target.weight.clone() for name, target in targets.items()}
    expected = [logits(quantized(model, layers), ids) for ids in batches]
    outputs = [None] * len(batches)
    before = held_tensors(model)

    def forward(number):
        def run():
            outputs[number] = logits(model, batches[number])

        return run

    modules = {name: target.module for name, target in targets.items()}
    # A unit a layer: all of them come and go while the batches wait.
    with Weights(model, CPU, stream=stream, capacity=capacity, unit_bytes=5000) as weights:

        @contextlib.contextmanager
        def waiting(number, name):
            yield
            weights.present(targets[name])

        groups = find_groups(modules, forward(0))
        forwards = [forward(n) for n in range(3)]
        for stop in lockstep.walk(groups, modules, forwards, lambda *_: None, waiting=waiting):
            for name in stop.group.names:
                assert torch.equal(weights.present(targets[name]), floats[name])
                weights.quantize([(targets[name], layers[name], None)])
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(outputs, expected))
    assert held_tensors(model) == before


def test_the_next_unit_is_copied_while_the_one_before_it_is_in_use():
    model, watched, targets = watched_layers(6)
    unit = size(model[0])
    with Weights(model, CPU, stream=True, capacity=2 * unit, unit_bytes=unit) as weights:
        model(torch.ones(1, 16))  # the first pass tells the order
        for tensor in watched:
            tensor.copied.clear()
        for number, target in enumerate(targets):
            assert not number or watched[number].copied.wait(10)  # before it is needed
            before = weights.copied_bytes
            weights.present(target)
            assert weights.copied_bytes - before == unit * (number == 0)  # the first one alone is waited for
            weights.quantize([(target, rounded(target), None)])
            model[number](torch.ones(1, 16))
    assert weights.peak_bytes == 2 * unit


def test_a_prefetch_does_not_take_the_room_of_what_other_batches_still_need():
    model, _, targets = watched_layers(4)
    unit, x = size(model[0]), torch.ones(1, 16)
    with Weights(model, CPU, stream=True, capacity=2 * unit, unit_bytes=unit) as weights:
        model(x)
        weights.quantize([(targets[0], rounded(targets[0]), None)])
        model[1](model[0](x))  # the first batch crosses into the next unit
        before = weights.copied_bytes
        model[1](model[0](x))  # and so do the others
        assert weights.copied_bytes == before
        weights.quantize([(targets[1], rounded(targets[1]), None)])
        model[1](x)
        assert weights.copied_bytes == before + unit


def test_no_copy_lives_on_afterwards_not_even_of_a_unit_that_was_on_its_way():
    model, watched, targets = watched_layers(4)
    unit = size(model[0])
    with Weights(model, CPU, stream=True, capacity=2 * unit, unit_bytes=unit) as weights:
        model(torch.ones(1, 16))
        weights.quantize([(targets[0], rounded(targets[0]), None)])
        watched[1].allowed.clear()
        watched[1].began.clear()
        weights.present(targets[0])
        assert watched[1].began.wait(10)
        threading.Timer(0.2, watched[1].allowed.set).start()
    assert len(watched[1].results) == 2 and not any(
        result() is not None for tensor in watched for result in tensor.results
    )
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("weights")]


def test_a_unit_on_its_way_makes_room_for_one_that_is_needed():
    model, watched, targets = watched_layers(4)
    unit = size(model[0])
    with Weights(model, CPU, stream=True, capacity=2 * unit, unit_bytes=unit) as weights:
        model(torch.ones(1, 16))
        weights.quantize([(targets[0], rounded(targets[0]), None)])
        watched[1].copied.clear()
        weights.present(targets[0])
        assert watched[1].copied.wait(10)
        model[0](torch.ones(1, 16))
        weights.present(targets[3])
        assert not any(result() is not None for result in watched[1].results)
        assert torch.equal(weights.present(targets[1]), model[1].weight) and weights.peak_bytes == 2 * unit


def test_an_error_while_copying_in_the_background_is_raised_where_the_weights_are_needed():
    model, watched, targets = watched_layers(3)
    before, unit = held_tensors(model), size(model[0])
    with Weights(model, CPU, stream=True, capacity=2 * unit, unit_bytes=unit) as weights:
        model(torch.ones(1, 16))
        watched[1].fails = True
        weights.quantize([(targets[0], rounded(targets[0]), None)])
        model[0](torch.ones(1, 16))  # copies 1 in the background
        with pytest.raises(RuntimeError, match="the weights of 1 could not be brought to cpu: the disk is gone"):
            model[1](torch.ones(1, 16))
        watched[1].fails = False
        model[1](torch.ones(1, 16))  # a second try starts afresh
    assert held_tensors(model) == before


def test_modes_of_a_batchs_thread_do_not_see_the_copies():
    model = llama()
    target = by_name(model)["model.layers.0.mlp.down_proj"]
    layer, made, used = rounded(target), set(), set()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if func.overloadpacket in (torch.ops.aten.clone, torch.ops.aten._to_copy, torch.ops.aten.mul):
                made.add(result.untyped_storage().data_ptr())
            return result

    for module in model.modules():
        module.register_forward_hook(
            lambda module, *_: used.update(p.data_ptr() for p in module.parameters(recurse=False))
        )
    with Weights(model, CPU, stream=True, capacity=UNLIMITED, unit_bytes=BLOCK) as weights:
        weights.quantize([(target, layer, None)])
        with torch.device("meta"), Watch(), torch.inference_mode():
            model.model.layers[0](
                torch.ones(1, 4, 64, device="cpu"), position_embeddings=(torch.ones(1, device="cpu"),) * 2
            )
        assert used and made and not used & made
        assert not target.parameter.is_inference() and torch.equal(target.weight, layer.dequantize())


class Counts(nn.Module):
    """Has a buffer it writes to and one it assigns, and remembers of both what it did."""

    def __init__(self):
        super().__init__()
        self.register_buffer("written", torch.zeros(1))
        self.register_buffer("assigned", torch.zeros(1), persistent=False)
        self.register_buffer("read", torch.ones(1))
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        self.written += self.read
        self.assigned = torch.full((1,), float(self.calls), device=x.device)
        assert float(self.written) == float(self.assigned) == self.calls
        return x


def test_what_the_forward_assigns_or_writes_to_a_buffer_is_not_lost():
    model = nn.Sequential(Counts(), nn.Linear(8, 8), Counts())
    read = model[0].read
    with Weights(model, CPU, stream=True, capacity=0, unit_bytes=100):
        for _ in range(3):
            model(torch.ones(1, 8))
    assert [float(block.written) for block in (model[0], model[2])] == [3, 3]
    assert model[0].read is read and float(model[0].assigned) == 3


@pytest.mark.gpu
@pytest.mark.parametrize("capacity", [0, 2 * BLOCK, UNLIMITED])
@pytest.mark.parametrize("unit_bytes", [0, BLOCK])
def test_a_model_on_the_cpu_runs_on_the_gpu_as_if_it_were_there(capacity, unit_bytes):
    model = llama()
    targets = by_name(model)
    layers = {name: rounded(target) for name, target in targets.items()}  # they stay on the CPU
    ids, before = IDS.cuda(), held_tensors(model)
    plain = logits(copy.deepcopy(model).cuda(), ids)
    expected = logits(quantized(model, layers).cuda(), ids)
    with Weights(model, torch.device("cuda"), stream=True, capacity=capacity, unit_bytes=unit_bytes) as weights:
        assert all(torch.equal(logits(model, ids), plain) for _ in range(3))
        for name, target in targets.items():
            assert weights.present(target).is_cuda
            weights.quantize([(target, layers[name], None)])
        assert all(torch.equal(logits(model, ids), expected) for _ in range(3))
    assert held_tensors(model) == before and all(not layer.qweight.is_cuda for layer in layers.values())


@pytest.mark.gpu
def test_what_the_forward_assigns_on_the_gpu_is_on_the_cpu_afterwards():
    model = nn.Sequential(Counts(), nn.Linear(8, 8), Counts())
    with Weights(model, torch.device("cuda"), stream=True, capacity=0, unit_bytes=100):
        for _ in range(3):
            assert model(torch.ones(1, 8, device="cuda")).is_cuda
    assert all(not buffer.is_cuda for buffer in model.buffers())
    assert float(model[2].written) == float(model[2].assigned) == 3


@pytest.mark.gpu
def test_memory_on_the_gpu_stays_within_the_capacity_while_copies_are_ahead_of_the_computation():
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(1024, 1024, bias=False) for _ in range(40)))
    unit, x = size(model[0]), torch.randn(16384, 1024, device="cuda")
    homes = [layer.weight for layer in model]
    on_gpu = copy.deepcopy(model).cuda()
    with torch.no_grad(), Weights(model, x.device, stream=True, capacity=4 * unit, unit_bytes=unit) as weights:
        expected = on_gpu(x)
        del on_gpu
        torch.cuda.synchronize()
        before = torch.cuda.memory_stats()["active_bytes.all.current"]  # memory some stream may still use counts
        for _ in range(3):
            torch.cuda.reset_peak_memory_stats()
            y = model(x)
            torch.cuda.synchronize()
            # A layer's input and output, and the weights.
            assert torch.cuda.memory_stats()["active_bytes.all.peak"] <= before + 2 * x.nbytes + 5 * unit
            assert torch.equal(y, expected)
            del y
            weights.capacity = 0
            weights.capacity = 4 * unit
    assert weights.peak_bytes == 4 * unit and weights.copied_bytes == 3 * 40 * unit
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() <= before
    assert all(layer.weight is home for layer, home in zip(model, homes))
