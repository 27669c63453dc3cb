"""Walks of small models in lock-step, and what they leave behind."""

from __future__ import annotations

import threading

import torch

from gptq_plugin.model.linears import is_linear
from gptq_plugin.walk import lockstep
from gptq_plugin.walk.groups import find_groups
from gptq_plugin.walk.kept_state import KeptState


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

    state = KeptState(model)
    groups = find_groups(layers, calls[0], state=state)
    order = []

    def observe(group, number, x):
        counted.setdefault(group.names[0], []).append((number, x.clone()))

    forwards = [forward(number) for number in range(len(calls))]
    for stop in lockstep.walk(groups, layers, forwards, observe, notes=notes, state=state):
        order.append(stop.group)
        if change:
            change(stop)
    return outputs, order, counted


def hooks_left(model):
    return sum(len(module._forward_pre_hooks) for module in model.modules())


def threads_left():
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("calibration-batch")]
