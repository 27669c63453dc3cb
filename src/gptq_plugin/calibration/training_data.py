"""A training run's calibration data: its own samples or given data, mixed with general text."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

from torch.utils.data import DataLoader

from gptq_plugin.calibration.given import rereadable
from gptq_plugin.calibration.sampling import TRAIN, VALIDATION, deal, require_single, sample_loaders
from gptq_plugin.calibration.sources import Sources
from gptq_plugin.config import QuantizeConfig
from gptq_plugin.errors import CalibrationError
from gptq_plugin.options import fields

_FRACTION = replace(fields.share(), words="a number in [0, 1) (to use only other data, give calibration=)")


class TrainingData:
    """The data selected by the training callbacks' options `calibration`, `mix` and `mix_fraction`.

    Args:
        config: nsamples, batch_size and seed are read.
        calibration: ``"train"`` (same as None) or ``"val"``, samples of the run's dataloaders, each once; a DataLoader,
            sampled likewise; or texts, token lists or batches (see `calibration.collect`), the same on every rank,
            which uses its part.
        mix: General text: a DataLoader, or texts, token lists or batches, as above.
        mix_fraction: Share of `config.nsamples` taken from `mix`, at least one sample; 0 for none.

    Raises:
        CalibrationError: `calibration` or `mix` is a single text or batch.
        ValueError: `mix_fraction` is out of range, or `config.nsamples` is too small to mix.
    """

    def __init__(
        self,
        config: QuantizeConfig,
        calibration: str | Iterable[Any] | None,
        mix: Iterable[Any] | None,
        mix_fraction: float,
    ):
        if calibration is None:
            calibration = "train"
        if isinstance(calibration, str) and calibration not in ("train", "val"):
            raise CalibrationError(
                f"calibration={calibration!r:.60} is neither 'train' nor 'val', the run's own data, and one text is no "
                "calibration set: give a list of texts, [text]"
            )
        if not isinstance(calibration, str):
            calibration = _given("calibration", calibration, config.nsamples, config.collected_batch_size)
        self.config = config
        self.calibration = calibration
        _FRACTION.check("mix_fraction", mix_fraction)
        self.nsamples_of_mix = 0 if mix is None else _part(mix_fraction, config.nsamples)
        self.mix = (
            _given("mix", mix, self.nsamples_of_mix, config.collected_batch_size)
            if mix is not None and self.nsamples_of_mix
            else None
        )

    @property
    def is_given(self) -> bool:
        """True if all data is given before training, so that nothing is sampled."""
        return not (_is_sampled(self.calibration) or _is_sampled(self.mix))

    def sources(self, train: Any, validation: Callable[[], Sequence[Any]]) -> Sources:
        """This rank's share of the data.

        Args:
            train: The run's train dataloader.
            validation: Returns its validation dataloaders, at least one.

        Raises:
            CalibrationError: `calibration` is "train", and there is not exactly one train dataloader.
        """
        general = self.nsamples_of_mix
        own = self.config.nsamples - general
        if self.calibration == "train":
            sources = sample_loaders([require_single(train)], self.config, TRAIN, nsamples=own)
        elif self.calibration == "val":
            sources = sample_loaders(validation(), self.config, VALIDATION, nsamples=own)
        elif isinstance(self.calibration, DataLoader):
            sources = sample_loaders([self.calibration], self.config, "the dataloader given", nsamples=own)
        else:
            sources = [deal(self.calibration, "the data given", nsamples=own)]
        if isinstance(self.mix, DataLoader):
            sources += sample_loaders(
                [self.mix], self.config, "the general dataloader", nsamples=general, is_general=True
            )
        elif self.mix is not None:
            sources.append(deal(self.mix, "the general text", nsamples=general, is_general=True))
        return Sources(tuple(sources))

    def rehearsal_data(self, data: Iterable[Any]) -> Iterable[Any] | None:
        """The part of the data to try before training.

        Args:
            data: The result of `sources`, or other data.

        Returns:
            All data that is given; of sampled data the first batch of every source that is not a stream; None without
            one.
        """
        if self.is_given:
            return data
        if isinstance(data, Sources):
            first = data.first_batches()
            return first if first.parts else None
        return islice(data, 1) if isinstance(data, DataLoader) else None

    def entire_data(self, data: Iterable[Any]) -> Iterable[Any] | None:
        """All data, if it may be read before training as well as after it; None if a part of it is a stream.

        Args:
            data: As for `rehearsal_data`.
        """
        if isinstance(data, Sources):
            return None if any(part.is_stream for part in data.parts) else data
        return data if isinstance(data, DataLoader) else None


def _given(name: str, data: Any, nsamples: int, batch_size: int) -> Iterable[Any]:
    try:
        return rereadable(data, nsamples, batch_size)
    except CalibrationError as error:
        raise CalibrationError(f"{name}: {error}") from error


def _is_sampled(data: Any) -> bool:
    return isinstance(data, (str, DataLoader))


def _part(fraction: float, nsamples: int) -> int:
    """Number of samples to take from `mix`: at least one, and not all."""
    if fraction and nsamples < 2:
        raise ValueError("nsamples=1 cannot be mixed: raise nsamples, or leave mix out")
    return min(max(1, round(fraction * nsamples)), nsamples - 1) if fraction else 0
