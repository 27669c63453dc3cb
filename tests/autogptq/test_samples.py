"""Calibration data of old scripts: tokenized dicts, and data sets by name, through `datasets`' own cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pytest
import torch

from gptq_plugin.autogptq.samples import computing_device, longest, named_samples, positions, token_samples
from gptq_plugin.errors import DataError

from hub_caches import C4_FILES, cache_dataset
from models import tiny_gpt2, tiny_opt


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path))
    return tmp_path


class Numbers:
    """A tokenizer of texts that are numbers; joined texts have an empty line, token -1, between them."""

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [int(word) for word in text.replace("\n\n", " -1 ").split()]}


def test_every_row_of_an_example_is_a_sample_without_its_labels() -> None:
    examples = [
        {"input_ids": [5, 6, 7], "attention_mask": [0, 1, 1], "labels": [5, 6, 7], "prompt": "x"},
        {"input_ids": torch.tensor([[1, 2], [3, 4]], dtype=torch.int32)},
    ]
    first, second, third = token_samples(examples)
    assert {key: value.tolist() for key, value in first.items()} == {
        "input_ids": [5, 6, 7],
        "attention_mask": [0, 1, 1],
    }
    assert (second["input_ids"].tolist(), third["input_ids"].tolist()) == ([1, 2], [3, 4])
    assert all(sample["input_ids"].dtype == torch.int64 for sample in (first, second, third))
    assert longest([first, second, third]) == 3
    assert set(third) == {"input_ids"}


def test_texts_are_left_as_they_are() -> None:
    assert token_samples(["one", "two"]) == ["one", "two"]
    assert longest(["one text of several words", {"text": "a row"}]) == 0


def test_wikitext2_gives_windows_of_the_joined_text(cache: Path) -> None:
    rows = [" ".join(map(str, range(start, start + 10))) for start in range(0, 300, 10)]
    cache_dataset(cache, "Salesforce/wikitext", rows, config="wikitext-2-raw-v1")
    joined = Numbers()("\n\n".join(rows))["input_ids"]
    windows = named_samples("wikitext2", Numbers(), nsamples=20, seqlen=25, seed=3)
    assert len(windows) == 20
    possible = [joined[start : start + 25] for start in range(len(joined) - 24)]
    starts = [possible.index(window.tolist()) for window in windows]
    assert len(set(starts)) > 10
    again = named_samples("wikitext2", Numbers(), nsamples=20, seqlen=25, seed=3)
    assert all(map(torch.equal, windows, again))
    other = named_samples("wikitext2", Numbers(), nsamples=20, seqlen=25, seed=4)
    assert not all(map(torch.equal, windows, other))


@pytest.mark.parametrize("name", ["c4", "c4-new"])
def test_c4_gives_a_window_of_each_document_that_is_long_enough(cache: Path, name: str) -> None:
    rows = [" ".join(str(1000 * document + token) for token in range(4 * document)) for document in range(12)]
    cache_dataset(cache, "allenai/c4", rows, data_files=C4_FILES)
    windows = named_samples(name, Numbers(), nsamples=7, seqlen=20)
    assert all(torch.equal(window, torch.arange(20) + window[0]) for window in windows)
    assert sorted(int(window[0]) // 1000 for window in windows) == [5, 6, 7, 8, 9, 10, 11]
    with pytest.raises(DataError, match="'c4.*' has 7 of 8 windows of 20 tokens: give a smaller model_seqlen"):
        named_samples(name, Numbers(), nsamples=8, seqlen=20)


def test_a_text_of_just_the_length_asked_for_is_a_window_and_a_shorter_one_is_refused(cache: Path) -> None:
    cache_dataset(cache, "Salesforce/wikitext", ["1 2 3", "4"], config="wikitext-2-raw-v1")
    assert named_samples("wikitext2", Numbers(), 2, 5)[1].tolist() == [1, 2, 3, -1, 4]
    with pytest.raises(DataError, match="0 of 2 windows of 6 tokens"):
        named_samples("wikitext2", Numbers(), 2, 6)


def test_a_data_set_that_is_not_to_be_had_names_the_way_out(cache: Path) -> None:
    with pytest.raises(DataError, match=r"could not read Salesforce/wikitext: .* give dataset a list of texts"):
        named_samples("wikitext2", Numbers(), 1, 5)


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("wikitext", "'wikitext' is none of wikitext2, c4, c4-new: give one of these, or a list of texts"),
        ("ptb", "ptb needs a script, which datasets does not run any more"),
        ("ptb-new", "ptb needs a script"),
    ],
)
def test_other_names_are_refused(name: str, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        named_samples(name, Numbers(), 1, 5)


def test_a_named_data_set_needs_a_tokenizer() -> None:
    with pytest.raises(ValueError, match=r"'c4' is text: give quantize_model\(model, tokenizer\)"):
        named_samples("c4", None, 1, 5)


def test_the_model_tells_its_longest_sequence() -> None:
    assert positions(tiny_opt(max_position_embeddings=96)) == 96
    assert positions(tiny_gpt2()) == 64
    assert positions(torch.nn.Linear(2, 2)) is None


def test_a_model_on_the_cpu_is_quantized_on_the_gpu_if_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = torch.nn.Linear(2, 2)
    for available, wanted in ((True, "cuda"), (False, None)):
        monkeypatch.setattr(torch.cuda, "is_available", lambda available=available: available)
        assert computing_device(model) == wanted
        assert computing_device(torch.nn.Linear(2, 2, device="meta")) is None
