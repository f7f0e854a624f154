"""Tiny random-weight models, small enough for a CPU: `build("llama")` by family, `build_class` of any of transformers' classes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from tests.support.tiny_configs import tiny_config
from tests.support.tiny_overrides import OVERRIDES
from tests.support.tiny_sizes import VOCAB

__all__ = ["CORE_FAMILIES", "EAGER_ONLY", "FAMILIES", "MOST_WEIGHTS", "VOCAB", "build", "build_class", "spread_weights"]

MOST_WEIGHTS = 30_000_000
_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_WINDOW = {"sliding_window": 8}
_GEMMA = {**_WINDOW, "query_pre_attn_scalar": 16}

# family -> (model type, what of its tiny configuration is otherwise)
_FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral_window": ("mistral", _WINDOW),
    "gemma3": ("gemma3_text", {**_GEMMA, "sliding_window_pattern": 2}),
    "phi3": ("phi3", {}),
    "gpt_neox": ("gpt_neox", {}),
    "olmo2": ("olmo2", {}),
    "gemma": ("gemma", {}),
    "gemma2": ("gemma2", _GEMMA),
    "gpt2": ("gpt2", {}),
    "opt": ("opt", {}),
    "falcon": ("falcon", {"new_decoder_architecture": True, "alibi": False}),
    "falcon_mqa": ("falcon", {"new_decoder_architecture": False, "multi_query": True, "alibi": False}),
    "falcon_alibi": ("falcon", {"new_decoder_architecture": False, "multi_query": True, "alibi": True}),
    "bloom": ("bloom", {}),
    "gpt_oss": ("gpt_oss", _WINDOW),
    "starcoder2": ("starcoder2", {}),
    "cohere": ("cohere", {}),
    "granite": ("granite", {}),
    "gptj": ("gptj", {}),
    "stablelm": ("stablelm", {}),
    "phi": ("phi", {}),
    "qwen3_moe": ("qwen3_moe", {"head_dim": 16}),
    "mixtral": ("mixtral", {}),
    "deepseek_v3": ("deepseek_v3", {"num_key_value_heads": 4, "first_k_dense_replace": 1}),
}
FAMILIES = tuple(_FAMILIES)
# the families that the first release promises; the rest are breadth
CORE_FAMILIES = FAMILIES[: FAMILIES.index("gemma")]
# transformers offers these no SDPA implementation
EAGER_ONLY = ("gemma2", "bloom", "gpt_oss", "gptj")


def build(name: str, attn_implementation: str = "sdpa", layers: int = 2, *, seed: int = 0, **overrides: Any) -> torch.nn.Module:
    """A causal language model of the family, float32, in eval mode, weights drawn from `seed`.

    attn_implementation: "sdpa" or "eager". overrides: configuration fields. Raises KeyError for an unknown family.
    """
    from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING

    model_type, fields = _FAMILIES[name]
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING[CONFIG_MAPPING[model_type]]
    given = {**_TOKENS, **fields, **overrides}
    return build_class(model_class, attn_implementation, layers=layers, by_layer=False, seed=seed, overrides=given)


def build_sharp() -> torch.nn.Module:
    """A Llama of two layers whose attention is sharper than that of random weights, so that heads differ."""
    made = build("llama", layers=2, max_position_embeddings=1024)
    with torch.no_grad():
        for layer in made.model.layers:
            layer.self_attn.q_proj.weight.mul_(6)
            layer.self_attn.k_proj.weight.mul_(6)
    return made


def build_class(
    model_class: Any,
    attn_implementation: str | None = None,
    *,
    layers: int = 2,
    kv_heads: int = 2,
    by_layer: bool = True,
    seed: int = 0,
    overrides: Mapping[str, Any] | None = None,
) -> torch.nn.Module:
    """A model of one of transformers' classes, float32, in eval mode, weights drawn from `seed`.

    attn_implementation: "sdpa", "eager", or None for what the class takes by itself. layers, kv_heads, by_layer: as in `tiny_config`.
    overrides: configuration fields, beside those of its type. Raises ValueError for a model that is not tiny.
    """
    given = {**OVERRIDES.get(model_class.config_class.model_type, {}), **(overrides or {})}
    config = tiny_config(model_class.config_class, kv_heads=kv_heads, layers=layers, by_layer=by_layer, overrides=given)
    chosen = {"attn_implementation": attn_implementation} if attn_implementation else {}
    with torch.device("meta"):
        sizes = [p.numel() for p in model_class._from_config(config, dtype=torch.float32, **chosen).parameters()]
    if sum(sizes) > MOST_WEIGHTS:
        raise ValueError(f"{sum(sizes)} weights, the largest tensors of {sorted(sizes)[-4:]}")
    torch.manual_seed(seed)
    return model_class._from_config(config, dtype=torch.float32, **chosen).to(torch.float32).eval()


@torch.no_grad()
def spread_weights(model: torch.nn.Module, seed: int = 0) -> None:
    """Draws weights anew, large enough for attention to be far from uniform, and for parameters that begin as zeros to show."""
    torch.manual_seed(seed)
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if isinstance(module, torch.nn.Embedding):
            module.weight.normal_(0, 0.5)
        elif isinstance(weight, torch.nn.Parameter) and weight.dim() == 2:
            if isinstance(module, torch.nn.Linear):
                weight.normal_(0, 1.2 / weight.shape[1] ** 0.5)
            elif "Conv1D" in type(module).__name__:  # GPT-2's: a linear layer with its weight the other way around
                weight.normal_(0, 1.2 / weight.shape[0] ** 0.5)
    for name, parameter in model.named_parameters():
        if not parameter.is_floating_point() or not parameter.numel():
            continue
        unset = float(parameter.abs().max()) == 0 or not torch.isfinite(parameter).all()
        if unset or (parameter.dim() == 3 and "expert" in name):
            parameter.normal_(0, 0.1)
