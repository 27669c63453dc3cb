"""The largest inputs and outputs of layers: measured in calibration, and said where float16 does not hold them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from gptq_plugin import QuantizeModule, distributed
from gptq_plugin.errors import ExportError
from gptq_plugin.walk.ranges import Ranges, near_float16

from inventories import of_quantized

CPU = torch.device("cpu")
DOWN = "model.layers.1.mlp.down_proj"


def llama(dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "llama", hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2, vocab_size=64
    )
    return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def rows(samples: int = 24) -> list[torch.Tensor]:
    return list(torch.randint(0, 64, (samples, 16), generator=torch.Generator().manual_seed(0)))


def largest_of(model: Any, batches: list[torch.Tensor]) -> dict[str, tuple[float, float]]:
    """What the quantized layers read and return when the model simply runs."""
    found: dict[str, tuple[float, float]] = {}

    def hook(name: str) -> Any:
        def see(_: Any, args: Any, output: torch.Tensor) -> None:
            now = float(args[0].abs().max()), float(output.abs().max())
            found[name] = tuple(map(max, found.get(name, (0, 0)), now))

        return see

    handles = [m.register_forward_hook(hook(n)) for n, m in model.named_modules() if hasattr(m, "qweight")]
    with torch.no_grad():
        for batch in batches:
            model(batch[None])
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("weighting", ["all", "labels"])
def test_the_report_has_the_largest_values_at_all_positions_whichever_of_them_count(weighting: str) -> None:
    """With labels, only the last eight positions of each sample enter a Hessian."""
    batches = [{"input_ids": row[None], "labels": torch.where(torch.arange(16) < 8, -100, row)[None]} for row in rows()]
    model = llama()
    report = QuantizeModule(group_size=32, nsamples=24, token_weighting=weighting).quantize(model, batches)
    expected = largest_of(model, rows())
    assert len(expected) == 14
    for module in report.quantized:
        assert (module.max_input, module.max_output) == pytest.approx(expected[module.name], rel=1e-4)
        assert not any("float16" in deviation for deviation in module.deviations)
    assert report.to_dict()["modules"][0]["max_input"] == pytest.approx(report.modules[0].max_input)


def test_layers_near_float16s_end_are_reported(tmp_path: Path) -> None:
    """Of a model in bfloat16: the down_proj of the last block reads 40000, and its outputs are small."""
    model = llama(torch.bfloat16)
    ordinary = QuantizeModule(group_size=32).quantize(llama(torch.bfloat16), rows())
    factor = 40000 / next(m.max_input for m in ordinary.modules if m.name == DOWN)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight *= factor**0.5
        model.model.layers[1].mlp.gate_proj.weight *= factor**0.5
        model.model.layers[1].mlp.down_proj.weight *= 1e-4
    report = QuantizeModule(group_size=32).quantize(model, rows())
    said = {m.name: [d for d in m.deviations if "float16 ends" in d] for m in report.modules}
    module = next(m for m in report.modules if m.name == DOWN)
    assert said[DOWN] == [
        f"its inputs reach {module.max_input:.4g} in calibration, and float16 ends at 65504: run it in bfloat16"
    ]
    assert module.max_input > 32752 > module.max_output


def test_what_overflows_float16_is_refused_for_a_client_and_reported_without_one(tmp_path: Path) -> None:
    """The last layer's output: what follows a quantized layer's input that is infinite would be refused anyway."""
    model = llama(torch.float16)
    with torch.no_grad():
        for proj in ("up_proj", "gate_proj"):
            getattr(model.model.layers[1].mlp, proj).weight *= 100
        model.model.layers[1].mlp.down_proj.weight *= 5e5
    quantizer = QuantizeModule(group_size=32)
    report = quantizer.quantize(model, rows())
    module = next(m for m in report.modules if m.name == DOWN)
    assert module.max_output == float("inf") and "outputs reach inf" in module.deviations[-1]
    with pytest.raises(ExportError, match=rf"vllm would not take.*\n.*{DOWN}: inputs or outputs reach inf.*bfloat16"):
        quantizer.export(model, tmp_path / "out", target="vllm")
    assert not list(tmp_path.iterdir())
    assert quantizer.export(model, tmp_path / "out").is_dir()
    assert not of_quantized(model, quantizer.config).activations


def test_a_layer_that_was_not_seen_and_values_that_are_no_numbers_have_no_range() -> None:
    ranges = Ranges()
    ranges.read(["a", "b"], torch.tensor([[1.0, -3.0]]))
    ranges.read(["a"], torch.tensor([[float("nan"), 9.0]]))
    ranges.read(["a"], torch.empty(0, 2))
    linear = torch.nn.Linear(2, 2)
    with ranges.watching({"b": linear}):
        linear(torch.zeros(1, 2))
    linear(torch.full((1, 2), 1e9))
    found = ranges.over_ranks(["a", "b", "c"], CPU)
    assert found["a"] == (3.0, pytest.approx(float("nan"), nan_ok=True))
    assert found["b"] == (3.0, pytest.approx(float(linear.bias.detach().abs().max())))
    assert all(value != value for value in found["c"])


def test_values_that_are_all_nan_have_no_range_and_zeros_have_one() -> None:
    ranges = Ranges()
    ranges.read(["nan"], torch.full((2, 2), float("nan")))
    ranges.read(["zero"], torch.zeros(2, 2))
    ranges.read(["infinite"], torch.tensor([float("-inf")]))
    found = {name: largest for name, (largest, _) in ranges.over_ranks(["nan", "zero", "infinite"], CPU).items()}
    assert found["nan"] != found["nan"] and found["zero"] == 0 and found["infinite"] == float("inf")


def test_the_range_over_ranks_is_the_largest_of_any_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    def maximum_(values: torch.Tensor) -> None:
        """The other rank: 2 and 5 for the first layer, nothing of the second."""
        values.copy_(torch.maximum(values, torch.tensor([2.0, 5.0, -1.0, -1.0], device=CPU)))

    monkeypatch.setattr(distributed, "maximum_", maximum_)
    ranges = Ranges()
    ranges.read(["a", "b"], torch.tensor([3.0]))
    with torch.device("meta"):  # not where new tensors happen to be made
        found = ranges.over_ranks(["a", "b"], CPU)
    assert found == {"a": (3.0, 5.0), "b": (3.0, pytest.approx(float("nan"), nan_ok=True))}


def test_half_of_float16s_end_is_not_near_it_and_more_is() -> None:
    near = 65504 / 2
    assert near_float16(near, near) is None
    assert near_float16(near + 1, near) == (
        "its inputs reach 3.275e+04 in calibration, and float16 ends at 65504: run it in bfloat16"
    )
    assert near_float16(1e5, 2e5).startswith("its inputs reach 1e+05 and its outputs reach 2e+05 in calibration")
    assert near_float16(float("nan"), float("nan")) is None


def test_the_default_dtype_of_a_forward_changes_nothing() -> None:
    """Lightning's bf16-true sets it around the user's forward."""
    x, ends = torch.tensor([[1.0, -3.003], [2.0, 1.5]]), torch.tensor([1, 2], dtype=torch.int32)
    ranges = Ranges()
    torch.set_default_dtype(torch.bfloat16)
    try:
        ranges.read(["one"], x)
        ranges.read_experts((("a",), ("b",)), x, ends)
        found = ranges.over_ranks(["one", "a", "b", "none"], CPU)
    finally:
        torch.set_default_dtype(torch.float32)
    values = {name: largest for name, (largest, _) in found.items()}
    assert values["one"] == values["a"] == pytest.approx(3.003, rel=1e-6) and values["b"] == 2
    assert math.isnan(values["none"])
