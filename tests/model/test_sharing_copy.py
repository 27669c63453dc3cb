"""A copy of a module that shares the memory of its parameters, and nothing else."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn

from gptq_plugin.model.sharing_copy import sharing_copy


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)
        self.tied = nn.Linear(4, 4)
        self.tied.weight = self.first.weight
        self.options = {"scale": 2.0}

    def forward(self, x):
        return self.norm(self.tied(self.first(x))) * self.options["scale"]


def test_parameters_lie_in_the_same_memory_and_ask_for_no_gradients():
    net = Net()
    copied = sharing_copy(net)
    for (name, own), (_, other) in zip(net.named_parameters(), copied.named_parameters(), strict=True):
        assert own is not other and own.data_ptr() == other.data_ptr(), name
        assert own.requires_grad and not other.requires_grad
    assert copied.tied.weight is copied.first.weight


def test_buffers_attributes_and_modes_are_the_copys_own():
    net = Net()
    copied = sharing_copy(net).eval()
    copied.norm.running_mean += 1
    copied.options["scale"] = 3.0
    copied.first.bias = nn.Parameter(torch.ones(4))
    assert not net.norm.running_mean.any() and net.options == {"scale": 2.0} and net.training
    assert net.first.bias.data_ptr() != copied.first.bias.data_ptr()


def test_a_replaced_forward_calls_the_copys_modules_through_partials_methods_and_closures():
    net, ran = Net(), []
    plain = net.forward

    class Holder:
        def __init__(self, function):
            self.function = function

        def __call__(self, x):
            return self.function(x)

    def inner(x, *, factor=3.0):
        ran.append(plain.__self__)
        return factor * plain(x)

    inner.mark = "kept"
    net.forward = Holder(inner)
    copied = sharing_copy(net)
    x = torch.randn(5, 4)
    copied.eval(), net.eval()
    assert torch.equal(copied(x), net(x))
    assert ran == [copied, net] and copied.forward.function.mark == "kept"
    assert net.forward.function is inner and copied.forward is not net.forward


def test_a_forward_that_holds_nothing_of_the_model_is_taken_as_it_is():
    net = Net()
    net.forward = functools.lru_cache(lambda x: x)
    assert sharing_copy(net).forward is net.forward


def recursive(net):
    """Calls itself, by its name in the closure."""
    plain = net.forward

    def forward(x, depth=2):
        return plain(x) if depth == 0 else forward(x, depth - 1) + 1

    return forward


def mutual(net):
    def even(x, depth=2):
        return net.first(x) if depth == 0 else odd(x, depth - 1)

    def odd(x, depth):
        return even(x, depth - 1)

    return even


def by_default(net):
    return lambda x, layer=net.first: layer(x)


def by_keyword_default(net):
    def forward(x, *, own=net.forward):
        return own(x)

    return forward


def partial_of_a_closure(net):
    plain = net.forward
    return functools.partial(lambda scale, x: plain(x) * scale, 2.0)


def wrapped(net):
    """As functools.wraps leaves it, with the original beside it."""
    plain = net.forward

    @functools.wraps(plain)
    def forward(x):
        return plain(x)

    return forward


def object_that_holds_itself(net):
    class Holder:
        def __init__(self):
            self.me, self.own = self, net.forward

        def __call__(self, x, again=True):
            return self.me(x, False) if again else self.own(x)

    return Holder()


@pytest.mark.parametrize(
    "replace",
    [recursive, mutual, by_default, by_keyword_default, partial_of_a_closure, wrapped, object_that_holds_itself],
)
def test_a_replaced_forward_runs_on_the_copy_however_it_reaches_its_modules(replace):
    net = Net().eval()
    net.forward = replace(net)
    wanted, own = net(x := torch.randn(5, 4)), net.forward
    copied = sharing_copy(net)
    assert torch.equal(copied(x), wanted)
    ran = []
    for name, module in (("own", net.first), ("copy", copied.first)):
        module.register_forward_hook(lambda *_, name=name: ran.append(name))
    copied(x)
    assert ran == ["copy"]
    ran.clear()
    net(x)
    assert ran == ["own"] and net.forward is own


def test_a_recursive_forward_that_holds_nothing_of_the_model_is_taken_as_it_is():
    net = Net()

    def forward(x, depth=3):
        return x if depth == 0 else forward(x, depth - 1)

    net.forward = forward
    assert sharing_copy(net).forward is forward
