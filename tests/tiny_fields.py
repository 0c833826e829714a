"""Fields of tiny configs, by model type, beyond what the names of fields tell."""

from typing import Any

from conftest import VOCAB, WINDOW

ORIGINAL_LENGTH = 16  # where a rotary embedding changes with length
GROUPED = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
ALTERNATING = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": WINDOW}
BY_LAYER = {
    name: {"rope_type": "default", "rope_theta": 10000.0} for name in ALTERNATING["layer_types"]
}
LONGROPE = {
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 4,
        "long_factor": [4.0] * 4,
        "original_max_position_embeddings": ORIGINAL_LENGTH,
        "factor": 8.0,
    },
    "original_max_position_embeddings": ORIGINAL_LENGTH,
}
MSCALED = {
    "rope_parameters": {**LONGROPE["rope_parameters"], "short_mscale": 1.25, "long_mscale": 1.5}
}
SECTIONS = {
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
}
TWO_SECTIONS = {"rope_parameters": {**SECTIONS["rope_parameters"], "mrope_section": [1, 1, 0]}}
LAST_LARGEST = {"rope_parameters": {**SECTIONS["rope_parameters"], "mrope_section": [1, 1, 2]}}
IMAGE_TOKENS = {"vocabulary_map": {"<image>": 9, "<|extra_200|>": 10, "IMGIMGAZ": 11}}
# model type → its fields
EXCEPTIONS: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "apertus1p5": {"image_token_offset": 20, "audio_token_offset": 28},
    "bailing_hybrid": {"num_expert_group": 1},
    "blt": {"encoder_hash_byte_group_vocab": VOCAB},
    "chameleon": IMAGE_TOKENS,
    "cohere_compass_text": {
        **ALTERNATING,
        "rope_parameters": BY_LAYER,
    },
    "dbrx": {
        "attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 48, "moe_top_k": 2},
    },
    "deepseek_v2": {
        "num_experts_per_tok": 2,
        "head_dim": 8,
        "q_lora_rank": 16,
        "first_k_dense_replace": 1,
    },
    "deepseek_ocr2_text": {
        "num_experts_per_tok": 2,
        "head_dim": 8,
        "mlp_layer_types": ["dense", "sparse"],
    },
    "deepseek_ocr2_sam_vision_model": {"downsample_channels": [16, 32]},
    "diffusion_gemma_text": {
        "num_experts": 4,
        "top_k_experts": 2,
        "moe_intermediate_size": 24,
    },
    "dory": {
        "n_input_layers": 1,
        "n_output_layers": 1,
        "n_recurrent_layers": 2,
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "dots1": {
        **GROUPED,
        **ALTERNATING,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
    },
    "dots3_note_text": {"num_key_value_heads": 4},
    "emu3": IMAGE_TOKENS,
    "ernie4_5_vl_moe_text": {**LAST_LARGEST, "moe_intermediate_size": [24, 24]},
    "gemma4_assistant": {
        "text_config": {
            "model_type": "gemma4_text",
            **GROUPED,
            **ALTERNATING,
            "vocab_size": VOCAB,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_kv_shared_layers": 2,
            "global_head_dim": 8,
            "hidden_size_per_layer_input": 0,
            "vocab_size_per_layer_input": 0,
            "rope_parameters": BY_LAYER,
        },
        "backbone_hidden_size": 32,
        "num_centroids": 4,
    },
    "glm4v_text": SECTIONS,
    "glm4v_moe_text": TWO_SECTIONS,
    "glm5_next_text": {"index_kpool": 1},
    "glm_ocr_text": SECTIONS,
    "granite4_vision": {
        "deepstack_layer_map": [[-1, 1]],
        "spatial_target_layers": [1],
        "downsample_rate": "1/2",
        "qformer_config": {
            "model_type": "blip_2_qformer",
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
            "hidden_size": 32,
            "encoder_hidden_size": 32,
            "intermediate_size": 48,
        },
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "num_layers": 2},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "hrm_text": {"num_hidden_layers": 2},
    "hunyuan_v1_dense": GROUPED,
    "hunyuan_v1_moe": GROUPED,
    "hunyuan_vl_text": {**GROUPED, **SECTIONS},
    "hy_v4_vl_text": SECTIONS,
    "jamba": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "num_hidden_layers": 2,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
    },
    "laguna": ALTERNATING,
    "lfm2": {"num_hidden_layers": 2, "layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "longcat_flash": {"num_key_value_heads": 4, "qk_head_dim": 16},
    "mamba2": {"num_heads": 8, "n_groups": 2, "chunk_size": 8},
    "mellum": ALTERNATING,
    "minimax_m3_vl_text": {
        "layer_types": ["minimax_m3_sparse", "full_attention"],
        "rotary_dim": 4,
        "index_block_size": 4,
        "index_topk_blocks": 2,
    },
    "ministral": GROUPED,
    "mistral4": {"head_dim": 16},
    "mllama_text_model": {"cross_attention_layers": [1]},
    "molmo2_adapter": {"vision_feature_layer": [0]},
    "nemotron": GROUPED,
    "paddleocr_vl_text": SECTIONS,
    "nemotron_h": {"n_groups": 2},
    "phi3": LONGROPE,
    "phimoe": {**LONGROPE, **MSCALED},
    "qwen2": ALTERNATING,
    "qwen2_moe": ALTERNATING,
    "qwen2_vl_text": SECTIONS,
    "qwen2_5_vl_text": SECTIONS,
    "qwen2_5_omni_text": SECTIONS,
    "qwen2_5_omni_thinker": {"vision_start_token_id": 9},
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 9},
    "qwen3": ALTERNATING,
    "qwen4_exp_text": {
        "indexer_n_heads": 4,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 4,
        "indexer_compress_ratio": 2,
    },
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {
        "axial_pos_embds_dim": (16, 16),
        "axial_pos_shape": (8, 16),
        "attention_head_size": 8,
        "attn_layers": ["local", "lsh"],
        "feed_forward_size": 48,
        "local_attn_chunk_length": 8,
        "lsh_attn_chunk_length": 8,
        "num_buckets": 4,
    },
    "smollm3": {"no_rope_layers": [1, 0], **ALTERNATING},
    "step3p7_text": {"sliding_window": WINDOW},
    "xmod": {"default_language": "en_XX"},
    "zamba2": {"attention_head_dim": 16, "attention_hidden_size": 64},
    "zamba": {
        "attention_head_dim": 16,
        "attention_hidden_size": 64,
        "num_hidden_layers": 5,
        "layers_block_type": [
            "linear_attention",
            "linear_attention",
            "hybrid",
            "linear_attention",
            "hybrid",
        ],
    },
    "zaya": {
        "num_experts_per_tok": 1,
        "layer_types": ["hybrid", "hybrid_sliding"],
        "sliding_window": WINDOW,
    },
}

# without these fields a config cannot be made
REQUIRED: dict[str, dict[str, Any]] = {
    "gemma4_assistant": {"text_config": EXCEPTIONS["gemma4_assistant"]["text_config"]},
    "nemotron_h_omni": {"vision_config": {"model_type": "radio", "video_temporal_patch_size": 2}},
}
