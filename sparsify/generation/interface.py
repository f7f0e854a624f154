"""Attention of models that are not compiled: `attn_implementation="sparsify"`.

A call of several rows is a function of its own, captured by Dynamo as one node and rewritten as in any graph: the mask is read by its
values, methods are asked, what they choose runs, and where none acts `scaled_dot_product_attention` does. Nothing else of the model is
compiled.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn

NAME = "sparsify"
OPTIONS = "sparsify"  # of a model's configuration


def attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **call: Any
) -> tuple[Tensor, Tensor | None]:
    """The attention function that transformers calls.

    Args:
        module: the model's attention module; options are those of `module.config.sparsify`, of files as in docs/configuration.md otherwise.
        query: [batch, query_heads, query_len, head_dim].
        key, value: [batch, kv_heads, key_len, head_dim].
        attention_mask: [batch or 1, heads or 1, query_len, key_len], bool or added to scores; None: causal or full, as the module says.
        call: scaling, dropout and whatever else transformers passes.

    Returns:
        output [batch, query_len, query_heads, v_head_dim], and None in place of the attention weights.

    Raises:
        ConfigError: unknown or impossible options, or rules or a plan, which name layers.
        UnsupportedError: attention weights are asked for.
        ValueError: transformers' own, for attention that its `sdpa` does not know (softcap).
    """
    import torch
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    from sparsify.errors import UnsupportedError

    dense = ALL_ATTENTION_FUNCTIONS["sdpa"]
    if call.get("output_attentions"):
        raise UnsupportedError(
            "attention weights are never written out", where=NAME, hint='load the model with attn_implementation="eager"'
        )
    known = {name for name, given in call.items() if given is not None} <= _KNOWN
    if torch.compiler.is_dynamo_compiling() or query.shape[2] == 1 or call.get("dropout") or not known:
        return dense(module, query, key, value, attention_mask, **call)
    causal = call.get("is_causal")
    causal = attention_mask is None and (getattr(module, "is_causal", True) if causal is None else causal)
    if causal and key.shape[2] > query.shape[2]:  # a static cache's empty slots: without a mask a prompt begins at its first
        key, value = key[:, :, : query.shape[2]], value[:, :, : query.shape[2]]
    options = getattr(getattr(module, "config", None), OPTIONS, None) or {}
    shape = (query.shape[1], key.shape[1], query.shape[3], value.shape[3])
    for operand, dims in ((query, (0, 2)), (key, (0, 2)), (value, (0, 2)), (attention_mask, (0, 2, 3))):
        if operand is not None:
            torch._dynamo.maybe_mark_dynamic(operand, dims)
    output = _made(_settings(options), shape)(query, key, value, attention_mask, repr(call.get("scaling")), causal, shape[0] != shape[1])
    return output.transpose(1, 2).contiguous(), None


# arguments of a call that change nothing here, or that `attend` looks at
_KNOWN = {"scaling", "dropout", "is_causal", "sliding_window", "position_ids", "use_cache", "cache_position", "output_attentions"}


def _settings(options: dict[str, Any]) -> str:
    """The configuration in effect, as JSON."""
    from sparsify.errors import ConfigError
    from sparsify.planning import registry
    from sparsify.planning.config import config

    settings = config.load({**options, "lower": "eager", "compile_ahead": False}, method_models=registry.discover())
    if settings.rules or settings.plan:
        what = "rules" if settings.rules else "plan"
        raise ConfigError(f"{what} name layers, which attention by itself does not know", where=NAME, hint="use sparsify.compile(model)")
    return json.dumps(settings.as_options(), sort_keys=True, default=str)


@functools.cache
def _made(settings: str, shape: tuple[int, ...]) -> Callable[..., Tensor]:
    """What computes attention under a configuration given as JSON. shape: of heads, by number and dim; one code object each."""
    import torch

    from sparsify import pipeline
    from sparsify.graph import isolated
    from sparsify.planning import registry
    from sparsify.planning.config import config

    chosen = config.load({**json.loads(settings), "plan": None}, method_models=registry.discover())
    backend = lambda gm, example_inputs: pipeline.compile_graph(gm, example_inputs, chosen, chosen, alone=False)
    return torch.compile(isolated.copy_of(_attention), backend=backend)


def _attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: str, causal: bool, grouped: bool) -> Tensor:
    """scaling: as text, since Dynamo makes a symbol of a number."""
    from torch.nn.functional import scaled_dot_product_attention

    scale = None if scaling == "None" else float(scaling)
    return scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale, is_causal=causal, enable_gqa=grouped)
