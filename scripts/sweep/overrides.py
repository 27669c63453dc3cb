"""Fields that some configurations need beside small sizes, since they depend on each other.

{model type, also of a part: {field: value}}; a dotted field belongs to a part. `...` leaves a field to its class.
"""

from __future__ import annotations

from typing import Any

_ROPE = {"rope_type": "default", "rope_theta": 1e4}
_MAPPED = {"vocabulary_map": {"<image>": 255, "<|extra_200|>": 254, "IMGIMGBSZ": 253, "<|image_token|>": 255}}


def _gemma4_assistant_text() -> Any:
    from transformers import Gemma4TextConfig

    return Gemma4TextConfig(
        hidden_size_per_layer_input=0, vocab_size_per_layer_input=0, num_hidden_layers=2, num_kv_shared_layers=2
    )


def _gemma4_vision() -> Any:
    from transformers import Gemma4VisionConfig

    sizes: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "head_dim": 32,
        "patch_size": 8,
    }
    return Gemma4VisionConfig(**sizes, num_attention_heads=2, num_key_value_heads=2, pooling_kernel_size=2)


OVERRIDES: dict[str, dict[str, Any]] = {
    "aria": {"projector_patch_to_query_dict": {64: 16}},
    "bamba": {"attn_layer_indices": [1]},
    "bit": {"num_groups": 8},
    "blip-2": {"image_token_index": 255},
    "blt": {"encoder_hash_byte_group_vocab": 64},
    "chameleon": _MAPPED,
    "cohere_compass_text": {"rope_parameters": {"full_attention": {**_ROPE, "mrope_section": [4, 6, 6]}}},
    "codegen": {"n_head": 4, "rotary_dim": 16},
    "cvt": {"depth": [1, 2, 3]},
    "dbrx": {"attn_config.rope_theta": 1e4, "attn_config.kv_n_heads": 1, "attn_config.clip_qkv": 8.0},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "deepseek_ocr2_text": {"num_experts_per_tok": 2, "mlp_layer_types": ["dense", "sparse"]},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "n_group": 1, "topk_group": 1},
    "donut-swin": {"image_size": 224},
    "swin": {"image_size": 224},
    "efficientnet": {"depth_coefficient": 1.0, "width_coefficient": 0.5, "hidden_dim": 640},
    "emu3": _MAPPED,
    "ernie4_5_vl_moe_text": {"rope_parameters": {**_ROPE, "mrope_section": [6, 6, 4]}},
    "esm": {"vocab_size": 64, "pad_token_id": 1, "mask_token_id": 32},
    "falcon_h1": {"mamba_d_ssm": 128, "mamba_n_heads": 4, "mamba_d_head": 32},
    "fun_asr_nano": {"adaptor_config.intermediate_size": 16},
    "gemma3n_text": {
        "num_kv_shared_layers": 2,
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "intermediate_size": [128] * 4,
        "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0],
        "laurel_rank": 32,
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granite4_vision": {"deepstack_layer_map": [[-1, 0]], "downsample_rate": "4/8"},
    "granite_speech_plus_encoder": {"context_size": 8, "max_pos_emb": 16},
    "granite_speech_encoder": {"context_size": 8, "max_pos_emb": 16},
    "gemma4": {"vision_config": _gemma4_vision},
    "gemma4_assistant": {"text_config": _gemma4_assistant_text},
    "hrm_text": {"num_layers_per_stack": 1, "H_cycles": 2, "L_cycles": 2, "num_hidden_layers": 6},
    "hunyuan_v1_moe": {"num_experts": 4, "moe_topk": 2},
    "instructblip": {"image_token_index": 255},
    "instructblipvideo": {"image_token_index": 255, "video_token_index": 254},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"], "num_hidden_layers": 3, "num_dense_layers": 1},
    "llama4_vision_model": {"intermediate_size": 256},
    "mamba2": {"num_heads": 4, "n_groups": 1},
    "mllama_vision_model": {"vision_output_dim": 192},
    "mllama_text_model": {"num_hidden_layers": 3, "cross_attention_layers": [1]},
    "musicgen_decoder": {"num_codebooks": 1},
    "musicgen_melody_decoder": {"num_codebooks": 1},
    "mimi": {"upsample_groups": 64, "num_filters": 8},
    "mobilenet_v1": {"depth_multiplier": 0.25},
    "mobilenet_v2": {"depth_multiplier": 0.35, "finegrained_output": False},
    "molmo2": {"adapter_config.vision_feature_layer": [1, 0]},
    "nemotron_h_omni": {"video_temporal_patch_size": 2, "vision_config.video_temporal_patch_size": 2},
    "perceiver": {"d_latents": 64, "num_self_attends_per_block": 2, "num_latents": 16, "output_shape": (1, 4, 16, 16)},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 32,
        "indexer_budget": 16,
        "indexer_compress_ratio": 4,
    },
    "paddleocr_vl_text": {"rope_parameters": {**_ROPE, "mrope_section": [4, 6, 6]}},
    "qwen2_5_omni_thinker": {"vision_start_token_id": 254},
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 254},
    "reformer": {"axial_pos_shape": (8, 16), "axial_pos_embds_dim": (32, 32), "attn_layers": ("local", "lsh")},
    "vibevoice_acoustic_tokenizer": {"num_filters": 4},
    "vibevoice_acoustic_tokenizer_encoder": {"num_filters": 4},
    "vibevoice_acoustic_tokenizer_decoder": {"num_filters": 4},
    "wav2vec2-bert": {"vocab_size": 64},
    "wav2vec2-conformer": {"vocab_size": 64},
    "xmod": {"default_language": "en_XX"},
    "diffusion_gemma_text": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 64},
    "levit": {"patch_size": 16},
    "pp_lcnet": {"stem_channels": 16},
    "moonshine_streaming": {"num_key_value_heads": 2},
    "shieldgemma2": {"text_config.vocab_size": 16384},
    "xlstm": {"qk_dim_factor": 1.0},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "step3p7_text": {"sliding_window": 16},
    "step3p7": {"text_config.sliding_window": 16},
    "hgnet_v2": {"hidden_sizes": (32, 32, 32, 32)},
    "pix2struct_vision_model": {"patch_embed_hidden_size": 192},
    "inkling_vision": {"num_hidden_layers": 4},
    "dots3_note_text": {
        "layer_types": ["indexed_attention"] * 2,
        "num_hidden_layers": 2,
        "mlp_layer_types": ["dense", "sparse"],
    },
    "zamba": {
        "layers_block_type": ["linear_attention", "hybrid", "hybrid"],
        "num_hidden_layers": 3,
        "attention_hidden_size": ...,
        "attention_head_dim": ...,
    },
}

# {(mapping, type): {field: value}}.
BY_MAPPING: dict[tuple[str, str], dict[str, Any]] = {
    ("causal-lm", "reformer"): {"is_decoder": True},
}
