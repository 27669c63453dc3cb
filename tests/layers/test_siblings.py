"""Layers that share one product: values, bytes, and what each computes by itself.

Without a GPU a stand-in multiplies.
"""

from __future__ import annotations

import copy
import gc
import io
import pickle
import threading
import weakref

import pytest
import torch
from random_weights import random_weight
from torch import nn

from gptq_plugin.layers import traced_part
from gptq_plugin.layers.fuse import fuse_layers
from gptq_plugin.layers.qlinear import QuantLinear
from gptq_plugin.layers.swap import swap_modules

from gpu_products import stand_in

gpu = pytest.mark.gpu
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture
def products(monkeypatch):
    return stand_in(monkeypatch)


def nothing(x):
    pass


class Attention(nn.Module):
    """Projections of several widths, one of which has no bias, and one of another input."""

    def __init__(self, **shape):
        super().__init__()
        for name, width in (("q", 100), ("k", 64), ("v", 37), ("o", 128)):
            weight = random_weight(n_out=width, **({"n_in": 128, "group_size": 64} | shape))
            setattr(self, name, QuantLinear.from_quantized(weight, torch.randn(width) if name != "k" else None))
        self.between = nothing

    def forward(self, x):
        q = self.q(x)
        self.between(x)
        k, v = self.k(x), self.v(x)
        return self.o(x * 2) + torch.cat([q, k, v], -1).sum(-1, keepdim=True)


@pytest.fixture(autouse=True)
def fresh():
    torch.manual_seed(0)
    torch._dynamo.reset()


@pytest.fixture
def fused(products):
    model = Attention()
    plain = copy.deepcopy(model)
    assert fuse_layers(model, torch.randn(1, 128)) == [("q", "k", "v")]
    products.clear()
    return model, plain


def same(model, plain, x):
    with torch.no_grad():
        assert torch.allclose(model(x), plain(x), rtol=1e-5, atol=1e-3)


SHAPES = [
    {},
    {"bits": 3, "group_size": 32, "n_in": 96},
    {"bits": 8},
    {"bits": 2, "group_size": -1, "n_in": 100},
    {"n_in": 320},
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("rows", [(), (1,), (2, 3), (0,)], ids=str)
def test_one_product_gives_what_each_layer_would(products, shape, rows):
    shape = {"n_in": 128} | shape
    model = Attention(**shape)
    model.forward = lambda x: (model.q(x), model.k(x), model.v(x))
    plain = copy.deepcopy({name: getattr(model, name) for name in "qkv"})
    assert fuse_layers(model, torch.randn(1, shape["n_in"])) == [("q", "k", "v")]
    products.clear()
    x = torch.randn(*rows, shape["n_in"])
    with torch.no_grad():
        for name, y in zip("qkv", model(x), strict=True):
            assert y.shape == (*rows, plain[name].out_features) and not y._is_view()
            assert torch.allclose(y, plain[name](x), rtol=1e-5, atol=1e-4)
            assert not rows or rows == (2, 3) or y.is_contiguous()
    assert products == [128 + 64 + 37]


def test_bytes_and_names_are_those_of_layers_by_themselves_and_one_copy_is_in_memory(products):
    model = Attention()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    names = [name for name, _ in model.named_modules()]
    for name in "qkvo":
        getattr(model, name).arrange()
    size = memory(model)
    assert fuse_layers(model, torch.randn(1, 128)) == [("q", "k", "v")]
    assert fuse_layers(model, torch.randn(1, 128)) == [], "they are fused already"
    assert memory(model) == size
    assert [name for name, _ in model.named_modules()] == names
    for each in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model)), saved(model)):
        held(each, before)
        same(each, model, torch.randn(2, 128))
        if each is not model:
            products.clear()
            same(each, each, torch.randn(2, 128))
            assert products == [229, 229], "a copy is a group of its own"
    assert memory(copy.deepcopy(model.k)) < memory(model) / 3, "a copied layer leaves its siblings' weights behind"
    layers = [copy.deepcopy(getattr(model, name)) for name in "qkvo"]
    assert len(pickle.dumps(model)) < 1.1 * sum(len(pickle.dumps(layer)) for layer in layers)
    alone = nn.Sequential(copy.deepcopy(model.k))
    assert fuse_layers(alone, torch.randn(1, 128)) == [] and alone[0].siblings is None
    assert torch.equal(model.k.qweight, before["k.qweight"])  # which separates them
    gc.collect()
    held(model, before)
    assert model.q.arranged().tensors.stride == 128
    model.load_state_dict(before)
    held(model.double().float(), before)


def memory(model):
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in model.buffers()}.values())


def held(model, before):
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(value, before[name]) for name, value in after.items())


def saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def test_parts_go_with_the_first_to_the_last_and_nothing_is_kept(fused, products):
    model, plain = fused
    seen = []
    model.between = lambda x: seen.extend(map(weakref.ref, [x, *parts(model)]))
    for _ in range(2):
        x = torch.randn(2, 128)
        same(model, plain, x)
        del x
    gc.collect()
    assert len(seen) == 6 and all(ref() is None for ref in seen) and products == [229, 229]
    assert model.q.siblings._calls.now is None


def parts(model):
    return [part.y for part in model.q.siblings._calls.now.parts.values()]


@pytest.mark.parametrize("change", ["in place", "through a view", "the bias"])
def test_a_change_between_two_layers_is_noticed(fused, products, change):
    model, plain = fused
    changes = {
        "in place": lambda module, x: x.mul_(2),
        "through a view": lambda module, x: x[0].mul_(2),
        "the bias": lambda module, x: module.v.bias.add_(1),
    }
    for module in fused:
        module.between = lambda x, module=module: changes[change](module, x)
    x = torch.randn(2, 128)
    with torch.no_grad():
        assert torch.allclose(model(x.clone()), plain(x.clone()), rtol=1e-5, atol=1e-3)
    assert products == ([229] if change == "the bias" else [229, 229])


def test_what_changes_a_weight_between_two_layers_is_noticed(fused):
    model, plain = fused
    other = Attention().state_dict()
    for module in fused:
        module.between = lambda x, module=module: module.load_state_dict(other)
    same(model, plain, torch.randn(2, 128))
    same(model, plain, torch.randn(2, 128))


@pytest.mark.parametrize("how", ["gradients", "inference mode", "outside", "another input", "forward itself"])
def test_by_itself_a_layer_computes_what_it_would_have(fused, products, how):
    model, plain = fused
    x = torch.randn(2, 128)
    if how == "gradients":
        x.requires_grad_()
        for module in fused:
            module(x).sum().backward()
            gradient, x.grad = x.grad, None
            module.found = gradient
        assert torch.allclose(model.found, plain.found, rtol=1e-4, atol=1e-3)
    elif how == "inference mode":
        with torch.inference_mode():
            x = torch.randn(2, 128)
            assert torch.allclose(model(x), plain(x), rtol=1e-5, atol=1e-3)
    elif how == "outside":
        with torch.no_grad():
            for name in "kqvqk":
                assert torch.allclose(getattr(model, name)(x), getattr(plain, name)(x), rtol=1e-5, atol=1e-3)
    elif how == "another input":
        model.forward = lambda x: [model.q(x), model.k(x * 1), model.v(x + 1)]
        with torch.no_grad():
            for y, name, z in zip(model(x), "qkv", (x, x, x + 1), strict=True):
                assert torch.allclose(y, getattr(plain, name)(z), rtol=1e-5, atol=1e-3)
        return
    else:
        with torch.no_grad():
            assert torch.allclose(model.forward(x), plain(x), rtol=1e-5, atol=1e-3)
    assert not products


def test_any_order_and_number_of_calls_is_right(fused, products):
    model, plain = fused
    for order, count in (("vkq", 1), ("qqkv", 1), ("k", 1), ("kq", 1), ("kk", 1)):
        products.clear()
        model.forward = lambda x, order=order: [(name, getattr(model, name)(x)) for name in order]
        x = torch.randn(3, 128)
        with torch.no_grad():
            for name, y in model(x):
                assert torch.allclose(y, getattr(plain, name)(x), rtol=1e-5, atol=1e-3)
        assert products == [229] * count and model.q.siblings._calls.now is None


def test_an_error_between_two_layers_leaves_nothing_behind(fused, products):
    model, plain = fused
    seen = []

    def fail(x):
        seen.extend(map(weakref.ref, parts(model)))
        raise RuntimeError("between")

    x, model.between = torch.randn(2, 128), fail
    with torch.no_grad(), pytest.raises(RuntimeError, match="between"):
        model(x)
    gc.collect()
    assert len(seen) == 2 and all(ref() is None for ref in seen)
    with torch.no_grad():
        assert torch.allclose(model.k(x), plain.k(x), rtol=1e-5, atol=1e-3)
    assert products == [229], "k took no part of a call that has ended"
    model.between = nothing
    same(model, plain, x)


def test_hooks_of_a_layer_run_and_what_they_exchange_counts(fused):
    model, plain = fused
    for module in fused:
        module.k.register_forward_pre_hook(lambda layer, args: (args[0] + 1,))
        module.v.register_forward_hook(lambda layer, args, y: y * 2)
    same(model, plain, torch.randn(2, 128))


def test_threads_and_nested_calls_have_calls_of_their_own(fused, products):
    model, plain = fused
    barrier, failed = threading.Barrier(2), []
    model.between = lambda x: barrier.wait(10)

    def run(seed):
        try:
            for i in range(5):
                x = torch.randn(2, 128, generator=torch.Generator().manual_seed(seed + i))
                same(model, plain, x)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=run, args=(seed,)) for seed in (10, 20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed and products == [229] * 10
    inner = iter((True, False))
    model.between = lambda x: same(model, plain, x + 1) if next(inner, False) else None
    same(model, plain, torch.randn(2, 128))


def test_another_dtype_autocast_and_vmap_are_as_before(fused):
    model, plain = fused
    x = torch.randn(4, 2, 128)
    with torch.no_grad():
        assert model.q(x.bfloat16()).dtype == torch.bfloat16
        with torch.autocast("cpu", torch.bfloat16):
            q = model.q(x)
        model.forward = lambda x: model.k(x) + model.q(x)[..., :64]
        plain.forward = lambda x: plain.k(x) + plain.q(x)[..., :64]
        assert q.dtype == torch.bfloat16
        assert torch.allclose(torch.vmap(model.__call__)(x), torch.vmap(plain.__call__)(x), rtol=1e-5, atol=1e-3)


def test_layers_that_go_are_left_alone_and_those_moved_come_together_again(fused, products):
    model, plain = fused
    x = torch.randn(2, 128)
    model.double().float()
    assert model.q.siblings.stacked() is None
    same(model, plain, x)  # one by one, which arranges them
    assert products == []
    same(model, plain, x)
    assert products == [229]
    linear = nn.Linear(128, 64)
    for module in fused:
        swap_modules(module, {"k": linear})
    gc.collect()
    products.clear()
    same(model, plain, x)
    assert products == [] and model.q.arranged().tensors.stride == 128


def test_layers_loaded_with_what_differs_are_fused_no_more(fused, caplog):
    model, plain = fused
    weight = random_weight(128, 64, group_size=64, act_order=True)
    other = QuantLinear.from_quantized(weight).state_dict()
    for module in fused:
        module.k.load_state_dict(other)
    with caplog.at_level("INFO"):
        for _ in range(3):
            same(model, plain, torch.randn(2, 128))
    assert caplog.text.count("fused no more: what they hold now differs (another order of channels (g_idx))") == 1


def test_tensors_that_somebody_puts_in_place_are_computed_with(fused, products, monkeypatch):
    model, plain = fused
    other = {f"k.{name}": value for name, value in Attention().k.state_dict().items()}
    plain.load_state_dict(plain.state_dict() | other)
    monkeypatch.undo()  # products are those of the CPU
    x = torch.randn(2, 128)
    with torch.no_grad():
        assert torch.allclose(torch.func.functional_call(model, other, (x,)), plain(x), rtol=1e-5, atol=1e-3)
    assert not products


def test_a_tensor_in_the_kernels_layout_that_somebody_puts_in_place_counts(fused):
    model, plain = fused
    other = Attention().k
    plain.k.qweight.copy_(other.qweight)
    other.arrange()
    x = torch.randn(2, 128)
    with torch.no_grad():
        y = torch.func.functional_call(model, {"k.words": other.get_buffer("words")}, (x,))
        assert torch.allclose(y, plain(x), rtol=1e-5, atol=1e-3)


def test_a_shallow_copy_of_a_layer_is_none_of_them(fused, products):
    model, plain = fused
    other, state, x = copy.copy(model.k), Attention().k.state_dict(), torch.randn(2, 128)
    assert model.k.siblings.present() == [model.q, model.k, model.v]
    same(model, plain, x)
    assert products == [229]
    other.load_state_dict(state)
    model.forward = lambda x: (model.q(x), other(x))
    plain.k.load_state_dict(state)
    for _ in range(3):
        with torch.no_grad():
            assert torch.allclose(model(x)[1], plain.k(x), rtol=1e-5, atol=1e-3)


def test_parts_that_nobody_fetches_go_with_their_input(fused):
    model, _ = fused

    def forward(x):
        model.q(x * 1)
        return parts(model)

    model.forward = forward
    with torch.no_grad():
        assert model(torch.randn(2, 128)) == []


@pytest.mark.parametrize(
    ("change", "backend"),
    [
        ("", "inductor"),
        ("in place", "eager"),
        ("in place", "aot_eager"),
        ("through a view", "aot_eager"),
        ("in inference mode", "aot_eager"),
        ("autocast", "aot_eager"),
    ],
)
def test_a_compiler_sees_one_product_of_one_tensor(fused, products, change, backend):
    model, plain = fused
    changes = {
        "in place": lambda x: x.mul_(2),
        "in inference mode": lambda x: x.mul_(2),
        "through a view": lambda x: x.view(-1)[3:90].mul_(2),
    }
    for module in fused:
        module.between = changes.get(change, nothing)
    compute = torch.compile(model, fullgraph=True, backend=backend)
    mode = torch.inference_mode if change == "in inference mode" else torch.no_grad
    with mode(), torch.autocast("cpu", torch.bfloat16, enabled=change == "autocast"):
        for rows in (2, 2, 5):
            x = torch.randn(rows, 128)
            expected = plain(x.clone())
            products.clear()
            y = compute(x.clone())
            tolerance = {"rtol": 0.05, "atol": 5} if change == "autocast" else {"rtol": 1e-5, "atol": 1e-3}
            assert torch.allclose(y, expected, **tolerance)
    # Their own, with the one of another input.
    by_themselves, together = [100, 64, 37, 128], [229] * (2 if changes.get(change) else 1) + [128]
    assert sorted(products) == sorted(by_themselves if backend == "eager" else together)
    assert not any(type(part) is torch.Tensor for part in traced_part._traced.last.parts.values())


def test_what_a_compiler_joined_may_be_changed_and_is_contiguous(fused):
    model, plain = fused
    for module in fused:
        module.forward = lambda x, module=module: (module.q(x).mul_(2), module.q(x), module.k(x), module.v(x).add_(1))
    x = torch.randn(2, 128)
    with torch.no_grad():
        found, expected = torch.compile(model, fullgraph=True, backend="aot_eager")(x), plain(x)
    for y, z in zip(found, expected, strict=True):
        assert torch.allclose(y, z, rtol=1e-5, atol=1e-3) and y.is_contiguous()


@pytest.mark.parametrize("how", ["export", "strict export", "compile with gradients", "separate"])
def test_a_compiler_sees_each_layer_by_itself(fused, products, how):
    model, plain = fused
    for module in fused:
        module.forward = lambda x, module=module: (module.q(x), module.k(x.mul_(2)), module.v(x))
    x = torch.randn(2, 128)
    with torch.set_grad_enabled("gradients" in how):
        expected = plain(x.clone())
        if how == "separate":
            model.q.siblings.separate()
        if "export" in how:
            compute = torch.export.export(model, (x,), strict="strict" in how).module()
        else:
            compute = torch.compile(model, fullgraph=True, backend="aot_eager")
        products.clear()
        found = compute(x.clone())
    for y, z in zip(found, expected, strict=True):
        assert torch.allclose(y, z, rtol=1e-5, atol=1e-3)
    assert products == [100, 64, 37]


@pytest.fixture
def on_gpu():
    model = Attention(n_in=1024, group_size=128).cuda()
    model.forward = lambda x: (model.q(x), model.k(x), model.v(x))
    plain = copy.deepcopy({name: getattr(model, name) for name in "qkv"})
    assert fuse_layers(model, torch.randn(1, 1024, dtype=torch.float16, device="cuda")) == [("q", "k", "v")]
    assert "fused=3" in repr(model.k) and "fused" not in repr(model.o)

    def check(found, x):
        for name, y in zip("qkv", found, strict=True):
            z = plain[name](x).detach()
            assert y.shape == z.shape and (y - z).norm() / z.norm() < 1e-3

    return model, check


@gpu
@needs_gpu
def test_on_a_gpu_layers_compute_the_same_together_and_one_by_one(on_gpu):
    model, check = on_gpu
    for rows in (0, 1, 5, 16, 64, 200, 1500):
        x = torch.randn(rows, 1024, dtype=torch.float16, device="cuda")
        with torch.no_grad():
            check(model(x), x) if rows else model(x)
        if rows:
            x.requires_grad_()
            check([y.detach() for y in model(x)], x)
            (gradient,) = torch.autograd.grad(sum(y.sum() for y in model(x)), x)
            weights = torch.cat([getattr(model, name).dequantize(torch.float16) for name in "qkv"])
            expected = weights.sum(0, dtype=torch.float32)
            assert (gradient.float() - expected).norm() / expected.norm() / rows**0.5 < 1e-2
    assert model.q.siblings.stacked() is not None


@gpu
@needs_gpu
def test_on_a_gpu_a_graph_replays_one_product_and_nothing_from_before_it(on_gpu):
    model, check = on_gpu
    x = torch.randn(1, 1024, dtype=torch.float16, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad():
        model(x), model.q(x)
        with torch.cuda.graph(graph):
            captured = model(x)
        for _ in range(2):
            x.copy_(torch.randn_like(x))
            graph.replay()
            check(captured, x)


@gpu
@needs_gpu
def test_on_a_gpu_a_stream_of_its_own_gets_no_part_of_another(on_gpu):
    model, check = on_gpu
    side, opened = torch.cuda.Stream(), []
    x = torch.randn(3, 1024, dtype=torch.float16, device="cuda")
    compute = model.q.siblings._compute
    model.q.siblings._compute = lambda *args: opened.append(1) or compute(*args)

    def forward(x):
        q = model.q(x)
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            k = model.k(x)
        torch.cuda.current_stream().wait_stream(side)
        return q, k, model.v(x)

    model.forward = forward
    with torch.no_grad():
        check(model(x), x)
    assert len(opened) == 3


@gpu
@needs_gpu
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_on_a_gpu_fused_layers_compile_as_one_graph(on_gpu, mode, monkeypatch):
    from gptq_plugin.kernels.product import products as of_gpu

    model, check = on_gpu
    outputs, product = [], of_gpu.product
    monkeypatch.setattr(of_gpu, "product", lambda x, of, *rest: outputs.append(of.n_out) or product(x, of, *rest))
    compiled = torch.compile(model, fullgraph=True, mode=mode)
    with torch.no_grad():
        for rows in (1, 1, 1, 16):
            x = torch.randn(rows, 1024, dtype=torch.float16, device="cuda")
            outputs.clear()
            found = [y.clone() for y in compiled(x)]
            assert set(outputs) <= {229} and (outputs or mode != "default")
            check(found, x)
