"""The training of a model's blocks, one after the other: `BlockWalk`."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from gptq_plugin import distributed
from gptq_plugin.device.memory import free_bytes
from gptq_plugin.finish.block_training import BlockTraining, Task
from gptq_plugin.finish.chain import Chain, Passage
from gptq_plugin.finish.descent import apart_from_other_numbers
from gptq_plugin.finish.interruption import Interruption
from gptq_plugin.finish.options import Finish
from gptq_plugin.finish.solving import solve_again
from gptq_plugin.finish.starts import begin_at_compensated
from gptq_plugin.finish.student import Student
from gptq_plugin.finish.surroundings import Surroundings, Teacher
from gptq_plugin.layers.qlinear import QuantLinear
from gptq_plugin.layers.stored_weight import PACKED
from gptq_plugin.memory.streamed_to import streamed_to
from gptq_plugin.model.experts import unfused
from gptq_plugin.model.linears import is_linear, linear_shape
from gptq_plugin.report.finish_record import BlockRecord, Judgement

log = logging.getLogger(__name__)

_SHARE = 4  # of a device's free memory, in which what blocks read and give may lie


@dataclass
class BlockWalk:
    """What a walk has done.

    Attributes:
        records: Of the blocks.
        tokens: Positions trained on, over all steps and ranks.
        interrupted: Whether Ctrl-C ended it.
        wanted: By layer, the weights that codes were rounded from; only where they are asked for.
        undo: Gives the model back what it had.
    """

    records: list[BlockRecord] = field(default_factory=list)
    tokens: int = 0
    interrupted: bool = False
    wanted: dict[str, Tensor] = field(default_factory=dict)
    undo: Callable[[], None] = lambda: None


def walk_blocks(
    model: nn.Module,
    teacher: Teacher,
    chain: Chain,
    passages: Sequence[Passage],
    numbers: Sequence[int],
    options: Finish,
    surroundings: Surroundings,
    interruption: Interruption,
    tell: Callable[[int, Judgement], None],
) -> BlockWalk:
    """Trains each block to give, for inputs that went through the trained blocks before it, what the float block gives
    for float inputs; held-out samples decide how long.

    In a process group every rank calls it. On an error the model is as it was.

    Args:
        model: The quantized model, in evaluation mode; changed in place.
        teacher: The float one.
        chain: The blocks.
        passages: Of this rank's batches, the last ones those to judge on.
        numbers: Of these over all ranks.
        options: How.
        surroundings: Where.
        interruption: Ctrl-C ends the walk.
        tell: Called with the steps so far, of all blocks, and a judgement of a block.
    """
    walk = BlockWalk()
    device = surroundings.device
    home = _home(passages, device, surroundings.memory)
    floats = [one.hidden.to(home) for one in passages]
    hidden = list(floats)
    with apart_from_other_numbers(device), contextlib.ExitStack() as undo:
        for place, name in enumerate(chain.names):
            calls = [one.calls[place] for one in passages]
            block = model.get_submodule(name)
            layers = [one for one, layer in block.named_modules() if isinstance(layer, QuantLinear)]
            weights = _float_weights(teacher, name, layers)
            with teacher(name) as part, torch.no_grad(), streamed_to(part, surroundings.where):
                given = [call.run(part, x.to(device)).to(home) for call, x in zip(calls, floats, strict=True)]
            tasks = [
                Task(call, x, y, before, passage.counted, passage.positions)
                for call, x, y, before, passage in zip(calls, hidden, given, floats, passages, strict=True)
            ]
            if not layers:
                with torch.no_grad(), streamed_to(block, surroundings.where):
                    hidden = [task.output(block, device).to(home) for task in tasks]
                floats = given
                continue
            count = len(tasks) - len(numbers)
            held_out = dict(zip(numbers, tasks[count:], strict=True))
            solved = solve_again(name, block, weights, tasks[:count], held_out, surroundings.solver, device)
            undo.callback(_take(block, solved))
            with Student.of(block, device, norms=options.trains_norms, codes=True) as student:
                begin_at_compensated(block, student.latent_layers, weights, tasks[:count], device)
                training = BlockTraining(block, student, tasks[:count], held_out, options, device, surroundings.memory)
                done = len(walk.records) * options.block_steps
                student.set_values(training.train(lambda steps, one: tell(done + steps, one), interruption))  # noqa: B023
                with torch.no_grad():
                    hidden = [task.output(block, device).to(home) for task in tasks]
                outcome = student.outcome(f"{name}.")
                if options.kind == "full":
                    walk.wanted |= student.wanted(f"{name}.")
            undo.callback(outcome.give(model))
            floats = given
            walk.tokens += training.tokens
            best, first = training.best, training.curve[0]
            walk.records.append(
                BlockRecord(name, first.held_out, best.held_out, best.step, training.steps, bool(solved))
            )
            _log(walk.records[-1].summary())
            if training.interrupted:
                walk.interrupted = True
                break
        walk.undo = undo.pop_all().close
    return walk


def _take(block: nn.Module, solved: Mapping[str, QuantLinear]) -> Callable[[], None]:
    """Gives a block's layers the tensors of others; returns what puts theirs back."""
    layers: dict[str, Any] = {name: block.get_submodule(name) for name in solved}
    old = {name: layer.packed() for name, layer in layers.items()}

    def give(tensors: Mapping[str, Sequence[Tensor]]) -> None:
        for name, layer in layers.items():
            for field_, tensor in zip(PACKED, tensors[name], strict=True):
                setattr(layer, field_, tensor.to(layer.device))

    give({name: layer.packed() for name, layer in solved.items()})
    return lambda: give(old)


def _float_weights(teacher: Teacher, block: str, layers: Sequence[str]) -> dict[str, Tensor]:
    """The weights of a float block, [out, in], by the names of layers in it; those of some layers may be missing."""
    with teacher(block) as part:
        found = weights_of(part)
    if any(name not in found for name in layers):  # of experts that the float model keeps in one parameter
        with teacher("") as whole, unfused(whole):
            found = weights_of(whole.get_submodule(block))
    return found


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """The weights of linear layers, [out, in], by name."""
    found: dict[str, Tensor] = {}
    for name, layer in model.named_modules():
        if not isinstance(layer, QuantLinear) and is_linear(layer):
            weight: Any = layer.weight
            found[name] = weight.detach() if tuple(weight.shape) == linear_shape(layer) else weight.detach().t()
    return found


def _home(passages: Sequence[Passage], device: torch.device, memory: int | None) -> torch.device:
    """Where what blocks read and give lies: on the device, if it takes little of what is free there."""
    free = free_bytes(device, memory)
    taken = 3 * sum(one.hidden.nbytes for one in passages)
    return device if free is None or taken * _SHARE <= free else torch.device("cpu")


def _log(text: str) -> None:
    if distributed.rank() == 0:
        log.info("finish: %s", text)
