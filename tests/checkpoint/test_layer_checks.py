"""A layer's tensors must be those its description promises."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gptq_plugin import load_quantized
from gptq_plugin.checkpoint.files import TensorEntry
from gptq_plugin.checkpoint.formats.format import QuantizedLayer, Scheme
from gptq_plugin.checkpoint.formats.registry import FORMATS
from gptq_plugin.checkpoint.layer_checks import StoredLayer, described_layer
from gptq_plugin.errors import CheckpointError

from copies import DOWN, LLAMA, Tensors, drop, edited, expected, logits_of, put, set_quantization, with_value

BROKEN: dict[str, tuple[Callable[[Tensors], Any], list[str]]] = {
    "a group index is too high": (
        put(f"{DOWN}.g_idx", with_value(5, 3)),
        [f"{DOWN}.g_idx", "from 0 to 3", "0..2"],
    ),
    "a group index is negative": (put(f"{DOWN}.g_idx", with_value(5, -1)), [f"{DOWN}.g_idx", "from -1 to 2"]),
    "group indices are too few": (put(f"{DOWN}.g_idx", lambda t: t[:64]), [DOWN, "with 64 inputs"]),
    "group indices were never written": (
        put(f"{DOWN}.g_idx", torch.zeros_like),
        [f"{DOWN}.g_idx puts 96 channels into group 0, and a group has group_size=32", "clients that read it"],
    ),
    "group indices are int64": (put(f"{DOWN}.g_idx", lambda t: t.long()), [f"{DOWN}.g_idx is I64, not I32"]),
    "codes are float": (put(f"{DOWN}.qweight", lambda t: t.float()), [f"{DOWN}.qweight is F32, not I32"]),
    "codes are one row short": (
        put(f"{DOWN}.qweight", lambda t: t[:-1]),
        [f"{DOWN}.qweight has shape [11, 64]"],
    ),
    "scales are transposed": (
        put(f"{DOWN}.scales", lambda t: t.T),
        [f"{DOWN}.scales has shape [64, 3]", "[3, 64]"],
    ),
    "scales are integers": (
        put(f"{DOWN}.scales", lambda t: t.int()),
        [f"{DOWN}.scales is I32, not floating point"],
    ),
    "a scale is NaN": (put(f"{DOWN}.scales", with_value(7, float("nan"))), [f"{DOWN}.scales holds NaN"]),
    "scales do not fit float16": (
        put(f"{DOWN}.scales", lambda t: t.float() * 1.0001),
        [f"{DOWN}.scales is F32 with values float16 cannot hold"],
    ),
    "a scale is negative": (put(f"{DOWN}.scales", with_value(7, -0.01)), [f"{DOWN}.scales holds negative values"]),
    "a scale is 0": (put(f"{DOWN}.scales", with_value(7, 0)), [f"{DOWN}.scales is 0 for weights whose codes are not"]),
    "a zero is not symmetric": (
        put(f"{DOWN}.qzeros", lambda t: t ^ 3),
        [f"{DOWN}: sym=True promises zeros of 8, and most others are 11"],
    ),
    "a norm is NaN": (put("model.norm.weight", with_value(7, float("nan"))), ["NaN or infinity in model.norm.weight"]),
    "the output embedding is infinite": (
        put("lm_head.weight", with_value(7, float("inf"))),
        ["NaN or infinity in lm_head.weight"],
    ),
    "the output embedding is stored as bool": (
        put("lm_head.weight", lambda t: t > 0),
        ["lm_head.weight is BOOL, no float, and belongs to no quantized layer"],
    ),
    "an embedding is stored as int8": (
        put("model.embed_tokens.weight", lambda t: (t * 100).to(torch.int8)),
        ["model.embed_tokens.weight is I8, no float"],
    ),
    "zeros are one-dimensional": (
        put(f"{DOWN}.qzeros", lambda t: t[0]),
        [f"{DOWN}.qzeros has shape [8], not 2"],
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_tensor_that_is_not_as_described_is_refused_and_named(case: str, tmp_path: Path) -> None:
    change, needles = BROKEN[case]
    with pytest.raises(CheckpointError) as caught:
        load_quantized(edited(LLAMA, tmp_path / "x", change))
    for needle in [*needles, str(tmp_path)]:
        assert needle in str(caught.value)


@pytest.mark.parametrize(
    ("fixture", "stated", "hint"),
    [(LLAMA, "gptq", "a gptq_v2 file labelled gptq (v1)"), ("gptqmodel-w4g32", "gptq_v2", "a gptq (v1) file labelled")],
)
def test_symmetric_zeros_of_the_other_format_are_refused_by_name(
    fixture: str, stated: str, hint: str, tmp_path: Path
) -> None:
    formats = {"checkpoint_format": stated, "format": stated}
    folder = edited(fixture, tmp_path / "x", config=lambda c: set_quantization(c, **formats))
    with pytest.raises(CheckpointError, match=re.escape(hint)):
        load_quantized(folder)


def test_a_scale_of_zero_is_taken_where_all_of_its_codes_are_zero_too(tmp_path: Path) -> None:
    def prune(state: dict[str, torch.Tensor]) -> None:
        state[f"{DOWN}.scales"][0] = 0
        state[f"{DOWN}.qweight"][:4] = -0x77777778  # 32 inputs: codes of 8

    model = load_quantized(edited(LLAMA, tmp_path / "x", prune))
    assert not model.get_submodule(DOWN).dequantize()[:, :32].any()


def test_act_order_without_its_group_indices_is_refused(tmp_path: Path) -> None:
    folder = edited("gptqmodel-w4g32-desc-act", tmp_path / "x", drop(".g_idx"))
    with pytest.raises(CheckpointError, match=r"g_idx is missing, and with desc_act=true"):
        load_quantized(folder)


def reversed_groups(state: dict[str, torch.Tensor]) -> None:
    inputs = int(state[f"{DOWN}.weight_shape"][1])
    state[f"{DOWN}.weight_g_idx"] = (torch.arange(inputs, dtype=torch.int32) // 32).flip(0)


def test_groups_in_act_order_that_the_description_does_not_state_are_refused(tmp_path: Path) -> None:
    """GPTQModel's kernels for GPUs (Marlin, Machete) and vLLM go by desc_act, its other kernels by g_idx."""
    folder = edited("gptqmodel-w4g32-desc-act", tmp_path / "x", config=lambda c: set_quantization(c, desc_act=False))
    words = r"g_idx puts channels into other groups than i // group_size, as only desc_act=true .*state desc_act=true"
    with pytest.raises(CheckpointError, match=words):
        load_quantized(folder)
    folder = edited("llmcompressor-w4g32", tmp_path / "y", reversed_groups)
    with pytest.raises(CheckpointError, match="as only actorder=group allows: .* state actorder=group"):
        load_quantized(folder)


def test_scales_in_another_dtype_are_taken_when_float16_holds_them_exactly(tmp_path: Path) -> None:
    folder = edited(LLAMA, tmp_path / "x", lambda s: s.update({k: v.float() for k, v in s.items() if "scales" in k}))
    reference = expected(LLAMA)
    model = load_quantized(folder, dtype=torch.float32)
    torch.testing.assert_close(logits_of(model, reference), reference["logits"], atol=2e-4, rtol=0)


def stored(name: str, **changed: torch.Tensor | None) -> StoredLayer:
    """A layer of 96 inputs and 40 outputs in groups of 32 at 4 bits; None removes a tensor."""
    form = FORMATS[name]
    tensors = {
        suffix: torch.ones(shape, dtype={"I32": torch.int32, "I64": torch.int64}.get(kind, torch.float16))
        for suffix, (kind, shape) in form.expected(96, 40, 3, 4, False).items()
    }
    if "weight_shape" in tensors:
        tensors["weight_shape"] = torch.tensor([40, 96])
    tensors[form.g_idx] = torch.arange(96, dtype=torch.int32) // 32
    tensors = {suffix: tensor for suffix, tensor in {**tensors, **changed}.items() if tensor is not None}
    kinds = {torch.int32: "I32", torch.int64: "I64", torch.float16: "F16", torch.bfloat16: "BF16"}
    entries = {s: TensorEntry(Path("f"), kinds[t.dtype], tuple(t.shape)) for s, t in tensors.items()}
    return StoredLayer("x", form, entries, tensors.__getitem__)


ASYM = Scheme(4, 32, sym=False, desc_act=False)
SYM = Scheme(4, 32, sym=True, desc_act=False)


@pytest.mark.parametrize("name", FORMATS)
def test_a_whole_layer_is_described_and_has_no_problems(name: str) -> None:
    problems: list[str] = []
    layer = described_layer(stored(name), ASYM, problems)
    assert layer == QuantizedLayer("x", 4, 32, 96, 40, 3, True, True, False, False) and not problems
    without = described_layer(stored(name, **{FORMATS[name].g_idx: None, "bias": None}), ASYM, problems)
    assert without == QuantizedLayer("x", 4, 32, 96, 40, 3, False, False, False, False) and not problems


@pytest.mark.parametrize(
    "layer,scheme,sentence",
    [
        (
            stored("compressed-tensors"),
            SYM,
            "x.weight_zero_point is stored, and the description has sym=True (f)",
        ),
        (
            stored("compressed-tensors", weight_zero_point=None),
            ASYM,
            "x.weight_zero_point is missing, and the description has sym=False",
        ),
        (
            stored("gptq", g_idx=None),
            Scheme(4, 32, sym=True, desc_act=True),
            "x.g_idx is missing, and with desc_act=true the groups cannot be told without it",
        ),
        (
            stored("gptq", scales=torch.full((3, 40), 1.001).bfloat16() * 1e6),
            SYM,
            "x.scales is BF16 with values float16 cannot hold (f)",
        ),
    ],
)
def test_what_does_not_fit_is_one_sentence_and_no_layer(layer: StoredLayer, scheme: Scheme, sentence: str) -> None:
    problems: list[str] = []
    assert described_layer(layer, scheme, problems) is None
    assert problems == [sentence]


def test_one_group_needs_no_g_idx_even_with_act_order() -> None:
    whole_rows = Scheme(4, -1, sym=True, desc_act=True)
    layer = stored(
        "gptq", g_idx=None, scales=torch.ones(1, 40).half(), qzeros=torch.full((1, 5), 0x77777777, dtype=torch.int32)
    )
    assert described_layer(layer, whole_rows, []).groups == 1
