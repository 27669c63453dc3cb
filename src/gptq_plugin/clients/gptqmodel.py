"""GPTQModel's rules: measured with 7.7.0, read in its ``nn_modules/qlinear/``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from gptq_plugin.clients import common, fused
from gptq_plugin.clients.client import Rules
from gptq_plugin.clients.inventory import Inventory
from gptq_plugin.config import COMPRESSED
from gptq_plugin.errors import some
from gptq_plugin.options.rules import matching_rules


def _problems(inventory: Inventory, ranks: int) -> Iterator[str]:
    if inventory.checkpoint_format == COMPRESSED:
        # measured: "Unknown quantization method".
        yield "gptqmodel reads GPTQ, not compressed-tensors: use checkpoint_format='gptq_v2'"
        return
    # measured (Mixtral: "Missing required quantized weights"): it looks for them under its own names.
    yield from fused.expert_names(inventory, "gptqmodel", fused.EXPERT_LAYERS[:3])
    yield from common.torch_groups(inventory, "gptqmodel")


def _missing(inventory: Inventory, description: Mapping[str, Any]) -> Iterator[str]:
    """measured: it recognizes layers left float by rules."""
    if inventory.checkpoint_format == COMPRESSED:
        return
    rules = [pattern for pattern in description.get("dynamic") or {} if pattern.startswith("-:")]
    untold = [name for name in inventory.floats if not matching_rules(rules, name)]
    if untold:
        yield (
            f'{some(untold)} are float without a `dynamic` rule ("-:REGEX": {{}}), by which gptqmodel recognizes '
            "them: add one"
        )


RULES = Rules(_problems, common.whole_rows, _missing)
