"""The report as data, as JSON and as a table; its sizes beside those of the exported files."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from reports import module, report
from safetensors.torch import load_file
from transformers import MixtralConfig, MixtralForCausalLM

from gptq_plugin import QuantizeConfig, QuantizeModule
from gptq_plugin.errors import TargetError
from gptq_plugin.report.coverage import Coverage, FloatWeight
from gptq_plugin.report.html_page import report_page
from gptq_plugin.report.module_report import ModuleReport
from gptq_plugin.report.report import ExportSize, QuantizeReport

from models import Plain, tiny_llama

HEAD = ModuleReport("head", "float", None, None, (20, 48), reason="the output embedding")


def mixture() -> Any:
    config = MixtralConfig(hidden_size=64, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
                           num_key_value_heads=1, num_local_experts=3, vocab_size=64)  # fmt: skip
    return MixtralForCausalLM(config)


@pytest.mark.parametrize(
    ("network", "options"),
    [
        (Plain, {"checkpoint_format": "gptq", "bits": 4, "group_size": 16}),
        (Plain, {"checkpoint_format": "gptq", "group_size": 24, "desc_act": True, "static_groups": False}),
        (Plain, {"checkpoint_format": "gptq", "dynamic": {"inner.0": {"bits": 8, "group_size": 16}}}),
        (Plain, {"checkpoint_format": "gptq_v2", "bits": 2, "sym": False}),
        (Plain, {"checkpoint_format": "compressed-tensors", "bits": 4}),
        (Plain, {"checkpoint_format": "compressed-tensors", "bits": 4, "group_size": 16, "sym": False}),
        (tiny_llama, {"checkpoint_format": "gptq", "bits": 3, "group_size": 32}),
        (mixture, {"checkpoint_format": "compressed-tensors", "bits": 3, "group_size": 32}),
    ],
)
def test_sizes_are_those_of_codes_scales_and_zeros_in_the_exported_files(
    network: Any, options: dict[str, Any], tmp_path: Path
) -> None:
    quantizer = QuantizeModule(**{"group_size": -1, **options})
    model = network()
    planned = quantizer.coverage(model)
    result = quantizer.round_to_nearest(model)
    stored = load_file(quantizer.export(model, tmp_path) / "model.safetensors")
    scales = {name: tensor for name, tensor in stored.items() if name.endswith((".scales", ".weight_scale"))}
    layers = {name.rpartition(".")[0] for name in scales}
    packed = floats = 0
    for name, tensor in stored.items():
        layer, _, suffix = name.rpartition(".")
        if layer in layers and suffix != "bias":
            packed += tensor.nbytes if suffix not in ("g_idx", "weight_shape") else 0
        else:
            floats += tensor.nbytes
    assert result.stored_bytes == planned.packed == packed and len(layers) == len(result.quantized)
    assert sum(one.bytes for one in planned.floats) == floats - sum(buffer.nbytes for buffer in buffers(model))
    average = f"{8 * packed / result.weights:.2f} bits per weight (scales and zeros included, g_idx not)"
    for text in (result.table(), report_page(result, "model"), (tmp_path / "README.md").read_text()):
        assert average in text


def buffers(model: torch.nn.Module) -> list[torch.Tensor]:
    """Those of float modules that are saved."""
    return [model.shift] if isinstance(model, Plain) else []


@pytest.mark.parametrize(("options", "bits"), [({}, 4 + 20 / 16), ({"checkpoint_format": "compressed-tensors"}, 5)])
def test_bits_per_weight_do_not_depend_on_the_layers_shapes(options: dict[str, Any], bits: float) -> None:
    for shape in ((32, 64), (96, 16)):
        network = torch.nn.Sequential(torch.nn.Linear(*shape))
        result = QuantizeModule(group_size=16, **options).round_to_nearest(network)
        assert result.bits_per_weight == bits


def test_float_modules_take_no_bytes_of_the_quantized_layers() -> None:
    network = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.Linear(32, 64))
    result = QuantizeModule(group_size=32, modules_to_not_convert=("1",)).round_to_nearest(network)
    quantized, head = result.modules
    assert head.method == "float" and head.stored_bytes == 0
    assert (result.weights, result.stored_bytes) == (quantized.weights, quantized.stored_bytes) != (0, 0)
    nothing = QuantizeReport(QuantizeConfig(), [HEAD])
    assert nothing.weights == nothing.stored_bytes == 0 and math.isnan(nothing.bits_per_weight)
    assert "bits per weight" not in nothing.table()


def test_totals_add_up_the_losses_that_are_known() -> None:
    nearest = ModuleReport("c", "rtn", 3, 16, (20, 48), deviations=("no token reached it",))
    whole = report(module("a", 0.02, 0.05), module("b", 0.04, 0.06), nearest, HEAD, deviations=["late"])
    whole.seconds = {"solve": 1.5, "export": 0.5}
    assert whole.totals() == {
        "modules": 3,
        "modules_float": 1,
        "modules_rtn": 1,
        "weights": 3 * 960,
        "samples": 40,
        "tokens": 640,
        "loss": pytest.approx(0.06),
        "rtn_loss": pytest.approx(0.11),
        "deviations": 2,
        "seconds": 2.0,
    }
    whole.seconds["total"] = 2.5
    assert whole.totals()["seconds"] == 2.5


def test_the_json_is_standard_and_holds_every_field() -> None:
    whole = report(module("a"), HEAD, metrics={"loss": {"float": math.nan, "gptq": math.inf}}, run_id="run7")
    whole.coverage = Coverage([FloatWeight("head.weight", (20, 48), 1920, "the output embedding")], 1920, 400)
    values = json.loads(whole.to_json(), parse_constant=pytest.fail)
    assert values["metrics"] == {"loss": {"float": None, "gptq": None}}
    assert values["config"] == json.loads(json.dumps(whole.config.to_dict())) and values["run_id"] == "run7"
    first, head = values["modules"]
    assert (first["name"], first["bits"], first["shape"], first["loss"]) == ("a", 3, [20, 48], 0.02)
    assert (head["method"], head["bits"], head["loss"]) == ("float", None, None)
    assert first["max_input"] is None and values["totals"] == whole.totals()
    assert values["coverage"]["floats"][0]["name"] == "head.weight"
    assert json.loads(report().to_json())["coverage"] is None


def test_the_table_has_a_line_for_each_module_then_totals_coverage_and_deviations() -> None:
    whole = report(
        module("a", 0.02, 0.05, stored_bytes=500, output_power=0.8, deviations=("damping raised",)),
        HEAD,
        deviations=["a sample dropped"],
    )
    whole.seconds = {"solve": 1.25}
    whole.coverage = Coverage([FloatWeight("head.weight", (20, 48), 1920, "the output embedding")], 1920, 500)
    head, first, last, totals, coverage, *deviations = whole.table().splitlines()
    assert (
        " ".join(head.split())
        == "module method bits group out x in relative error loss RTN loss loss/RTN tokens damp s"
    )
    assert " ".join(first.split()) == "a gptq 3 16 20 x 48 2.5 % 0.02 0.05 0.4 640 0.01 0.25"
    assert " ".join(last.split()) == "head float 20 x 48 the output embedding"
    assert totals == (
        "1 modules quantized, 1 left float; 500 B, 4.17 bits per weight (scales and zeros included, g_idx not); "
        "40 samples, 640 tokens; loss 0.02, 0.400 of round-to-nearest's; solve 1.2 s"
    )
    assert coverage == whole.coverage.summary()
    assert deviations == ["! a sample dropped", "! a: damping raised"]


def test_figures_that_are_unknown_are_blank_in_the_table() -> None:
    line = report(ModuleReport("never.calibrated", "rtn", 3, 16, (20, 48))).table().splitlines()[1]
    assert " ".join(line.split()) == "never.calibrated rtn 3 16 20 x 48 0 0.00"


def test_deviations_of_many_layers_are_one_line_of_the_table() -> None:
    alike = report(*(module(f"layers.{n}.up", deviations=("damping raised",)) for n in range(9)))
    assert alike.table().splitlines()[-1] == (
        "! 9 layers (layers.0.up, layers.1.up, layers.2.up, layers.3.up and 5 more): damping raised"
    )
    assert len(list(alike.all_deviations())) == alike.totals()["deviations"] == 9
    assert alike.deviation_lines() == [one.line for one in alike.grouped_deviations()]


def test_a_relative_error_is_the_loss_as_a_share_of_the_outputs_power() -> None:
    one = module("a", 0.02, 0.05, output_power=0.5)
    assert (one.relative_error, one.rtn_relative_error) == (0.04, 0.1)
    for unknown in (module("a"), module("a", output_power=0.0)):
        assert math.isnan(unknown.relative_error) and math.isnan(unknown.rtn_relative_error)
    values = json.loads(report(one, HEAD).to_json())["modules"]
    assert [value["relative_error"] for value in values] == [0.04, None]


def test_the_float_share_is_of_the_export_or_else_of_the_plan() -> None:
    whole = report(module("a", stored_bytes=300))
    assert math.isnan(whole.float_share) and json.loads(whole.to_json())["size"] is None
    whole.coverage = Coverage([FloatWeight("head.weight", (1,), 100, "embeddings")], 1200, 300)
    assert whole.float_share == 0.25
    whole.size = ExportSize(bytes=1000, float_bytes=500)  # 200 are g_idx and headers
    assert whole.float_share == 0.625
    assert json.loads(whole.to_json())["size"] == {"bytes": 1000, "float_bytes": 500}


def test_the_largest_activation_is_that_of_the_side_that_is_known() -> None:
    assert module("a", max_input=3.0, max_output=5.0).largest == 5.0
    assert module("a", max_input=3.0).largest == 3.0
    assert math.isnan(module("a").largest)


def test_a_model_without_layers_to_quantize_has_no_report() -> None:
    quantizer = QuantizeModule()
    with pytest.raises(TargetError):
        quantizer.round_to_nearest(torch.nn.Sequential(torch.nn.ReLU()))
