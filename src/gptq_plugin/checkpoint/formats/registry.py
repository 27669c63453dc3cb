"""Every checkpoint format, by its name and by what a description states."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gptq_plugin.checkpoint.formats import compressed_tensors, gptq
from gptq_plugin.checkpoint.formats.format import Format
from gptq_plugin.errors import CheckpointError
from gptq_plugin.options.fields import shown

FORMATS: dict[str, Format] = {known.name: known for known in (*gptq.FORMATS, *compressed_tensors.FORMATS)}


def stated_format(quantization: Mapping[str, Any], source: Path) -> Format:
    """The format that a description states.

    Args:
        quantization: The description.
        source: Its file, for messages.

    Raises:
        CheckpointError: Another one, or the description contradicts itself.
    """
    method = quantization.get("quant_method", "gptq")
    methods = list(dict.fromkeys(known.quant_method for known in FORMATS.values()))
    if method not in methods:
        raise CheckpointError(
            f"{source}: quant_method is {shown(method)}; this package reads {' and '.join(map(repr, methods))}. Load "
            "such a checkpoint with transformers"
        )
    of_method = [known for known in FORMATS.values() if known.quant_method == method]
    name = of_method[0].stated(quantization, source)
    if name not in [known.name for known in of_method]:
        others = " and ".join(repr(other) for other in methods if other != method)
        raise CheckpointError(
            f"{source}: checkpoint_format is {shown(name)}; this package reads "
            f"{' and '.join(repr(known.name) for known in of_method)}, and quant_method {others}"
        )
    return FORMATS[name]
