"""Names of layers that servers compute as one: q, k and v; gate and up.

Tested by tests/clients/test_fused.py: clients are asked about them there.
"""

from __future__ import annotations

# `packed_modules_mapping` of nearly all models of vLLM and sglang.
_FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
_WHOLE = {member: whole for whole, members in _FUSED.items() for member in members}


def fused_name(layer: str) -> str | None:
    """The name under which servers compute a layer with others, or None: "attn.qkv_proj" of "attn.q_proj"."""
    prefix, _, last = layer.rpartition(".")
    return f"{prefix}.{_WHOLE[last]}" if last in _WHOLE else None
