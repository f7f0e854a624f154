"""Fields of tiny configurations that are not as their names say, by model type: sizes that have to fit, and layers of each kind."""

from __future__ import annotations

from typing import Any

DROP = object()  # leaves the field to the configuration's class

_THETA: dict[str, Any] = {"rope_type": "default", "rope_theta": 10000.0}
_THETA_BY_KIND = dict.fromkeys(("sliding_attention", "full_attention"), _THETA)
_FULL_WINDOW = ["full_attention", "sliding_attention"]
_WINDOW_FULL = ["sliding_attention", "full_attention"]
_MAMBA2 = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 16, "mamba_chunk_size": 64}
_DOTS3_TEXT = {
    "num_key_value_heads": 4, "head_dim": 24, "swa_num_attention_heads": 4, "swa_num_key_value_heads": 4, "swa_q_lora_rank": 32,
    "swa_kv_lora_rank": 32, "swa_head_dim": 24, "swa_qk_nope_head_dim": 16, "swa_v_head_dim": 16, "sliding_window": 64,
    "n_shared_experts": 1, "per_layer_config": DROP, "shared_experts_intermediate_size": 32, "rope_parameters": DROP,
    "layer_types": ["indexed_attention", "sliding_attention"], "mlp_layer_types": ["dense", "sparse"], "num_hidden_layers": 2,
}  # fmt: skip
_QWEN4_TEXT = {
    "indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 32, "indexer_compress_ratio": 4,
    "ngram_vocab_size_base": 500, "split_ngram_parts": 1, "hc_lowrank": 16,
}  # fmt: skip
_LLAMA4_TEXT = {
    "layer_types": ["chunked_attention", "full_attention"], "no_rope_layers": [1, 0], "num_hidden_layers": 2, "moe_layers": [1],
}  # fmt: skip
_COMPASS_TEXT = {"layer_types": _WINDOW_FULL, "rope_parameters": _THETA_BY_KIND}
_MUSICGEN = {"num_codebooks": 1, "pad_token_id": 0, "bos_token_id": 1}
_MEL80 = {"encoder_config": {"num_mel_bins": 80}}
_VISIBLE_TOKEN = {"vocabulary_map": {"<image>": 5}}
_THREE_TILES = {"image_grid_pinpoints": [[32, 64]]}  # of 32: two and the whole image
_TINY_TOKENIZER = {"num_filters": 4, "hidden_size": 16}


def _mrope(*section: int, **more: Any) -> dict[str, Any]:
    return {"text_config": {"rope_parameters": {**_THETA, "mrope_section": list(section)}, **more}}


def _gemma4_draft(text: str) -> dict[str, Any]:
    """All of a draft's layers read keys and values of the model that it drafts for."""
    return {
        "model_type": text, "vocab_size": 128, "hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "global_head_dim": 16, "num_hidden_layers": 2, "num_kv_shared_layers": 2,
        "layer_types": _WINDOW_FULL, "sliding_window": 64, "hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0,
        "rope_parameters": _THETA_BY_KIND,
    }  # fmt: skip


OVERRIDES: dict[str, dict[str, Any]] = {
    # decoders
    "bamba": {**_MAMBA2, "attn_layer_indices": [1]},
    "blenderbot": {"max_position_embeddings": 512},
    "blt": {
        "encoder_hash_byte_group_vocab": 1000, "encoder_hash_byte_group_size": [3, 4],
        "encoder_config": {"hidden_size_global": 64}, "decoder_config": {"hidden_size_global": 64},
    },
    "cohere_compass_text": _COMPASS_TEXT,
    "dbrx": {"attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0}},
    "deepseek_v2": {"num_experts_per_tok": 2, "num_key_value_heads": 4, "first_k_dense_replace": 1},
    "dory": {
        "num_hidden_layers": 3, "n_input_layers": 1, "n_recurrent_layers": 1, "n_output_layers": 1,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "layer_types": _FULL_WINDOW, "sliding_window": 64},
    "dots3_note_text": _DOTS3_TEXT,
    "granitemoehybrid": {
        **_MAMBA2, "layer_types": ["linear_attention", "full_attention"], "num_hidden_layers": 2, "shared_intermediate_size": 32,
    },
    "hrm_text": {"H_cycles": 1, "L_cycles": 1, "num_hidden_layers": 2, "L_bp_cycles": [1]},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "laguna": {"layer_types": _FULL_WINDOW},
    "lfm2": {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2, "full_attn_idxs": DROP},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2, "num_dense_layers": 1},
    "llama4_text": _LLAMA4_TEXT,
    "mamba2": {"num_heads": 8, "head_dim": 16, "n_groups": 1},
    "mellum": {"layer_types": _FULL_WINDOW},
    "minimax_m3_vl_text": {"layer_types": ["full_attention", "minimax_m3_sparse"], "index_block_size": 32, "index_topk_blocks": 3},
    "ministral": {"head_dim": 16, "layer_types": _WINDOW_FULL, "sliding_window": 64},
    "mistral4": {"qk_nope_head_dim": 8, "head_dim": 16, "num_key_value_heads": 4, "qk_head_dim": 16},
    "musicgen_decoder": _MUSICGEN,
    "musicgen_melody_decoder": _MUSICGEN,
    "qwen4_exp_text": _QWEN4_TEXT,
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "reformer": {
        "attn_layers": ["local", "lsh"], "axial_pos_embds": False, "num_buckets": 4, "hash_seed": 0, "attention_head_size": 16,
        "num_hidden_layers": DROP,
    },
    "zamba2": {
        "num_hidden_layers": 3, "layers_block_type": ["linear_attention", "hybrid", "hybrid"], "attention_head_dim": 32,
        "attention_hidden_size": 128, "mamba_headdim": 16, "n_mamba_heads": 8, "kv_channels": 16, "num_query_groups": 4,
        "num_key_value_heads": 4, "hybrid_layer_ids": DROP,
    },
    # with images
    "chameleon": _VISIBLE_TOKEN,
    "cohere_compass": {"text_config": _COMPASS_TEXT},
    "deepseek_ocr2": {"text_config": {"mlp_layer_types": ["dense", "sparse"], "num_experts_per_tok": 2}},
    "dots3_note": {
        "text_config": _DOTS3_TEXT, "vision_config": {"mlp_layer_types": ["dense", "dense"], "per_layer_config": DROP},
        "audio_config": {"adapter_input_size": 64},
    },
    "emu3": _VISIBLE_TOKEN,
    "ernie4_5_vl_moe": _mrope(3, 3, 2),
    "gemma3": {"mm_tokens_per_image": 4}, "shieldgemma2": {"mm_tokens_per_image": 4},
    "glm4v": _mrope(2, 3, 3), "glm46v": _mrope(2, 3, 3), "glm_ocr": _mrope(2, 3, 3), "glmga": _mrope(2, 3, 3),
    "glm4v_moe": _mrope(1, 1, 2),
    "granite4_vision": {"deepstack_layer_map": [[0, 0]], "spatial_target_layers": [1], "spatial_vision_layer": 0},
    "hunyuan_vl": {
        "text_config": {"head_dim": 16, "rope_parameters": {**_THETA, "mrope_section": [2, 2, 2, 2], "xdrope_section": [2, 2, 2, 2]}},
    },
    "hy_v4_vl": _mrope(1, 1, 2),
    "llava_next": _THREE_TILES, "llava_next_video": _THREE_TILES, "llava_onevision": _THREE_TILES,
    "gemma4_assistant": {"text_config": _gemma4_draft("gemma4_text")},
    "gemma4_unified_assistant": {"text_config": _gemma4_draft("gemma4_unified_text")},
    "llama4": {"text_config": _LLAMA4_TEXT},
    "mistral_large4": {
        "text_config": {
            "num_key_value_heads": 4, "kv_source_layers": [0, 1], "no_rope_layers": [1, 0], "mlp_layer_types": ["dense", "sparse"],
            "layer_types": ["indexed_attention", "indexed_attention"], "num_hidden_layers": 2,
        },
    },
    "paddleocr_vl": _mrope(2, 3, 3),
    "qwen2_5_omni_thinker": _mrope(2, 3, 3), "qwen2_5_vl": _mrope(2, 3, 3), "qwen2_vl": _mrope(2, 3, 3),
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 7},
    "qwen4_exp": {"text_config": _QWEN4_TEXT},
    # encoders
    "esm": {"vocab_size": 256, "pad_token_id": 0, "mask_token_id": 4, "max_position_embeddings": 512},
    "esmc": {"vocab_size": 256, "num_key_value_heads": 4},
    "mobilebert": {"hidden_size": 128, "embedding_size": 64, "intra_bottleneck_size": 64},
    "perceiver": {
        "num_latents": 32, "d_latents": 64, "d_model": 64, "num_self_attends_per_block": 2, "num_self_attention_heads": 4,
        "num_cross_attention_heads": 4, "qk_channels": 64, "v_channels": 64,
    },
    "xmod": {"default_language": "en_XX"},
    # speech
    "canary": _MEL80, "cohere_asr": _MEL80,
    "fun_asr_nano": {"adaptor_config": {"intermediate_size": 16}},
    "moonshine_streaming": {"num_key_value_heads": 4, "encoder_config": {"num_key_value_heads": 4}},
    "speech-encoder-decoder": {"encoder": {"num_feat_extract_layers": 7}},
    "speecht5": {"num_feat_extract_layers": 7, "vocab_size": 256},
    "vibevoice_asr": {f"{what}_tokenizer_encoder_config": _TINY_TOKENIZER for what in ("acoustic", "semantic")},
    "whisper": {"max_source_positions": 100, "max_target_positions": 448},
}  # fmt: skip
