"""Experts called, calibrated, solved and packed at once on a GPU, against those taken one by one there."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from plans import calibration_of
from transformers import AutoConfig, AutoModelForCausalLM

from gptq_plugin import QuantizeConfig
from gptq_plugin.gptq.solver import solve
from gptq_plugin.model.plan import planned
from gptq_plugin.options.methods import METHOD_FIELDS
from gptq_plugin.quantize import batch_runs, experts_pass
from gptq_plugin.quantize.one_pass import OnePass
from gptq_plugin.quantize.options import PassOptions

from kernel_cases import needs_gpu

pytestmark = needs_gpu
EXPERTS, WIDTH, INNER = 12, 256, 192
CONFIG = QuantizeConfig(group_size=64, batch_size=8, nsamples=32)
BEST = {"method": "best", **dict.fromkeys(METHOD_FIELDS)}  # a replaced method has its own values of these


def mixture(dtype: torch.dtype = torch.bfloat16, **options: Any) -> Any:
    torch.manual_seed(0)
    sizes = {
        "hidden_size": WIDTH, "intermediate_size": INNER, "moe_intermediate_size": INNER, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 512,
        "num_experts": EXPERTS, "num_experts_per_tok": 3, "initializer_range": 0.1,
    }  # fmt: skip
    config = AutoConfig.for_model("qwen3_moe", **{**sizes, **options})
    return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def batches(padded: bool = False) -> list[Any]:
    generator = torch.Generator().manual_seed(1)
    found: list[Any] = [torch.randint(0, 512, (8, 100), generator=generator) for _ in range(4)]
    if not padded:
        return found
    mask = torch.ones(8, 100, dtype=torch.long)
    mask[1, 25:] = 0
    return [{"input_ids": one, "attention_mask": mask} for one in found]


def quantized(model: Any, config: QuantizeConfig = CONFIG, data: Any = None, **options: Any) -> Any:
    options = {"device": "cuda", **options}
    with planned(model, config) as plan:
        pass_ = OnePass(plan, calibration_of(batches() if data is None else data, config), PassOptions(**options))
        layers, report = pass_.run()
        return layers, {module.name: module for module in report.modules}, pass_.runs.at_once


def alike(found: Any, wanted: Any, *fields: str) -> None:
    assert found.keys() == wanted.keys()
    for name, one in wanted.items():
        for field in fields:
            assert getattr(found[name], field) == getattr(one, field), (name, field)


def one_by_one(*args: Any, **options: Any) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batch_runs, "grouped_experts", lambda *_: {})
        return quantized(*args, **options)


@pytest.mark.parametrize("home", ["cuda", "cpu"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("padded", [False, True])
def test_the_report_is_that_of_experts_quantized_one_by_one(dtype, padded, home):
    data = batches(padded)
    layers, modules, at_once = quantized(mixture(dtype).to(home), data=data)
    wanted_layers, wanted, apart = one_by_one(mixture(dtype).to(home), data=data)
    assert len(at_once) == 4 and not apart
    assert layers.keys() == wanted_layers.keys()
    alike(modules, wanted, "method", "bits", "deviations", "shape")
    totals = [sum(of[name].loss for name in layers) for of in (modules, wanted)]
    assert totals[0] == pytest.approx(totals[1], rel=1e-2)
    first = [name for name in layers if name.startswith("model.layers.0")]
    for name in first:
        assert modules[name].tokens == wanted[name].tokens, name
        assert modules[name].max_input == pytest.approx(wanted[name].max_input, rel=2e-2), name
        assert modules[name].max_output == pytest.approx(wanted[name].max_output, rel=2e-2), name
        assert modules[name].rtn_loss == pytest.approx(wanted[name].rtn_loss, rel=1e-2), name
    gates = [name for name in first if "gate_proj" in name or "up_proj" in name]  # of the same inputs
    same = [(layers[name].qweight == wanted_layers[name].qweight).double().mean() for name in gates]
    print("words that are the same:", float(torch.stack(same).mean()))
    assert torch.stack(same).mean() > 0.98


@pytest.mark.parametrize("home", ["cuda", "cpu"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("exact", [False, True])
def test_the_report_of_best_is_that_of_experts_quantized_one_by_one(exact, dtype, home):
    config, options = dataclasses.replace(CONFIG, **BEST), {"data": batches(padded=True), "exact_sums": exact}
    layers, modules, at_once = quantized(mixture(dtype).to(home), config, **options)
    wanted_layers, wanted, apart = one_by_one(mixture(dtype).to(home), config, **options)
    assert len(at_once) == 4 and not apart
    alike(modules, wanted, "method", "bits", "deviations", "shape")
    totals = [sum(of[name].loss for name in layers) for of in (modules, wanted)]
    assert totals[0] == pytest.approx(totals[1], rel=1e-2)
    gates = [name for name in layers if name.startswith("model.layers.0") and name.endswith(("gate_proj", "up_proj"))]
    same = [(layers[name].qweight == wanted_layers[name].qweight).double().mean() for name in gates]
    print("words that are the same:", float(torch.stack(same).mean()), "loss:", totals[0] / totals[1] - 1)
    assert torch.stack(same).mean() > 0.96
    for name in gates:
        assert modules[name].tokens == wanted[name].tokens, name
        assert modules[name].max_output == pytest.approx(wanted[name].max_output, rel=5e-2), name


@pytest.mark.parametrize(
    "changes",
    [
        {},
        BEST,
        {"bits": 2, "asymmetric_alpha": 1.0},
        {"bits": 3, "sym": False},
        {"desc_act": True, "static_groups": False},
    ],
)
def test_the_codes_are_those_of_the_solver_with_the_same_hessians(changes, monkeypatch):
    taken = []
    take = experts_pass.ExpertsPass._take

    def noted(self: Any, chunk: Any, every: Any, *rest: Any) -> Any:
        experts = [every[number] for number in chunk.experts]
        weights = [torch.cat([self._runs.weights.present(one) for one in own]).clone() for own in experts]
        config, evidence = experts[0][0].config, chunk.evidence()
        means = [(one.mean.clone(), None if one.drift is None else one.drift.clone()) for one in evidence]
        damp_percents = [max(one.damp_percent, config.damp_percent) for one in evidence]
        taken.append((weights, means, chunk.solved, damp_percents, config))
        return take(self, chunk, every, *rest)

    monkeypatch.setattr(experts_pass.ExpertsPass, "_take", noted)
    quantized(mixture().to("cuda"), dataclasses.replace(CONFIG, **changes))
    assert len(taken) == 4
    same, losses = [], torch.zeros(2, dtype=torch.float64)
    for weights, means, solved, damp_percents, config in taken:
        for number, (weight, (mean, drift), damp_percent) in enumerate(zip(weights, means, damp_percents)):
            own = dataclasses.replace(config, damp_percent=damp_percent)
            alone = solve(weight, mean, own, drift, in_blocks=False)
            same.append((alone.weight.codes == solved.codes[number].T).double().mean())
            losses += torch.tensor([alone.loss.double().sum(), solved.losses[number, 0].double().sum()])
    print("codes that are the same:", float(torch.stack(same).mean()), "loss:", float(losses[1] / losses[0] - 1))
    assert torch.stack(same).mean() >= 0.999
    assert losses[1].item() == pytest.approx(losses[0].item(), rel=1e-3)


def test_an_expert_that_no_token_reached_takes_the_blocks_tokens_or_is_rounded():
    def model() -> Any:
        made = mixture()
        with torch.no_grad():
            made.model.embed_tokens.weight[:, 0] = 5.0
            made.model.layers[0].self_attn.o_proj.weight[0] = 0  # so that it stays there
            made.model.layers[0].mlp.gate.weight[3] = 0
            made.model.layers[0].mlp.gate.weight[3, 0] = -50.0
        return made.to("cuda")

    layers, modules, _ = quantized(model())
    wanted_layers, wanted, _ = one_by_one(model())
    first, behind = (f"model.layers.0.mlp.experts.3.{part}" for part in ("gate_proj", "down_proj"))
    assert (modules[first].method, modules[first].tokens) == ("gptq", 0)
    assert modules[behind].method == "rtn"
    for name in (first, behind):
        assert modules[name].deviations == wanted[name].deviations
    assert torch.equal(layers[behind].qweight, wanted_layers[behind].qweight)
