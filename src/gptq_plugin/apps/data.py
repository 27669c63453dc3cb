"""Rows of tokens for training, validation and calibration, as a LightningDataModule.

Three functions, one for each config of the group `data`, differ only in where the documents come from.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from gptq_plugin.apps.documents import TEXT, builtin_documents, file_documents, hub_documents, texts
from gptq_plugin.apps.rows import cut_rows
from gptq_plugin.calibration.collect import Sources
from gptq_plugin.calibration.sampling import deal
from gptq_plugin.errors import DataError, some
from gptq_plugin.options import fields


class TextData(LightningDataModule):
    """Turns documents into batches ``{"input_ids": int64 [batch_size, seq_len]}``.

    Args:
        documents: Column ``text`` of texts or chats; for training and calibration.
        eval_documents: The same, for validation; None takes the last `eval_fraction` of the rows instead.
        seq_len: Tokens a row.
        batch_size: Rows a batch.
        bos: Put the tokenizer's BOS token before each document.
        shuffle: Shuffle rows in training and draw calibration rows at random; False keeps the text's order.
        seed: Seed of the shuffling.
        train_rows: Number of rows to use, the first ones; None uses all.
        eval_rows: The same for validation.
        eval_fraction: Share of the rows held out if there are no `eval_documents`.
        source: The text's name, for the report; no path.

    Attributes:
        train: int64 [rows, seq_len], after `encode`.
        validation: The same.
    """

    train: Tensor
    validation: Tensor

    def __init__(
        self,
        documents: Dataset,
        eval_documents: Dataset | None = None,
        *,
        seq_len: int = 512,
        batch_size: int = 8,
        bos: bool = True,
        shuffle: bool = True,
        seed: int = 0,
        train_rows: int | None = None,
        eval_rows: int | None = None,
        eval_fraction: float = 0.1,
        source: str = "",
    ):
        super().__init__()
        fields.integer(1).check("data.seq_len", seq_len)
        fields.integer(1).check("data.batch_size", batch_size)
        fields.integer(-(2**63), 2**63 - 1).check("data.seed", seed)
        if not 0 < eval_fraction < 1:
            raise DataError(f"eval_fraction must lie between 0 and 1, got {eval_fraction}")
        self.documents = documents
        self.eval_documents = eval_documents
        self.seq_len = seq_len
        self.batch_size = batch_size
        self.bos = bos
        self.shuffle = shuffle
        self.seed = seed
        self.train_rows = train_rows
        self.eval_rows = eval_rows
        self.eval_fraction = eval_fraction
        self.source = source

    def encode(self, tokenizer: Any) -> TextData:
        """Tokenizes the text and cuts it into rows. Call it once, before training.

        Raises:
            DataError: The text does not fill a row for training and one for validation.
        """
        rows = self._cut(self.documents, tokenizer, self.train_rows, "training text")
        if self.eval_documents is not None:
            self.train = rows
            self.validation = self._cut(self.eval_documents, tokenizer, self.eval_rows, "validation text")
            return self
        held_out = max(1, round(len(rows) * self.eval_fraction))
        if held_out >= len(rows):
            raise DataError(
                f"the text is too short to hold out some for validation: it fills {len(rows)} row of "
                f"{self.seq_len} tokens. Give more text, a smaller data.seq_len, or data.eval_path"
            )
        self.train, held = rows[:-held_out], rows[-held_out:]
        self.validation = held[: self.eval_rows]
        return self

    def calibration(self, nsamples: int) -> list[Tensor]:
        """Returns `nsamples` rows of the training text, or all if it has fewer: int64 [seq_len] each."""
        order = torch.arange(len(self.train), device="cpu")
        if self.shuffle:
            order = torch.randperm(
                len(self.train), generator=torch.Generator("cpu").manual_seed(self.seed), device="cpu"
            )
        return [self.train[index] for index in order[:nsamples]]

    def calibration_source(self, nsamples: int) -> Sources:
        """`calibration`, with its origin for the report."""
        origin = f"{len(self.train)} rows of {self.source or 'the training text'}"
        return Sources((deal(self.calibration(nsamples), origin, nsamples=nsamples),))

    def train_dataloader(self) -> DataLoader:
        """Batches of the training rows."""
        generator = torch.Generator().manual_seed(self.seed)
        return DataLoader(_Rows(self.train, self.source), self.batch_size, shuffle=self.shuffle, generator=generator)

    def val_dataloader(self) -> DataLoader:
        """Batches of the validation rows, in order."""
        return DataLoader(_Rows(self.validation, self.source), self.batch_size)

    def _cut(self, documents: Dataset, tokenizer: Any, limit: int | None, purpose: str) -> Tensor:
        return cut_rows(
            texts(documents, tokenizer), tokenizer, self.seq_len, bos=self.bos, limit=limit, purpose=purpose
        )


class _Rows(TorchDataset):
    def __init__(self, rows: Tensor, name: str):
        self.rows = rows
        self.name = name  # read by `calibration.dataset_name`

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.rows[index]}


def builtin(**options: Any) -> TextData:
    """Python's reference manual; see `documents.builtin_documents`. `options` are TextData's."""
    return TextData(builtin_documents(), source="Python's reference manual", **options)


def text(
    path: str | Sequence[str] | None,
    eval_path: str | Sequence[str] | None = None,
    column: str = TEXT,
    **options: Any,
) -> TextData:
    """Text from files; see `documents.file_documents`. `options` are TextData's."""
    if path is None:
        raise DataError("data=text needs data.path=FILES: a file, a folder, a pattern, or a list of these")
    documents = file_documents(path, column)
    held_out = None if eval_path is None else file_documents(eval_path, column)
    paths = [path] if isinstance(path, str) else path
    return TextData(documents, held_out, source=some(Path(one).name for one in paths), **options)


def hub(
    path: str,
    name: str | None = None,
    split: str = "train",
    eval_split: str | None = "validation",
    column: str = TEXT,
    **options: Any,
) -> TextData:
    """A data set of the hub, or a folder; see `documents.hub_documents`. `options` are TextData's."""
    documents = hub_documents(path, name, split, column)
    held_out = None if eval_split is None else hub_documents(path, name, eval_split, column)
    what = [Path(path).name if os.path.exists(path) else path, name, split]
    return TextData(documents, held_out, source=" ".join(filter(None, what)), **options)
