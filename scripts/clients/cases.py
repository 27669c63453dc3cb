"""The clients' test cases: `CASES`, each an export of a model, and `SPOILED`, copies that must fail.

`expected` gives each client's result on a CPU: it "loads" the case and computes what the reference computes, or refuses
it with an error that matches the regular expression. Clients that are not named are not run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

LOADS = "loads"
COMPRESSED = {"checkpoint_format": "compressed-tensors"}


@dataclass(frozen=True)
class Case:
    """One export.

    Attributes:
        name: The folder's name.
        config: Fields of QuantizeConfig.
        expected: {client: LOADS, or a regular expression of its error}.
        architecture: A key of `make.ARCHITECTURES`.
        shard: Bytes of quantized layers per file; None for one file.
        finish: Kind of a finish that the model gets; it has to be kept.
    """

    name: str
    config: Mapping[str, Any]
    expected: Mapping[str, str]
    architecture: str = "llama"
    shard: int | None = None
    finish: str = "none"


def _gptq(transformers: str = LOADS, gptqmodel: str = LOADS, vllm: str = LOADS) -> dict[str, str]:
    return {"transformers": transformers, "gptqmodel": gptqmodel, "vllm": vllm}


def _compressed(transformers: str = LOADS, vllm: str = LOADS) -> dict[str, str]:
    return {"transformers": transformers, "vllm": vllm}


# On a CPU vLLM has a kernel for 4 bits only.
_CPU_BITS = "Unsupported quantization config|weight_bits = uint8b128|Failed to find a kernel"
_ONE_WIDTH = "ignore_mismatched_sizes"
_LEFT_FLOAT = {"modules_to_not_convert": ("self_attn.o_proj", "layers.1.mlp.down_proj")}
_PART_FLOAT = {"modules_to_not_convert": ("self_attn.v_proj",)}  # vLLM fuses q, k and v
_EXPERTS_G32 = {"dynamic": {r".*\.experts\.": {"group_size": 32}}}
_FLOAT_EXPERTS = {"modules_to_not_convert": ("experts",)}
_EXPERTS = "missing_keys.*experts"
_CPU_EXPERTS = "No WNA16 MoE backend"  # concerns the CPU's kernel only
_OTHER_NAMES = "Missing required quantized weights.*experts"

CASES = [
    Case("4-bit", {}, _gptq()),
    Case("4-bit-v2", {"checkpoint_format": "gptq_v2"}, _gptq()),
    Case("4-bit-g32", {"group_size": 32}, _gptq()),
    Case("4-bit-channelwise", {"group_size": -1}, _gptq(gptqmodel="qGroupSize")),
    Case("4-bit-asym-v2", {"sym": False, "checkpoint_format": "gptq_v2"}, _gptq(vllm="sym=False")),
    Case("8-bit", {"bits": 8}, _gptq(vllm=_CPU_BITS)),
    Case("3-bit", {"bits": 3}, _gptq(vllm=_CPU_BITS)),
    Case("2-bit-g32", {"bits": 2, "group_size": 32}, _gptq(vllm=_CPU_BITS)),
    Case("4-bit-desc_act", {"desc_act": True, "static_groups": False}, _gptq(vllm="desc_act=True")),
    Case("4-bit-sharded", {}, _gptq(), shard=100_000),
    Case("4-bit-finished", {}, _gptq(), finish="full"),
    Case("4-bit-left-float", _LEFT_FLOAT, _gptq()),
    Case("4-bit-part-float", _PART_FLOAT, _gptq(vllm="All shards of fused layers")),
    Case("4-and-8-bit", {"dynamic": {r".*\.down_proj": {"bits": 8}}}, _gptq(transformers=_ONE_WIDTH, vllm=_CPU_BITS)),
    Case("4-bit-g128-and-g32", {"dynamic": {r".*\.down_proj": {"group_size": 32}}}, _gptq(transformers=_ONE_WIDTH)),
    Case("4-bit-qwen3", {}, _gptq(), "qwen3"),
    Case("4-bit-gemma3", {}, _gptq(vllm="float16"), "gemma3"),
    Case("4-bit-opt", {}, _gptq(), "opt"),
    Case("4-bit-gpt2", {}, _gptq(transformers="normal_"), "gpt2"),
    Case("4-bit-mixtral", {}, _gptq(transformers=_EXPERTS, gptqmodel=_OTHER_NAMES), "mixtral"),
    Case("4-bit-mixtral-g32", _EXPERTS_G32, _gptq(transformers=_EXPERTS, gptqmodel=_OTHER_NAMES), "mixtral"),
    Case("4-bit-qwen3-moe", {}, _gptq(transformers=_EXPERTS), "qwen3_moe"),
    Case("4-bit-qwen3-moe-float", _FLOAT_EXPERTS, _gptq(), "qwen3_moe"),
    Case("ct-4-bit", COMPRESSED, {**_compressed(), "gptqmodel": "(?i)quant"}),
    Case("ct-4-bit-finished", COMPRESSED, _compressed(), finish="full"),
    Case("ct-4-bit-asym", {**COMPRESSED, "sym": False}, _compressed()),
    Case("ct-4-bit-channelwise", {**COMPRESSED, "group_size": -1}, _compressed()),
    Case("ct-8-bit", {**COMPRESSED, "bits": 8}, _compressed(vllm=_CPU_BITS)),
    Case("ct-3-bit", {**COMPRESSED, "bits": 3}, _compressed(vllm=_CPU_BITS)),
    Case("ct-4-bit-left-float", {**COMPRESSED, **_LEFT_FLOAT}, _compressed()),
    Case("ct-4-bit-g128-and-g32", {**COMPRESSED, "dynamic": {r".*\.down_proj": {"group_size": 32}}}, _compressed()),
    Case("ct-4-bit-gpt2", COMPRESSED, _compressed(transformers="missing_keys"), "gpt2"),
    Case("ct-4-bit-mixtral", COMPRESSED, _compressed(), "mixtral"),
    Case("ct-4-bit-mixtral-g32", {**COMPRESSED, **_EXPERTS_G32}, _compressed(vllm=_CPU_EXPERTS), "mixtral"),
    Case("ct-4-bit-qwen3-moe", COMPRESSED, _compressed(), "qwen3_moe"),
    Case(
        "ct-4-bit-qwen3-moe-asym",
        {**COMPRESSED, "sym": False},
        _compressed("conversion of the weights", _CPU_EXPERTS),
        "qwen3_moe",
    ),
    Case("ct-4-bit-qwen3-moe-float", {**COMPRESSED, **_FLOAT_EXPERTS}, _compressed(transformers=_EXPERTS), "qwen3_moe"),
]


@dataclass(frozen=True)
class Spoiled:
    """A copy of a case with one error (`corrupt.KINDS`), and the clients whose checks must fail on it."""

    case: str
    kind: str
    clients: tuple[str, ...] = field(default=("transformers",))

    @property
    def name(self) -> str:
        return f"{self.case}-{self.kind}"


SPOILED = [
    Spoiled("4-bit", "zeros", ("transformers", "gptqmodel")),
    Spoiled("4-bit", "scales", ("transformers", "gptqmodel", "vllm")),
    Spoiled("4-bit", "rows"),
    Spoiled("4-bit", "missing"),
    Spoiled("ct-4-bit", "scales", ("transformers", "vllm")),
    Spoiled("ct-4-bit", "missing"),
    Spoiled("ct-4-bit-asym", "zeros", ("transformers",)),
]
