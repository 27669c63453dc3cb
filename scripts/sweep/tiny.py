"""Makes a tiny configuration of any model type: well-known sizes become small, all else stays.

The default configuration is built, its fields are visited, and it is built again with small sizes, so that a class
derives dependent values anew. All widths are multiples of 32 and match: 64 = 2 heads of 32. Per-layer lists keep one
layer of every kind. Special tokens move into the small vocabulary.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from overrides import OVERRIDES
from transformers import CONFIG_MAPPING, PreTrainedConfig

VOCAB = 256
HIDDEN, WIDE, HEADS, HEAD = 64, 128, 2, 32
IMAGE, PATCH = 64, 8
LAYERS = 2

# {pattern of a field's whole name: its new value, or a function of the present one}. The first match counts; in lists
# every number is replaced.
RULES: tuple[tuple[str, Any], ...] = (
    (r"(num_)?(hidden_layers|decoder_layers|encoder_layers|layers|local_layers)", LAYERS),
    (
        r"n_layers?|depth|layers|num_(encoder|decoder)_layers|(encoder|decoder|speech_encoder|\w+_num_hidden)_layers",
        LAYERS,
    ),
    (r"\w*(t2u|resampler|adapter|residual)\w*_(layers|depth)|resampler_depth|aligner_num_add_layers", LAYERS),
    (
        r"depths|num_block_repeats|n_attn_blocks|stage_num(b_of_layers|_blocks)|block_sizes",
        lambda n: min(n, 1 + n // 3, 2),
    ),
    (r"conf_num_hidden_layers|num_timestamp_prediction_layers|num_layers_per_stack", LAYERS),
    (r"num_key_value_heads|num_kv_heads|\w+_num_key_value_heads|kv_n_heads|n_kv_heads", "kv"),
    (r"linear_num_(key|value)_heads|linear_num_heads|index_n_heads", HEADS),
    (r"(num|n|\w+_num)_(attention_)?heads?|n_heads?|(\w+_)?attention_heads|resampler_(n_)?heads", HEADS),
    (r"mamba_n(um)?_heads|mamba_num_heads|mamba_n_heads", 4),
    (r"qk_head_dim", ...),
    (r"rotary_dim", 16),
    (r"(\w+_)?head_dim|mamba_d_head|d_kv|d_head|kv_channels|kv_lora_rank|q_lora_rank|o_lora_rank", HEAD),
    (r"attention_head_dim|dim_head|resampler_dim_head|linear_head_dim|key_dim", HEAD),
    (r"n_groups?|topk_group|num_expert_group|mamba_n_groups", 1),
    (r"(moe_)?num_(local_|routed_)?experts|n_routed_experts|moe_num_experts|num_experts", lambda n: min(n, 4)),
    (r"zero_expert_num", 2),
    (r"num_experts_per_tok(en)?|moe_top_?k|moe_k|num_selected_experts", lambda n: min(n, 2)),
    (r"(n|num|moe_num)_shared_experts", lambda n: min(n, 1)),
    (r"\w*moe\w*intermediate_size\w*|\w*expert\w*(intermediate|hidden)_size|expert_ffn_hidden_size", HIDDEN),
    (r"(\w+_)?intermediate_size(_\w+)?|(\w+_)?ffn_(hidden_)?(dim|size)|ffn_dim|d_ff|dff|dim_ff|n_inner|mlp_dim", WIDE),
    (r"mlp_hidden_size|d_inner|projection_intermediate_size", WIDE),
    (r"hidden_sizes|(neck|encoder_hidden|decoder_hidden)_sizes|embed_dims", HIDDEN),
    (
        r"(\w+_)?hidden_size(_global)?|d_model|n_embd|embed_dim|dim|hidden_dim|embedding_size|emb_dim|embedding_dim",
        HIDDEN,
    ),
    (r"(\w+_)?(projection|output|out|proj|embed|latent)_(dim|hidden_dim|size)|projection_hidden_dim", HIDDEN),
    (r"vision_output_dim|pooler_output_size|projector_(input|output)_dim|adapter_(in|out)_dim|out_hidden_size", HIDDEN),
    (r"conv_dim|tdnn_dim|xvector_output_dim|classifier_proj_size|codevector_dim|codebook_dim|entity_emb_size", HEAD),
    (r"stage_(in|mid|out)_channels|stem_channels", lambda n: n if n < 8 else 32),
    (r"auxiliary_channels|aspp_out_channels|subsampling_conv_channels|conv_channels|downsample_channels", HEAD),
    (r"base_channels", 32),
    (r"adapter_input_size", HIDDEN),
    (r"image_size|resolution|input_size|train_size|max_image_size", lambda n: min(n, IMAGE)),
    (r"image_grid_pinpoints", IMAGE),
    (r"mm_tokens_per_image|image_seq_length|num_image_tokens", 16),
    (r"patch_size", lambda n: min(n, PATCH)),
    (
        r"(\w+_)?vocab_size(_\w+)?|tgt_vocab_size|(src|tgt|entity|decoder)_vocab_size|unpadded_vocab_size",
        lambda n: min(n, VOCAB),
    ),
    (r"max_position_embeddings|n_positions|n_ctx|max_seq_len|max_sequence_length|max_pos_emb", lambda n: min(n, 128)),
    (
        r"max_(en|de)coder_position_embeddings|max_target_positions|original_max_position_embeddings",
        lambda n: min(n, 128),
    ),
    (r"max_source_positions", lambda n: min(n, 32)),
    (r"\w*sliding_window|attention_chunk_size|attention_window|index_topk", lambda n: min(n, 16)),
    (r"ssm_state_size|mamba_d_state|state_size|mamba_d_ssm", lambda n: min(n, 16)),
    (r"mamba_chunk_size|chunk_size", lambda n: min(n, 16)),
    (r"num_conv_pos_embeddings", 16),
    (r"num_conv_pos_embedding_groups", 2),
    (r"num_queries|num_query_tokens|query_tokens|latent_query_num|resampler_n(um)?_latents", lambda n: min(n, 8)),
    (r"first_k_dense_replace|num_dense_layers|num_nextn_predict_layers", lambda n: min(n, 1)),
    (r"n_codes|codebook_size|num_embeddings", lambda n: min(n, 64)),
)
TOKEN = re.compile(r"\w*(_|^)(token_ids?|token_index|index|id)$")
INDICES = re.compile(r"\w*(index(es)?|indices|_layers|_idxs)$")
COUNTS = ("num_hidden_layers", "n_layers", "num_layers", "n_layer", "num_decoder_layers", "depth", "encoder_layers")


class Tokens:
    """Maps special tokens into the vocabulary: those that fit stay, others get the largest free ids, consistently."""

    def __init__(self) -> None:
        self.moved: dict[int, int] = {}

    def __call__(self, token: int) -> int:
        if token < VOCAB:
            return token
        return self.moved.setdefault(token, VOCAB - 1 - len(self.moved))


def tiny(kind: type[PreTrainedConfig], **more: Any) -> PreTrainedConfig:
    """A small configuration of that class, with the given fields."""
    try:
        default = kind()
    except Exception:  # noqa: BLE001 - some defaults contradict themselves
        default = kind(**_given(kind))
    return _shrunk(default, Tokens(), more)


def _given(kind: type[PreTrainedConfig]) -> dict[str, Any]:
    return {k: v() if callable(v) else v for k, v in OVERRIDES.get(kind.model_type, {}).items() if "." not in k}


def _shrunk(config: PreTrainedConfig, tokens: Tokens, more: dict[str, Any]) -> PreTrainedConfig:
    kind = type(config)
    overrides = {**OVERRIDES.get(kind.model_type, {}), **more}
    layers = _layers(config)
    values: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        name = config.attribute_map.get(field.name, field.name)
        if name not in vars(config):
            continue
        value = vars(config)[name]
        default = field.default if field.default is not dataclasses.MISSING else None
        if not field.init or field.name.startswith("_") or field.name in ("transformers_version", "model_type"):
            continue
        if isinstance(value, PreTrainedConfig):
            inner = {k.partition(".")[2]: v for k, v in overrides.items() if k.startswith(f"{field.name}.")}
            values[field.name] = _shrunk(value, tokens, inner)
            continue
        new = _small(field.name, value, config, layers, tokens)
        derived = value is not None and (default is None or isinstance(default, str)) and isinstance(value, int)
        if new != default and not (derived and new == value and type(value) is int and not TOKEN.match(field.name)):
            values[field.name] = new
    values |= {name: value() if callable(value) else value for name, value in overrides.items() if "." not in name}
    for name in [name for name, value in values.items() if value is ...]:
        del values[name]  # left to the class
    return kind(**values)


def _layers(config: PreTrainedConfig) -> tuple[int, list[int]]:
    """The number of layers, and those to keep: one of every kind in the per-layer lists."""
    names = [f.name for f in dataclasses.fields(config)]
    for count in (c for c in COUNTS if c in names):
        n = vars(config).get(count)
        lists: list[Any] = [v for v in map(vars(config).get, names) if isinstance(v, (list, tuple)) and len(v) == n]
        if isinstance(n, int) and n > 2 and lists:
            kinds: dict[str, int] = {}
            for i in range(n):
                kinds.setdefault(repr([v[i] for v in lists if not _counts_up(v)]), i)
            keep = sorted(kinds.values())[:4]
            keep += [i for i in range(n) if i not in keep][: max(0, LAYERS - len(keep))]
            return n, sorted(keep)
    return -1, list(range(LAYERS))


def _counts_up(values: Any) -> bool:
    return list(values) == sorted(set(values)) if all(isinstance(v, int) for v in values) else False


def _small(name: str, value: Any, config: PreTrainedConfig, layers: tuple[int, list[int]], tokens: Tokens) -> Any:
    count, keep = layers
    if value is None:
        return {"num_key_value_heads": HEADS, "head_dim": HEAD}.get(name)
    if isinstance(value, bool):
        return value
    if isinstance(value, dict):
        return _rope(value, config) if "rope" in name else value
    if _is_list(value):
        kind = type(value)
        if len(value) == count:
            value = [value[i] for i in keep]
            if INDICES.match(name) and all(isinstance(v, int) for v in value):
                return kind(min(v, i) for i, v in enumerate(value))
            return kind(_small(re.sub("_per_layer$", "", name), v, config, (-1, keep), tokens) for v in value)
        if "token" in name and all(isinstance(v, int) for v in value):
            return kind(map(tokens, value))
        if INDICES.match(name) and value and all(type(v) is int for v in value) and _rule(name) is None:
            return kind(_indices(value, len(keep)))
        return kind(_small(name, v, config, (-1, keep), tokens) for v in value)
    if not isinstance(value, int):
        return value
    if name in COUNTS and value == count:
        return len(keep)
    new = _rule(name)
    if new == "kv":
        heads = vars(config).get("num_attention_heads", value)
        return HEADS if not isinstance(heads, int) or value >= heads else 1
    if new is not None:
        return 0 if value == 0 else new(value) if callable(new) else new
    return tokens(value) if TOKEN.match(name) else value


def _rule(name: str) -> Any:
    return next((new for pattern, new in RULES if re.fullmatch(pattern, name)), None)


def _indices(values: Any, layers: int) -> list[int]:
    """Distinct indices of the last layers, as many as possible, counted from the start or the end."""
    if any(v < 0 for v in values):
        return [max(v, -layers) if v < 0 else min(v, layers) for v in values]
    return sorted({min(v, layers - 1 - i) for i, v in enumerate(sorted(values, reverse=True)) if i < layers})


def _rope(rope: dict[str, Any], config: PreTrainedConfig) -> dict[str, Any]:
    """Sections of a rotary embedding, which add up to half of a head."""
    new: dict[str, Any] = {k: _rope(v, config) if isinstance(v, dict) else v for k, v in rope.items()}
    if "rope_type" in new and "mrope_section" in getattr(config, "ignore_keys_at_rope_validation", ()):
        half = int(HEAD * new.get("partial_rotary_factor", 1.0)) // 2
        new["mrope_section"] = [half - 2 * (half * 3 // 8), half * 3 // 8, half * 3 // 8]
    if "original_max_position_embeddings" in new:
        new["original_max_position_embeddings"] = min(64, new["original_max_position_embeddings"])
    return new


def _is_list(value: Any) -> bool:
    return isinstance(value, (list, tuple))


def config_class(model_type: str) -> type[PreTrainedConfig]:
    return CONFIG_MAPPING[model_type]  # type: ignore[no-any-return]
