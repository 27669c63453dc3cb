"""What sglang takes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gptq_plugin.clients.client import Client
from gptq_plugin.clients.rules import conditions, problems

from inventories import CT, experts, inventory

REFUSED = [
    # GPUs, the checkpoint, words of the sentence (which layer, why, what works instead)
    (1, {"bits": 3}, ("4 and 8 bits only", "bits=4")),
    (1, {"bits": 3, "checkpoint_format": CT}, ("4 and 8 bits only", "bits=4")),
    (1, {"sym": False}, ("sym=True only", CT)),
    (1, {"sym": False, "bits": 8, "checkpoint_format": CT}, ("asymmetric 8-bit", "sym=True")),
    (1, {"leave": ("mlp.gate_proj", "mlp.up_proj")}, ("gate_proj", "do not match its name", CT)),
    (1, {"leave": ("mlp.gate_proj",)}, ("gate_proj", "all or none")),
    (8, {"group_size": -1}, ("Marlin", "multiple of 64")),
    (1, {"lm_head": True}, ("output embedding",)),
    (1, {"group_size": 16}, ("not 16",)),
]


@pytest.mark.parametrize("ranks,what,words", REFUSED)
def test_a_limit_is_named_with_the_layer_the_reason_and_what_works(
    ranks: int, what: dict[str, Any], words: tuple[str, ...]
) -> None:
    found = problems(inventory(**what), Client("sglang", ranks))
    assert any(all(word in sentence for word in words) for sentence in found), found


TAKEN: list[tuple[int, dict[str, Any]]] = [
    (1, {"act_order": True}),
    (1, {"sym": False, "checkpoint_format": CT}),
]


@pytest.mark.parametrize("ranks,what", TAKEN)
def test_what_it_takes_is_not_refused(ranks: int, what: dict[str, Any]) -> None:
    assert not problems(inventory(**what), Client("sglang", ranks))


def test_what_was_not_tried_and_what_it_rounds_is_listed() -> None:
    assert "experts" in " ".join(conditions(inventory(**experts()), Client("sglang")))
    assert "scales" in " ".join(conditions(inventory(dtype=torch.bfloat16), Client("sglang")))
    assert not conditions(inventory(), Client("sglang"))


def test_keys_that_it_does_not_find_in_a_gptq_description_are_named() -> None:
    (line,) = Client("sglang").rules.missing(inventory(), {"bits": 4, "group_size": 128, "desc_act": False})
    assert "lacks sym, which sglang needs" in line
