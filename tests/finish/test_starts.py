"""Where codes begin: at compensated weights, nearly all of which are rounded to GPTQ's codes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gptq_plugin.finish.block_training import Task
from gptq_plugin.finish.chain import Call
from gptq_plugin.finish.latent_codes import LatentCodes
from gptq_plugin.finish.starts import begin_at_compensated

from random_layers import CPU, layer_of


def task_of(x, counted=None):
    return Task(Call((), {}, False), x, x, x, counted, x[..., 0].numel())


@pytest.mark.parametrize("counted", [None, torch.arange(20) % 3 > 0])
def test_it_is_what_is_best_for_a_channel_while_all_others_have_their_codes(counted):
    layer = layer_of(3, 32, 96, "zeros", bias=False)
    latent = LatentCodes(layer, CPU)
    block = nn.Sequential(latent)
    x = torch.randn(4, 5, 96) @ torch.randn(96, 96)
    weight = layer.dequantize() + torch.randn(24, 96) * 2e-3
    begin_at_compensated(
        block,
        {"0": latent},
        {"0": weight, "other": weight},
        [task_of(x[:2], _half(counted, 0)), task_of(x[2:], _half(counted, 1))],
        CPU,
    )
    rows = x.flatten(0, 1).double()
    rows = rows if counted is None else rows[counted]
    hessian = rows.t() @ rows
    hessian += 0.1 * hessian.diagonal().mean() * torch.eye(96)
    codes = layer.dequantize().double()
    scales = layer.scales.double().t()[:, layer.g_idx.long()]
    for row, channel in ((0, 0), (3, 17), (23, 95)):
        apart = weight[row].double() - codes[row]
        apart[channel] = 0  # all others have their codes
        best = weight[row, channel].double() + (apart @ hessian)[channel] / hessian[channel, channel]
        steps = (best - codes[row, channel]) / scales[row, channel]
        assert abs(float(steps)) > 1e-3
        found = (latent.wanted()[row, channel].double() - codes[row, channel]) / scales[row, channel]
        assert float(found) == pytest.approx(float(steps.clamp(-0.499, 0.499)), rel=1e-2, abs=1e-4)
    assert torch.equal(latent.packed_codes(), layer.qweight)


def _half(counted, number):
    return None if counted is None else counted[10 * number : 10 * number + 10]


def test_a_layer_that_reads_nothing_or_whose_weight_is_unknown_stays_at_its_codes():
    layer = layer_of(3, 32, 96, None)
    latents = {name: LatentCodes(layer, CPU) for name in ("0", "1")}
    block = nn.ModuleDict(latents)
    block.forward = lambda hidden: hidden
    begin_at_compensated(block, latents, {"0": torch.randn(24, 96)}, [task_of(torch.randn(1, 5, 96))], CPU)
    assert not any(one.latent.frac().any() for one in latents.values())


def test_of_a_layer_that_reads_other_rows_than_positions_all_count():
    """Such as pooled ones, or those routed to an expert."""
    layer, x, found = layer_of(3, 32, 96, None), torch.randn(2, 5, 96), []
    for counted in (None, torch.arange(10) > 3):
        latent = LatentCodes(layer, CPU)
        block = nn.ModuleDict({"0": latent})
        block.forward = lambda hidden, latent=latent: latent(hidden.mean(1))
        begin_at_compensated(block, {"0": latent}, {"0": layer.dequantize() + 1e-3}, [task_of(x, counted)], CPU)
        found.append(latent.latent)
    assert torch.equal(*found) and found[0].frac().any()


def test_a_layer_that_is_called_by_keyword_is_seen():
    layer, x = layer_of(3, 32, 96, None), torch.randn(1, 50, 96)
    found = []
    for call in (lambda one, hidden: one(hidden), lambda one, hidden: one(input=hidden)):
        latent = LatentCodes(layer, CPU)
        block = nn.ModuleDict({"0": latent})
        block.forward = lambda hidden, latent=latent, call=call: call(latent, hidden)
        begin_at_compensated(block, {"0": latent}, {"0": layer.dequantize() + 1e-3}, [task_of(x)], CPU)
        found.append(latent.latent)
    assert torch.equal(*found) and found[0].frac().any()
