"""`dynamic` rules: expressions made of pieces, whose meaning Python's matcher tells, and hostile ones."""

from __future__ import annotations

import re
from typing import Any

import torch
from campaigns.campaign import Wrong
from hypothesis import strategies as st
from torch import nn

from gptq_plugin.layers.qlinear import QuantLinear

Rules = dict[str, dict[str, Any]]

_PIECES = st.sampled_from(
    [
        "layers", r"\.", ".", "0", "1", r"\d", r"\d+", "[01]", "q_proj", "k_proj", "up", "(q|k)_proj", "[qk]", "_proj",
        ".*", ".+", ".*?", "^", "$", "(?:layers)", "(?!x)", "(?=l)", "(?<=s)", "a?", "l+", "(ay|xx)*", "(?i:LAYERS)",
        r"\w{2,}", "(?P<n>l)?", "head", r"\b", "[^q]",
    ]
)  # fmt: skip
_HOSTILE = st.sampled_from(
    [
        "(a+)+!", "(.*)*!", ".*" * 12 + "!", "(l|l)*(l|l)*!", "(" * 200 + ")" * 200, "(", "*", "-:", "+:", "",
        r"(l)\1", "(?>l+)!", "l++", "(?P<x>l)(?P=x)", "(?(1)a|b)", "l{0,99999}", "l{99999999999}", "x" * 10**5, "\0",
        "(?=.*)*", "[", "\\", "(?i)LAYERS", "(?x) l a", "-:-:layers", "+:-:layers", "\udce9", "(?L:x)", "(?u)layers",
    ]
)  # fmt: skip
_OVERRIDES = st.fixed_dictionaries(
    {},
    optional={
        "bits": st.sampled_from([2, 3, 4, 8]),
        "group_size": st.sampled_from([-1, 8, 16, 32]),
        "sym": st.booleans(),
        "desc_act": st.just(False),
        "damp_percent": st.sampled_from([0.01, 0.1]),
        "clip_ratios": st.sampled_from([[1.0], [0.9, 1.0]]),
    },
)


@st.composite
def cases(draw: st.DrawFn) -> tuple[str, Rules, bool]:
    """("rules", the rules, whether `compare` knows what they mean)."""
    rules: Rules = {}
    hostile = draw(st.integers(0, 3)) == 0
    for number in range(draw(st.integers(1, 4))):
        odd = hostile and number == 0
        expression = draw(_HOSTILE) if odd else "".join(draw(st.lists(_PIECES, min_size=1, max_size=5)))
        prefix = draw(st.sampled_from(["", "", "", "+:", "-:"]))
        rules[prefix + expression] = {} if prefix == "-:" else draw(_OVERRIDES.filter(bool))
    return "rules", rules, not hostile


def model() -> nn.Module:
    """Six layers, whose names rules can tell apart."""
    torch.manual_seed(0)
    names = ("q_proj", "k_proj", "up")
    blocks = [nn.ModuleDict({name: nn.Linear(32, 32) for name in names}) for _ in range(2)]

    class Chain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(blocks)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for block in self.layers:
                for layer in block.values():  # type: ignore[operator]
                    x = x + layer(x)
            return x

    return Chain().eval()


def compare(quantized: nn.Module, rules: Rules) -> None:
    """Compares bits and groups with what Python's matcher makes of the rules.

    Raises:
        Wrong: They are others.
    """
    for name, layer in quantized.named_modules():
        if not isinstance(layer, (QuantLinear, nn.Linear)):
            continue
        first = next((key for key in rules if re.match(re.sub(r"^[+-]:", "", key), name)), None)
        own = rules.get(first or "", {})
        is_float = first is not None and first.startswith("-:")
        wanted = None if is_float else (own.get("bits", 4), own.get("group_size", 16))
        found = (layer.bits, layer.group_size) if isinstance(layer, QuantLinear) else None
        if found != wanted:
            raise Wrong(f"{name} has {found}, and {first!r} asks for {wanted}")
