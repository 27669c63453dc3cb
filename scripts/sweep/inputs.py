"""Makes batches for a model of unknown kind, from its forward's signature and its configuration's sizes.

Names do not always reveal what a vision or audio tower needs, so several layouts are tried until the forward runs,
those with most modalities first. There are as many placeholders for images and sounds as features.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch
from maker import IMAGES, SOUNDS, Batch, Maker, has, look, names_of

LENGTH = 24


class NoInputs(Exception):
    """The forward refused every layout."""


def batches_for(model: Any, sizes: tuple[int, ...] = (3, 2)) -> tuple[str, list[Batch]]:
    """The modalities of the first layout that the model accepts, in words, and batches of the given numbers of samples,
    of different lengths.

    Raises:
        NoInputs: With the forward's errors for the first layout and the last.
    """
    errors: list[str] = []
    for label, media in _layouts(model):
        try:
            batches = [_fitting(model, media, n, LENGTH + 8 * i, seed=i) for i, n in enumerate(sizes)]
        except Exception as error:  # noqa: BLE001 - whatever a forward raises at inputs that are not for it
            errors.append(f"{label} {media}: {type(error).__name__}: {error}"[:300])
            continue
        return label, batches
    raise NoInputs(" | ".join(dict.fromkeys([errors[0], errors[-1]])) if errors else "no input that we know")


def _fitting(model: Any, media: dict[str, Any], samples: int, length: int, seed: int) -> Batch:
    torch.manual_seed(seed)
    batch = Maker(model, samples, length).batch(media)
    counts: dict[str, int] = {}
    for _ in range(3):
        try:
            with torch.no_grad():
                model(**batch)
            return batch
        except Exception as error:
            found = re.search(r"(Image|Audio|Multimodal).*tokens:? *\(?(\d+).*features:? *\(?(\d+)", str(error))
            if found is None or int(found[3]) % samples or counts.get(found[1]) == int(found[3]):
                raise
            counts[found[1]] = int(found[3])
            kind = "audio" if found[1] == "Audio" else "image" if found[1] == "Image" else next(iter(media))
            torch.manual_seed(seed)
            batch = Maker(model, samples, length).batch(media, {kind: int(found[3]) // samples})
    with torch.no_grad():
        model(**batch)
    return batch


def _layouts(model: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields (description, {modality: layout}) in the order to try."""
    names = names_of(model)
    images = ["BCHW", "B1CHW", "B2CHW", "patches", "BPD", "BPC", "B1TCHW", "cameras"] if has(names, IMAGES) else []
    sounds = ["BFT", "BTF", "BS", "B1S", "BT4F"] if has(names, SOUNDS) else []
    has_text = "input_ids" in names
    for image in images:
        for extras in (False, True):
            yield f"{'text, ' * has_text}image", {"image": image, "extras": extras}
    for sound in sounds:
        yield f"{'text, ' * has_text}audio", {"audio": sound}
    if has_text:
        yield "text", {}
        if look(model.config, "num_codebooks"):
            yield "text and codes", {"books": look(model.config, "num_codebooks") + 1}
    if "inputs" in names:
        yield "text", {"inputs": "ids"}
        for image in ("BCHW",):
            yield "image", {"image": image}
        yield "audio", {"audio": "BS"}
