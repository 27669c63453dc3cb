"""Small models and a tokenizer."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def tiny_llama(**overrides: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {
        "vocab_size": 128,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 3,
    }
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **overrides})).eval()


def tiny_experts(**overrides: Any) -> Any:
    """Two blocks of four experts, two of which each token gets."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    sizes = {
        "vocab_size": 128,
        "hidden_size": 32,
        "intermediate_size": 48,
        "moe_intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "initializer_range": 0.2,
    }
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**{**sizes, **overrides})).eval()


def tiny_gpt2(**overrides: Any) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=128,
        n_embd=64,
        n_layer=2,
        n_head=4,
        n_positions=64,
        bos_token_id=1,
        eos_token_id=2,
        **overrides,
    )
    return GPT2LMHeadModel(config).eval()


def tiny_llava() -> Any:
    """A model whose tensors have other names on the hub than in memory."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    text = LlamaConfig(**{**tiny_llama().config.to_dict(), "num_hidden_layers": 1})
    return LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text, image_token_index=120))


def tiny_opt(**overrides: Any) -> Any:
    from transformers import OPTConfig, OPTForCausalLM

    torch.manual_seed(0)
    sizes = {
        "vocab_size": 512,
        "hidden_size": 128,
        "word_embed_proj_dim": 128,
        "ffn_dim": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 512,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
    }
    return OPTForCausalLM(OPTConfig(**{**sizes, **overrides})).eval()


class Reads(nn.Module):
    """Two layers that read tokens, and no transformers model."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words, self.first, self.last = nn.Embedding(128, 32), nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.last(self.first(self.words(input_ids)).relu())


def rows(count: int = 24, length: int = 40) -> list[torch.Tensor]:
    """Tokens of so many samples."""
    return list(torch.randint(0, 128, (count, length), generator=torch.Generator().manual_seed(1)))


class Plain(nn.Module):
    """A module tree of its own: odd sizes, a bias, a buffer, a tied pair, a shared layer, a view."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(32, 48)
        self.inner = nn.Sequential(nn.Linear(48, 96), nn.GELU(), nn.Linear(96, 48, bias=False))
        self.again = self.inner[2]
        self.register_buffer("shift", torch.arange(48.0))
        self.window = nn.Parameter(torch.randn(4, 48)[1])
        self.head = nn.Linear(48, 32, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens) + self.shift * self.window
        x = self.inner(x)
        x = self.again(torch.cat([x, x], -1))
        return self.head(x)


def tokenizer() -> Any:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(2048)}, unk_token="t0"))
    return PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="t0", bos_token="t1", eos_token="t2", pad_token="t3"
    )
