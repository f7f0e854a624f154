"""How small a configuration's numbers become in tiny models: by the name of the field, whichever of transformers' models it is of."""

from __future__ import annotations

import re
from typing import Any

VOCAB = 128
WIDTH, HEADS, HEAD_DIM, POSITIONS = 64, 4, 16, 512

# Size, then what names of fields end with; earlier lines win. Numbers that are smaller already stay. "kv_heads" and "layers" are chosen by
# the caller, since not every model may have fewer KV heads than heads, and some repeat a pattern of layers.
_SIZES: tuple[tuple[int | str | None, str], ...] = (
    (VOCAB, "vocab_size vocab_size_per_layer_input"),
    (
        None,
        "conv_kernel conv_kernel_size d_conv conv_kernel_dim short_conv_kernel_size conv1d_width conv_output_size tokenizer_chunk_size "
        "audio_chunk_size encoder_chunk_size",
    ),
    (
        32,
        "moe_intermediate_size expert_intermediate_size shared_intermediate_size moe_ffn_hidden_size expert_ffn_hidden_size moe_ffn_dim "
        "expert_hidden_size expert_hidden_dim moe_hidden_size shared_expert_hidden_size moe_intermediate_dim expert_ffn_dim expert_dim",
    ),
    (8, "qk_rope_head_dim rope_head_dim rotary_dim"),
    (
        HEAD_DIM,
        "head_dim head_size d_head dim_head dim_heads headdim head_v_dim head_k_dim kv_channels d_kv head_dimension mlstm_dim_head",
    ),
    (32, "lora_rank lora_r"),
    (
        "kv_heads",
        "num_key_value_heads num_kv_heads n_kv_heads key_value_heads num_key_value_head kv_heads n_head_kv num_query_groups n_kv_head "
        "num_attention_groups",
    ),
    (8, "mamba_n_heads mamba_num_heads ssm_num_heads"),
    (2, "linear_num_key_heads linear_key_heads lin_num_key_heads num_k_heads"),
    (
        HEADS,
        "num_attention_heads attention_heads n_head n_heads num_heads heads num_value_heads num_v_heads num_attention_head nhead",
    ),
    (
        "layers",
        "num_hidden_layers n_layer n_layers num_layers layers num_layer depth num_blocks n_block num_hidden_layer num_block",
    ),
    (
        2 * WIDTH,
        "intermediate_size ffn_dim n_inner d_ff ffn_hidden_size inner_dim feedforward_size intermediate_dim mlp_dim feed_forward_size "
        "feed_forward_proj_dim ff_dim mlp_hidden_size dim_feedforward attention_hidden_size attn_hidden_size",
    ),
    (
        WIDTH,
        "lru_width projection_dim out_hidden_size pooler_output_size mm_hidden_size output_dim output_size output_hidden_size proj_dim "
        "projector_hidden_size projector_dim merger_dim projection_hidden_size",
    ),
    (16, "hidden_size_per_layer_input laurel_rank"),
    (32, "index_topk topk_index"),
    (HEAD_DIM, "d_state state_size linear_state_size"),
    (
        WIDTH,
        "hidden_size d_model n_embd dim emb_dim embed_dim embedding_size embedding_dim embd_dim hidden_dim hidden_sizes model_dim "
        "encoder_hidden_dim width hidden_dims d_embed d_embedding",
    ),
    (
        2,
        "num_experts_per_tok num_experts_per_token moe_k experts_per_token moe_topk num_selected_experts router_topk moe_top_k "
        "num_activated_experts top_k_experts num_experts_per_topk num_expert_per_tok",
    ),
    (
        4,
        "num_experts n_routed_experts num_local_experts n_experts num_expert num_routed_experts num_total_experts n_routed_expert",
    ),
    (
        1,
        "n_group topk_group n_groups num_expert_group n_shared_experts num_shared_experts num_limited_groups num_groups n_expert_groups "
        "n_limited_groups",
    ),
    (2, "zero_expert_num"),
    (
        POSITIONS,
        "max_position_embeddings n_positions max_sequence_length max_seq_len max_seq_length n_ctx seq_length max_len max_target_positions "
        "model_max_length max_pos seq_len max_token_len max_encoder_position_embeddings max_decoder_position_embeddings max_seqlen",
    ),
    (
        64,
        "sliding_window sliding_window_size attention_window_size window_size_left window local_attention local_window "
        "attention_chunk_size local_window_size attn_window chunk_size",
    ),
    (8, "time_step_rank mamba_dt_rank dt_rank"),
    (32, "image_size"),
    (8, "patch_size"),
    (
        8,
        "num_query_tokens num_queries query_length num_latents resampler_n_latents max_image_tokens num_image_tokens",
    ),
    (64, "codebook_size audio_vocab_size codebook_dim"),
)
_ENDINGS = [(re.compile(rf"(?:.*_)?(?:{names.replace(' ', '|')})"), size) for size, names in _SIZES]


def size_of(name: str) -> int | str | None:
    """Of the field `name`: its largest size, "kv_heads" or "layers"; None where it stays as it is."""
    return next((size for ending, size in _ENDINGS if ending.fullmatch(name)), None)


def shrunk(name: str, value: Any, kv_heads: int, layers: int) -> Any:
    """The field's value in a tiny model; what is not a number stays."""
    if isinstance(value, bool) or not isinstance(value, int):
        return value
    size = size_of(name)
    if size == "kv_heads":
        return min(value, kv_heads)
    if size == "layers":
        return min(value, layers)
    return min(value, size) if isinstance(size, int) else value
