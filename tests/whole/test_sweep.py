"""scripts/sweep, which docs/architectures.md comes from: it runs, and it tells what is broken."""

from __future__ import annotations

import sys

import pytest
import torch

from gptq_plugin import load_quantized
from gptq_plugin.layers.qlinear import QuantLinear

from paths import REPOSITORY


@pytest.fixture(scope="module", autouse=True)
def scripts():
    """scripts/sweep, whose files import each other by name, on the path."""
    folder = str(REPOSITORY / "scripts" / "sweep")
    sys.path.insert(0, folder)
    yield
    sys.path.remove(folder)


@pytest.mark.parametrize(
    "mapping, kind", [("causal-lm", "mixtral"), ("image-text-to-text", "llava"), ("ctc", "wav2vec2")]
)
def test_a_type_is_walked_quantized_exported_and_reloaded(mapping, kind):
    import one

    result = one.examine(mapping, kind)
    assert result["stage"] == "ok", result.get("trace")
    assert result["quantized"] > 10
    assert 0 < result["float_share"] < 1
    assert ("with_towers" in result) == (kind == "llava")


def test_a_walk_that_changes_the_outputs_is_reported(monkeypatch):
    import one
    import running
    import table

    walk = running.walk
    monkeypatch.setattr(one, "walk", lambda *args: [torch.nextafter(t, t + 1) for t in walk(*args)])
    result = one.examine("causal-lm", "llama")
    assert (result["stage"], result["error"].partition(":")[0]) == ("walk", "Differs")
    assert "walk: Differs" in table.page([result], "the command")
    assert "| causal-lm | 1 | 1 | 1 | 0 | 0.0% |" in table.summary([result])


def test_an_export_that_loads_as_something_else_is_reported(monkeypatch):
    import one

    def load(directory):
        model = load_quantized(directory)
        layer = next(module for module in model.modules() if isinstance(module, QuantLinear))
        layer.scales *= 1.01
        return model

    monkeypatch.setattr(one, "load_quantized", load)
    result = one.examine("causal-lm", "llama")
    assert (result["stage"], result["error"].partition(":")[0]) == ("compare", "Differs")


def test_a_type_that_cannot_be_built_is_reported(monkeypatch):
    import one
    import table

    monkeypatch.setattr("building.LARGEST", 1000)
    result = one.examine("causal-lm", "llama")
    assert result["stage"] == "not built"
    assert "not tiny" in table.line(result)


def test_a_rule_for_towers_matches_them_alone():
    from one import rule_for

    rule = rule_for(["model.vision.0.fc", "model.vision.1.fc", "projector"], ["model.text.fc", "projectors.fc"])
    assert rule == r"(model\.vision|projector)(\.|$)"
