"""make.py OUT [CASE...]: quantizes small random models and exports each into OUT/CASE (`cases.CASES`).

Runs in this project's environment. The weights are random and scaled so that every layer matters: in a briefly trained
model, an error in one layer's zeros is smaller than float16's rounding.
"""

from __future__ import annotations

import copy
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from cases import CASES, Case
from torch import nn

import gptq_plugin.export.export
from gptq_plugin import Finish, QuantizeConfig, QuantizeModule

VOCABULARY = 512
_SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}
_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    **_SPECIAL,
}

# transformers' class, its configuration, and the standard deviation of its embeddings. If the head is tied to them,
# every layer affects the logits at that deviation.
ARCHITECTURES: dict[str, tuple[str, Callable[[], Any], float]] = {
    "llama": ("LlamaForCausalLM", lambda: transformers.LlamaConfig(**_SIZES), 0.5),
    "qwen3": ("Qwen3ForCausalLM", lambda: transformers.Qwen3Config(**_SIZES), 0.5),
    # Multiplies embeddings by sqrt(hidden_size) = 16.
    "gemma3": (
        "Gemma3ForCausalLM",
        lambda: transformers.Gemma3TextConfig(**{**_SIZES, "tie_word_embeddings": True, "query_pre_attn_scalar": 64}),
        0.1,
    ),
    "opt": (
        "OPTForCausalLM",
        lambda: transformers.OPTConfig(
            vocab_size=VOCABULARY,
            hidden_size=256,
            word_embed_proj_dim=256,
            ffn_dim=512,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=256,
            **_SPECIAL,
        ),
        0.2,
    ),
    "mixtral": (
        "MixtralForCausalLM",
        lambda: transformers.MixtralConfig(
            **{**_SIZES, "intermediate_size": 256}, num_local_experts=4, num_experts_per_tok=2
        ),
        0.5,
    ),
    "qwen3_moe": (
        "Qwen3MoeForCausalLM",
        lambda: transformers.Qwen3MoeConfig(
            **_SIZES, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=256, norm_topk_prob=True
        ),
        0.5,
    ),
    "gpt2": (
        "GPT2LMHeadModel",
        lambda: transformers.GPT2Config(
            vocab_size=VOCABULARY, n_positions=256, n_embd=256, n_layer=2, n_head=4, **_SPECIAL
        ),
        0.2,
    ),
}


def make(case: Case, out: Path) -> Path:
    """Quantizes and exports one case; returns its folder."""
    model = loud(case.architecture)
    # Without the search for narrower grids, which takes most of the time and does not affect the files' format.
    quantizer = QuantizeModule(QuantizeConfig(clip_ratios=(1.0,), **case.config))
    rows = torch.randint(8, VOCABULARY, (32, 64), generator=torch.Generator().manual_seed(2))
    teacher = copy.deepcopy(model)
    quantizer.quantize(model, rows.tolist())
    if case.finish != "none":
        finish = Finish(case.finish, steps=8, block_steps=8, nsamples=24, held_out=8, tokens_per_step=512, judgements=2)
        record = quantizer.finish(model, teacher, rows.tolist(), finish)
        assert record.kept, record.reason
    whole = gptq_plugin.export.export.SHARD
    try:
        gptq_plugin.export.export.SHARD = case.shard or whole
        return quantizer.export(model, out / case.name, tokenizer=tokenizer())
    finally:
        gptq_plugin.export.export.SHARD = whole


def loud(architecture: str) -> nn.Module:
    """A float16 model of random weights, whose layers each add as much to the residual stream as it holds."""
    name, config, embedding = ARCHITECTURES[architecture]
    torch.manual_seed(1)
    model = getattr(transformers, name)._from_config(config(), dtype=torch.float16)
    with torch.no_grad():
        for path, module in model.named_modules():
            transposed = type(module).__name__ == "Conv1D"  # GPT-2's, [in, out]
            for kind, parameter in module.named_parameters(recurse=False):
                if parameter.ndim == 1 and kind == "bias":
                    parameter.copy_(0.1 * torch.randn(parameter.shape))
                if parameter.ndim < 2 or (path.endswith("lm_head") and model.config.tie_word_embeddings):
                    continue
                if isinstance(module, nn.Embedding):
                    scale = embedding
                else:
                    scale = (3 if path.endswith("lm_head") else 1) * parameter.shape[-2 if transposed else -1] ** -0.5
                parameter.copy_(scale * torch.randn(parameter.shape))
    return model.eval()


def tokenizer() -> Any:
    """A tokenizer with a word for every id: the checks use ids, but servers need one."""
    from tokenizers import Tokenizer, models

    words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(VOCABULARY)}, unk_token="t0"))
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="t0", bos_token="t1", eos_token="t2", pad_token="t3"
    )


def main() -> None:
    out, names = Path(sys.argv[1]), sys.argv[2:]
    for case in CASES:
        if not names or case.name in names:
            started = time.perf_counter()
            make(case, out)
            print(f"made {case.name} in {time.perf_counter() - started:.1f} s", flush=True)


if __name__ == "__main__":
    main()
