"""What a SparseCache is made with: which options go together, and which models it serves."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING

from sparsify.errors import ConfigError, UnsupportedError
from sparsify.generation.caches import attention as cache_attention
from sparsify.generation.caches.layer import divided_by
from sparsify.ops.limits import cdiv
from sparsify.ops.pages import Clusters, Pages
from sparsify.policies import Policy


def checked_budget(budget: object, prompt_len: int | None) -> int | float | None:
    if isinstance(budget, bool) or not isinstance(budget, int | float | None):
        raise ConfigError(f"must be tokens or a share, not {budget!r}", where="budget")
    if isinstance(budget, int) and budget < 1:
        raise ConfigError(f"must be at least 1 token, not {budget}", where="budget")
    if isinstance(budget, float):
        if not 0 < budget <= 1:
            raise ConfigError(f"a share lies above 0 and at most at 1, not {budget}", where="budget", hint="an int gives tokens")
        if prompt_len is not None:
            return max(1, cdiv(prompt_len * round(budget * 10**6), 10**6))
    return budget


def checked_codes(dtype: torch.dtype | str | None) -> str:
    """The bits in which keys and values are kept, "" for those of a dtype."""
    if not isinstance(dtype, str):
        return ""
    if dtype not in ("fp8", "int4"):
        raise ConfigError(f'must be a torch.dtype, "fp8" or "int4", not {dtype!r}', where="dtype")
    return dtype


def checked_read(read: str | Pages | None) -> Pages | None:
    if read is None or isinstance(read, Pages):
        return read
    if read not in ("pages", "clusters"):
        raise ConfigError(f'must be "pages", "clusters", a sparsify.Pages, a sparsify.Clusters or None, not {read!r}', where="read")
    return Pages() if read == "pages" else Clusters()


def check_clusters(read: Pages | None, policy: Policy, dtype: torch.dtype | str | None) -> None:
    """Raises UnsupportedError for what does not go together with clusters of a prefix."""
    if not isinstance(read, Clusters):
        return
    if policy.layout(1 << 30).window:
        what = f"policy {policy.name} has no prefix that stays"
        raise UnsupportedError(what, where="read", hint='policy "full", or one that chooses what it keeps')
    if isinstance(dtype, str):
        what = f"keys in {dtype} are codes of the slots around them, which clusters move apart"
        raise UnsupportedError(what, where="read", hint="leave one of them out")


def checked_every(every: object, policy: Policy, budget: int | float | None) -> int:
    if every is None:
        if policy.by_head:
            raise ConfigError(f"{policy.name} shares slots among heads, which takes room", where="every", hint="give every=64")
        if policy.awaits:
            raise ConfigError(
                f"{policy.name} scores tokens after their call, which takes room for them", where="every", hint="give every=512"
            )
        if policy.scores_once:
            what = f"{policy.name} scores tokens when they come, which takes room to keep the scores"
            raise ConfigError(what, where="every", hint="give every=512")
        return 0
    if isinstance(every, bool) or not isinstance(every, int) or every < 1:
        raise ConfigError(f"must be at least 1 token, not {every!r}", where="every")
    layout = policy.layout(1 << 30 if isinstance(budget, float) else budget)
    if layout.window or layout.grows:
        raise ConfigError(f"{policy.name} has nothing to select anew", where="every", hint="leave every out")
    return every


def check_divided(config: Any, policy: Policy) -> None:
    """Raises UnsupportedError where tensor parallelism gives this process some of a layer's heads, and that is not enough."""
    ranks = divided_by(config)
    heads = model_kv_heads(config)
    if heads % ranks:
        raise UnsupportedError(f"{heads} KV heads are not divided evenly by {ranks} processes", where="SparseCache")
    if ranks > 1 and policy.by_head:
        what = f"{policy.name} compares all heads of a layer, of which tensor parallelism gives this process some"
        raise UnsupportedError(what, where="SparseCache", hint="another policy")


def text_config(config: Any) -> Any:
    """That of the decoder of text. Raises ConfigError for what is no configuration of a model."""
    if not isinstance(config, PreTrainedConfig):
        what, hint = f"must be a model's configuration, not a {type(config).__name__}", "SparseCache(model.config, ...)"
        raise ConfigError(what, where="config", hint=hint)
    return config.get_text_config(decoder=True)


def check_model(config: Any) -> None:
    kind = getattr(config, "model_type", type(config).__name__)
    base = config._attn_implementation
    if base is not None and base not in cache_attention.NAMES and base not in cache_attention.NAMES.values():
        raise UnsupportedError(f"attention implementation {base!r}", where=kind, hint='load the model with attn_implementation="sdpa"')
    # the text part of a model with images may be no model of its own
    model = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None) or MODEL_MAPPING.get(type(config), None)
    if model is None or not getattr(model, "_supports_attention_backend", False):
        raise UnsupportedError(
            "its attention does not go through transformers' AttentionInterface", where=kind, hint="use an ordinary cache"
        )
    reasons = {
        "encoder-decoder models": getattr(config, "is_encoder_decoder", False),
        "attention without causality": not getattr(config, "is_causal", True),
        "latent attention (MLA)": getattr(config, "kv_lora_rank", None),
        "layers that share keys and values": getattr(config, "num_kv_shared_layers", 0),
        "ALiBi": getattr(config, "alibi", False),
    }
    for reason, applies in reasons.items():
        if applies:
            raise UnsupportedError(f"{reason} are not served" if reason[-1] == "s" else f"{reason} is not served", where=kind)


def kv_head_sizes(config: Any) -> tuple[int, int]:
    """Number of KV heads of this process, and head_dim."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return model_kv_heads(config) // divided_by(config), head_dim


def model_kv_heads(config: Any) -> int:
    """Number of KV heads of the model."""
    return getattr(config, "num_key_value_heads", None) or config.num_attention_heads
