"""Experts that transformers' code runs in grouped products are called, calibrated, solved and packed at once."""

from __future__ import annotations

import copy
import dataclasses
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from plans import calibration_of
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from gptq_plugin import QuantizeConfig, QuantizeModule
from gptq_plugin.errors import CalibrationError
from gptq_plugin.model.experts_call import ExpertsCall
from gptq_plugin.model.plan import planned
from gptq_plugin.quantize import batch_runs, experts_pass, grouped_experts, one_pass, solve_experts
from gptq_plugin.quantize.float_tokens import FloatTokens
from gptq_plugin.quantize.one_pass import OnePass
from gptq_plugin.quantize.options import PassOptions
from gptq_plugin.walk.each_drift import EachDrift
from gptq_plugin.walk.lockstep import Stop

EXPERTS = 6
CONFIG = QuantizeConfig(group_size=16, batch_size=2, nsamples=8)


def mixture(**options: Any) -> Any:
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 48, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 128,
        "num_experts": EXPERTS, "num_experts_per_tok": 2, "initializer_range": 0.2,
    }  # fmt: skip
    return AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen3_moe", **{**sizes, **options})).eval()


def unreached(model: Any, expert: int) -> Any:
    """No token is routed to this expert."""
    with torch.no_grad():
        embedded = model.model.embed_tokens.weight
        embedded[:, 0] = 5.0  # an input that is always positive, whatever the block before adds
        model.model.layers[0].mlp.gate.weight[expert] = 0
        model.model.layers[0].mlp.gate.weight[expert, 0] = -50.0
    return model


def batches(padded: bool = False) -> list[Any]:
    generator = torch.Generator().manual_seed(1)
    found: list[Any] = [torch.randint(0, 128, (2, 40), generator=generator) for _ in range(4)]
    if not padded:
        return found
    mask = torch.ones(2, 40, dtype=torch.long)
    mask[1, 25:] = 0
    return [{"input_ids": one, "attention_mask": mask} for one in found]


class Watched:
    """A quantization, with the stops of its walk and the calls of experts."""

    def __init__(self, model: Any, config: QuantizeConfig = CONFIG, data: Any = None, **options: Any) -> None:
        self.stops: list[Stop] = []
        with pytest.MonkeyPatch.context() as patch, planned(model, config) as plan:
            pass_ = OnePass(plan, calibration_of(batches() if data is None else data, config), PassOptions(**options))
            quantize = pass_._quantize_group
            patch.setattr(
                pass_, "_quantize_group", lambda stop, *rest: (self.stops.append(stop), quantize(stop, *rest))
            )
            self.layers, self.report = pass_.run()
        self.modules = {module.name: module for module in self.report.modules}


def one_by_one(model: Any, *args: Any, **options: Any) -> Watched:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batch_runs, "grouped_experts", lambda *_: {})
        return Watched(model, *args, **options)


@cache
def pair(padded: bool) -> tuple[Watched, Watched]:
    return Watched(mixture(), data=batches(padded)), one_by_one(mixture(), data=batches(padded))


@pytest.mark.parametrize("padded", [False, True])
def test_codes_and_report_are_those_of_experts_quantized_one_by_one(padded):
    at_once, apart = pair(padded)
    assert at_once.layers.keys() == apart.layers.keys()
    same = [(at_once.layers[name].qweight == apart.layers[name].qweight).double().mean() for name in apart.layers]
    assert torch.stack(same).mean() > 0.999
    for name, wanted in apart.modules.items():
        found = at_once.modules[name]
        for field in ("method", "bits", "tokens", "deviations", "shape", "stored_bytes"):
            assert getattr(found, field) == getattr(wanted, field), (name, field)
        if wanted.method == "gptq":
            for field in ("loss", "rtn_loss", "output_power", "max_input", "max_output", "damp_percent"):
                assert getattr(found, field) == pytest.approx(getattr(wanted, field), rel=2e-3), (name, field)
    assert at_once.report.deviations == apart.report.deviations
    for one in (at_once, apart):  # each layer has its share of the time
        assert sum(module.seconds for module in one.modules.values()) == pytest.approx(one.report.seconds["solve"])


def test_the_walk_stops_once_for_all_experts_of_a_projection():
    at_once, apart = pair(False)
    of_experts = [stop.group for stop in at_once.stops if "experts" in stop.group.names[0]]
    assert [group.at_once for group in of_experts] == [
        ("model.layers.0.mlp.experts.gate_up_proj",),
        ("model.layers.0.mlp.experts.down_proj",),
    ]
    assert [len(group.names) for group in of_experts] == [2 * EXPERTS, EXPERTS]
    assert len(apart.stops) == len(at_once.stops) - 2 + 2 * EXPERTS


def test_afterwards_the_model_is_as_it_was():
    model = mixture()
    config, before = model.config, dict(model.named_parameters())
    Watched(model)
    assert dict(model.named_parameters()).keys() == before.keys()
    assert all(before[name] is parameter for name, parameter in model.named_parameters())
    assert model.model.layers[0].mlp.experts.config is config and config._experts_implementation == "grouped_mm"
    assert not any(isinstance(module, ExpertsCall) for module in model.modules())


def test_an_expert_that_no_token_reached_takes_the_blocks_tokens_or_is_rounded():
    at_once, apart = (way(unreached(mixture(), 3)) for way in (Watched, one_by_one))
    first, behind = (f"model.layers.0.mlp.experts.3.{part}" for part in ("gate_proj", "down_proj"))
    assert (at_once.modules[first].method, at_once.modules[first].tokens) == ("gptq", 0)
    assert at_once.modules[behind].method == "rtn"
    for name in (first, behind):
        assert at_once.modules[name].deviations == apart.modules[name].deviations
        assert torch.equal(at_once.layers[name].qweight, apart.layers[name].qweight)


@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_a_last_chunk_with_fewer_experts_has_the_codes_of_experts_alone(alpha, monkeypatch):
    config, own = dataclasses.replace(CONFIG, asymmetric_alpha=alpha), {"num_experts": 5}
    apart = one_by_one(unreached(mixture(**own), 4), config)
    monkeypatch.setattr(solve_experts, "most", lambda *_: 3)
    at_once = Watched(unreached(mixture(**own), 4), config)
    assert at_once.layers.keys() == apart.layers.keys()
    same = [(at_once.layers[name].qweight == apart.layers[name].qweight).double().mean() for name in apart.layers]
    assert torch.stack(same).mean() > 0.999
    assert [one.tokens for one in at_once.modules.values()] == [one.tokens for one in apart.modules.values()]


@pytest.mark.parametrize("most", [1, 2, 4])
def test_experts_in_chunks_are_those_solved_all_at_once(most, monkeypatch):
    monkeypatch.setattr(solve_experts, "most", lambda *_: most)
    found, wanted = Watched(mixture()), pair(False)[0]
    same = [(found.layers[name].qweight == wanted.layers[name].qweight).double().mean() for name in wanted.layers]
    assert torch.stack(same).mean() > 0.999
    assert sum(module.seconds for module in found.modules.values()) == pytest.approx(found.report.seconds["solve"])


@pytest.mark.parametrize(
    "changes",
    [
        {"method": "best"},
        {"method": "best", "asymmetric_alpha": 0.0},
        {"dynamic": {r".*down_proj": {"bits": 8}}},
        {"desc_act": True, "static_groups": False},
        {"bits": 3, "sym": False},
    ],
)
def test_whatever_is_asked_for_experts_gives_the_layers_of_one_by_one(changes):
    config = dataclasses.replace(QuantizeConfig(**{"group_size": 16, "batch_size": 2, **changes}), nsamples=8)
    found, wanted = Watched(mixture(), config), one_by_one(mixture(), config)
    same = [(found.layers[name].qweight == wanted.layers[name].qweight).double().mean() for name in wanted.layers]
    assert torch.stack(same).mean() > 0.99 and min(same) > 0.9
    assert {name: layer.bits for name, layer in found.layers.items()} == {
        name: layer.bits for name, layer in wanted.layers.items()
    }


def test_where_tokens_are_weighted_layer_by_layer_or_stops_are_kept_experts_are_called_one_by_one():
    for weighting, options, count in (
        ("all", {}, 2), ("gradients", {}, 0), ("all", {"cache_dir": "kept"}, 0), ("all", {"resume": True}, 0),
    ):  # fmt: skip
        with planned(mixture(), dataclasses.replace(CONFIG, token_weighting=weighting)) as plan:
            found = grouped_experts.grouped_experts(plan, torch.device("cpu"), PassOptions(**options))
        assert len(found) == count


def drifting(method: str, at_once: bool = True, **options: Any) -> Watched:
    """Experts whose inputs drift; some are reached by no token, and one by few."""
    fields = {"best": {"method": "best"}, "2 bits": {"bits": 2, "asymmetric_alpha": 1.0}}[method]
    config = QuantizeConfig(**{"group_size": 16, "batch_size": 2, "nsamples": 8, **fields})
    return (Watched if at_once else one_by_one)(unreached(mixture(), 3), config, batches(padded=True), **options)


drifting_apart = cache(partial(drifting, at_once=False))


@pytest.mark.parametrize(
    "options", [{}, {"exact_sums": False}, {"offload_weights": True, "offload_activations": True}], ids=str
)
@pytest.mark.parametrize("method", ["best", "2 bits"])
def test_experts_that_make_up_for_drift_are_those_that_do_so_one_by_one(method, options):
    found, wanted = drifting(method, **options), drifting_apart(method)
    assert [len(stop.group.names) for stop in found.stops if stop.group.at_once] == [2 * EXPERTS, EXPERTS]
    tokens = [one.tokens for name, one in wanted.modules.items() if name.endswith("gate_proj")]
    assert tokens[3] == 0 < tokens[5] < 32 < tokens[1] and same_codes(found, wanted)
    for name, one in wanted.modules.items():
        other = found.modules[name]
        assert (other.method, other.tokens, other.deviations) == (one.method, one.tokens, one.deviations), name
        for field in ("loss", "rtn_loss", "output_power", "max_input", "max_output"):
            assert getattr(other, field) == pytest.approx(getattr(one, field), rel=2e-3, nan_ok=True), (name, field)


@pytest.mark.parametrize("rows", ["unknown", "of others"])
def test_drift_that_is_not_known_is_told_and_not_made_up_for(rows, monkeypatch):
    def changed(self: FloatTokens, experts: str, batch: int, x: torch.Tensor) -> Any:
        return None if rows == "unknown" else -x  # which are far from what the experts read

    monkeypatch.setattr(FloatTokens, "of_rows", changed)
    found, wanted = drifting("2 bits"), drifting("2 bits", at_once=False)
    assert same_codes(found, wanted) and not same_codes(found, drifting_apart("2 bits"))
    told = "have no counterpart" if rows == "unknown" else "have little to do"
    for name, one in wanted.modules.items():
        assert found.modules[name].deviations == one.deviations, name
        if "up_proj" in name:
            assert any(told in deviation for deviation in one.deviations) == (one.tokens > 0), name


def test_a_rule_asks_some_experts_to_make_up_for_drift():
    rule = {r".*experts\.[01]\..*": {"asymmetric_alpha": 1.0}, ".*o_proj": {"asymmetric_alpha": 0.5}}
    config = dataclasses.replace(CONFIG, bits=2, dynamic=rule)
    found, wanted = Watched(mixture(), config), one_by_one(mixture(), config)
    assert same_codes(found, wanted) and not same_codes(found, Watched(mixture(), dataclasses.replace(CONFIG, bits=2)))
    for name, one in wanted.modules.items():
        assert found.modules[name].deviations == one.deviations, name


def test_rows_that_experts_read_in_another_dtype_than_their_block_are_paired():
    config = dataclasses.replace(CONFIG, bits=2, asymmetric_alpha=1.0)

    def forward(model: Any, batch: Any) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return model(batch)

    for model in (mixture(), mixture().bfloat16()):
        found = Watched(model, config, forward=forward)
        assert all(stop.group.at_once for stop in found.stops[2:])
        told = [sentence for one in found.modules.values() for sentence in one.deviations]
        assert not any("no counterpart" in sentence for sentence in told)


def test_a_device_that_cannot_hold_all_hessians_takes_one_expert_after_the_other(monkeypatch):
    with planned(mixture(), CONFIG) as plan:
        found = grouped_experts.grouped_experts(plan, torch.device("cpu"), PassOptions())
        whole, solving = (
            grouped_experts.whole_bytes(found.values()),
            grouped_experts.evidence_bytes(found.values(), plan, 0, True),
        )
        for options, needed in (
            (PassOptions(), whole + solving),
            (PassOptions(offload_weights=True), 3 * whole + solving),
        ):
            for free, count in ((needed // 3 * 4 + 8, 2), (needed // 3 * 4 - 8, 0)):
                monkeypatch.setattr(grouped_experts, "free_bytes", lambda *_, free=free: free)
                assert len(grouped_experts.grouped_experts(plan, torch.device("cpu"), options)) == count


def test_how_many_experts_are_solved_together_follows_from_a_gpus_memory_where_sums_may_depend_on_it(monkeypatch):
    for name, value in {"mem_get_info": (40, 80), "get_per_process_memory_fraction": 0.5}.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    memory, gpu = grouped_experts.solving_memory, torch.device("cuda")
    assert memory(gpu, PassOptions()) == 40 and memory(gpu, PassOptions(device_memory=30)) == 30
    assert memory(torch.device("cpu"), PassOptions(exact_sums=False)) == 0
    assert memory(gpu, PassOptions(exact_sums=True)) == 0
    monkeypatch.setattr(grouped_experts.distributed, "active", lambda: True)
    assert memory(gpu, PassOptions(exact_sums=False)) == 0


def test_what_is_solved_together_is_asked_with_that_memory_and_has_room(monkeypatch):
    asked = []
    monkeypatch.setattr(solve_experts, "most", lambda *arguments: asked.append(arguments[3]) or 2)
    monkeypatch.setattr(one_pass, "solving_memory", lambda *_: 12345)
    Watched(mixture())
    assert set(asked) == {12345}
    with planned(mixture(), CONFIG) as plan:
        every = grouped_experts.grouped_experts(plan, torch.device("cpu"), PassOptions()).values()
        found = [one for one in every if one.in_features == 48]
        one = grouped_experts.bytes_of_one(32, 48, CONFIG)
        monkeypatch.setattr(grouped_experts, "CHUNK_BYTES", one)
        hessians = EXPERTS * 48**2 * 8
        assert grouped_experts.evidence_bytes(found, plan, 0, True) == hessians + EXPERTS * one
        both = grouped_experts.bytes_of_one(2 * 48, 32, CONFIG)  # gate and up are solved together
        of_both = grouped_experts.evidence_bytes([one for one in every if one.in_features == 32], plan, 0, True)
        assert of_both == EXPERTS * (32**2 * 8 + both)
        monkeypatch.setattr(grouped_experts, "most", lambda *arguments: {0: 1, 99: 4}[arguments[3]])
        assert grouped_experts.evidence_bytes(found, plan, 0, True) == hessians + one
        assert grouped_experts.evidence_bytes(found, plan, 99, True) == hessians + 4 * one
        monkeypatch.setattr(grouped_experts, "CHUNK_BYTES", 3 * one)
        assert grouped_experts.evidence_bytes(found, plan, 0, True) == hessians + 3 * one
        monkeypatch.setattr(grouped_experts, "CHUNK_BYTES", one)
        solver = grouped_experts.placement.solver_bytes(plan.targets)
        for memory, number in ((0, 1), (99, 4)):
            monkeypatch.setattr(grouped_experts, "solving_memory", lambda *_, memory=memory: memory)
            bytes_ = grouped_experts.solving_bytes(found, plan, torch.device("cpu"), PassOptions())
            assert bytes_ == solver + hessians + number * one


@pytest.mark.parametrize("exact", [True, False])
def test_there_is_room_for_the_drifts_sums_and_their_means(exact):
    drift = EachDrift(EXPERTS, 48, "cpu", exact=exact)
    means = drift.take(drift.along(), drift.tokens())
    held = {one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in (drift._sums, means)}
    needed = []
    for config in (CONFIG, dataclasses.replace(CONFIG, asymmetric_alpha=0.5)):
        with planned(mixture(), config) as plan:
            every = grouped_experts.grouped_experts(plan, torch.device("cpu"), PassOptions()).values()
            found = [one for one in every if one.in_features == 48]
            needed.append(grouped_experts.evidence_bytes(found, plan, 0, exact))
            bytes_ = grouped_experts.solving_bytes(found, plan, torch.device("cpu"), PassOptions(exact_sums=exact))
            assert bytes_ == grouped_experts.placement.solver_bytes(plan.targets) + needed[-1]
    assert sum(held.values()) <= needed[1] - needed[0] <= 2 * sum(held.values())


def test_where_the_device_of_another_rank_cannot_hold_all_hessians_no_rank_calls_experts_at_once(monkeypatch):
    own: list[int] = []
    monkeypatch.setattr(grouped_experts.distributed, "minimum", lambda value: own.append(value) or min(value, 0))
    with planned(mixture(), CONFIG) as plan:
        assert grouped_experts.grouped_experts(plan, torch.device("cpu"), PassOptions()) == {}
    assert own == [True]


def test_experts_of_a_module_with_code_of_its_own_are_found_by_what_it_calls():
    model = mixture()
    experts = model.model.layers[0].mlp.experts

    plain = type(experts)
    experts.__class__ = type("Own", (plain,), {"forward": plain.forward.__wrapped__})
    found = Watched(model)
    assert all(not stop.group.at_once for stop in found.stops)
    same = [torch.equal(found.layers[name].qweight, pair(False)[1].layers[name].qweight) for name in found.layers]
    assert all(same)


def test_batches_that_cannot_take_turns_give_the_same_layers(monkeypatch):
    monkeypatch.setattr(batch_runs.BatchRuns, "disturbance", lambda *_: "they share a queue")
    found, wanted = Watched(mixture()), pair(False)[0]
    same = [(found.layers[name].qweight == wanted.layers[name].qweight).double().mean() for name in wanted.layers]
    assert torch.stack(same).mean() > 0.999


def test_experts_that_come_first_need_as_many_tokens_as_other_layers():
    config = dataclasses.replace(CONFIG, modules_to_not_convert=["self_attn"])
    for way in (Watched, one_by_one):
        with pytest.raises(CalibrationError, match="the calibration set is too short"):
            way(mixture(), config, [torch.zeros(1, 3, dtype=torch.long)])


def test_a_batch_that_is_not_finite_is_named():
    model = mixture()
    data = batches()
    embedded = copy.deepcopy(model.model.embed_tokens)
    model.model.embed_tokens = embedded
    config = dataclasses.replace(CONFIG, modules_to_not_convert=["self_attn"])

    def poisoned(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        return output * torch.nan if torch.equal(args[0][0], data[2][0]) else output

    embedded.register_forward_hook(poisoned)
    with pytest.raises(CalibrationError, match=r"batches \[2\]"):
        QuantizeModule(config).quantize(model, data)


def test_one_message_tells_that_all_experts_are_done():
    steps: list[tuple[int, int, str]] = []
    Watched(mixture(), progress=lambda *step: steps.append(step))
    assert [done for done, _, _ in steps][-2:] == [4 + 2 * EXPERTS, 4 + 3 * EXPERTS]


def same_codes(found: Watched, wanted: Watched) -> bool:
    assert found.layers.keys() == wanted.layers.keys()
    same = [(found.layers[name].qweight == wanted.layers[name].qweight).double().mean() for name in wanted.layers]
    return bool(torch.stack(same).mean() > 0.999)


def test_weights_and_activations_may_come_and_go():
    moved = Watched(mixture(), offload_weights=True, offload_activations=True)
    assert all(stop.group.at_once for stop in moved.stops[2:]) and same_codes(moved, pair(False)[0])


def test_sums_that_depend_on_their_order_give_the_same_layers():
    found = Watched(mixture(), exact_sums=False, data=batches(padded=True))
    assert all(stop.group.at_once for stop in found.stops[2:]) and same_codes(found, pair(True)[0])
    for name, one in pair(True)[0].modules.items():
        assert (found.modules[name].tokens, found.modules[name].deviations) == (one.tokens, one.deviations), name


def test_only_labelled_positions_count():
    labels = [torch.where(torch.arange(40) % 3 == 0, one, -100) for one in batches()]
    data = [{"input_ids": one, "labels": own} for one, own in zip(batches(), labels, strict=True)]
    config = dataclasses.replace(CONFIG, token_weighting="labels")
    found, wanted = Watched(mixture(), config, data), one_by_one(mixture(), config, data)
    assert same_codes(found, wanted)
    assert [one.tokens for one in found.modules.values()] == [one.tokens for one in wanted.modules.values()]


def test_where_one_projection_stays_float_the_other_is_quantized_at_once():
    config = dataclasses.replace(CONFIG, modules_to_not_convert=["gate_proj", "up_proj"])
    found = Watched(mixture(), config)
    assert [stop.group.at_once for stop in found.stops] == [(), (), ("model.layers.0.mlp.experts.down_proj",)]
    assert same_codes(found, one_by_one(mixture(), config))


def test_a_forward_under_autocast_computes_in_its_dtype():
    def forward(model: Any, batch: Any) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return model(batch)

    assert same_codes(Watched(mixture(), forward=forward), one_by_one(mixture(), forward=forward))


def test_padding_that_is_not_told_from_tokens_behind_float_layers_is_reported_also_with_one_expert_a_token():
    """There are as many rows as tokens then, but sorted by expert."""
    config = dataclasses.replace(CONFIG, modules_to_not_convert=["gate_proj", "up_proj"])
    model = mixture(num_experts_per_tok=1)
    found, wanted = (way(model, config, batches(padded=True)) for way in (Watched, one_by_one))
    assert found.stops[-1].group.at_once
    for name, one in wanted.modules.items():
        assert (found.modules[name].tokens, found.modules[name].deviations) == (one.tokens, one.deviations), name


@pytest.mark.parametrize("skipped", [1, 0])
def test_experts_that_the_first_batch_does_not_come_to_are_quantized_at_once_like_those_that_it_does(skipped):
    found, wanted = skipping_pair([skipped])
    assert sum(bool(stop.group.at_once) for stop in found.stops) == 4
    assert found.report.deviations == wanted.report.deviations  # no call came late
    same = [(found.layers[name].qweight == wanted.layers[name].qweight).double().mean() for name in wanted.layers]
    assert torch.stack(same).mean() > 0.98  # a near tie in the first block moves the inputs of the second
    for name, one in wanted.modules.items():
        assert (found.modules[name].method, found.modules[name].tokens) == (one.method, one.tokens), name


def test_where_the_first_batch_comes_to_no_experts_they_are_quantized_one_by_one():
    found, wanted = skipping_pair([0, 1])
    assert not any(stop.group.at_once for stop in found.stops)
    assert found.layers.keys() == wanted.layers.keys()


def skipping_pair(blocks: list[int]) -> tuple[Watched, Watched]:
    """These blocks do nothing for the longest samples."""

    def model() -> Any:
        made = mixture(num_hidden_layers=2)
        for number in blocks:
            block = made.model.layers[number].mlp
            plain = type(block)

            def forward(self: Any, x: torch.Tensor, plain: Any = plain) -> torch.Tensor:
                return torch.zeros_like(x) if x.shape[1] > 40 else plain.forward(self, x)

            block.__class__ = type("Skipped", (plain,), {"forward": forward})
        return made

    longest = torch.randint(0, 128, (2, 48), generator=torch.Generator().manual_seed(2))
    data = [longest, *(one[:, :2] for one in batches()[:2]), batches()[2]]  # few tokens, which reach some experts each
    found, wanted = (way(model(), data=data) for way in (Watched, one_by_one))
    return found, wanted


@pytest.mark.parametrize("experts_per_token", [1, 2])
def test_rows_that_a_grouped_product_casts_are_the_tokens_they_were(experts_per_token):
    """transformers casts what an expert reads to the weights' dtype, such as the float32 of a norm under autocast."""

    def model() -> Any:
        made = mixture(num_experts_per_tok=experts_per_token).to(torch.bfloat16)
        made.model.layers[0].post_attention_layernorm.register_forward_hook(lambda module, args, output: output.float())
        return made

    def forward(model: Any, batch: Any) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return model(**batch)

    data = batches(padded=True)
    found, wanted = Watched(model(), data=data, forward=forward), one_by_one(model(), data=data, forward=forward)
    assert all(stop.group.at_once for stop in found.stops[2:])
    for name, one in wanted.modules.items():
        assert (found.modules[name].tokens, found.modules[name].deviations) == (one.tokens, one.deviations), name


@pytest.mark.parametrize("expert", [0, EXPERTS - 1])
def test_where_all_layers_of_one_expert_stay_float_the_others_are_quantized(expert, monkeypatch):
    names = [f"model.layers.0.mlp.experts.{expert}.{part}_proj" for part in ("gate", "up", "down")]
    monkeypatch.setattr(batch_runs.Replaceable, "settle", lambda *_: dict.fromkeys(names, "they are read elsewhere"))
    found, wanted = Watched(mixture()), one_by_one(mixture())
    assert len([stop for stop in found.stops if stop.group.at_once]) == 2
    assert {found.modules[name].method for name in names} == {"float"}
    assert same_codes(found, wanted)


def test_in_the_model_two_experts_of_a_parameter_are_compared(monkeypatch):
    compared: list[str] = []
    check = batch_runs.check_swap

    def noted(model: Any, targets: Any, *rest: Any) -> Any:
        compared.extend(target.name for target in targets)
        return check(model, targets, *rest)

    monkeypatch.setattr(batch_runs, "check_swap", noted)
    Watched(mixture())
    assert {int(name.split(".")[5]) for name in compared if ".experts." in name} == {0, 1}
    assert len(compared) == 4 + 2 * 3
    compared.clear()
    one_by_one(mixture())
    assert len(compared) == 4 + 3 * EXPERTS


def test_experts_that_were_packed_together_are_saved_by_other_libraries_as_a_whole(tmp_path: Path) -> None:
    """Of tensors that share memory accelerate drops all but one, with a warning, and safetensors refuses them."""
    from accelerate import Accelerator
    from safetensors.torch import load_file, save_model

    model = mixture()
    QuantizeModule(CONFIG).quantize(model, [torch.randint(0, 128, (2, 40)) for _ in range(4)])
    state = model.state_dict()
    Accelerator(cpu=True).save_model(model, str(tmp_path / "folder"))
    save_model(model, str(tmp_path / "file.safetensors"))
    for file in (tmp_path / "folder" / "model.safetensors", tmp_path / "file.safetensors"):
        saved = load_file(file)
        assert saved.keys() == state.keys() and all(torch.equal(saved[name], state[name]) for name in state)


@pytest.mark.parametrize("name", ["packed_layers", "dequantize", "_empty"])
def test_what_follows_a_solve_of_experts_and_finds_no_room_runs_again(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = [torch.randint(0, 128, (2, 40)) for _ in range(4)]
    right, found, calls = mixture(), mixture(), []
    QuantizeModule(CONFIG).quantize(right, batches)
    follows = getattr(experts_pass, name)

    def failing(*args: Any) -> Any:
        calls.append(1)
        if len(calls) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return follows(*args)

    monkeypatch.setattr(experts_pass, name, failing)
    QuantizeModule(CONFIG).quantize(found, batches)
    assert len(calls) > 1
    assert all(torch.equal(tensor, found.state_dict()[name]) for name, tensor in right.state_dict().items())
