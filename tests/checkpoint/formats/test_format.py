"""What every format has in common."""

from __future__ import annotations

import pytest
import torch

from gptq_plugin.checkpoint.formats.format import Contents, Scheme, check_expressions, contiguous, trivial_g_idx
from gptq_plugin.checkpoint.formats.registry import FORMATS
from gptq_plugin.errors import CheckpointError

FOUR, EIGHT = Scheme(4, 128, True, False), Scheme(8, 128, True, False)


def test_contiguous_groups_are_all_but_the_last_of_one_size() -> None:
    assert trivial_g_idx(7, 3).tolist() == [0, 0, 0, 1, 1, 1, 2]
    assert trivial_g_idx(4, -1).tolist() == [0, 0, 0, 0]
    assert contiguous(trivial_g_idx(7, 3), 3) and not contiguous(trivial_g_idx(7, 3), 4)
    assert not contiguous(torch.tensor([0, 1, 0, 1], dtype=torch.int32), 2)


def test_a_block_of_experts_stands_for_its_layers_where_all_are_alike() -> None:
    names = [f"m.{b}.mlp.experts.{e}.up_proj" for b in range(3) for e in range(2)]
    schemes = {**dict.fromkeys(names[:2], FOUR), names[2]: FOUR, names[3]: EIGHT, "m.0.o_proj": FOUR}
    units = Contents(schemes, names[4:]).units()
    assert [units[name] for name in names[:2]] == ["m.0.mlp.experts"] * 2
    assert [units[name] for name in names[2:4]] == names[2:4]  # of two kinds
    assert [units[name] for name in names[4:]] == ["m.2.mlp.experts"] * 2  # all float
    assert units["m.0.o_proj"] == "m.0.o_proj"
    mixed = Contents({names[0]: FOUR}, [names[1]]).units()
    assert mixed == {name: name for name in names[:2]}


def test_what_is_no_expression_is_refused_with_its_place() -> None:
    check_expressions([r".*\.up"], "here")
    with pytest.raises(CheckpointError, match=r"here: '\[' is not a regular expression"):
        check_expressions([".*", "["], "here")


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("bits,sym", [(3, True), (4, False), (8, True)])
def test_what_a_format_writes_is_what_it_expects_and_reads(name: str, bits: int, sym: bool) -> None:
    """Names, kinds and shapes of all that is stored, and every tensor back."""
    from gptq_plugin import QuantizeConfig
    from gptq_plugin.checkpoint.formats.format import QuantizedLayer
    from gptq_plugin.gptq.solver import round_to_nearest
    from gptq_plugin.layers.qlinear import QuantLinear
    from gptq_plugin.layers.stored_weight import TENSORS

    form, kinds = FORMATS[name], {torch.int32: "I32", torch.int64: "I64", torch.float16: "floating point"}
    config = QuantizeConfig(bits=bits, group_size=32, sym=sym)
    weight = torch.randn(40, 96, generator=torch.Generator().manual_seed(bits))
    linear = QuantLinear.from_quantized(round_to_nearest(weight, config), torch.ones(40).half())
    tensors = {suffix: getattr(linear, suffix) for suffix in TENSORS}
    stored = form.to_file(tensors, bits, sym)
    expected = form.expected(96, 40, 3, bits, sym)
    assert {k: (kinds[t.dtype], tuple(t.shape)) for k, t in stored.items()}.items() <= expected.items()
    assert set(form.needed) <= stored.keys() <= set(form.suffixes)
    assert expected.keys() - stored.keys() <= {form.g_idx}
    assert form.sizes({k: tuple(t.shape) for k, t in stored.items()}, bits, stored.__getitem__) == (96, 40)
    layer = QuantizedLayer("x", bits, 32, 96, 40, 3, form.g_idx in stored, True, sym, False)
    back = form.from_file(stored.__getitem__, layer)
    assert all(torch.equal(back[suffix], tensors[suffix]) for suffix in TENSORS)
    assert all(torch.equal(stored[suffix], tensors[suffix]) for suffix in form.in_memory)
    counted = [form.codes, form.scales, form.zeros]
    assert form.stored_bytes(96, 40, 3, bits, sym) == sum(stored[s].nbytes for s in counted if s in stored)
