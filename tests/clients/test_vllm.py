"""What vLLM takes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gptq_plugin.clients.client import Client
from gptq_plugin.clients.rules import conditions, problems

from inventories import CT, DOWN8, EXPERTS, FUSED, MIXTRAL, Q4, QKV8, RANGES, experts, inventory

REFUSED = [
    # GPUs, the checkpoint, words of the sentence (which layer, why, what works instead)
    (1, {"sym": False}, ("all 7 layers", "sym=True only", f"checkpoint_format='{CT}'")),
    (1, {"sym": False, "bits": 8}, ("sym=True only", "use sym=True")),
    (1, {"sym": False, "bits": 8, "checkpoint_format": CT}, ("asymmetric 8-bit", "use sym=True")),
    (1, {"bits": 3}, ("4 and 8 bits only", f"checkpoint_format='{CT}'")),
    (1, {"bits": 2}, ("4 and 8 bits only", "bits=4")),
    (1, {"act_order": True}, ("not contiguous", "static_groups=True")),
    (1, {"act_order": True, "checkpoint_format": CT}, ("not contiguous", "static_groups=True")),
    (1, {"desc_act": True}, ("all groups are contiguous", "desc_act=false")),
    (1, {"group_size": 16}, ("not 16", "group_size=128")),
    (1, {"group_size": 48}, ("last group", "group_size=128")),
    (4, {"group_size": 128}, ("o_proj", "group_size 128 does not divide the 64 inputs", "group_size=64")),
    (3, {}, ("o_proj", "among 3 ranks", "fewer ranks")),
    (1, {"lm_head": True}, ("output embedding", "lm_head=False")),
    (1, {"model_type": "gemma3_text"}, ("float16 for gemma3_text", "torch.bfloat16")),
    (1, {"change": Q4}, ("q_proj (bits=8", "k_proj (bits=4", "one width")),
    (1, {"change": Q4, "checkpoint_format": CT}, ("q_proj (bits=8", "one width")),
    (1, {"change": QKV8, "rules": {r".*\.[qkv]_proj$": {"bits": 8}}}, ("qkv_proj", "the same rule")),
    (1, {"leave": ("self_attn.v_proj",)}, ("v_proj", "all or none", "modules_to_not_convert")),
    (1, experts(FUSED), ("experts.0.gate_up_proj", "w1, w2, w3")),
    (1, experts(change={"group_size": 64}), ("experts.1.down_proj (bits=4, group_size=64", "as one")),
    (1, experts(leave=EXPERTS[2::3]), ("experts.0.down_proj (float)", "match all layers")),
]


@pytest.mark.parametrize("ranks,what,words", REFUSED)
def test_a_limit_is_named_with_the_layer_the_reason_and_what_works(
    ranks: int, what: dict[str, Any], words: tuple[str, ...]
) -> None:
    found = problems(inventory(**what), Client("vllm", ranks))
    assert any(all(word in sentence for word in words) for sentence in found), found


TAKEN: list[tuple[int, dict[str, Any]]] = [
    (1, {"bits": 8}),
    (1, {"group_size": -1, "desc_act": True}),
    (2, {"group_size": 128}),
    (4, {"group_size": 64}),
    (4, {"group_size": -1}),
    (1, {"sym": False, "checkpoint_format": CT}),
    (1, {"bits": 3, "checkpoint_format": CT}),
    (1, {"change": DOWN8, "rules": {r".*down_proj$": {"bits": 8}}}),
    (1, {"change": QKV8, "rules": {r".*\.self_attn\.(q|k|v|qkv)_proj$": {"bits": 8}}}),
    (1, {"leave": ("mlp.gate_proj", "mlp.up_proj")}),
    (1, {"dtype": torch.bfloat16, "model_type": "gemma3_text"}),
    (1, {"checkpoint_format": CT, "model_type": "gpt2"}),
    (1, {"dtype": torch.bfloat16, "activations": RANGES}),
    (1, experts()),
    (1, experts(MIXTRAL)),
    (1, experts(leave=EXPERTS)),
    (1, {**experts(sym=False), "checkpoint_format": CT}),
]


@pytest.mark.parametrize("ranks,what", TAKEN)
def test_what_it_takes_is_not_refused(ranks: int, what: dict[str, Any]) -> None:
    assert not problems(inventory(**what), Client("vllm", ranks))


def test_what_it_needs_beside_the_checkpoint_or_does_on_a_cpu_is_listed() -> None:
    def said(**what: Any) -> str:
        return " ".join(conditions(inventory(**what), Client("vllm")))

    assert "humming" in said(bits=3, checkpoint_format=CT)
    assert "on a CPU it takes 4 bits only" in said(bits=8)
    assert "scales" in said(dtype=torch.bfloat16)
    assert "need AMX" in said(**experts())
    assert "zeros of gptq_v2" in said(**experts(), checkpoint_format="gptq_v2")
    assert "float32 to bfloat16" in said(dtype=torch.float32)
    assert "q_proj" in said(change={"self_attn.q_proj": {"out_features": 250}})
    assert not said()


def test_keys_that_it_does_not_find_in_a_gptq_description_are_named() -> None:
    whole = {"bits": 4, "group_size": 128, "desc_act": False, "sym": True}
    missing = Client("vllm").rules.missing
    assert not list(missing(inventory(), whole))
    assert [line for line in missing(inventory(), {"bits": 4, "sym": True}) if "lacks group_size, desc_act" in line]
    assert not list(missing(inventory(checkpoint_format=CT), {}))
