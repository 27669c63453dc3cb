"""transformers' rules: measured with transformers 5.24.0, which loads GPTQ through optimum 2.3.0 and GPTQModel
7.7.0."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from gptq_plugin.clients import common, fused
from gptq_plugin.clients.client import Rules
from gptq_plugin.clients.inventory import Inventory
from gptq_plugin.clients.published import Published
from gptq_plugin.config import COMPRESSED
from gptq_plugin.errors import some
from gptq_plugin.model.hf_models import CONV1D
from gptq_plugin.report.markdown import snippet


def _problems(inventory: Inventory, ranks: int) -> Iterator[str]:
    return (_compressed if inventory.checkpoint_format == COMPRESSED else _gptq)(inventory)


def _gptq(inventory: Inventory) -> Iterator[str]:
    experts = [x.name for block in fused.expert_blocks(inventory) for x in block.layers]
    if experts:
        # measured: it keeps them in one parameter, for which its GPTQ has no layer.
        yield (
            f"{common.listed(experts)}: transformers leaves quantized experts of a GPTQ checkpoint at random values: "
            "use checkpoint_format='compressed-tensors', modules_to_not_convert=['experts'], or load_quantized"
        )
    # measured: one width for all, read from the description; else the shapes do not match.
    yield from _mixed(inventory)
    yield from common.head(inventory, "transformers")  # measured
    yield from common.torch_groups(inventory, "transformers")
    if inventory.model_type == "gpt2":
        # measured (docs/clients.md): 5.24 with GPTQModel 7.7 ends in "no attribute 'normal_'" when it initialises.
        yield "transformers does not load GPTQ layers of gpt2: use load_quantized, or target='gptqmodel'"


def _compressed(inventory: Inventory) -> Iterator[str]:
    # measured (docs/clients.md): 3, 4 and 8 bits, asymmetric, a scale a row, several groups; read: g_idx.
    if inventory.model_type in CONV1D:
        # measured (docs/clients.md): compressed-tensors prepares nn.Linear only (initialize.py), so that their
        # weights are "missing" and stay random. vLLM, which builds linear layers of its own, loads them.
        yield (
            f"transformers loads compressed-tensors into nn.Linear only, and the layers of {inventory.model_type} "
            "are Conv1D, which would stay random: use load_quantized, or target='vllm'"
        )
    blocks = fused.expert_blocks(inventory)
    # read (get_experts_scheme): of several groups, one counts for all experts.
    yield from fused.expert_grids(
        inventory, "transformers takes one grid for all experts of a checkpoint, which must be"
    )
    asymmetric = [x.name for block in blocks for x in block.layers if not x.sym]
    if asymmetric:
        # measured: DecompressExperts has no place for zeros.
        yield (
            f"{common.listed(asymmetric)}: transformers reads no zeros of experts: use sym=True for them, or "
            "load_quantized"
        )
    floats = [name for block in blocks for name in block.floats if name.rpartition(".")[2] in fused.EXPERT_LAYERS]
    if floats:
        # measured: it looks for experts' packed weights only.
        yield (
            f"{common.listed(floats)} left float: transformers leaves float experts of a compressed-tensors checkpoint "
            "at random values: use checkpoint_format='gptq', or quantize them"
        )


def _mixed(inventory: Inventory) -> Iterator[str]:
    grids = common.by(inventory, lambda x: (x.bits, x.group_size))
    if len(grids) > 1:
        have = "; ".join(f"bits={b} group_size={g} in {common.listed(names)}" for (b, g), names in grids.items())
        yield (
            "transformers reads one width and group size for all layers of a GPTQ checkpoint, and there are "
            f"{have}: use one for all, or checkpoint_format='compressed-tensors'"
        )


def _conditions(inventory: Inventory) -> Iterator[str]:
    yield from common.whole_rows(inventory)
    packages = " compressed-tensors" if inventory.checkpoint_format == COMPRESSED else "s gptqmodel and optimum"
    yield f"needs the package{packages}"


def _loading(published: Published) -> str:
    settings, facts, loader = published.settings, published.facts, published.facts.loader
    compressed = settings["checkpoint_format"] == COMPRESSED
    refused = []
    if facts.model_type in (CONV1D if compressed else ("gpt2",)):
        refused.append("it has no quantized Conv1D, which this model consists of")
    if not compressed and published.grids != {(settings["bits"], settings["group_size"])}:
        refused.append("it does not read layers of different bits or group sizes")
    if not compressed and settings["lm_head"]:
        refused.append("it does not read a quantized output embedding")
    if refused:
        return f"### transformers\n\ntransformers does not load this checkpoint: {'; '.join(refused)}."
    if compressed:
        code = f'from transformers import {loader}\n\nmodel = {loader}.from_pretrained(".")'
        needs = "It needs compressed-tensors (0.18 or newer for 3 bits): `pip install compressed-tensors`."
        return f"{snippet('transformers', code)}\n\n{needs}"
    names, option = loader, ""
    if settings["group_size"] == -1:  # the kernel that GPTQModel selects fails
        names = f"{loader}, GPTQConfig"
        option = f', quantization_config=GPTQConfig(bits={settings["bits"]}, backend="torch")'
    code = f'from transformers import {names}\n\nmodel = {loader}.from_pretrained("."{option})'
    return f"{snippet('transformers', code)}\n\nIt needs GPTQModel and Optimum: `pip install gptqmodel optimum`."


def _missing(inventory: Inventory, description: Mapping[str, Any]) -> Iterator[str]:
    """measured: it recognizes layers left float by a list of the others."""
    if inventory.checkpoint_format == COMPRESSED:
        return
    if inventory.floats and not description.get("modules_in_block_to_quantize"):
        yield (
            f"{some(inventory.floats)} are float and the description does not list the others in "
            "modules_in_block_to_quantize, by which transformers recognizes them: add it"
        )


RULES = Rules(_problems, _conditions, _missing, _loading)
