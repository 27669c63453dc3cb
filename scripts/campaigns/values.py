"""Values for options: right ones by option, and odd ones for any."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import torch
from gptq_plugin.kernels.reference import BITS
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from gptq_plugin import QuantizeConfig


class _Unusable:
    """Raises whatever is done with it."""

    def __eq__(self, other: object) -> bool:
        raise RuntimeError("compared")

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        raise RuntimeError("shown")

    def __iter__(self) -> Iterator[Any]:
        raise RuntimeError("iterated")

    def __len__(self) -> int:
        raise RuntimeError("measured")

    def __bool__(self) -> bool:
        raise RuntimeError("asked")

    def __fspath__(self) -> str:
        raise RuntimeError("as a path")


class _Endless(dict):  # type: ignore[type-arg]
    """A mapping whose items do not end."""

    def __init__(self) -> None:
        super().__init__(a={"bits": 8})

    def items(self) -> Any:
        return (("a", {"bits": 8}) for _ in iter(int, 1))


def _doubled() -> list[Any]:
    """Forty lists, each twice in the next: nothing to store, and 2^40 to show or to walk."""
    whole: list[Any] = []
    for _ in range(40):
        whole = [whole, whole]
    return whole


def _in_itself() -> dict[str, Any]:
    whole: dict[str, Any] = {}
    whole["0"] = whole
    return whole


def _deep() -> Any:
    whole: Any = 1
    for _ in range(5000):
        whole = {"0": whole}
    return whole


ODD: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 3, 4, 8, 5, 16, 32, 128, 2**31 - 1, 2**31, 2**63, -(2**63), 10**5000, 0.0, 0.01,
    0.5, 1.0, 4.0, -0.5, 1e-300, 1e300, float("nan"), float("inf"), 5e-324, "", "a", "lm_head", "4", "true", "null",
    "x" * 10**5, "\0", "\udce9", "../x", "\n", "0", "all", "labels", "gptq", "gptq_v2", "vllm", "cpu", "cuda", "meta",
    "cuda:99", "train", "val", "raise", "escalate", "2%", b"x", bytearray(b"x"), memoryview(b"x"), (), [], {}, [1],
    [0.5, 1.0], (1.0,), ["0"], ["lm_head"], ["0", "2"], [None], [[]], [["0"]], [float("nan")], [1e-300], [1.0] * 100,
    [1.0] * 101, [True], [""], ["0"] * 10**5, {"0": {"bits": 8}}, {"0": {}}, {"-:0": {}}, {"-:0": None}, {"0": None},
    {"0": 8}, {"0": []}, {0: {"bits": 8}}, {"(": {"bits": 8}}, {"0": {"bits": "8"}}, {"0": {8: 8}},
    {"0": {"dynamic": {}}}, {"": {"bits": 8}}, {None: {}}, {"0": {"bits": 8, "group_size": 2**70}},
    {".*": {"bits": 8}, "0": {"bits": 3}}, {"0": {"clip_ratios": [0.9]}, "2": {"sym": False}}, {"(a+)+b": {"bits": 8}},
    {"(" * 300 + ")" * 300: {"bits": 8}}, {"(a)\\1": {"bits": 8}}, {"client": "vllm", "tensor_parallel_size": 2},
    {"client": "vllm", "tensor_parallel_size": 0}, {"client": 3}, {"val_loss": 0.1}, {"val_loss": "x%"},
    {"a": {"b": {}}},
    set(), {"0"}, frozenset(["2"]), range(3), numpy.int64(4), numpy.float32(0.5), numpy.array([1, 2]),
    numpy.bool_(True),
    torch.tensor(4), torch.tensor([0.5, 1.0]), torch.float16, torch.device("cpu"), Path("x"), object(), int, len,
    lambda *given: given, 1 + 2j, threading.Lock(), QuantizeConfig(), _Unusable(), _Endless(), _doubled(), _in_itself(),
    _deep(), Ellipsis, NotImplemented, slice(1),
)  # fmt: skip

RIGHT: dict[str, SearchStrategy[Any]] = {
    "bits": st.sampled_from(BITS),
    "group_size": st.sampled_from([-1, 8, 16, 32, 128, 2**31 - 1]),
    "sym": st.booleans(),
    "desc_act": st.booleans(),
    "static_groups": st.booleans(),
    "damp_percent": st.floats(0, 1, exclude_max=True),
    "damp_auto_increment": st.floats(0, 1, exclude_max=True),
    "method": st.sampled_from(["gptq", "best"]),
    "clip_ratios": st.lists(st.floats(0.01, 1.25), min_size=1, max_size=4),
    "clip_candidates": st.sampled_from([None, 1, 3, 100]),
    "scale_rounds": st.sampled_from([None, 0, 2]),
    "refit_rounds": st.sampled_from([None, 0, 2]),
    "asymmetric_alpha": st.sampled_from([None, 0, 0.5, 1.0]),
    "true_sequential": st.just(True),
    "lm_head": st.booleans(),
    "dynamic": st.sampled_from(
        [
            {}, None, {"0": {"bits": 8}}, {"-:0": {}}, {"2": {"sym": False, "group_size": 8}},
            {"0": {"bits": 2}, ".*": {"bits": 4}},
        ]
    ),
    "modules_to_not_convert": st.sampled_from([(), None, ["0"], ["2"]]),
    "model_seqlen": st.integers(1, 2**31 - 1),
    "nsamples": st.integers(16, 2**31 - 1),
    "batch_size": st.integers(1, 2**31 - 1),
    "seed": st.integers(-(2**63), 2**63 - 1),
    "token_weighting": st.sampled_from(["all", "labels"]),
    "checkpoint_format": st.sampled_from(["gptq", "gptq_v2", "compressed-tensors"]),
}  # fmt: skip

_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


def odd() -> SearchStrategy[Any]:
    """Anything: one of the list above, or something as JSON has it."""
    return st.sampled_from(range(len(ODD))).map(ODD.__getitem__) | _JSON
