"""Where calibration samples come from, in a few words without a path."""

from __future__ import annotations

from typing import Any

import datasets
import pytest
import torch
from torch.utils.data import ConcatDataset, DataLoader, Dataset, IterableDataset, Subset, TensorDataset

from gptq_plugin import QuantizeConfig
from gptq_plugin.calibration.collect import collect
from gptq_plugin.calibration.dataset_name import dataset_name
from gptq_plugin.calibration.sampling import TRAIN, VALIDATION, sample_loaders


class Alpaca(Dataset):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": torch.arange(4) + index}


class Named(Alpaca):
    name = "my\n texts"


class Stream(IterableDataset):
    def __iter__(self) -> Any:
        return iter(Alpaca())


def of_the_hub(**info: Any) -> datasets.Dataset:
    made = datasets.Dataset.from_dict({"text": ["a", "b"]}, split=datasets.Split.TRAIN)
    for key, value in info.items():
        setattr(made.info, key, value)
    return made


HUB = {"hf://datasets/Salesforce/wikitext@b08601e/wikitext-2-raw-v1/train.parquet": {}}


@pytest.mark.parametrize(
    ("dataset", "name"),
    [
        (Alpaca(), "Alpaca"),
        (Subset(Subset(Alpaca(), [1, 2]), [0]), "Alpaca"),
        (Named(), "my texts"),
        (Stream(), "Stream"),
        ([1, 2, 3], ""),
        (None, ""),
        (TensorDataset(torch.zeros(3)), ""),
        (ConcatDataset([Alpaca(), Alpaca()]), ""),
        (of_the_hub(), ""),
        (of_the_hub(builder_name="json", dataset_name="json", config_name="default"), "json files"),
        (of_the_hub(builder_name="parquet", dataset_name="wikitext", config_name="default"), "wikitext train"),
        (
            of_the_hub(dataset_name="wikitext", config_name="wikitext-2-raw-v1", download_checksums=HUB),
            "Salesforce/wikitext wikitext-2-raw-v1 train",
        ),
    ],
)
def test_a_dataset_has_the_hubs_name_its_own_or_its_class(dataset: Any, name: str) -> None:
    assert dataset_name(dataset) == name


def test_a_dataset_read_from_files_names_no_path(tmp_path: Any) -> None:
    (tmp_path / "secret.jsonl").write_text('{"text": "a"}\n')
    read = datasets.load_dataset("json", data_files=str(tmp_path / "secret.jsonl"), split="train", cache_dir=tmp_path)
    assert dataset_name(read) == dataset_name(read.map(lambda row: {"b": 1})) == "json files"


def test_data_given_by_itself_is_named_if_it_has_a_name() -> None:
    config = QuantizeConfig(nsamples=8, batch_size=2)
    assert collect(DataLoader(Alpaca(), batch_size=4), config).sources == {"Alpaca": 8}
    assert collect(Named(), config, nsamples=3).sources == {"my texts": 3}
    assert collect([[1, 2, 3]] * 4, config).sources == collect(iter([[1, 2]]), config).sources == {}


def test_the_report_names_the_datasets_of_the_loaders() -> None:
    def names(name: str, *loaders: Any) -> list[str]:
        config = QuantizeConfig(nsamples=4, batch_size=2)
        return [source.name for source in sample_loaders(loaders, config, name, nsamples=4)]

    alpaca, named, plain = DataLoader(Alpaca()), DataLoader(Named()), DataLoader([{"a": 1}] * 3)
    assert names(TRAIN, alpaca) == ["the train dataloader's 8 of Alpaca (seed 0)"]
    assert names(VALIDATION, alpaca, named) == ["the validation dataloader's 16 of Alpaca, my texts (seed 0)"] * 2
    assert names(TRAIN, plain) == ["the train dataloader's 3 (seed 0)"]
    assert names(TRAIN, DataLoader(Stream())) == ["the train dataloader of Stream"]
