"""What stays float, how much of the model and of the export that is, and why."""

from __future__ import annotations

import json
import logging

import pytest
import torch
from torch import nn

from gptq_plugin import QuantizeConfig, QuantizeModule
from gptq_plugin.model.plan import planned
from gptq_plugin.report.coverage import Coverage, FloatWeight

from models import Plain, tiny_llama


def covered(network: nn.Module, **options: object) -> Coverage:
    return QuantizeModule(**{"group_size": 16, **options}).coverage(network)


def one(size: int, name: str = "head.weight", reason: str = "embeddings") -> FloatWeight:
    return FloatWeight(name, (size,), size, reason)


@pytest.mark.parametrize("network", [Plain, tiny_llama, lambda: tiny_llama(tie_word_embeddings=True)])
def test_every_parameter_is_counted_once(network) -> None:
    model = network()
    found = covered(model)
    names = [one.name for one in found.floats]
    for each in (found, covered(model, lm_head=True)):
        assert each.float_model == sum(p.nbytes for p in model.parameters())
    assert len(set(names)) == len(names)
    assert all(tuple(model.get_parameter(one.name).shape) == one.shape for one in found.floats)
    if hasattr(model, "lm_head"):
        assert covered(model, lm_head=True).floats[0].name == "model.embed_tokens.weight"
    assert [one.bytes for one in found.floats] == sorted((one.bytes for one in found.floats), reverse=True)


def test_a_quantized_layers_bias_stays_float() -> None:
    found = covered(nn.Sequential(nn.Linear(32, 64)))
    assert [(one.name, one.shape, one.bytes) for one in found.floats] == [("0.bias", (64,), 256)]
    assert found.quantized == 4 * 32 * 64


def test_shares_are_of_the_bytes_before_and_after() -> None:
    found = Coverage([one(300), one(100, "embed")], quantized=1600, packed=400)
    assert (found.share, found.exported_share) == (0.2, 0.5)
    assert (Coverage([], 0, 0).share, Coverage([], 0, 0).exported_share) == (0.0, 0.0)


@pytest.mark.parametrize(("floats", "mostly"), [(500, False), (501, True), (900, True), (100, False)])
def test_an_export_is_mostly_float_from_more_than_half_of_its_bytes_on(floats: int, mostly: bool) -> None:
    assert Coverage([one(floats)], quantized=10**6, packed=1000 - floats).mostly_float is mostly


@pytest.mark.parametrize(("vocabulary", "level"), [(64, logging.INFO), (512, logging.WARNING)])
def test_an_export_that_will_be_mostly_float_is_warned_of_before_the_work(
    vocabulary: int, level: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Of 64 or 512 rows of 32 float32 beside a layer of 128 x 128 in 4 bits, half the export or 88 % are float."""
    network = nn.Sequential(nn.Embedding(vocabulary, 32), nn.Linear(128, 128, bias=False))
    with caplog.at_level(logging.INFO):
        found = covered(network, group_size=-1)
    (record,) = (record for record in caplog.records if "stay float" in record.message)
    assert record.levelno == level and found.exported_share < 0.9
    assert record.message == found.summary()


def test_the_summary_gives_each_reason_its_share_and_names_large_parameters() -> None:
    found = Coverage(
        [one(600, "embed.weight"), one(80, "b", "norms"), one(4, "c", "norms"), one(300, "a", "norms")], 1016, 500
    )
    assert found.summary() == (
        "49.2% of the model's 2 kB stay float, which will be 66.3% of the export: "
        "600 B, 30.0%: embeddings (embed.weight [600]); 384 B, 19.2%: norms (b [80], a [300])"
    )


def test_many_large_parameters_are_not_all_named() -> None:
    summary = Coverage([one(100, f"layers.{i}") for i in range(9)], 100, 50).summary()
    assert "layers.3 [100] and 5 more" in summary and "layers.4" not in summary


class Scaled(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) / 2


def test_every_parameter_that_stays_float_has_its_reason() -> None:
    network = nn.ModuleDict(
        {
            "target": nn.Linear(32, 32, bias=False),
            "embed": nn.Embedding(32, 8),
            "conv": nn.Conv1d(4, 4, 3, bias=False),
            "norm": nn.LayerNorm(32),
            "scaled": Scaled(32, 16, bias=False),
            "narrow": nn.Linear(3, 5, bias=False),
            "asked": nn.Linear(32, 32, bias=False),
            "pair": nn.Bilinear(4, 4, 4, bias=False),
        }
    )
    reasons = {one.name: one.reason for one in covered(network, modules_to_not_convert=("asked",)).floats}
    skipped = {
        skip.name: skip.reason
        for skip in QuantizeModule(group_size=16, modules_to_not_convert=("asked",)).check(network)[1]
    }
    assert reasons == {
        "embed.weight": "embeddings",
        "conv.weight": "convolutions",
        "norm.weight": "norms, biases and other vectors",
        "norm.bias": "norms, biases and other vectors",
        "scaled.weight": "layers of class Scaled, which does not compute what Linear does",
        "narrow.weight": skipped["narrow"],
        "asked.weight": skipped["asked"],
        "pair.weight": "parameters of Bilinear, which is not a Linear",
    }


def test_plain_values_are_ready_for_json() -> None:
    found = Coverage([one(300)], quantized=900, packed=300)
    assert json.loads(json.dumps(found.to_dict())) == {
        "share_float": 0.25,
        "share_float_of_export": 0.5,
        "quantized_bytes": 900,
        "packed_bytes": 300,
        "floats": [{"name": "head.weight", "shape": [300], "bytes": 300, "reason": "embeddings"}],
    }


def test_the_packed_bytes_are_those_given() -> None:
    network = nn.Sequential(nn.Linear(32, 32))
    with planned(network, QuantizeConfig(group_size=16)) as plan:
        assert Coverage.of(plan, 123).packed == 123
