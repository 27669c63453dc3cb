"""What is refused for a client before the work begins, and when an export is finished."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from gptq_plugin import QuantizeConfig, QuantizeModule
from gptq_plugin.checkpoint.checkpoint import Checkpoint
from gptq_plugin.clients.client import CLIENTS, Client
from gptq_plugin.clients.inventory import Inventory
from gptq_plugin.clients.rules import problems, refuse
from gptq_plugin.errors import ExportError
from gptq_plugin.export.export import Export, export_model
from gptq_plugin.model.plan import planned
from gptq_plugin.model.structure import Structure
from gptq_plugin.quantize.options import PassOptions
from gptq_plugin.training.escalation import Ranking, steps

from inventories import CT, RANGES, half_llama, inventory


@pytest.fixture
def llama() -> Any:
    return half_llama()


@pytest.mark.parametrize("client", CLIENTS)
@pytest.mark.parametrize("checkpoint_format", ["gptq", "gptq_v2", CT])
def test_symmetric_4_bits_in_groups_of_128_are_taken_by_every_client(client: str, checkpoint_format: str) -> None:
    found = problems(inventory(checkpoint_format=checkpoint_format), Client(client))
    assert not found or (client, checkpoint_format) == ("gptqmodel", CT)


@pytest.mark.parametrize("client", CLIENTS)
def test_values_that_float16_cannot_hold_are_refused_by_every_client(client: str) -> None:
    found = problems(inventory(activations=RANGES), Client(client))
    words = ("v_proj: inputs", "reach 6.6e+04", "bfloat16")
    assert any(all(word in sentence for word in words) for sentence in found), found
    assert not problems(inventory(activations=RANGES, dtype=torch.bfloat16), Client(client))


def test_without_a_target_nothing_is_refused_and_with_one_all_reasons_are_given() -> None:
    refuse(inventory(bits=3, group_size=16), None)
    with pytest.raises(
        ExportError, match=r"(?s)^target: vllm would not take this checkpoint:\n  .*4 and 8 bits.*\n  .*not 16"
    ):
        refuse(inventory(bits=3, group_size=16), Client("vllm"))


def test_a_module_that_is_no_transformers_model_is_for_no_client() -> None:
    for client in CLIENTS:
        (only,) = problems(inventory(model_type=None), Client(client))
        assert "load_quantized" in only


def test_an_export_for_a_client_that_would_not_take_it_is_refused_with_all_reasons(
    rtn: Callable[..., Any], tmp_path: Path
) -> None:
    config = QuantizeConfig(bits=3, group_size=16)
    quantized = rtn(half_llama(torch.float32), config)
    with pytest.raises(ExportError) as refused:
        export_model(quantized, tmp_path / "out", config, target="vllm")
    for reason in ("vllm would not take", "4 and 8 bits only", "not 16"):
        assert reason in str(refused.value)
    assert not list(tmp_path.iterdir())
    assert export_model(quantized, tmp_path / "out", config, target="gptqmodel").is_dir()


def test_an_export_is_judged_again_by_the_layers_it_has(llama: Any, rtn: Callable[..., Any], tmp_path: Path) -> None:
    """Groups that the plan called contiguous and that are not."""
    config = QuantizeConfig(group_size=32)
    with Export(Structure.of(llama), tmp_path / "out", config, target=Client("vllm")) as export:
        quantized = rtn(llama, config, permuted=True)
        for name, module in quantized.named_modules():
            if hasattr(module, "qweight"):
                export.add(name, module)
        with pytest.raises(ExportError, match="not contiguous"):
            export.finish(quantized)
    assert not list(tmp_path.iterdir())


def test_a_quantization_for_such_a_client_does_not_begin(llama: Any, tmp_path: Path) -> None:
    def batches() -> Iterator[Any]:
        raise AssertionError("no batch was to be asked for")
        yield

    quantizer = QuantizeModule(sym=False, group_size=32)
    for export_dir in (None, tmp_path / "out"):
        with pytest.raises(ExportError, match="sym=True only"):
            quantizer.quantize(llama, batches(), export_dir=export_dir, target={"client": "vllm"})
    assert not list(tmp_path.iterdir())
    assert isinstance(llama.model.layers[0].mlp.up_proj, torch.nn.Linear)


def test_a_model_is_quantized_and_exported_for_a_client_that_takes_it(llama: Any, tmp_path: Path) -> None:
    quantizer = QuantizeModule(group_size=32, nsamples=2)
    quantizer.quantize(llama, [list(range(40)), list(range(50))], export_dir=tmp_path / "out", target="vllm")
    assert not problems(Inventory.of(Checkpoint.open(tmp_path / "out")), Client("vllm"))


def test_lightning_s_callback_refuses_before_training(tmp_path: Path) -> None:
    import lightning.pytorch as pl

    from gptq_plugin import GPTQCallback

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = half_llama(torch.bfloat16)

        def training_step(self, batch: Any, _: int) -> Any:
            raise AssertionError("training was not to begin")

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    rows = [torch.arange(8) for _ in range(4)]
    callback = GPTQCallback(QuantizeModule(sym=False, group_size=32), tmp_path / "out", target="vllm")
    trainer = pl.Trainer(
        accelerator="cpu", callbacks=[callback], logger=False, enable_checkpointing=False, max_steps=1, barebones=False
    )
    with pytest.raises(ExportError, match="sym=True only"):
        trainer.fit(Module(), torch.utils.data.DataLoader(rows, batch_size=2))
    assert not (tmp_path / "out").exists()


def test_transformers_trainer_s_callback_refuses_before_training(tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    from gptq_plugin import GPTQTrainerCallback

    rows = [{"input_ids": list(range(8)), "labels": list(range(8))} for _ in range(4)]
    arguments = TrainingArguments(tmp_path / "run", max_steps=1, report_to=[], use_cpu=True, save_strategy="no")
    callback = GPTQTrainerCallback(QuantizeModule(group_size=16), tmp_path / "out", target="vllm")
    trainer = Trainer(half_llama(torch.float32), arguments, train_dataset=rows, callbacks=[callback])
    with pytest.raises(ExportError, match="not 16"):
        trainer.train()
    assert trainer.state.global_step == 0
    assert not (tmp_path / "out").exists()


def test_escalation_tries_only_what_the_client_takes(llama: Any) -> None:
    from gptq_plugin.training.attempts import Attempts, Quality
    from gptq_plugin.training.quality_gate import QualityGate

    config = QuantizeConfig(group_size=-1)
    with planned(llama, config) as plan:
        noise = {layer.name: float(i) for i, layer in enumerate(Inventory.of_plan(plan).layers)}

    def tried(target: Client | None) -> list[str]:
        nothing: Any = None
        attempts = Attempts(llama, nothing, PassOptions(), Quality(QualityGate({}, "escalate")), target=target)
        return [step.what for step in steps(plan, noise, lambda: Ranking(noise)) if attempts._is_allowed(step)]

    assert any("more bits" in what for what in tried(None))
    for_transformers = tried(Client("transformers"))
    assert for_transformers
    mixed = [what for what in for_transformers if "more bits for" in what and "for 14 of 14" not in what]
    assert not mixed
    for_vllm = tried(Client("vllm"))
    assert for_vllm and set(for_vllm) <= set(tried(None))
