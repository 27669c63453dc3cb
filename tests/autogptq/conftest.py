"""An OPT with a tokenizer in a folder, and texts to calibrate on."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from gptq_plugin import QuantizeModule
from gptq_plugin.apps.tokenizer import train_tokenizer

from models import tiny_opt


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """128 paragraphs of Python's manual, shuffled."""
    paragraphs = {p.strip() for topic in topics.values() for p in topic.split("\n\n") if 80 < len(p) < 160}
    chosen = sorted(paragraphs)[:128]
    random.Random(0).shuffle(chosen)
    return chosen


@pytest.fixture(scope="session")
def tokenizer(texts: list[str]) -> Any:
    return train_tokenizer(texts, 512)


@pytest.fixture(scope="session")
def opt(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small OPT and its tokenizer."""
    folder = tmp_path_factory.mktemp("opt")
    tiny_opt().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def reference(opt: Path, texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What QuantizeModule exports with the options of the classic scripts."""
    folder = tmp_path_factory.mktemp("reference") / "out"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(opt), AutoTokenizer.from_pretrained(opt)
    quantizer = QuantizeModule(bits=4, group_size=128, damp_percent=0.1, desc_act=False)
    quantizer.quantize(model, texts, tokenizer=tokenizer, export_dir=folder)
    return folder


@pytest.fixture(scope="session")
def same_files() -> Callable[[Path, Path], None]:
    """same_files(one, other): asserts that two exports have the same files, all the same to the byte but for when and
    by which run they were made, and which files the export itself wrote: the tokenizer's, or not."""

    def options(file: Path) -> Any:
        content = json.loads(file.read_text(encoding="utf-8"))
        for name in ("date", "run_id", "files"):
            del content["meta"]["gptq_plugin"][name]
        return content

    def compare(one: Path, other: Path) -> None:
        names = {file.name for file in one.iterdir()}
        assert names == {file.name for file in other.iterdir()}
        assert options(one / "quantize_config.json") == options(other / "quantize_config.json")
        timed = {"README.md", "quantization_report.json", "quantize_config.json", "report.html"}
        assert {"config.json", "model.safetensors", "tokenizer.json"} <= names - timed
        for name in names - timed:
            assert (one / name).read_bytes() == (other / name).read_bytes(), name

    return compare
