"""An export is loaded again and must compute what the model computes, or there is none."""

from __future__ import annotations

import logging

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from gptq_plugin import QuantizeConfig, QuantizeModule, QuantLinear, load_quantized
from gptq_plugin.errors import ExportError
from gptq_plugin.export import verify_outputs
from gptq_plugin.export.export import export_model
from gptq_plugin.export.verify_outputs import LENGTH, Sample, same_outputs

from models import Plain, tiny_gpt2, tiny_llama

IDS = torch.randint(3, 60, (5, 100), generator=torch.Generator().manual_seed(0))
SMALL = QuantizeConfig(group_size=32, nsamples=5, batch_size=5)


def quantized_llama(**options):
    quantizer, model = QuantizeModule(SMALL), tiny_llama(num_hidden_layers=1, **options)
    quantizer.quantize(model, list(IDS))
    return quantizer, model


@pytest.mark.parametrize("checkpoint_format", ["gptq", "compressed-tensors"])
def test_one_calibration_sample_goes_through_the_model_and_the_export(checkpoint_format, tmp_path, caplog):
    quantizer = QuantizeModule(QuantizeConfig(**{**SMALL.to_dict(), "checkpoint_format": checkpoint_format}))
    model, shapes = tiny_llama(num_hidden_layers=1), []
    quantizer.quantize(model, list(IDS))
    kind = type(model)
    forward = kind.forward

    def watching(self, input_ids=None, **kwargs):
        shapes.append((self is model, tuple(input_ids.shape)))
        return forward(self, input_ids=input_ids, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kind, "forward", watching)
        quantizer.export(model, tmp_path / "out")
    assert shapes == [(True, (1, LENGTH)), (False, (1, LENGTH))]
    assert "not run" not in caplog.text and "not compared" not in caplog.text


def test_a_sample_that_runs_under_autocast_is_compared_by_a_call_without(tmp_path):
    _, model = quantized_llama()
    seen = []

    def forward(network, batch):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            seen.append(network(batch).logits)

    for run, rounded in ((forward, True), (lambda network, batch: network(batch), False)):
        called = verify_outputs._called(model, Sample.of(IDS[:1], run, torch.device("cpu")))
        assert called is not None
        (args, kwargs), _, outputs = called
        assert (outputs is None) is rounded
    assert torch.equal(outputs[0], model(*args, **kwargs).logits) and seen[0].dtype == torch.bfloat16


def test_layers_on_a_cpu_keep_nothing_of_the_calls_that_verify_them(tmp_path):
    """They would hold a byte for each weight of a model that may be mapped from its files."""
    quantizer, model = quantized_llama()
    layers = [layer for layer in model.modules() if isinstance(layer, QuantLinear)]
    expected = model(IDS[:1]).logits
    assert all(layer._prepared is not None for layer in layers)
    quantizer.export(model, tmp_path / "out")
    assert len(layers) == 7 and all(layer._prepared is None and not layer._forward_hooks for layer in layers)
    assert torch.equal(model(IDS[:1]).logits, expected)


@pytest.mark.parametrize("shown", [True, False])
def test_the_reload_shows_no_progress_bar_and_leaves_the_setting(shown, tmp_path, capfd):
    from transformers.utils import logging as transformers_logging

    quantizer, model = quantized_llama()
    (transformers_logging.enable_progress_bar if shown else transformers_logging.disable_progress_bar)()
    try:
        folder = quantizer.export(model, tmp_path / "out")
        assert "Loading weights" not in capfd.readouterr().err
        assert transformers_logging.is_progress_bar_enabled() is shown
        load_quantized(folder)
        assert ("Loading weights" in capfd.readouterr().err) is shown
    finally:
        transformers_logging.enable_progress_bar()


@pytest.mark.parametrize("when", ["export", "quantize"])
def test_a_model_changed_by_hand_is_not_exported_as_what_it_is_not(when, tmp_path):
    def change(model):
        model.model.norm.variance_epsilon = 1.0  # which its configuration does not say

    if when == "export":
        quantizer, model = quantized_llama()
        change(model)
        with pytest.raises(ExportError, match="computes something else than the model: an output differs by"):
            quantizer.export(model, tmp_path / "out")
    else:
        model = tiny_llama(num_hidden_layers=1)
        change(model)
        with pytest.raises(ExportError, match="computes something else"):
            QuantizeModule(SMALL).quantize(model, list(IDS), export_dir=tmp_path / "out")
        assert type(model.model.layers[0].mlp.up_proj) is nn.Linear  # float again
    assert not any(tmp_path.iterdir())


def test_a_change_that_the_export_does_not_say_is_found_without_calibration_too(rtn, tmp_path):
    model = rtn(tiny_gpt2(), QuantizeConfig(group_size=16))
    export_model(model, tmp_path / "out", QuantizeConfig(group_size=16))
    model.transformer.ln_f.eps = 10.0
    with pytest.raises(ExportError, match="computes something else"):
        export_model(model, tmp_path / "other", QuantizeConfig(group_size=16))


def test_a_model_that_computes_something_else_every_time_is_exported_with_a_warning(tmp_path, caplog):
    quantizer, model = quantized_llama()
    model.model.norm.register_forward_hook(lambda m, a, y: y + torch.randn_like(y))
    quantizer.export(model, tmp_path / "out")
    assert "not compared with the model: two runs of the model gave different outputs" in caplog.text


def test_a_forward_that_changes_the_model_while_it_runs_does_not_hide_what_differs(tmp_path, caplog):
    quantizer, model = quantized_llama()
    folder = quantizer.export(model, tmp_path / "out")

    def forward(network, batch):
        handle = network.lm_head.register_forward_hook(lambda m, a, y: 2 * y)
        network(batch)
        handle.remove()

    sample = Sample.of(IDS[:1], forward, torch.device("cpu"))
    assert same_outputs(model, folder, sample) == [] and "not compared" not in caplog.text
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.input_layernorm.weight"] *= 3
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ExportError, match="computes something else than the model: an output differs by"):
        same_outputs(model, folder, sample)


def test_a_sample_that_cannot_be_told_from_its_batch_is_run_with_it():
    class Own:
        def __init__(self):
            self.ids = IDS

    own = Own()
    assert Sample.of(own, None, None).batch is own
    assert Sample.of({"x": IDS, "y": torch.ones(5), "z": 3}, None, None).batch["x"].shape == (1, 100)
    assert Sample.of({"input_ids": IDS, "mask": torch.ones(5, 1, 100)}, None, None).batch["input_ids"].shape == (1, 64)
    assert Sample.of((torch.ones(4, 3), torch.ones(4)), None, None).batch[1].shape == (1,)
    assert Sample.of(IDS, None, None).batch.shape == (1, 64)
    assert Sample.of(IDS.float(), None, None).batch.shape == (1, 100)


def test_a_model_that_does_not_run_a_part_of_a_batch_is_compared_on_all_of_it():
    def forward(network, batch):
        seen.append(tuple(batch.shape))
        assert len(batch) == 5
        return network(batch)

    seen, sample = [], Sample.of(IDS, forward, torch.device("cpu"))
    (args, _), _, _ = verify_outputs._called(nn.Embedding(128, 8), sample)
    assert torch.equal(args[0], IDS) and seen == [(1, 64), (5, 100)]
    assert [one.batch.shape for one in Sample.of(IDS[:1, :9], forward, None).sizes()] == [(1, 9)] * 2


def test_a_plain_module_is_filled_anew_and_compared(tmp_path, caplog):
    torch.manual_seed(0)
    model, config = Plain(), QuantizeConfig(group_size=16, nsamples=4)
    quantizer = QuantizeModule(config)
    quantizer.quantize(model, [IDS[:4, :12] % 8])
    out = quantizer.export(model, tmp_path / "out")
    assert "not run" not in caplog.text
    with torch.no_grad():
        model.shift += 1
    with pytest.raises(ExportError, match="computes something else"):
        same_outputs(model, out, quantizer._sample)


def test_a_module_that_is_never_called_as_a_whole_is_exported_with_a_warning(tmp_path, caplog):
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 16))
    quantizer = QuantizeModule(QuantizeConfig(group_size=32, nsamples=40))
    quantizer.quantize(model, [torch.randn(40, 32)], forward=lambda m, x: m[1](m[0](x)))
    with caplog.at_level(logging.WARNING):
        quantizer.export(model, tmp_path / "out")
    assert "no calibration sample went through the model as a whole" in caplog.text


def test_a_model_in_training_mode_is_compared_without_its_dropout_and_stays_in_it(tmp_path, caplog):
    quantizer, model = quantized_llama(attention_dropout=0.5)
    model.train()
    quantizer.export(model, tmp_path / "out")
    assert "two runs" not in caplog.text and all(module.training for module in model.modules())


@pytest.mark.parametrize(
    "dtype,near,far",
    [(torch.float32, 1.0005, 1.002), (torch.bfloat16, 1.03, 1.08), (torch.float16, 1.03, 1.08)],
    ids=str,
)
def test_outputs_may_differ_by_rounding_and_by_no_more(dtype, near, far, rtn, tmp_path):
    """By 1/1000 of the largest output in 32 bits, and by 1/20 in 16."""
    config = QuantizeConfig(group_size=32)
    model = rtn(tiny_llama(num_hidden_layers=1).to(dtype), config)
    folder = export_model(model, tmp_path / "out", config)
    norm = model.model.norm.weight.data.clone()
    model.model.norm.weight.data = norm * near
    same_outputs(model, folder, None)
    model.model.norm.weight.data = norm * far
    with pytest.raises(ExportError, match="an output differs by"):
        same_outputs(model, folder, None)


def test_a_forward_that_was_put_over_the_class_s_may_round_to_16_bits(rtn, tmp_path):
    """As accelerate does, to run a model in 32 bits under autocast."""
    config = QuantizeConfig(group_size=32)
    model = rtn(tiny_llama(num_hidden_layers=1), config)
    folder = export_model(model, tmp_path / "out", config)
    model.forward = model.forward
    norm = model.model.norm.weight.data.clone()
    model.model.norm.weight.data = norm * 1.03
    same_outputs(model, folder, None)
    model.model.norm.weight.data = norm * 1.08
    with pytest.raises(ExportError, match="an output differs by"):
        same_outputs(model, folder, None)


def test_values_that_are_not_finite_in_one_of_them_differ_without_limit(rtn, tmp_path):
    config = QuantizeConfig(group_size=32)
    model = rtn(tiny_llama(num_hidden_layers=1), config)
    folder = export_model(model, tmp_path / "out", config)
    with torch.no_grad():
        model.model.norm.weight[0] = torch.inf
    with pytest.raises(ExportError, match="an output differs by inf"):
        same_outputs(model, folder, None)
