"""Everything before the pass: the plan, refusals, and the calibration data."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from gptq_plugin import distributed
from gptq_plugin.calibration.collect import Calibration, collect
from gptq_plugin.calibration.forward import evaluating
from gptq_plugin.clients.client import Client
from gptq_plugin.clients.inventory import Inventory
from gptq_plugin.clients.rules import refuse
from gptq_plugin.config import QuantizeConfig
from gptq_plugin.memory.streamed_to import streamed_to
from gptq_plugin.model.experts import learn_layouts, undeclared
from gptq_plugin.model.plan import Plan, planned
from gptq_plugin.quantize.options import PassOptions


@contextlib.contextmanager
def prepared(
    model: nn.Module, batches: Iterable[Any], config: QuantizeConfig, options: PassOptions, client: Client | None = None
) -> Iterator[tuple[Plan, Calibration]]:
    """Plans the quantization, refuses what cannot work, and only then collects the batches.

    A model that does not declare how it uses its experts is planned after a batch has run through it. The experts are
    apart inside the block.

    Raises:
        TargetError: See `targets.find_targets`.
        ExportError: `client` would not take the export.
        CalibrationError: See `calibration.collect.collect`.
    """
    calibration = None
    if undeclared(model):
        check_client(model, config, client)
        calibration = _collect(batches, config, options)
        _learn_layouts(model, calibration, config, options)
    with planned(model, config) as plan:
        _refuse(plan, client)
        yield plan, _collect(batches, config, options) if calibration is None else calibration


def check_client(model: nn.Module, config: QuantizeConfig, client: Client | None) -> None:
    """Refuses a model whose export a client would not take; None is no client.

    Raises:
        ExportError: With all its reasons, and what it takes instead.
    """
    if client is not None:
        with planned(model, config) as plan:
            _refuse(plan, client)


def share(total: int) -> int:
    """This rank's part of `total` samples; the parts of all ranks add up to it."""
    size, rank = distributed.world_size(), distributed.rank()
    return total // size + (rank < total % size)


def _refuse(plan: Plan, client: Client | None) -> None:
    if client is not None:
        refuse(Inventory.of_plan(plan), client)


def _collect(batches: Iterable[Any], config: QuantizeConfig, options: PassOptions) -> Calibration:
    nsamples = share(config.nsamples) if options.nsamples is None else options.nsamples
    return collect(batches, config, options.tokenizer, nsamples)


def _learn_layouts(model: nn.Module, calibration: Calibration, config: QuantizeConfig, options: PassOptions) -> None:
    """Every rank has the same model, and runs its own first batch."""

    def first() -> None:
        run = options.runner(every_logit=config.lm_head)
        with evaluating(model), streamed_to(model, options.where), torch.no_grad():
            run(model, calibration.batches[0].data)

    if calibration.batches:
        learn_layouts(model, first)
