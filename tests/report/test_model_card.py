"""README.md of an export: metadata the hub reads, nothing private, and instructions that work."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, BertConfig, BertForSequenceClassification

from gptq_plugin import QuantizeConfig, QuantizeModule, QuantLinear, load_quantized
from gptq_plugin.errors import ExportError
from gptq_plugin.export.export_dir import check_export_dir
from gptq_plugin.report.model_card import ModelFacts, hub_id, model_facts
from gptq_plugin.report.module_report import ModuleReport
from gptq_plugin.report.numbers import format_bytes
from gptq_plugin.report.report import QuantizeReport

from cards import card_of, report_of, section, snippet
from models import tiny_llama, tokenizer

IDS = torch.tensor([[1, 17, 5, 42, 7, 8]])


def llama(name: str | None = None) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model("llama", hidden_size=64, intermediate_size=96, num_hidden_layers=1,
                                  num_attention_heads=2, num_key_value_heads=1, vocab_size=64)  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    if name is not None:
        model.config._name_or_path = name
    return model


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(32, 48), nn.Linear(48, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.up(x).relu())


class Tokenizer:
    """Leaves a README of its own in the folder: a link to the user's."""

    def __init__(self, readme: Path) -> None:
        self.readme = readme

    def save_pretrained(self, directory: Path) -> None:
        (Path(directory) / "README.md").symlink_to(self.readme)


def quantized(model: nn.Module, batches: Any, folder: Path, **options: Any) -> Path:
    """A real export with metrics and a deviation."""
    quantizer = QuantizeModule(**{"group_size": 16, **options})
    report = quantizer.quantize(model, batches)
    report.calibration = "the run's train dataloader"
    report.metrics = {"val_loss": {"float": 2.5, "gptq": 2.55}}
    report.deviations.append(f"{folder.parent}/mine holds an earlier export: exported to out instead")
    return quantizer.export(model, folder)


def metadata(card: str) -> dict[str, Any]:
    return yaml.safe_load(card.split("---\n")[1])


# --- real exports -------------------------------------------------------------------------------------------


def test_the_card_of_a_transformers_model_is_read_by_the_hub_and_its_snippet_loads_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = llama("someone/tiny-llama")
    folder = quantized(model, [{"input_ids": IDS}] * 20, tmp_path / "out", bits=4)
    card = ModelCard.load(folder / "README.md")
    assert card.data.to_dict() == {
        "base_model": "someone/tiny-llama",
        "base_model_relation": "quantized",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["gptq", "4-bit", "quantized", "gptq_plugin"],
        "metrics": ["val_loss"],
        "model-index": [
            {
                "name": "tiny-llama, 4-bit GPTQ",
                "results": [
                    {
                        "task": {"type": "text-generation"},
                        "dataset": {"name": "validation data of the training run", "type": "unknown"},
                        "metrics": [{"type": "loss", "value": 2.55, "name": "val_loss"}],
                    }
                ],
            }
        ],
    }
    assert card.data.eval_results[0].metric_value == 2.55 and card.data.model_name == "tiny-llama, 4-bit GPTQ"
    assert "# tiny-llama, 4-bit GPTQ" in card.content
    assert "the run's train dataloader: 20 samples, 120 tokens. Their SHA-256 is `" in card.content
    files = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    assert f"The whole export is {format_bytes(files)} (" in section(card.content, "tiny-llama, 4-bit GPTQ")
    assert "| val_loss | GPTQ | 2.55 | +0.05 | +2.00 % |" in card.content
    assert "| `group_size` | `16` |" in card.content
    assert "mine holds an earlier export" in card.content and str(tmp_path) not in card.content

    monkeypatch.chdir(folder)
    names: dict[str, Any] = {}
    exec(snippet(card.content, "gptq_plugin"), names)
    with torch.no_grad():
        assert torch.equal(names["model"](input_ids=IDS).logits, model(input_ids=IDS).logits)
    assert snippet(card.content, "transformers").endswith('model = AutoModelForCausalLM.from_pretrained(".")')
    assert "pip install gptqmodel optimum" in card.content
    assert (
        snippet(card.content, "vLLM") == "vllm serve . --dtype float16 --tokenizer FOLDER_OR_ID"
    )  # trained in float32

    assert snippet(card.content, "hf").endswith("hf upload YOUR_NAME/tiny-llama-GPTQ-4bit .")

    page = (folder / "report.html").read_text()
    assert "<h1>tiny-llama, 4-bit GPTQ</h1>" in page and "model.layers.0.mlp.down_proj" in page


@pytest.mark.parametrize("with_tokenizer", [True, False])
def test_the_example_of_generation_runs_as_it_stands_in_the_folder(
    with_tokenizer: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny_llama()
    quantizer = QuantizeModule(group_size=16)
    quantizer.round_to_nearest(model)
    folder = quantizer.export(model, tmp_path / "out", tokenizer=tokenizer() if with_tokenizer else None)
    monkeypatch.chdir(folder)
    capsys.readouterr()
    exec(snippet((folder / "README.md").read_text(), "Generate"), names := {})
    assert names["ids"].shape[1] > 0 and capsys.readouterr().out.strip()
    assert ("tokenizer" in names) == with_tokenizer


def test_only_a_language_model_gets_an_example_of_generation() -> None:
    assert "generate" not in card_of(report_of((4, 128)), ModelFacts("Plain"))
    bert = ModelFacts("Bert", "AutoModelForMaskedLM", pipeline_tag="fill-mask")
    assert "generate" not in card_of(report_of((4, 128)), bert)


def test_a_plain_module_is_loaded_here_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model, x = Plain(), torch.randn(9, 7, 32)
    folder = quantized(model, [x], tmp_path / "out")
    card = (folder / "README.md").read_text()
    assert metadata(card)["library_name"] == "gptq_plugin" and "base_model" not in metadata(card)
    assert "transformers" not in card and "vllm" not in card.lower()
    monkeypatch.chdir(folder)
    names: dict[str, Any] = {"Plain": Plain}
    exec(snippet(card, "gptq_plugin"), names)
    assert isinstance(names["model"].up, QuantLinear) and torch.equal(names["model"](x), model(x))


def test_a_readme_of_somebody_else_is_not_written_to(tmp_path: Path) -> None:
    mine = tmp_path / "README.md"
    mine.write_text("my own")
    model = Plain()
    quantizer = QuantizeModule(group_size=16)
    quantizer.round_to_nearest(model)
    folder = quantizer.export(model, tmp_path / "out", tokenizer=Tokenizer(mine))
    assert mine.read_text() == "my own"
    assert (folder / "README.md").read_text().startswith("---\n") and not (folder / "README.md").is_symlink()


def test_an_export_from_before_there_were_pages_and_cards_is_replaced(tmp_path: Path) -> None:
    model = Plain()
    quantizer = QuantizeModule(group_size=16)
    quantizer.round_to_nearest(model)
    folder = quantizer.export(model, tmp_path / "out")
    listed = json.loads((folder / "quantize_config.json").read_text())
    for name in ("README.md", "report.html"):
        listed["meta"]["gptq_plugin"]["files"].remove(name)
        (folder / name).unlink()
    (folder / "quantize_config.json").write_text(json.dumps(listed))
    (folder / "README.md").write_text("written by the user since")
    with pytest.raises(ExportError, match=r"did not write \(README\.md\)"):
        check_export_dir(folder, overwrite=True)
    (folder / "README.md").unlink()
    for _ in range(2):
        quantizer.export(model, tmp_path / "out", overwrite=True)
        assert (folder / "README.md").exists() and (folder / "report.html").exists()
    load_quantized(folder, model=Plain())


@pytest.mark.parametrize("writes", ["report_page", "model_card"])
def test_a_page_or_card_that_cannot_be_made_leaves_the_earlier_export(
    writes: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Plain()
    quantizer = QuantizeModule(group_size=16)
    quantizer.round_to_nearest(model)
    folder = quantizer.export(model, tmp_path / "out")
    before = {file.name: file.read_bytes() for file in folder.iterdir()}

    def fails(*_: Any) -> str:
        raise OSError("no space left on device")

    monkeypatch.setattr(f"gptq_plugin.export.side_files.{writes}", fails)
    with pytest.raises(ExportError, match="no space left"):
        quantizer.export(model, tmp_path / "out", overwrite=True)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


# --- the base model -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["/home/me/model", "./runs/model", "../a/b", "~/models/x", "runs/last/model", "C:\\models\\x", "gpt2", None]
)
def test_what_may_be_a_path_is_no_base_model(name: str | None) -> None:
    assert hub_id(name) is None
    facts = model_facts(llama(name))
    assert facts.base_model is None
    card = card_of(report_of((4, 128)), facts)
    assert "base_model" not in metadata(card)
    assert not name or name not in card


def test_a_folder_that_looks_like_an_id_is_no_base_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert hub_id("meta-llama/Llama-3.2-1B") == "meta-llama/Llama-3.2-1B"
    (tmp_path / "runs" / "model").mkdir(parents=True)
    assert hub_id("runs/model") is None


def test_the_task_and_the_loader_come_from_transformers_own_tables() -> None:
    bert = BertForSequenceClassification(
        BertConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, vocab_size=64)
    )
    facts = model_facts(bert.to(torch.bfloat16))
    assert (facts.pipeline_tag, facts.loader) == ("text-classification", "AutoModelForSequenceClassification")
    assert facts.dtype == torch.bfloat16

    class Mine(type(llama())):  # a user's subclass is what its base is
        pass

    assert model_facts(Mine(llama().config)).name == "LlamaForCausalLM"


def test_a_model_with_code_of_its_own_is_loaded_here_only() -> None:
    from transformers.models.llama.modeling_llama import LlamaPreTrainedModel

    class Own(LlamaPreTrainedModel):
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.linear = nn.Linear(8, 8)

    facts = model_facts(Own(llama().config))
    assert (facts.name, facts.loader) == ("Own", None)
    assert "model=Own()" in snippet(card_of(report_of((4, 128)), facts), "gptq_plugin")


# --- its license --------------------------------------------------------------------------------------------


def licensed(folder: Path, head: str, **config: Any) -> tuple[dict[str, Any], str]:
    """Metadata and section of a model's card that was loaded from a folder with a card of its own."""
    folder.mkdir()
    (folder / "README.md").write_text(f"---\n{head}\n---\n# Base\n")
    model = llama(str(folder))
    model.config.update(config)
    card = card_of(report_of((4, 128)), model_facts(model))
    ModelCard(card)
    return metadata(card), section(card, "License")


def test_the_license_of_the_base_models_card_is_taken_over(tmp_path: Path) -> None:
    data, text = licensed(tmp_path / "base", "license: apache-2.0\ntags: [x]")
    assert data["license"] == "apache-2.0" and "license_name" not in data
    assert text == "`apache-2.0`, that of the base model, as its card has it."
    link = "https://ai.meta.com/llama/license"
    data, text = licensed(tmp_path / "other", f"license: other\nlicense_name: my licence 1.0\nlicense_link: {link}")
    assert (data["license"], data["license_name"], data["license_link"]) == ("other", "my licence 1.0", link)
    assert text.startswith(f"[my licence 1.0]({link}), that of the base model")


def test_a_license_of_the_configuration_counts_where_no_card_has_one(tmp_path: Path) -> None:
    assert licensed(tmp_path / "base", "tags: [x]", license="mit")[0]["license"] == "mit"
    assert licensed(tmp_path / "both", "license: apache-2.0", license="mit")[0]["license"] == "apache-2.0"


@pytest.mark.parametrize(
    "head",
    [
        "tags: [x]",
        "license: [a, b]",
        "license: '<script>'",
        "license: |\n  a\n  b",
        "license: 3",
        "license: {a: b",
        "- a",
        "",
    ],
)
def test_an_unknown_license_is_a_visible_note_and_no_metadata(head: str, tmp_path: Path) -> None:
    data, text = licensed(tmp_path / "base", head)
    assert "license" not in data and text.startswith("**Unknown**: no base model is known.")
    assert "`license:`" in text


def test_a_card_in_the_hubs_cache_is_read_and_its_file_named_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    model = llama("someone/tiny-llama")
    unknown = card_of(report_of((4, 128)), model_facts(model))
    assert "license" not in metadata(unknown)
    assert "the card of someone/tiny-llama was not on disk" in section(unknown, "License")
    snapshot = tmp_path / "models--someone--tiny-llama" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs" / "main").write_text("abc")
    (snapshot / "README.md").write_text("---\nlicense: other\nlicense_name: theirs\nlicense_link: LICENSE\n---\n")
    card = card_of(report_of((4, 128)), model_facts(model))
    link = "https://huggingface.co/someone/tiny-llama/blob/main/LICENSE"
    assert metadata(card)["license_link"] == link and f"[theirs]({link})" in section(card, "License")


# --- its results --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("metric", "kind"),
    [
        ("val_loss", "loss"),
        ("val/Accuracy_top5", "accuracy"),
        ("PPL", "perplexity"),
        ("é!", "unknown"),
        ("my score", "my_score"),
    ],
)
def test_results_are_the_quantized_models_under_the_hubs_metric_if_it_has_one(metric: str, kind: str) -> None:
    report = report_of((4, 128), metrics={metric: {"float": 1.0, "gptq": 1.5}, "nan": {"float": 1.0, "gptq": math.nan}})
    (result,) = ModelCard(card_of(report)).data.eval_results
    assert (result.metric_type, result.metric_value, result.metric_name) == (kind, 1.5, metric)
    assert result.task_type == "other"


def test_without_finite_metrics_there_are_no_results() -> None:
    for metrics in ({}, {"a": {"float": 1.0, "gptq": math.inf}}):
        assert "model-index" not in metadata(card_of(report_of((4, 128), metrics=metrics)))


# --- any text -----------------------------------------------------------------------------------------------


def test_texts_of_the_user_are_neither_markup_nor_metadata() -> None:
    hostile = "x: [y]|<b>\n---\ntags: *all* `code` __init__ # no"
    report = report_of(
        (4, 128), tokens=9, deviations=[hostile], calibration=hostile, metrics={hostile: {"float": 1.0, "é": 2.0}}
    )
    card = card_of(report, dynamic={"-:a|`b`": {}})
    assert metadata(card)["metrics"] == [" ".join(hostile.split())]
    assert ModelCard(card).data.tags == ["gptq", "4-bit", "quantized", "gptq_plugin"]
    body = card.split("---\n", 2)[2]
    shown = r"x: \[y\]\|&lt;b&gt; --- tags: \*all\* \`code\` \__init_\_ \# no"
    assert body.count(shown) == 4 and "<b>" not in body
    rows = [line for line in body.splitlines() if line.startswith("|") and "val" not in line]
    assert all(len(re.findall(r"(?<!\\)\|", row)) in (3, 6) for row in rows)


@pytest.mark.parametrize(
    "path",
    [
        "/me/secret/out",
        "~/secret/out",
        "./secret/out",
        "file:///secret/out",
        "C:\\secret\\out",
        "\\\\host\\secret\\out",
    ],
)
def test_paths_of_this_machine_are_cut_to_their_end(path: str) -> None:
    for said in (f"{path}: is taken", f"from '{path}'.", f"({path}) a/b and loss/RTN stay"):
        card = card_of(report_of((4, 128), deviations=[said], calibration=said, tokens=1))
        assert "secret" not in card and card.count("out") >= 2
        assert "a/b" not in said or "a/b and loss/RTN stay" in card


def test_figures_that_are_unknown_are_blank() -> None:
    layer = ModuleReport("a", "rtn", 4, 128, (20, 128))
    report = QuantizeReport(QuantizeConfig(), [layer], metrics={"m": {"float": float("nan"), "gptq": 1.0}})
    card = card_of(report)
    assert not re.search(r"\bnan\b", card, re.IGNORECASE)
    assert "| m | GPTQ | 1 |  |  |" in card
    assert section(card, "Calibration") == "None: the weights were rounded to nearest."
    assert section(card, "Differences from the request") == "Nothing."
