"""What the options calibration, mix and mix_fraction select."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

from gptq_plugin import QuantizeConfig
from gptq_plugin.calibration.sources import Source, Sources
from gptq_plugin.calibration.training_data import TrainingData
from gptq_plugin.errors import CalibrationError

CONFIG = QuantizeConfig(nsamples=8, batch_size=4)
TEXTS = [f"text {n}" for n in range(20)]


def data_of(calibration=None, mix=None, fraction=0.25, **options):
    return TrainingData(QuantizeConfig(**{**CONFIG.to_dict(), **options}), calibration, mix, fraction)


def train():
    return DataLoader(list(range(100, 140)), batch_size=5)


def validation():
    return [DataLoader(list(range(200, 206)), batch_size=5), DataLoader(list(range(300, 306)), batch_size=5)]


def values(source):
    return [int(value) for batch in source.data for value in batch]


def selected(data):
    return data.sources(train(), validation).parts


@pytest.mark.parametrize("calibration", [None, "train"])
def test_by_default_the_train_dataloader_is_sampled(calibration):
    (source,) = selected(data_of(calibration))
    assert len(set(values(source))) == 8 and all(100 <= value < 140 for value in values(source))
    assert source.name == "the train dataloader's 40 (seed 0)" and not source.is_general


def test_val_samples_all_validation_dataloaders_as_one_population():
    sources = selected(data_of("val", nsamples=12))
    assert sorted(value for source in sources for value in values(source)) == [*range(200, 206), *range(300, 306)]
    assert {source.name for source in sources} == {"the validation dataloader's 12 (seed 0)"}


def test_a_dataloader_given_is_sampled():
    (source,) = selected(data_of(DataLoader(list(range(400, 440)))))
    assert all(value >= 400 for value in values(source)) and source.nsamples == 8
    assert source.name.startswith("the dataloader given's 40")


def test_data_given_is_used_from_its_start():
    (source,) = selected(data_of(TEXTS))
    assert list(source.data) == TEXTS and (source.name, source.nsamples) == ("the data given", 8)


def test_an_iterator_given_is_kept_for_a_second_reading():
    data = data_of(iter(TEXTS), mix=iter(TEXTS), fraction=0.5)
    for _ in range(2):
        own, general = selected(data)
        assert list(own.data)[:8] == TEXTS[:8] and list(general.data)[:4] == TEXTS[:4]


@pytest.mark.parametrize(("fraction", "general"), [(0.25, 2), (0.01, 1), (0.99, 7), (0.4375, 4)])
def test_a_fraction_of_the_samples_is_general_at_least_one_and_not_all(fraction, general):
    own, other = selected(data_of(mix=TEXTS, fraction=fraction))
    assert (own.nsamples, other.nsamples) == (8 - general, general) and len(values(own)) == 8 - general
    assert other.is_general and other.name == "the general text"


def test_a_dataloader_of_general_text_is_sampled_too():
    _, general = selected(data_of(TEXTS, mix=DataLoader(list(range(500, 540))), fraction=0.5))
    assert general.is_general and len(set(values(general))) == 4 and min(values(general)) >= 500


def test_a_fraction_of_zero_takes_no_general_text():
    data = data_of(mix=TEXTS, fraction=0)
    assert len(selected(data)) == 1 and data.mix is None and data.nsamples_of_mix == 0


@pytest.mark.parametrize("loader", [None, [train(), train()], {"a": train()}])
def test_training_without_a_single_train_dataloader_needs_other_data(loader):
    with pytest.raises(CalibrationError, match="calibration=..., the texts or batches to use"):
        data_of().sources(loader, validation)
    assert data_of(TEXTS).sources(loader, validation).parts


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"fraction": 1}, ValueError, r"mix_fraction must be a number in \[0, 1\).*give calibration="),
        ({"fraction": -0.1}, ValueError, "mix_fraction"),
        ({"fraction": True}, ValueError, "mix_fraction"),
        ({"fraction": "0.5"}, ValueError, "mix_fraction"),
        ({"nsamples": 1}, ValueError, "nsamples=1 cannot be mixed"),
        ({"mix": "a text"}, CalibrationError, "give a list of texts"),
        ({"mix": {"input_ids": [1]}}, CalibrationError, "give a list of batches"),
        ({"calibration": "a text"}, CalibrationError, "give a list of texts"),
    ],
)
def test_options_that_select_nothing_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        data_of(**{"mix": TEXTS, **options})


@pytest.mark.parametrize(
    ("calibration", "mix", "given"),
    [
        (TEXTS, None, True),
        (TEXTS, TEXTS, True),
        (None, None, False),
        ("val", TEXTS, False),
        (TEXTS, DataLoader(TEXTS), False),
        (DataLoader(TEXTS), None, False),
    ],
)
def test_data_is_given_if_no_part_is_sampled(calibration, mix, given):
    assert data_of(calibration, mix).is_given is given


def test_all_data_that_is_given_is_tried_before_training():
    data = data_of(TEXTS, mix=TEXTS)
    sources = data.sources(None, validation)
    assert data.rehearsal_data(sources) is sources


def test_of_sampled_data_the_first_batch_of_each_source_is_tried():
    data = data_of(mix=TEXTS)
    own, general = data.rehearsal_data(data.sources(train(), validation)).parts
    assert [len(batch) for batch in own.data] == [4] and list(general.data) == TEXTS[:1]


class Stream(IterableDataset):
    def __iter__(self):
        return iter(torch.arange(30))


def test_a_stream_is_not_read_before_training():
    combined = [torch.zeros(2)]  # a combination of loaders, not a DataLoader
    data = data_of(mix=TEXTS)
    (general,) = data.rehearsal_data(data.sources(combined_loader(combined), validation)).parts
    assert general.name == "the general text"
    alone = data_of()
    assert alone.rehearsal_data(alone.sources(combined_loader(combined), validation)) is None
    (restarted,) = alone.rehearsal_data(alone.sources(DataLoader(Stream(), batch_size=3), validation)).parts
    assert [len(batch) for batch in restarted.data] == [3]


def combined_loader(batches):
    class Combined:
        def __iter__(self):
            raise AssertionError("read ahead of training")

    return Combined()


def test_other_data_is_tried_if_it_is_a_dataloader():
    data = data_of()
    assert list(data.rehearsal_data(DataLoader(list(range(8)), batch_size=3)))[0].tolist() == [0, 1, 2]
    assert len(list(data.rehearsal_data(DataLoader(list(range(8)), batch_size=3)))) == 1
    assert data.rehearsal_data(iter(TEXTS)) is None
    assert data.rehearsal_data(Sources((Source(TEXTS, "stream", 3, is_stream=True),))) is None
