"""Passes that take Hessians and solutions from earlier ones, and give what they would have given without."""

from __future__ import annotations

import copy
import dataclasses
import os

import pytest
import torch
from plans import Attention, Listed, calibration_of, rows
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from gptq_plugin import QuantizeModule
from gptq_plugin.cache import files
from gptq_plugin.config import QuantizeConfig
from gptq_plugin.model.plan import planned
from gptq_plugin.quantize.batch_runs import BatchRuns
from gptq_plugin.quantize.divergence import Divergence
from gptq_plugin.quantize.one_pass import OnePass
from gptq_plugin.quantize.options import PassOptions

from models import tiny_gpt2, tiny_llama

CONFIG = QuantizeConfig(bits=3, group_size=16, nsamples=180, batch_size=2)
SECONDS = ("seconds", "run_id", "cache")


class Blocks(nn.Module):
    """Attention, then a layer, then attention again: five stops, of nine layers."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.middle, self.last = Attention(), nn.Linear(32, 32), Attention()
        self.scale = 1.0

    def forward(self, x):
        return self.last(x + self.scale * torch.tanh(self.middle(x + self.first(x))))


BATCHES = [rows(60, 32, seed) for seed in range(3)]


def passed(model, folder, config=CONFIG, batches=BATCHES, **options):
    given = PassOptions(cache_dir=folder, **options)
    with torch.no_grad(), planned(model, config) as plan:
        return OnePass(plan, calibration_of(batches, config), given).run()


def facts(report):
    """All that a report tells but times and what came from where."""
    values = {name: value for name, value in report.to_dict().items() if name not in SECONDS}
    values["totals"].pop("seconds")
    for module in values["modules"]:
        module.pop("seconds")
    return values


def assert_same(one, other):
    assert_same_layers(one, other)
    assert facts(one[1]) == facts(other[1])


def assert_same_layers(one, other):
    layers, others = one[0], other[0]
    assert layers.keys() == others.keys()
    for name, layer in layers.items():
        for key, value in layer.state_dict().items():
            assert torch.equal(value, others[name].state_dict()[key]), (name, key)


def rule(**changes):
    return dataclasses.replace(CONFIG, dynamic=changes.pop("rules"), **changes)


def taken(result):
    return result[1].cache["layers_taken"]


CASES = {
    "gptq": (Blocks, BATCHES, CONFIG),
    "best": (Blocks, BATCHES, dataclasses.replace(CONFIG, asymmetric_alpha=0.5, clip_candidates=11, refit_rounds=1)),
    "experts": (Listed, [rows(200, 32, seed) for seed in range(2)], CONFIG),
    "experts-drift": (Listed, [rows(200, 32, seed) for seed in range(2)], rule(rules={}, asymmetric_alpha=0.5)),
    "llama": (
        tiny_llama,
        [{"input_ids": torch.randint(0, 128, (2, 32), generator=torch.Generator().manual_seed(n))} for n in range(4)],
        CONFIG,
    ),
    "gpt2-lm_head": (
        lambda: tiny_gpt2(tie_word_embeddings=False),
        [{"input_ids": torch.randint(0, 128, (2, 32), generator=torch.Generator().manual_seed(n))} for n in range(4)],
        dataclasses.replace(CONFIG, lm_head=True, desc_act=True, static_groups=False),
    ),
}


@pytest.mark.parametrize(
    "case, streamed", [*((case, False) for case in CASES), ("best", True), ("experts-drift", True)]
)
def test_a_pass_of_the_same_takes_every_layer_and_gives_what_it_would_have_without(tmp_path, case, streamed):
    make, batches, config = CASES[case]
    options = {"offload_weights": True, "offload_activations": True} if streamed else {}
    torch.manual_seed(0)
    model = make()
    plain = passed(model, None, config, batches, **options)
    assert plain[1].cache == {}
    first = passed(copy.deepcopy(model), tmp_path, config, batches, **options)
    again = passed(copy.deepcopy(model), tmp_path, config, batches, **options)
    assert_same(plain, first)
    assert_same(plain, again)
    count = len(plain[0])
    told = f"{count} layers taken from earlier runs, without walking the batches through the model, 0 solved"
    assert told in again[1].table() and "layers taken" not in plain[1].table()
    assert first[1].cache["layers_solved"] == count and taken(first) == 0 and first[1].cache["bytes_written"]
    assert taken(again) == count and again[1].cache["walk_taken"] and not again[1].cache["bytes_written"]


@pytest.mark.parametrize("case", ["gptq", "best"])
def test_layers_up_to_the_first_that_is_quantized_otherwise_are_taken_and_that_one_by_its_kept_hessian(
    tmp_path, case, solved
):
    model, batches, config = CASES[case]
    changed = dataclasses.replace(config, dynamic={"last.v": {"bits": 8}})
    passed(model(), tmp_path, config, batches)
    plain = passed(model(), None, changed, batches)
    solved.clear()
    second = passed(model(), tmp_path, changed, batches)
    assert_same(plain, second)
    assert [shape for shape, *_ in solved] == [(64, 32), (32, 32), (32, 32)]  # last.q and k, v, o
    assert second[1].cache | {"bytes_written": 0} == {
        "layers_taken": 5, "layers_solved": 4, "hessians_taken": 2, "walk_taken": 0, "bytes_written": 0,
    }  # fmt: skip


def test_a_walk_sums_up_no_hessian_that_is_known(tmp_path, monkeypatch):
    from gptq_plugin.walk.hessian import Hessian

    passed(Blocks(), tmp_path)
    sums, add = [], Hessian.add
    monkeypatch.setattr(Hessian, "add", lambda self, x: (sums.append(len(x)), add(self, x)))
    passed(Blocks(), tmp_path, rule(rules={"last.o": {"bits": 8}}))
    assert sums == [60] * 3  # the first group's, whose inputs identify the data


@pytest.mark.parametrize("changes", [{"bits": 4}, {"group_size": 32}, {"damp_percent": 0.05}, {"sym": False}])
def test_another_grid_of_all_layers_takes_none(tmp_path, changes):
    passed(Blocks(), tmp_path)
    config = dataclasses.replace(CONFIG, **changes)
    second = passed(Blocks(), tmp_path, config)
    assert taken(second) == 0
    assert_same(passed(Blocks(), None, config), second)
    assert taken(passed(Blocks(), tmp_path, config)) == 9


def test_the_way_codes_were_found_does_not_count_where_they_are_the_same(tmp_path):
    passed(Blocks(), tmp_path)
    wider = rule(rules={"first": {"damp_auto_increment": 0.01}})  # changes nothing but the key of the solution
    assert taken(passed(Blocks(), tmp_path, wider)) == 5


def weight(model):
    model.last.o.weight.data[3, 4] += 0.5


def scale(model):
    model.scale = 1.0 + 2**-20


def buffer(model):
    model.register_buffer("more", torch.ones(3))


def hook(model):
    model.middle.register_forward_hook(lambda module, args, output: output * 1.01)


def own_forward(model):
    model.middle.forward = lambda x: nn.functional.linear(x, model.middle.weight, model.middle.bias)


@pytest.mark.parametrize("change", [weight, scale, buffer, hook, own_forward])
def test_a_change_of_the_model_anywhere_takes_nothing(tmp_path, change):
    passed(Blocks(), tmp_path)
    model = Blocks()
    change(model)
    second = passed(model, tmp_path)
    assert taken(second) == 0
    assert_same(passed(model, None), second)


class Doubled(Blocks):
    def forward(self, x):
        return super().forward(x) * 2


class Negated(Blocks):
    def forward(self, x):
        return super().forward(x) * -2


def test_code_that_no_input_of_a_layer_shows_counts(tmp_path):
    passed(Doubled(), tmp_path)
    assert taken(passed(Doubled(), tmp_path)) == 9
    assert taken(passed(Negated(), tmp_path)) == 0


@pytest.mark.parametrize(
    "batches",
    [
        BATCHES[:2],
        BATCHES[::-1],
        [*BATCHES[:2], BATCHES[2] + 2**-20],
        [torch.cat(BATCHES[:2]), BATCHES[2]],
        [BATCHES[0], BATCHES[1].double().float(), BATCHES[2].clone().index_fill_(0, torch.tensor([59]), 0.0)],
    ],
)
def test_other_data_takes_nothing(tmp_path, batches):
    passed(Blocks(), tmp_path)
    assert taken(passed(Blocks(), tmp_path, batches=batches)) == 0


def test_a_forward_counts_by_its_code_and_by_what_it_refers_to(tmp_path):
    def made(factor):
        return lambda model, batch: model(batch * factor)

    kept = passed(Blocks(), tmp_path, forward=made(1.0))
    assert taken(passed(Blocks(), tmp_path, forward=made(1.0))) == 9
    for other in (made(1.5), lambda model, batch: model(batch) * 1.0, None):
        assert taken(passed(Blocks(), tmp_path, forward=other)) == 0
    assert_same(kept, passed(Blocks(), None, forward=made(1.0)))


def test_what_a_forward_takes_from_elsewhere_shows_in_the_first_layers_inputs(tmp_path):
    path = tmp_path / "factor"

    def read(model, batch):  # no hash of code or data tells what the file holds
        return model(batch * float(open(path).read()) if len(batch) == 50 else batch)

    batches = [*BATCHES[:2], BATCHES[2][:50]]  # the largest is run once more, before
    path.write_text("1")
    passed(Blocks(), tmp_path / "cache", batches=batches, forward=read)
    path.write_text("2")
    assert taken(passed(Blocks(), tmp_path / "cache", batches=batches, forward=read)) == 0


class Shifted(Blocks):
    def forward(self, x, shift):
        return self.last(x + shift * torch.tanh(self.middle(x + self.first(x))))


def test_data_that_only_later_layers_read_counts_in_every_batch(tmp_path):
    def batches(last):
        shifts = (1.0, 1.0, last)
        sizes = (60, 60, 50)
        return [{"x": BATCHES[n][: sizes[n]], "shift": torch.full((sizes[n], 1), shifts[n])} for n in range(3)]

    passed(Shifted(), tmp_path, batches=batches(1.0))
    assert taken(passed(Shifted(), tmp_path, batches=batches(1.0))) == 9
    assert taken(passed(Shifted(), tmp_path, batches=batches(1.5))) == 0


def test_what_changes_behind_the_first_layers_shows_in_one_float_forward(tmp_path):
    path = tmp_path / "factor"

    class Reads(Blocks):
        def forward(self, x):
            return self.last(torch.tanh(self.middle(x + self.first(x))) * float(open(path).read()))

    path.write_text("1")
    passed(Reads(), tmp_path / "cache")
    path.write_text("2")
    assert taken(passed(Reads(), tmp_path / "cache")) == 0


class Noisy(Blocks):
    def forward(self, x):
        return super().forward(x + torch.randn(32) * 1e-3)


class Held(Blocks):
    def __init__(self):
        super().__init__()
        self.file = open(os.devnull)  # noqa: SIM115


@pytest.mark.parametrize(
    "make, why",
    [
        (Noisy, "the model's forward draws random numbers"),
        (Held, "the model: file, an object of type TextIOWrapper, which cannot be pickled cannot be told from others"),
    ],
)
def test_a_pass_that_cannot_be_told_from_others_is_not_kept_and_the_report_tells_why(tmp_path, make, why):
    for _ in range(2):
        _, report = passed(make(), tmp_path)
        assert report.cache == {
            "layers_taken": 0, "layers_solved": 9, "hessians_taken": 0, "walk_taken": 0, "bytes_written": 0,
        }  # fmt: skip
        assert any(line.startswith(f"cache_dir is not used: {why}") for line in report.deviations), report.deviations
    assert not list(tmp_path.iterdir())


def test_batches_that_cannot_take_turns_are_not_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(BatchRuns, "disturbance", lambda self, layers: "they meet")
    _, report = passed(Blocks(), tmp_path)
    assert "cache_dir is not used: the batches cannot take turns (they meet)" in report.deviations


def test_a_damaged_file_is_told_and_computed_again(tmp_path):
    plain = passed(Blocks(), tmp_path)
    for path in tmp_path.glob("solution-*"):
        content = bytearray(path.read_bytes())
        content[-5] ^= 1
        path.write_bytes(content)
    again = passed(Blocks(), tmp_path)
    assert taken(again) == 0 and again[0].keys() == plain[0].keys()
    told = [line for line in again[1].deviations if "is damaged and was computed again" in line]
    assert len(told) == 5
    again[1].deviations.clear()
    assert_same(plain, again)
    third = passed(Blocks(), tmp_path)
    assert taken(third) == 9


@pytest.mark.parametrize("kept", ["solution", "hessian", "stop", "walk"])
def test_files_that_are_missing_are_made_again(tmp_path, kept):
    plain = passed(Blocks(), tmp_path)
    changed = rule(rules={"last.o": {"bits": 8}})
    for path in tmp_path.glob(f"{kept}-*"):
        path.unlink()
    assert_same(plain, passed(Blocks(), tmp_path))
    assert_same(passed(Blocks(), None, changed), passed(Blocks(), tmp_path, changed))
    assert taken(passed(Blocks(), tmp_path)) == 9


def test_a_full_disk_ends_no_run(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "save_file", full)
    result = passed(Blocks(), tmp_path)
    told = [line for line in result[1].deviations if "No space left" in line]
    assert told == [f"nothing more is kept in {tmp_path}: [Errno 28] No space left on device"]
    assert not list(tmp_path.iterdir())
    result[1].deviations.clear()
    assert_same(passed(Blocks(), None), result)


def test_a_folder_that_cannot_be_made_ends_no_run(tmp_path):
    (tmp_path / "file").write_text("")
    _, report = passed(Blocks(), tmp_path / "file" / "cache")
    assert any(line.startswith("nothing more is kept in") for line in report.deviations)


def test_layers_that_come_in_another_order_than_before_are_refused(tmp_path, monkeypatch):
    passed(Blocks(), tmp_path)
    from gptq_plugin.quantize import kept_pass

    alike = kept_pass.alike
    monkeypatch.setattr("gptq_plugin.quantize.one_pass.alike", lambda targets: [[one] for one in targets])
    assert alike
    with pytest.raises(Exception, match="its layers came together with others than in an earlier run"):
        passed(Blocks(), tmp_path, rule(rules={"last.o": {"bits": 8}}))


def test_token_weights_by_gradients_count(tmp_path):
    def batches(shift):
        ids = [torch.randint(0, 128, (2, 32), generator=torch.Generator().manual_seed(n)) for n in range(4)]
        return [{"input_ids": one, "labels": (one + shift) % 128} for one in ids]

    config = dataclasses.replace(CONFIG, token_weighting="gradients")
    plain = passed(tiny_llama(), None, config, batches(0))
    passed(tiny_llama(), tmp_path, config, batches(0))
    again = passed(tiny_llama(), tmp_path, config, batches(0))
    assert_same(plain, again)
    assert taken(again) == 14 and again[1].cache["walk_taken"]
    assert taken(passed(tiny_llama(), tmp_path, config, batches(1))) == 0
    late = dataclasses.replace(config, dynamic={"model.layers.1.mlp.down_proj": {"bits": 8}})
    assert_same(passed(tiny_llama(), None, late, batches(0)), passed(tiny_llama(), tmp_path, late, batches(0)))


def test_a_pass_that_was_ended_in_the_middle_goes_on_where_it_stood(tmp_path):
    def stop(done, *_):
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        passed(Blocks(), tmp_path, progress=stop)
    assert_same(passed(Blocks(), None), again := passed(Blocks(), tmp_path))
    assert taken(again) == 5


def test_a_pass_takes_up_what_another_process_has_left_meanwhile(tmp_path):
    def other(done, *_):
        if done == 4:
            passed(Blocks(), tmp_path / "cache")

    result = passed(Blocks(), tmp_path / "cache", progress=other)
    assert taken(result) == 5 and result[1].cache["walk_taken"]
    assert_same(passed(Blocks(), None), result)


def test_an_attempt_takes_the_layers_before_the_first_that_it_changes_from_the_attempt_before(tmp_path):
    model = tiny_llama(num_hidden_layers=3)
    rows_ = [torch.randint(0, 128, (32,), generator=torch.Generator().manual_seed(n)) for n in range(16)]
    options = {"group_size": 32, "nsamples": 16, "model_seqlen": 32}
    with QuantizeModule(**options, bits=2, cache_dir=tmp_path).temporarily(model, rows_):
        pass
    more = {r"model\.layers\.2\.mlp\.(gate|up)_proj": {"bits": 4}}
    with QuantizeModule(**options, bits=2, cache_dir=tmp_path, dynamic=more).temporarily(model, rows_) as report:
        kept = copy.deepcopy(model.state_dict())
    assert report.cache["layers_taken"] == 7 + 7 + 4 and report.cache["hessians_taken"] == 1
    with QuantizeModule(**options, bits=2, dynamic=more).temporarily(model, rows_):
        assert all(torch.equal(value, kept[name]) for name, value in model.state_dict().items())


def test_another_budget_takes_the_trials_and_the_divergences_of_the_first(tmp_path, solved, monkeypatch):
    measured, measure = [], Divergence.measure
    monkeypatch.setattr(Divergence, "measure", lambda self: measured.append(measure(self)) or measured[-1])
    batches = CASES["llama"][1]
    ids = [row for batch in batches for row in batch["input_ids"]]
    options = {"group_size": 32, "nsamples": 8, "model_seqlen": 32, "batch_size": 2, "cache_dir": tmp_path}
    QuantizeModule(**options, target_bits=3.5).quantize(tiny_llama(), ids)
    trials = len(solved)
    assert len(measured) > trials
    solved.clear(), measured.clear()
    model = tiny_llama()
    QuantizeModule(**options, target_bits=4.0).quantize(model, ids)
    assert 0 < len(solved) <= 14 < trials  # of the pass alone
    assert not measured
    plain = tiny_llama()
    QuantizeModule(**{**options, "cache_dir": None}, target_bits=4.0).quantize(plain, ids)
    assert all(torch.equal(value, plain.state_dict()[name]) for name, value in model.state_dict().items())


def fused():
    config = AutoConfig.for_model(
        "qwen3_moe", hidden_size=64, intermediate_size=64, moe_intermediate_size=32, num_hidden_layers=2, vocab_size=64,
        num_attention_heads=2, num_key_value_heads=1, num_experts=4, num_experts_per_tok=2, initializer_range=0.2,
    )  # fmt: skip
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


TOKENS = [{"input_ids": torch.randint(0, 64, (4, 32), generator=torch.Generator().manual_seed(n))} for n in range(3)]


def test_experts_of_one_parameter_are_solved_one_by_one_and_taken_and_layers_behind_depend_on_them(tmp_path):
    config = dataclasses.replace(CONFIG, nsamples=12)
    plain = passed(fused(), None, config, TOKENS)
    first, again = (passed(fused(), tmp_path, config, TOKENS) for _ in range(2))
    assert_same_layers(plain, first)  # whose losses differ in their last bits
    assert_same(first, again)
    assert first[1].cache["layers_solved"] == 2 * (4 + 3 * 4) == len(plain[0]) == taken(again)
    wide = dataclasses.replace(config, dynamic={"model.layers.0.mlp.experts": {"bits": 8}})
    other = passed(fused(), tmp_path, wide, TOKENS)
    assert_same_layers(passed(fused(), None, wide, TOKENS), other)
    assert taken(other) == 4  # before the experts


def test_experts_that_are_solved_by_themselves_are_taken_by_themselves(tmp_path):
    config = dataclasses.replace(CONFIG, nsamples=12, desc_act=True, static_groups=False, asymmetric_alpha=0.5)
    plain = passed(fused(), None, config, TOKENS)
    first, again = (passed(fused(), tmp_path, config, TOKENS) for _ in range(2))
    assert_same_layers(plain, first)  # whose losses differ in their last bits
    assert_same(first, again)
    wide = dataclasses.replace(config, dynamic={"model.layers.1.mlp.experts": {"bits": 8}})
    assert_same_layers(passed(fused(), None, wide, TOKENS), passed(fused(), tmp_path, wide, TOKENS))
