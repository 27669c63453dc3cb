"""Tokens weighted by the gradients of the loss: `token_weighting="gradients"`."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from plans import Attention, Listed, calibration_of, plan_of, rows
from torch import nn
from torch.nn import functional
from transformers import T5Config, T5ForConditionalGeneration

from gptq_plugin import QuantizeModule
from gptq_plugin.config import QuantizeConfig
from gptq_plugin.errors import CalibrationError
from gptq_plugin.quantize.gradient_weights import GradientWeights
from gptq_plugin.quantize.one_pass import OnePass
from gptq_plugin.quantize.options import PassOptions

from models import tiny_gpt2, tiny_llama

CONFIG = QuantizeConfig(bits=3, group_size=16, nsamples=1000, batch_size=8, token_weighting="gradients")


def passed(model, batches, config=CONFIG, **options):
    with torch.no_grad():
        return OnePass(plan_of(model, config), calibration_of(batches, config), PassOptions(**options)).run()


def loss_to_targets(model, batch):
    return (model(batch["x"]) - batch["y"]).square().sum(-1).mul(batch["weight"]).mean()


def pairs(count=2, rows_each=50):
    made = []
    for seed in range(count):
        x, y = rows(rows_each, 32, seed), rows(rows_each, 32, seed + 10)
        made.append({"x": x, "y": y, "weight": torch.rand(rows_each) * torch.tensor([0, 1]).repeat(rows_each // 2)})
    return made


def plain_weights(model, name, run, batches):
    """The mean over a layer's outputs of its squared gradients, and its inputs."""
    weights, inputs = [], []
    for batch in batches:
        outputs = []

        def keep(_, args, output, outputs=outputs):
            inputs.append(args[0].detach().flatten(0, -2))
            outputs.append(output)

        handle = model.get_submodule(name).register_forward_hook(keep)
        with torch.enable_grad():
            (gradient,) = torch.autograd.grad(run(model, batch), outputs)
        handle.remove()
        weights.append(gradient.flatten(0, -2).square().mean(-1))
    return torch.cat(weights), torch.cat(inputs)


def scaled(weights):
    """By a power of two, to a mean in [1, 2)."""
    return weights * 2.0 ** -math.floor(math.log2(weights.double().mean()))


def test_a_tokens_weight_is_the_mean_square_of_the_gradients_at_the_layers_outputs(solved):
    model, batches = Attention(), pairs()
    passed(model, batches, forward=loss_to_targets)
    assert len(solved) == 4  # q, k and v read one input, and weigh its tokens differently
    for (_, hessian, _), name in zip(solved[:3], "qkv", strict=True):
        weights, x = plain_weights(model, name, loss_to_targets, batches)
        weights = scaled(weights)
        assert (weights == 0).sum() >= 50
        torch.testing.assert_close(hessian, (x * weights[:, None]).T @ x / len(x), rtol=1e-4, atol=1e-6)
    assert not torch.equal(solved[0][1], solved[1][1])


def test_the_drift_is_weighted_as_the_hessian_is(solved):
    model, batches = Attention(), pairs()
    config = QuantizeConfig.from_dict({**CONFIG.to_dict(), "bits": 2, "asymmetric_alpha": 1.0})
    layers, _ = passed(model, batches, config, forward=loss_to_targets)
    weights, x = plain_weights(model, "o", loss_to_targets, batches)
    weights = scaled(weights)[:, None]
    quantized = Attention()
    quantized.load_state_dict({f"{name}.weight": layer.dequantize() for name, layer in layers.items()})
    _, seen = plain_weights(quantized, "o", loss_to_targets, batches)
    torch.testing.assert_close(solved[3][1], (seen * weights).T @ seen / len(x), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(solved[3][2], ((x - seen) * weights).T @ seen / len(x), rtol=1e-3, atol=1e-6)


def next_token_loss(ignored):
    def run(model, batch):
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        labels = batch["labels"] if "labels" in batch else batch["input_ids"].masked_fill(ignored(batch), -100)
        return functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")

    return run


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
@pytest.mark.parametrize("labelled", [False, True])
def test_a_model_that_generates_has_the_loss_of_its_labels_or_of_its_tokens(make, labelled, solved):
    model = make()
    ids = torch.randint(4, 128, (4, 40), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(40) < torch.tensor([[40], [17], [33], [8]])).long()
    batch = {"input_ids": ids, "attention_mask": mask}
    if labelled:
        batch["labels"] = ids.masked_fill((torch.arange(40) < 10) | (mask == 0), -100)
    passed(model, [batch])
    name = next(one for one, layer in model.named_modules() if type(layer).__name__ in ("Linear", "Conv1D"))
    run = next_token_loss(lambda batch: batch["attention_mask"] == 0)
    weights, x = plain_weights(model, name, run, [batch])
    kept = mask.flatten().bool()
    weights, x = scaled(weights)[kept], x[kept]
    torch.testing.assert_close(solved[0][1], (x * weights[:, None]).T @ x / len(x), rtol=1e-3, atol=1e-6)


def test_parameters_keep_their_gradients_and_flags():
    model = Attention()
    model.q.weight.requires_grad_(False)
    model.k.weight.grad = torch.ones(32, 32)
    passed(model, pairs(), forward=loss_to_targets)
    assert [p.requires_grad for p in model.parameters()] == [False, True, True, True]
    assert model.q.weight.grad is None and model.v.weight.grad is None and bool((model.k.weight.grad == 1).all())
    assert not any(layer._forward_hooks for layer in model.modules())


def test_outputs_may_be_written_to_in_place(solved):
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(inplace=True), nn.Linear(32, 32))
    apart = nn.Sequential(model[0], nn.ReLU(), model[2])
    batches = pairs()
    passed(model, batches, forward=loss_to_targets)
    for (_, hessian, _), name in zip(solved[:1], ("0",), strict=True):
        weights, x = plain_weights(apart, name, loss_to_targets, batches)
        torch.testing.assert_close(hessian, (x * scaled(weights)[:, None]).T @ x / len(x), rtol=1e-4, atol=1e-6)


class Detached(Attention):
    """The loss does not depend on `q`."""

    def forward(self, x):
        return self.o(torch.sigmoid(self.q(x).detach()) * self.k(x) + self.v(x))


def test_layers_that_the_loss_does_not_depend_on_are_not_weighted_and_that_is_reported(solved):
    model, batches = Detached(), pairs()
    _, report = passed(model, batches, forward=loss_to_targets)
    x = torch.cat([batch["x"] for batch in batches])
    torch.testing.assert_close(solved[0][1], x.T @ x / len(x), rtol=1e-4, atol=1e-6)
    told = {one.name: [text for text in one.deviations if "token_weighting" in text] for one in report.modules}
    assert told == {
        "q": [
            "token_weighting='gradients' is not applied: no gradient is known for the rows of its input, or all are 0 "
            "(2 batches)"
        ],
        "k": [],
        "v": [],
        "o": [],
    }


def test_the_tokens_of_experts_are_not_weighted_and_that_is_reported():
    model = nn.Sequential(nn.Linear(32, 32), Listed(), nn.Linear(32, 32))
    _, report = passed(model, pairs(rows_each=400), forward=loss_to_targets)
    told = {one.name for one in report.modules if any("token_weighting" in text for text in one.deviations)}
    assert told >= {"1.experts.0.0", "1.experts.1.2"} and not told & {"0", "2", "1.gate"}


@pytest.mark.parametrize(
    ("forward", "message"),
    [
        (lambda model, batch: model(batch["x"]), "needs the loss of every calibration batch"),
        (torch.no_grad()(loss_to_targets), "depends on no layer that is to be quantized"),
        (lambda model, batch: model(batch["x"]).round().sum() * batch["x"].sum(), None),
    ],
    ids=["no loss", "no gradient", "a loss"],
)
def test_a_batch_without_a_loss_is_refused_before_training_and_before_any_work(forward, message):
    model, batches = Attention(), pairs()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    if message is None:
        QuantizeModule(CONFIG).rehearse(model, batches, forward=forward)
        return
    with pytest.raises(CalibrationError, match=message):
        QuantizeModule(CONFIG).rehearse(model, batches, forward=forward)
    with pytest.raises(CalibrationError, match=message):
        QuantizeModule(CONFIG).quantize(model, batches, forward=forward)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_weights_tokens_as_a_cpu_does(solved):
    batches = pairs()
    torch.manual_seed(0)
    model = Attention()
    passed(copy.deepcopy(model), batches, forward=loss_to_targets)
    passed(model.cuda(), batches, forward=loss_to_targets, device="cuda")
    for (_, here, _), (_, there, _) in zip(solved[:1], solved[4:5], strict=True):
        torch.testing.assert_close(there.cpu(), here, rtol=1e-4, atol=1e-5)


def t5():
    torch.manual_seed(0)
    sizes = {"vocab_size": 96, "d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 1, "num_heads": 2}
    return T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0, pad_token_id=0)).eval()


def test_a_token_weighs_the_same_in_a_short_batch_as_in_a_long_one(solved):
    model, batches = t5(), []
    for targets in (3, 40):
        ids = torch.randint(1, 96, (2, 30), generator=torch.Generator().manual_seed(targets))
        batches.append({"input_ids": ids, "labels": torch.randint(1, 96, (2, targets))})
    passed(model, batches)
    name = "encoder.block.0.layer.0.SelfAttention.q"

    def summed(model, batch):
        logits = model(**batch).logits
        return functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), reduction="sum")

    weights, x = plain_weights(model, name, summed, batches)
    torch.testing.assert_close(solved[0][1], (x * scaled(weights)[:, None]).T @ x / len(x), rtol=1e-3, atol=1e-5)


def test_a_classifiers_loss_is_that_of_its_samples_labels(solved):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 16)), rows(60, 32)
    batch = {"x": x, "labels": torch.randint(0, 16, (60,))}
    passed(model, [batch], forward=lambda model, batch: model(batch["x"]))

    def summed(model, batch):
        return functional.cross_entropy(model(batch["x"]), batch["labels"], reduction="sum")

    weights, _ = plain_weights(model, "0", summed, [batch])
    torch.testing.assert_close(solved[0][1], (x * scaled(weights)[:, None]).T @ x / 60, rtol=1e-3, atol=1e-6)


def test_gradients_that_float16_would_round_to_zero_are_kept():
    """Of the mean of a batch: those of the sum are larger by the number of its rows."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32)), rows(500, 32)
    run = {"x": x, "y": rows(500, 32, 1)}
    weights = []
    for dtype in (torch.float32, torch.float16):
        one = copy.deepcopy(model).to(dtype)
        found = GradientWeights(one, dict(one.named_children()))
        batch = {name: value.to(dtype) for name, value in run.items()}
        found.measure(
            0, lambda one=one, batch=batch: (one(batch["x"]) - batch["y"]).float().square().mean() / 30, batch
        )
        found.over_ranks()
        weights.append(found.take("0", 0, 500).square())
    assert bool((weights[1] > 0).all())
    assert ((weights[0] - weights[1]).abs() / weights[0]).max() < 0.05


@pytest.mark.parametrize(
    ("forward", "message"),
    [
        (lambda model, batch: loss_to_targets(model, batch) * torch.nan, "the loss of calibration batch 0 is nan"),
        (
            lambda model, batch: (model(batch["x"]).sum() * 0.0).sqrt(),
            "gradients of calibration batch 0 at the outputs",
        ),
        (lambda model, batch: loss_to_targets(model, batch) * 0.0, "gradients of zero alone"),
    ],
    ids=["NaN", "infinite gradients", "zero"],
)
def test_a_loss_that_gives_no_weights_is_refused(forward, message):
    with pytest.raises(CalibrationError, match=message):
        passed(Attention(), pairs(), forward=forward)


def test_parameters_made_in_inference_mode_are_refused_and_flags_stay():
    with torch.inference_mode():
        made = nn.Linear(32, 32)
    model = nn.Sequential(nn.Linear(32, 32), made)
    with pytest.raises(CalibrationError, match=r"parameters made in torch\.inference_mode"):
        GradientWeights(model, {}).measure(0, lambda: None, None)
    assert all(parameter.requires_grad for parameter in model[0].parameters())


class Twice(Attention):
    """It calls `q` once more where gradients are computed."""

    def forward(self, x):
        return super().forward(x) + (self.q(x) if torch.is_grad_enabled() else 0)


def test_calls_that_only_the_forward_with_gradients_makes_are_reported():
    _, report = passed(Twice(), pairs(), forward=loss_to_targets)
    told = {one.name: [text for text in one.deviations if "more often" in text] for one in report.modules}
    assert [name for name, found in told.items() if found] == ["q"] and "(2 batches)" in told["q"][0]


def test_a_model_that_is_streamed_is_refused():
    with pytest.raises(ValueError, match="runs the model backward"):
        QuantizeModule(CONFIG, offload_weights=True).quantize(Attention(), pairs(), forward=loss_to_targets)


def test_a_batch_whose_backward_fails_is_named():
    class NoBackward(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.sum()

        @staticmethod
        def backward(ctx, gradient):
            raise RuntimeError("there is none")

    with pytest.raises(CalibrationError, match=r"calibration batch 0: it has no backward \(there is none\)"):
        passed(Attention(), pairs(), forward=lambda model, batch: NoBackward.apply(model(batch["x"])))
