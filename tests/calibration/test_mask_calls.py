"""The masks that calls carry."""

from __future__ import annotations

import torch
from torch import nn

from gptq_plugin.calibration.mask_calls import MaskCalls, watch_calls, with_masks

KEPT = torch.arange(6) < torch.tensor([[4], [6], [2]])
X = torch.randn(3, 6, 8)


class Inner(nn.Module):
    def forward(self, x, *, mask=None):
        return x


class Outer(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = Inner(), Inner()

    def forward(self, batch, mask=None):
        x = self.first(batch["x"], mask=mask)
        x = self.first(x, mask=mask)
        return self.second(x[:, :4], mask=KEPT[:, :4].long())


def seen_of(run, of_batch=None):
    model, calls = Outer(), MaskCalls(of_batch or {})
    with watch_calls(dict(model.named_modules()), calls.visit):
        run(model)
    assert not any(module._forward_pre_hooks for module in model.modules())
    return calls.sequences


def test_of_calls_inside_another_only_new_masks_count():
    seen = seen_of(lambda model: model({"x": X}, KEPT))
    assert list(seen) == [("", "mask"), ("second", "mask")]
    assert seen["second", "mask"].kept.shape == (3, 4)


def test_masks_of_calls_side_by_side_all_count():
    def run(model):
        model.first(X, mask=torch.ones_like(KEPT))
        model.second(X, mask=torch.ones_like(KEPT))

    assert list(seen_of(run)) == [("first", "mask"), ("second", "mask")]


def test_a_first_call_without_a_mask_has_the_batchs():
    of_batch = {"attention_mask": KEPT}
    seen = seen_of(lambda model: model.first(X), of_batch)
    assert list(seen) == [("first", "attention_mask")] and torch.equal(seen["first", "attention_mask"].kept, KEPT)
    assert list(seen_of(lambda model: model.first(X, mask=KEPT), of_batch)) == [("first", "mask")]
    assert with_masks({"x": X}, of_batch, inside=True) == {"x": X}


def test_arguments_are_replaced_at_any_depth():
    model, other, got = Outer(), torch.zeros_like(X), []
    model.first.register_forward_pre_hook(lambda _, args: got.append(args[0]))

    def visit(name, module, arguments):
        return {id(arguments["x"]): other} if name == "" else None

    with watch_calls({"": model}, visit):
        model({"x": X}, mask=KEPT)
        model(batch={"x": X})
    assert all(x is other for x in got) and len(got) == 4
