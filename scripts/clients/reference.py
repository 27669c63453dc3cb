"""reference.py FOLDER...: writes "tokens" and a checkpoint's "logits" for them to FOLDER.reference.safetensors.

An independent reader in plain torch, which shares no code with gptq_plugin or any client. It dequantizes GPTQ (v1, v2)
and compressed-tensors (pack-quantized) into transformers' float model, and runs it in float32.

In all formats codes form one stream of bits, the lowest bits of the first int32 word first: the k-th code of b bits
takes bits k*b to (k+1)*b. GPTQ packs qweight [in * b / 32, out] along the inputs and qzeros [groups, out * b / 32]
along the outputs; v1 stores a zero minus one. compressed-tensors stores both transposed.
"""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

_TOKENS = 48


def reference_of(folder: Path) -> Path:
    """The file of a folder's reference, next to the folder."""
    return folder.with_name(folder.name + ".reference.safetensors")


def reference_logits(folder: Path) -> tuple[list[int], Tensor]:
    """A prompt, and the logits of the checkpoint's model for it, float32 [tokens, vocabulary]."""
    model = float_model(folder)
    with torch.no_grad():
        tokens = _prompt(model)
        return tokens, model(input_ids=torch.tensor([tokens])).logits[0].float()


def _prompt(model: Any) -> list[int]:
    """Tokens whose choice of experts no rounding changes: of eight, always the one that the routers decide clearest.

    With another expert a token's logits differ by more than most errors in a file's format would make them.
    """
    chosen = getattr(model.config, "num_experts_per_tok", None)
    tokens: list[int] = []
    for place in range(_TOKENS):
        candidates = [(97 * place + 31 * i + 13) % 500 + 8 for i in range(8 if chosen else 1)]
        if chosen:
            rows = torch.tensor([[*tokens, candidate] for candidate in candidates])
            scores = model(input_ids=rows, output_router_logits=True).router_logits
            leads = [_lead(layer.float().unflatten(0, (len(rows), -1))[:, -1], chosen) for layer in scores]
            candidates = [candidates[int(torch.stack(leads).amin(0).argmax())]]
        tokens += candidates
    return tokens


def _lead(scores: Tensor, chosen: int) -> Tensor:
    """By how much each row's last chosen expert leads the next, from scores [rows, experts]."""
    ordered = scores.sort(-1, descending=True).values
    return ordered[:, chosen - 1] - ordered[:, chosen]


def float_model(folder: Path) -> Any:
    """The float32 model of a checkpoint's dequantized weights.

    Raises:
        ValueError: Tensors are missing or unexpected.
    """
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    random = transformers.AutoModelForCausalLM.from_config(config)
    state = float_state(folder)
    for name, module in random.named_modules():
        if type(module).__name__ == "Conv1D" and f"{name}.quantized" in state:  # GPT-2's keeps its weight [in, out]
            state[f"{name}.quantized"] = state[f"{name}.quantized"].t().contiguous()
    state = {name.replace(".quantized", ".weight"): tensor for name, tensor in state.items()}
    # Loaded by transformers, which maps names of experts to parts of one parameter.
    model, found = type(random).from_pretrained(
        None, config=config, state_dict=state, dtype=torch.float32, output_loading_info=True
    )
    wrong = [f"{kind.partition('_')[0]} {sorted(map(str, names))}" for kind, names in found.items() if names]
    if wrong:
        raise ValueError(f"{folder}: {', '.join(wrong)}")
    return model.eval()


def float_state(folder: Path) -> dict[str, Tensor]:
    """All tensors in float32; a quantized layer's weight, [out, in], is named NAME.quantized."""
    tensors: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        for name, tensor in load_file(file).items():
            if name in tensors:
                raise ValueError(f"{folder}: {name} is in two files")
            tensors[name] = tensor
    description = json.loads((folder / "config.json").read_text())["quantization_config"]
    compressed = description["quant_method"] == "compressed-tensors"
    read, mark = (_compressed, ".weight_packed") if compressed else (_gptq, ".qweight")
    state: dict[str, Tensor] = {}
    for layer in [name.removesuffix(mark) for name in tensors if name.endswith(mark)]:
        state[f"{layer}.quantized"] = read(description, layer, tensors)
    return {**state, **{name: tensor.float() for name, tensor in tensors.items()}}


def _gptq(description: dict[str, Any], layer: str, tensors: dict[str, Tensor]) -> Tensor:
    bits = description["bits"]
    for pattern, rule in description.get("dynamic", {}).items():
        if re.match(pattern.removeprefix("+:").removeprefix("-:"), layer):
            if pattern.startswith("-:"):
                raise ValueError(f"{layer} is quantized, and the rule {pattern!r} leaves it float")
            bits = rule.get("bits", bits)
            break
    group = tensors.pop(f"{layer}.g_idx").long()
    scales = tensors.pop(f"{layer}.scales").float()
    codes = codes_of(tensors.pop(f"{layer}.qweight"), bits, len(group))
    zeros = codes_of(tensors.pop(f"{layer}.qzeros").t(), bits, scales.shape[1]).t()
    if description["checkpoint_format"] == "gptq":
        zeros = (zeros + 1) % 2**bits
    return ((codes - zeros[group]) * scales[group]).t()


def _compressed(description: dict[str, Any], layer: str, tensors: dict[str, Tensor]) -> Tensor:
    schemes = description["config_groups"].values()
    named = [scheme for scheme in schemes if layer in scheme["targets"]]
    scheme = (named or [scheme for scheme in schemes if "Linear" in scheme["targets"]])[0]["weights"]
    bits = scheme["num_bits"]
    outputs, inputs = tensors.pop(f"{layer}.weight_shape").tolist()
    scales = tensors.pop(f"{layer}.weight_scale").float()
    size = inputs if scheme["strategy"] == "channel" else scheme["group_size"]
    if scales.shape != (outputs, inputs // size):
        raise ValueError(f"{layer}: scales {tuple(scales.shape)} for [{outputs}, {inputs}] in groups of {size}")
    codes = codes_of(tensors.pop(f"{layer}.weight_packed").t(), bits, inputs).t()
    if scheme["symmetric"]:
        zeros = torch.full(scales.shape, 2 ** (bits - 1))
    else:
        zeros = codes_of(tensors.pop(f"{layer}.weight_zero_point"), bits, outputs)
    return (codes - zeros.repeat_interleave(size, 1)) * scales.repeat_interleave(size, 1)


def codes_of(words: Tensor, bits: int, count: int) -> Tensor:
    """Unpacks codes along the first dimension: int32 [count * bits / 32, n] to int64 [count, n]."""
    single = (words.long()[:, None] >> torch.arange(32)[:, None]) & 1  # [words, 32, n]
    stream = single.flatten(0, 1)[: count * bits].unflatten(0, (count, bits))
    return (stream << torch.arange(bits)[:, None]).sum(1)


def main() -> None:
    for folder in map(Path, sys.argv[1:]):
        tokens, logits = reference_logits(folder)
        save_file({"tokens": torch.tensor(tokens), "logits": logits.contiguous()}, reference_of(folder))


if __name__ == "__main__":
    main()
