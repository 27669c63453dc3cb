"""All experts of a parameter in one call: the products are those of each expert's matrix with its rows."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn
from torch.nn import functional

from gptq_plugin.model import experts_call
from gptq_plugin.model.expert_weights import ExpertWeights
from gptq_plugin.model.experts_call import ExpertsCall

WIDTHS, IN = (6, 3), 4


def layers(experts=4):
    torch.manual_seed(0)
    return [[nn.Linear(IN, width, bias=False) for width in WIDTHS] for _ in range(experts)]


def ends_of(counts):
    return torch.tensor(counts).cumsum(0, dtype=torch.int32)


def expected(own, x, ends):
    y, start = torch.zeros(len(x), sum(WIDTHS)), 0
    for of_one, stop in zip(own, ends.tolist(), strict=True):
        y[start:stop] = torch.cat([functional.linear(x[start:stop], layer.weight) for layer in of_one], -1)
        start = stop
    return y


@pytest.mark.parametrize("as_one", [False, True])
@pytest.mark.parametrize("counts", [(3, 0, 5, 1), (0, 0, 0, 2), (7, 0, 0, 0), (0, 0, 0, 0)])
@pytest.mark.parametrize("beyond", [0, 2])
def test_each_row_meets_its_experts_matrix_and_rows_of_none_become_zero(counts, beyond, as_one):
    own = layers()
    call, ends = ExpertsCall(own.__getitem__, len(own)), ends_of(counts)
    x = torch.randn(sum(counts) + beyond, IN)
    with call.as_one() if as_one else torch.no_grad():
        y = call(x, ends)
    torch.testing.assert_close(y, expected(own, x, ends))


def test_layers_are_called_with_their_rows_unless_they_are_called_as_one():
    own, seen = layers(), []
    for of_one in own:
        of_one[0].register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    call, x, ends = ExpertsCall(own.__getitem__, len(own)), torch.randn(9, IN), ends_of((3, 0, 5, 1))
    call(x, ends)
    assert seen == [3, 5, 1]
    with call.as_one():
        call(x, ends)
    assert seen == [3, 5, 1] and call.count == 1


@torch.no_grad()
def test_of_some_experts_layers_may_be_called_all_the_same():
    own, seen = layers(), []
    for of_one in own:
        of_one[0].register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    for counts, called in (((3, 0, 5, 1), [3]), ((3, 2, 5, 1), [3, 2]), ((0, 0, 1, 1), [])):
        call, x, ends = ExpertsCall(own.__getitem__, len(own)), torch.randn(sum(counts), IN), ends_of(counts)
        seen.clear()
        with call.as_one(but=2):
            torch.testing.assert_close(call(x, ends), expected(own, x, ends))
        assert seen == called


def test_a_hook_on_the_call_gets_all_rows_and_can_ask_where_experts_rows_end():
    own, seen = layers(), []
    call, x, ends = ExpertsCall(own.__getitem__, len(own)), torch.randn(9, IN), ends_of((3, 0, 5, 1))
    call.register_forward_pre_hook(lambda module, args: seen.append((args[0], module.ends_of(args[0]))))
    call(x, ends)
    assert seen[0][0] is x and torch.equal(seen[0][1], ends)


def test_under_autocast_the_products_are_in_its_dtype():
    own = layers()
    call, x, ends = ExpertsCall(own.__getitem__, len(own)), torch.randn(9, IN), ends_of((3, 0, 5, 1))
    with torch.autocast("cpu", torch.bfloat16), call.as_one():
        assert call(x, ends).dtype == torch.bfloat16


def test_a_mode_that_watches_who_reads_weights_sees_no_read():
    from torch.overrides import TorchFunctionMode

    class Watch(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            seen.extend(value for value in args if isinstance(value, nn.Parameter))
            return function(*args, **(kwargs or {}))

    own, seen = layers(), []
    call, x, ends = ExpertsCall(own.__getitem__, len(own)), torch.randn(9, IN), ends_of((3, 0, 5, 1))
    with Watch(), call.as_one():
        call(x, ends)
    assert not seen


def parts_of(whole):
    return [part for of_one in whole for part in of_one.split(WIDTHS)]


def test_weights_that_lie_one_behind_the_other_are_not_copied():
    whole = torch.randn(4, sum(WIDTHS), IN)
    found = experts_call._as_they_lie(parts_of(whole[1:]), torch.float32)
    assert torch.equal(found, whole[1:].flatten(0, 1)) and found.data_ptr() == whole[1].data_ptr()
    memory, beside = torch.randn(8 * IN), torch.randn(8 * IN)
    for parts in (
        parts_of(whole)[1:] + parts_of(whole)[:1],  # another order
        parts_of(whole)[:3] + parts_of(whole)[4:],  # a gap
        [part.T for part in parts_of(whole)],
        [memory[: 4 * IN].view(4, IN), beside[4 * IN :].view(4, IN)],
        [*parts_of(whole)[:1], nn.Parameter(parts_of(whole)[1].clone())],
    ):
        assert experts_call._as_they_lie(parts, torch.float32) is None
    assert experts_call._as_they_lie(parts_of(whole), torch.bfloat16) is None


def test_single_rows_may_have_any_stride():
    memory = torch.randn(8)
    parts = [memory.as_strided((1, 4), (1, 1), start) for start in (0, 4)]
    assert torch.equal(experts_call._as_they_lie(parts, torch.float32), memory.view(2, 4))


def test_neighbours_in_memory_that_are_others_tensors_are_no_view_of_one():
    memory = torch.randn(2 * 8 * IN)
    first, second = (torch.from_numpy(memory.numpy()[i * 8 * IN : (i + 1) * 8 * IN]).view(8, IN) for i in range(2))
    assert first.data_ptr() + first.nbytes == second.data_ptr()
    assert experts_call._as_they_lie([first, second], torch.float32) is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("width", "n_in"), [(64, 32), (36, 20)])  # rows that are aligned, and such that are not
@pytest.mark.parametrize("together", [False, True])
def test_on_a_gpu_the_grouped_product_is_the_same(dtype, width, n_in, together):
    own = [[nn.Linear(n_in, width, bias=False, device="cuda", dtype=dtype) for _ in range(2)] for _ in range(5)]
    if together:
        whole = torch.randn(5, 2, width, n_in, device="cuda", dtype=dtype) / n_in**0.5
        for layer, weight in zip((layer for of_one in own for layer in of_one), whole.flatten(0, 1), strict=True):
            layer.weight = nn.Parameter(weight)
    call = ExpertsCall(own.__getitem__, 5)
    ends, x = ends_of((300, 0, 17, 1, 40)).cuda(), torch.randn(360, n_in, device="cuda", dtype=dtype)
    with torch.no_grad(), call.as_one():
        y = call(x, ends)
        parts = x[:358].split([300, 0, 17, 1, 40])
    wanted = [torch.cat([layer(rows) for layer in of_one], -1) for of_one, rows in zip(own, parts, strict=True)]
    torch.testing.assert_close(y[:358], torch.cat(wanted), rtol=2e-2, atol=2e-2)
    assert not y[358:].any()


def test_a_module_of_experts_is_saved_as_a_whole_and_read_again():
    module = nn.Module()
    for expert in range(3):
        module.add_module(str(expert), nn.Linear(IN, 2, bias=False))
    weights = ExpertWeights(module, [["0"], ["1"], ["2"]], torch.Size([3, 2, IN]), torch.float32)
    module.__dict__["weights"] = weights
    x, ends = torch.randn(6, IN), ends_of((1, 2, 3))
    wanted = weights.call(x, ends)  # whose place is known while x lives
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    assert torch.equal(again.weights.call(x, ends), wanted)
    for copied in (again, copy.deepcopy(module)):
        assert copied.weights.call._layers(1)[0] is copied.get_submodule("1")
