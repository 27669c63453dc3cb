"""Rules that several clients share; each client's own test shows which of them it asks."""

from __future__ import annotations

import pytest

from gptq_plugin.clients import common

from inventories import DOWN8, inventory


def test_all_layers_are_called_so_and_of_some_the_first_three_are_named() -> None:
    (line,) = common.of_layers(inventory(bits=3), lambda x: x.bits == 3, "no")
    assert line == "all 7 layers (bits=3 group_size=128 sym=True): no"
    (line,) = common.of_layers(inventory(change=DOWN8), lambda x: x.bits == 8, "no")
    assert line == "model.layers.0.mlp.down_proj (bits=8 group_size=128 sym=True): no"
    assert common.listed(list("abcde"), inventory()) == "a, b, c and 2 more"
    assert not list(common.of_layers(inventory(), lambda x: x.bits == 8, "no"))


@pytest.mark.parametrize("size,found", [(-1, 0), (32, 0), (128, 0), (256, 1)])
def test_marlin_takes_some_group_sizes(size: int, found: int) -> None:
    assert len(list(common.marlin_groups(inventory(group_size=size), "vllm"))) == found


def test_the_torch_kernel_takes_a_group_as_long_as_the_input_whatever_its_size() -> None:
    one = {"self_attn.q_proj": {"in_features": 192, "group_size": 192}}
    assert not list(common.torch_groups(inventory(change=one), "gptqmodel"))
    (line,) = common.torch_groups(inventory(change={"mlp.down_proj": {"group_size": 192}}), "gptqmodel")
    assert "down_proj" in line and "not 192: use group_size=128" in line


@pytest.mark.parametrize("inputs,ranks,size", [(256, 1, 128), (256, 4, 64), (96, 1, 32), (40, 1, -1)])
def test_the_size_that_is_recommended_divides_the_inputs_of_every_rank(inputs: int, ranks: int, size: int) -> None:
    change = {"self_attn.o_proj": {"in_features": inputs}}
    name = "model.layers.0.self_attn.o_proj"
    assert common.nearest_group(inventory(change=change), [name], ranks) == f"group_size={size}"


def test_ranks_share_inputs_of_layers_that_reduce_and_outputs_of_the_others() -> None:
    assert not list(common.parallel(inventory(), 1, "vllm"))
    assert not list(common.parallel(inventory(), 2, "vllm"))
    # 256 inputs and 1024 outputs among 3 ranks; k and v are repeated instead
    names = {line.split(":")[0].rpartition(".")[2] for line in common.parallel(inventory(), 3, "vllm")}
    assert names == {"q_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    one_group = inventory(change={"self_attn.o_proj": {"group_size": 256}})
    (line,) = common.parallel(one_group, 2, "vllm")
    assert "its only group spans 2 ranks: use group_size=-1" in line
