"""Calibration data as old scripts give it: examples in dicts, or the name of a data set."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gptq_plugin.errors import DataError, brief

_NAMES = ("wikitext2", "c4", "c4-new")
_KEPT = ("input_ids", "attention_mask")


def token_samples(examples: Iterable[Any]) -> list[Any]:
    """Every row of tokenized examples as a sample; examples of other kinds, such as texts and chats, unchanged.

    Args:
        examples: Dicts with ``input_ids`` and perhaps ``attention_mask``, each a list or tensor, [tokens] or
            [rows, tokens]. Other keys, such as ``labels``, are left out, as AutoGPTQ does.

    Returns:
        {"input_ids": int64 [tokens], "attention_mask": int64 [tokens]} for each row.
    """
    samples: list[Any] = []
    for example in examples:
        if not isinstance(example, Mapping) or "input_ids" not in example:
            samples.append(example)
            continue
        tensors = {key: _whole_numbers(example[key]) for key in _KEPT if example.get(key) is not None}
        rows = {key: tensor.reshape(-1, tensor.shape[-1]) for key, tensor in tensors.items()}
        samples += [dict(zip(rows, row, strict=True)) for row in zip(*rows.values(), strict=True)]
    return samples


def longest(samples: Iterable[Any]) -> int:
    """Tokens of the longest sample among those that are tokenized; 0 without any."""
    tokenized = (sample for sample in samples if isinstance(sample, Mapping) and "input_ids" in sample)
    return max((len(sample["input_ids"]) for sample in tokenized), default=0)


def named_samples(name: str, tokenizer: Any, nsamples: int, seqlen: int, seed: int = 0) -> list[Tensor]:
    """Windows drawn at random from one of the data sets of the GPTQ paper, loaded through `datasets`.

    Args:
        name: ``"wikitext2"`` (the joined text of its training split), ``"c4"`` or ``"c4-new"`` (documents of the first
            file of its training split that are long enough; both names mean the same).
        tokenizer: Called as tokenizer(text).
        nsamples: How many windows.
        seqlen: Tokens in each.
        seed: Of the draw.

    Returns:
        int64 [seqlen] each.

    Raises:
        ValueError: There is no tokenizer, or no such data set.
        DataError: The data set cannot be loaded, or is too short.
    """
    if name not in _NAMES:
        gone = " (the hub's copy of ptb needs a script, which datasets does not run any more)" if "ptb" in name else ""
        raise ValueError(
            f"dataset={name!r} is none of {', '.join(_NAMES)}{gone}: give one of these, or a list of texts"
        )
    if tokenizer is None:
        raise ValueError(f"dataset={name!r} is text: give quantize_model(model, tokenizer)")
    choose = random.Random(seed)
    windows: list[Tensor] = []
    for tokens in _documents(name, tokenizer, choose):
        draws = nsamples if name == "wikitext2" else 1
        starts = [choose.randint(0, len(tokens) - seqlen) for _ in range(draws)] if len(tokens) >= seqlen else []
        windows += [torch.tensor(tokens[start : start + seqlen], device="cpu") for start in starts]
        if len(windows) >= nsamples:
            return windows
    raise DataError(
        f"dataset={name!r} has {len(windows)} of {nsamples} windows of {seqlen} tokens: give a smaller model_seqlen, "
        "or a list of texts"
    )


def positions(model: nn.Module) -> int | None:
    """The longest sequence the model takes, where its config tells."""
    config = getattr(model, "config", None)
    names = ("max_position_embeddings", "n_positions", "seq_length")
    return next((getattr(config, name) for name in names if getattr(config, name, None)), None)


def computing_device(model: nn.Module) -> str | None:
    """The GPU for a model on the CPU, as both libraries do, where there is one; else None, where the model is."""
    on_cpu = all(parameter.device.type == "cpu" for parameter in model.parameters())
    return "cuda" if on_cpu and torch.cuda.is_available() else None


def _documents(name: str, tokenizer: Any, choose: random.Random) -> Iterator[list[int]]:
    """Tokens of all of wikitext2, or of c4's documents in random order."""
    if name == "wikitext2":
        rows = _load("Salesforce/wikitext", "wikitext-2-raw-v1")
        yield tokenizer("\n\n".join(rows["text"]))["input_ids"]
        return
    rows = _load("allenai/c4", data_files={"train": "en/c4-train.00000-of-01024.json.gz"})
    order = list(range(len(rows)))
    choose.shuffle(order)
    for number in order:
        yield tokenizer(rows[number]["text"])["input_ids"]


def _load(path: str, config: str | None = None, **options: Any) -> Any:
    from datasets import load_dataset

    try:
        return load_dataset(path, config, split="train", **options)
    except (OSError, ValueError) as error:
        raise DataError(
            f"datasets.load_dataset could not read {path}: {brief(error)}. Without a network it must be in its cache; "
            "or give dataset a list of texts"
        ) from error


def _whole_numbers(values: Any) -> Tensor:
    return values.cpu().long() if isinstance(values, Tensor) else torch.tensor(values, device="cpu").long()
