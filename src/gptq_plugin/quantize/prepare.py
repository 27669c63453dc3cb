"""Everything before the pass: the plan, refusals, and the calibration data."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from gptq_plugin import distributed
from gptq_plugin.allocation.budget import check_budget
from gptq_plugin.calibration.collect import Calibration, collect
from gptq_plugin.calibration.forward import evaluating, takes_of
from gptq_plugin.calibration.loss import reads_every_logit
from gptq_plugin.calibration.sampling import share_of
from gptq_plugin.clients.client import Client
from gptq_plugin.clients.inventory import Inventory
from gptq_plugin.clients.rules import refuse
from gptq_plugin.config import QuantizeConfig
from gptq_plugin.device.cycles import rarely_collected
from gptq_plugin.device.finite import has_values
from gptq_plugin.device.surroundings import alone, same_random_numbers, without_values
from gptq_plugin.errors import TargetError, some
from gptq_plugin.memory.streamed_to import streamed_to
from gptq_plugin.model.experts import learn_layouts, undeclared
from gptq_plugin.model.plan import MODEL, Plan, planned
from gptq_plugin.quantize.data_checks import check_finite
from gptq_plugin.quantize.missed_samples import all_seen
from gptq_plugin.quantize.options import PassOptions
from gptq_plugin.quantize.same_on_ranks import check_same


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Keeps other threads out of the block, and ends it on all ranks if an error ends it on one.

    Random numbers that models draw also where they evaluate, and data that is shuffled, change none that come later.
    """
    with alone("quantization"), distributed.ending_together(), same_random_numbers(), rarely_collected():
        yield


@contextlib.contextmanager
def prepared(
    model: nn.Module,
    batches: Iterable[Any],
    config: QuantizeConfig,
    options: PassOptions,
    client: Client | None = None,
    *,
    alone: bool = False,
) -> Iterator[tuple[Plan, Calibration]]:
    """Plans the quantization, refuses what cannot work, and only then collects the batches.

    A model that does not declare how it uses its experts is planned after a batch has run through it. The experts are
    apart inside the block. With `alone`, this rank's batches are not exchanged with others': see `collect`.

    Raises:
        TargetError: See `targets.find_targets`; or inference mode is on, or a weight holds NaN or infinity.
        ExportError: `client` would not take the export.
        RankError: Ranks differ in what they are about to quantize.
        CalibrationError: See `calibration.collect.collect` and `missed_samples.all_seen`.
    """
    if torch.is_inference_mode_enabled():
        raise TargetError(
            "quantization was called inside torch.inference_mode, where PyTorch does not notice changes of tensors: "
            "call it outside of that block; torch.no_grad() may be on"
        )
    refuse_without_values()
    MODEL.check("model", model)
    check_same(model, config, options, client)
    check_finite(model)
    calibration = None
    if undeclared(model):
        check_client(model, config, client)
        calibration = _collect(model, batches, config, options, alone)
        _learn_layouts(model, calibration, config, options)
    with planned(model, config) as plan:
        _refuse(plan, client)
        if calibration is None:
            calibration = _collect(model, batches, config, options, alone)
        yield plan, all_seen(plan, calibration, options, alone=alone)


def refuse_without_values(model: nn.Module | None = None) -> None:
    """Refuses to quantize where tensors have no values, or a model without values.

    Raises:
        TargetError: It tells where that is, or which parameters lack them.
    """
    where = without_values()
    if where:
        raise TargetError(f"quantization was called {where}. Call it outside of that")
    if model is not None:
        MODEL.check("model", model)
    without = [] if model is None else [name for name, one in model.named_parameters() if not has_values(one)]
    if without:
        raise TargetError(f"{some(without)} of {type(model).__name__} have no values: load the weights first")


def collected(plan: Plan, batches: Iterable[Any], options: PassOptions) -> Calibration:
    """The batches for a plan. Every rank calls it."""
    return all_seen(plan, _collect(plan.model, batches, plan.config, options, alone=False), options)


@contextlib.contextmanager
def budgeted(model: nn.Module, config: QuantizeConfig, client: Client | None = None) -> Iterator[Plan]:
    """Plans the quantization of a float model, as `planned`; with `target_bits`, a plan of that size.

    Raises:
        TargetError, ExportError: As `planned` and `check_budget`.
    """
    with planned(model, config) as plan:
        yield check_budget(plan, client)


def check_client(model: nn.Module, config: QuantizeConfig, client: Client | None) -> None:
    """Refuses a model whose export a client would not take; None is no client.

    Raises:
        ExportError: With all its reasons, and what it takes instead.
    """
    if client is not None:
        with budgeted(model, config, client) as plan:
            refuse(Inventory.of_plan(plan), client)


def _refuse(plan: Plan, client: Client | None) -> None:
    plan = check_budget(plan, client)
    if client is not None:
        refuse(Inventory.of_plan(plan), client)


def _collect(
    model: nn.Module, batches: Iterable[Any], config: QuantizeConfig, options: PassOptions, alone: bool
) -> Calibration:
    nsamples = share_of(config.nsamples) if options.nsamples is None else options.nsamples
    return collect(batches, config, options.tokenizer, nsamples, alone=alone, takes=takes_of(model, options.forward))


def _learn_layouts(model: nn.Module, calibration: Calibration, config: QuantizeConfig, options: PassOptions) -> None:
    """Every rank has the same model, and runs its own first batch, or another's if it has none."""
    batch = calibration.batches[0].data if calibration.batches else None
    have = distributed.gather_objects(bool(calibration.batches))
    if not all(have) and any(have):
        first = have.index(True)
        batch = distributed.gather_objects(batch if distributed.rank() == first else None)[first]

    def run_first() -> None:
        run = options.runner(every_logit=reads_every_logit(config), explains=True)
        with evaluating(model), streamed_to(model, options.where), torch.no_grad():
            run(model, batch)

    if any(have):
        learn_layouts(model, run_first)
