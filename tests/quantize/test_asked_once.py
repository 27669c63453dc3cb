"""The model is asked once for what it consists of, however many steps read the answer."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from gptq_plugin import QuantizeConfig, QuantizeModule
from gptq_plugin.clients.inventory import Inventory
from gptq_plugin.model import experts, stored_names, targets
from gptq_plugin.quantize.options import PassOptions
from gptq_plugin.training.attempts import Attempts, Quality
from gptq_plugin.training.quality_gate import QualityGate

SIZES: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 128, "num_experts_per_tok": 2,
}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4},
    "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 32},
}


def moe(kind: str) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SIZES, **KINDS[kind])).eval()


def batches() -> list[torch.Tensor]:
    return [torch.randint(0, 128, (4, 48), generator=torch.Generator().manual_seed(n)) for n in range(4)]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Callable[[nn.Module], Counter[str]]:
    """asked(model): how often each question was put to that model. Other models, such as the one that a written export
    is loaded into to verify it, have counts of their own."""
    counts: dict[int, Counter[str]] = {}
    models: list[Any] = []  # kept, so that no id is used twice

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def asks(first: Any, *args: Any, **kwargs: Any) -> Any:
            model = getattr(first, "structure", first)
            model = getattr(model, "model", model) if not isinstance(model, nn.Module) else model
            models.append(model)
            counts.setdefault(id(model), Counter())[function.__name__] += 1
            return function(first, *args, **kwargs)

        return asks

    ours = [module for name, module in sys.modules.items() if name.partition(".")[0] == "gptq_plugin"]
    for function in (
        targets.find_targets, experts.find_experts, experts.routers, stored_names.expert_parts,
        stored_names.stored_names,
    ):  # fmt: skip
        stand_in = counted(function)
        for module in ours:
            for name, value in list(vars(module).items()):
                if value is function:
                    monkeypatch.setattr(module, name, stand_in)
    for maker in ("of_plan", "of_layers"):
        monkeypatch.setattr(Inventory, maker, counted(getattr(Inventory, maker)))
    return lambda model: counts.get(id(model), Counter())


@pytest.mark.parametrize("kind", KINDS)
def test_one_quantize_for_a_client_with_an_export_asks_the_model_once(
    kind: str, asked: Callable[[nn.Module], Counter[str]], tmp_path: Path
) -> None:
    model = moe(kind)
    QuantizeModule(group_size=32).quantize(model, batches(), export_dir=tmp_path / "out", target="vllm")
    assert asked(model) == {
        "find_targets": 1,
        "find_experts": 1,
        "expert_parts": 1,
        "routers": 1,
        "stored_names": 1,
        "of_plan": 1,  # refuses before the work begins
        "of_layers": 1,  # the same question to the layers that came of it, before the folder appears
    }


def test_an_export_of_a_quantized_model_asks_it_once(
    asked: Callable[[nn.Module], Counter[str]], tmp_path: Path
) -> None:
    model = moe("mixtral")
    quantizer = QuantizeModule(group_size=32)
    quantizer.quantize(model, batches())
    before = Counter(asked(model))
    quantizer.export(model, tmp_path / "out", target="vllm")
    assert asked(model) - before == {
        "find_experts": 1, "expert_parts": 1, "routers": 1, "stored_names": 1, "of_layers": 1
    }  # fmt: skip


def test_an_escalation_asks_the_model_once_an_attempt_and_once_to_measure_its_layers(
    asked: Callable[[nn.Module], Counter[str]],
) -> None:
    model = moe("mixtral")
    losses = iter([9.0, 9.0, 1.0])
    quality = Quality(QualityGate({"loss": 0.1}, "escalate"), {"loss": 1.0}, lambda: {"loss": next(losses)})
    attempts = Attempts(model, batches, PassOptions(lambda network, batch: network(batch)), quality)
    quantizer = QuantizeModule(QuantizeConfig(bits=3, group_size=-1))
    report = attempts.quantize(quantizer, lambda accepted, report: None)
    assert sum("escalated" in deviation for deviation in report.deviations) == 2  # three attempts
    counts = asked(model)
    asked_for = {counts[name] for name in ("find_experts", "expert_parts", "routers", "stored_names")}
    assert max(asked_for) == 4 and min(asked_for) == 3  # what only a pass or an export asks
