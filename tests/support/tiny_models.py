"""Tiny random-weight decoders, one per family, small enough for a CPU: `build("llama")`."""

from __future__ import annotations

from typing import Any

import torch

VOCAB = 128
_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_LLAMA_LIKE = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
_GPT_LIKE = {"vocab_size": VOCAB, "n_embd": 64, "n_head": 4, "n_positions": 512}
_MHA = {key: value for key, value in _LLAMA_LIKE.items() if key != "num_key_value_heads"}
_DEEPSEEK = {
    "num_key_value_heads": 4,
    "moe_intermediate_size": 32,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "n_group": 1,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
}
_FALCON = {"vocab_size": VOCAB, "hidden_size": 64, "num_attention_heads": 4}
_OPT = {"vocab_size": VOCAB, "hidden_size": 64, "ffn_dim": 128, "num_attention_heads": 4, "max_position_embeddings": 512}
_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_GEMMA = {"head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 16}

# family -> (transformers configuration class, its arguments beside the number of layers)
_RECIPES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", _LLAMA_LIKE),
    "qwen2": ("Qwen2Config", _LLAMA_LIKE),
    "qwen3": ("Qwen3Config", {**_LLAMA_LIKE, "head_dim": 16}),
    "mistral": ("MistralConfig", {**_LLAMA_LIKE, "sliding_window": None}),
    "mistral_window": ("MistralConfig", {**_LLAMA_LIKE, "sliding_window": 8}),
    "gemma3": ("Gemma3TextConfig", {**_LLAMA_LIKE, **_GEMMA, "sliding_window_pattern": 2}),
    "phi3": ("Phi3Config", _LLAMA_LIKE),
    "gpt_neox": ("GPTNeoXConfig", _MHA),
    "olmo2": ("Olmo2Config", _LLAMA_LIKE),
    "gemma": ("GemmaConfig", {**_LLAMA_LIKE, "head_dim": 16}),
    "gemma2": ("Gemma2Config", {**_LLAMA_LIKE, **_GEMMA}),
    "gpt2": ("GPT2Config", _GPT_LIKE),
    "opt": ("OPTConfig", {**_OPT, "word_embed_proj_dim": 64}),
    "falcon": ("FalconConfig", {**_FALCON, "new_decoder_architecture": True, "num_kv_heads": 2, "alibi": False}),
    "falcon_mqa": ("FalconConfig", {**_FALCON, "new_decoder_architecture": False, "multi_query": True, "alibi": False}),
    "falcon_alibi": ("FalconConfig", {**_FALCON, "new_decoder_architecture": False, "multi_query": True, "alibi": True}),
    "bloom": ("BloomConfig", {"vocab_size": VOCAB, "hidden_size": 64, "n_head": 4}),
    "gpt_oss": ("GptOssConfig", {**_LLAMA_LIKE, "head_dim": 16, "num_local_experts": 4, "sliding_window": 8}),
    "starcoder2": ("Starcoder2Config", _LLAMA_LIKE),
    "cohere": ("CohereConfig", _LLAMA_LIKE),
    "granite": ("GraniteConfig", _LLAMA_LIKE),
    "gptj": ("GPTJConfig", {**_GPT_LIKE, "rotary_dim": 8}),
    "stablelm": ("StableLmConfig", _LLAMA_LIKE),
    "phi": ("PhiConfig", _LLAMA_LIKE),
    "qwen3_moe": ("Qwen3MoeConfig", {**_LLAMA_LIKE, **_MOE, "head_dim": 16}),
    "mixtral": ("MixtralConfig", {**_LLAMA_LIKE, "num_local_experts": 4}),
    "deepseek_v3": ("DeepseekV3Config", {**_LLAMA_LIKE, **_DEEPSEEK}),
}
FAMILIES = tuple(_RECIPES)
# the families that the first release promises; the rest are breadth
CORE_FAMILIES = FAMILIES[: FAMILIES.index("gemma")]
# transformers offers these no SDPA implementation
EAGER_ONLY = ("gemma2", "bloom", "gpt_oss", "gptj")


def build(name: str, attn_implementation: str = "sdpa", layers: int = 2, *, seed: int = 0, **overrides: Any) -> torch.nn.Module:
    """A causal language model of the family, float32, in eval mode, weights drawn from `seed`.

    attn_implementation: "sdpa" or "eager". overrides: configuration fields. Raises KeyError for an unknown family.
    """
    import transformers

    class_name, arguments = _RECIPES[name]
    arguments = {**arguments, **_TOKENS, **overrides}
    arguments["n_layer" if class_name in ("GPT2Config", "GPTJConfig", "BloomConfig") else "num_hidden_layers"] = layers
    config = getattr(transformers, class_name)(**arguments)
    torch.manual_seed(seed)
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attn_implementation).eval()
