"""Every python block of README, tutorials and how-tos, run as it stands there, and the notebook."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import lightning
import nbformat
import pytest
import torch
from nbclient import NotebookClient
from torch import nn
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM, TrainingArguments
from transformers import Trainer as HFTrainer

from gptq_plugin import QuantizeConfig, QuantizeModule, QuantLinear, load_quantized
from gptq_plugin.apps.documents import builtin_documents, texts
from gptq_plugin.apps.tokenizer import train_tokenizer

from forked_python import python
from hub_uploads import hub_for_uploads
from pages import DOCS, blocks, name, pages

_OWN_TEST = ("how-to/lightning-cli.md",)
_PAGES = [page for page in pages() if blocks(page, "python") and not name(page).endswith(_OWN_TEST)]


# --- what the pages' names stand for ------------------------------------------------------------------------


def llama(**sizes: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    usual = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 2, "num_key_value_heads": 2}
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=512, num_hidden_layers=1, bos_token_id=0, eos_token_id=1, **{**usual, **sizes})
    )


def mixture() -> Qwen3MoeForCausalLM:
    torch.manual_seed(0)
    return Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            vocab_size=512, hidden_size=64, moe_intermediate_size=32, intermediate_size=64, num_hidden_layers=1,
            num_attention_heads=2, num_key_value_heads=2, head_dim=32, num_experts=4, num_experts_per_tok=2,
        )
    )  # fmt: skip


class FineTune(lightning.LightningModule):
    def __init__(self, width: int = 128):
        super().__init__()
        self.model = llama(hidden_size=width)

    def training_step(self, batch: dict[str, torch.Tensor], index: int) -> torch.Tensor:
        return self.model(**batch).loss

    def validation_step(self, batch: dict[str, torch.Tensor], index: int) -> None:
        self.log("val_loss", self.training_step(batch, index))

    test_step = validation_step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


class PlainNet(lightning.LightningModule):
    """A network of no library, and rows without tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.net = plain_net()

    def train_dataloader(self) -> DataLoader:
        return DataLoader(torch.randn(160, 64), batch_size=16)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return self.net(rows)

    def training_step(self, rows: torch.Tensor, index: int) -> torch.Tensor:
        return self.net(rows).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-3)


def plain_net() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 32))


def rows() -> list[dict[str, torch.Tensor]]:
    ids = torch.randint(0, 512, (32, 16), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row, "labels": row} for row in ids]


class Data(lightning.LightningDataModule):
    def train_dataloader(self) -> DataLoader:
        return DataLoader(rows(), batch_size=8)

    val_dataloader = test_dataloader = train_dataloader


def library_that_trains() -> None:
    lightning.Trainer(max_epochs=1).fit(FineTune(), Data())


def arguments() -> TrainingArguments:
    return TrainingArguments("run", use_cpu=True, max_steps=1, report_to=[], save_strategy="no", disable_tqdm=True)


_NAMES: dict[str, Callable[[], Any]] = {
    "Trainer": lambda: lightning.Trainer,
    "args": arguments,
    "batches": lambda: [row["input_ids"] for row in rows()],
    "build_net": lambda: plain_net,
    "datamodule": Data,
    "dataset": rows,
    "library_that_trains": lambda: library_that_trains,
    "lightning_module": FineTune,
    "loader": lambda: DataLoader(rows(), batch_size=8),
    "model": llama,
    "moe_model": mixture,
    "path": lambda: "first/float",
    "plain_module": PlainNet,
    "texts": lambda: ["some text to calibrate on, " * 10] * 16,
}
# Where a page's names are of other things.
_OTHERS: dict[str, dict[str, Callable[[], Any]]] = {
    "docs/how-to/hf-trainer.md": {"Trainer": lambda: HFTrainer},
    "docs/how-to/choose-a-client.md": {"model": lambda: llama(hidden_size=256, intermediate_size=512)},
}
# Pages that begin with an export in ./out.
_WITH_EXPORT = ("load.md", "check.md", "convert.md", "upload.md")


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return train_tokenizer(texts(builtin_documents()), vocab_size=512)


@pytest.fixture(scope="module")
def folders(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with first/float, first/gptq (the first tutorial's) and out, an export."""
    folder = tmp_path_factory.mktemp("folders")
    model = llama()
    model.save_pretrained(folder / "first" / "float")
    tokenizer.save_pretrained(folder / "first" / "float")
    quantizer = QuantizeModule(nsamples=16)
    quantizer.quantize(model, [row["input_ids"] for row in rows()])
    quantizer.export(model, folder / "out", tokenizer=tokenizer)
    shutil.copytree(folder / "out", folder / "first" / "gptq")
    return folder


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """huggingface_hub uploads to a server in this process."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    with hub_for_uploads():
        yield


class QuickTrainer(lightning.Trainer):
    """Lightning's, on the CPU, for one epoch unless the page asks for another number, and quiet."""

    def __init__(self, **options: Any):
        quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        super().__init__(**{"max_epochs": 1, **options, **quiet, "enable_model_summary": False, "accelerator": "cpu"})


@pytest.mark.parametrize("page", _PAGES, ids=name)
def test_the_python_blocks_of_a_page_run(page, folders, tokenizer, tmp_path, monkeypatch, capsys, request):
    """In order, in one namespace; what a page says of its names ("yours") is made anew for each block."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(lightning, "Trainer", QuickTrainer)
    if page.name == "upload.md":
        request.getfixturevalue("hub")
    shutil.copytree(folders / "first", tmp_path / "first")
    if page.name in _WITH_EXPORT:
        shutil.copytree(folders / "out", tmp_path / "out")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    made = {**_NAMES, **_OTHERS.get(name(page), {}), "tokenizer": lambda: tokenizer}
    namespace: dict[str, Any] = {"__name__": "page"}
    for number, block in enumerate(blocks(page, "python")):
        if "tutorials" not in page.parts:  # those bring all they need
            namespace.update({key: make() for key, make in made.items() if re.search(rf"\b{key}\b", block)})
        code = block.replace('"cuda"', repr(device))
        exec(compile(code, f"{name(page)}, block {number}", "exec"), namespace)


def test_lightning_cli_takes_the_configuration_that_its_page_shows(tmp_path, monkeypatch, tokenizer):
    """In this process, as `python train.py fit --config gptq.yaml`."""
    page = DOCS / "how-to" / "lightning-cli.md"
    (script,), (configuration,) = blocks(page, "python"), blocks(page, "yaml")
    monkeypatch.chdir(tmp_path)
    Path("gptq.yaml").write_text(configuration)
    tokenizer.save_pretrained("tokenizer")
    quick = ["--trainer.accelerator=cpu", "--trainer.logger=false", "--trainer.enable_progress_bar=false"]
    monkeypatch.setattr(sys, "argv", ["train.py", "fit", "--config", "gptq.yaml", *quick])
    exec(compile(script, name(page), "exec"), {"__name__": "__main__", "FineTune": FineTune, "Data": Data})
    exported = QuantizeConfig.from_quantize_config(json.loads(Path("out/quantize_config.json").read_text()))
    assert (exported.bits, exported.group_size) == (4, 64)


@pytest.mark.slow
def test_a_hydra_application_of_ones_own_finds_the_groups_through_its_search_path(tmp_path):
    page = DOCS / "how-to" / "hydra-app.md"
    for language, file in (("yaml", "config.yaml"), ("python", "app.py")):
        (text,) = blocks(page, f'{language} title="{file}"')
        (tmp_path / file).write_text(text)
    done = subprocess.run(
        [python(), "app.py", "callbacks.gptq.export_dir=mine"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.stdout.split() == ["GPTQCallback", "3", "mine"], done.stderr


@pytest.mark.slow
def test_the_notebook_runs_from_its_first_cell_to_its_last(tmp_path):
    notebook = nbformat.read(DOCS / "tutorials" / "fine_tune_quantize_generate.ipynb", as_version=4)
    nbformat.validate(notebook)
    (steps,) = [cell for cell in notebook.cells if cell.source.startswith("STEPS = ")]
    steps.source = "STEPS = 20"
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    printed = "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", []))
    assert "14 modules quantized" in printed
    layers = [module for module in load_quantized(tmp_path / "out").modules() if isinstance(module, QuantLinear)]
    assert {layer.bits for layer in layers} == {4}
