"""Several texts one after the other in a row of a tower, such as the images of a prompt or the windows of an image: one attention, whose
mask has a document for each.

A layer is told where texts end (`cu_seqlens`). For kernels of variable lengths transformers' layers hand that on to one call of
attention; for others they cut queries, keys and values at these numbers, and a graph is one for each number of texts. What stands for a
layer here asks for the former, and attends with a mask.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from sparsify.generation.regions import claims
from sparsify.generation.regions.layers import Layer, NotShared

log = logging.getLogger(__name__)

_ROWS = 12  # that a claim is run over
# transformers takes an attention of this word for one of variable lengths
NAME = "sparsify_flash_documents"
BOUNDS = "cu_seqlens"
LONGEST = "max_seqlen"


def attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **call: Any) -> tuple[Tensor, None]:
    """The attention function that transformers calls.

    Args:
        query: [1, query_heads, tokens, head_dim]. key, value: [1, kv_heads, tokens, head_dim].
        call: `cu_seq_lens_q` and `cu_seq_lens_k`, integers [texts + 1], from 0 to the number of tokens; scaling, dropout, `is_causal`.

    Returns:
        output [1, tokens, query_heads, v_head_dim], and None in place of the attention weights.

    Raises:
        NotShared: it is no attention of texts that see themselves alone, to both sides.
    """
    bounds = call.pop("cu_seq_lens_q", None)
    if bounds is None or call.pop("cu_seq_lens_k", None) is not bounds or attention_mask is not None or call.pop("is_causal", None):
        raise NotShared("its texts are not told by bounds alone")
    mask = None
    if bounds.shape[0] > 2:
        places = torch.arange(query.shape[2], dtype=bounds.dtype, device=query.device)
        text = torch.searchsorted(bounds[1:], places, right=True)
        mask = (text[None, :] == text[:, None])[None, None]
    known = {name: call[name] for name in ("scaling", "dropout") if name in call}
    output = ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, mask, is_causal=False, **known)
    return output[0], None


def told(config: Any) -> Any:
    """A configuration under which layers call `attend`."""
    if NAME not in ALL_ATTENTION_FUNCTIONS:
        ALL_ATTENTION_FUNCTIONS.register(NAME, attend)
    changed = copy.copy(config)
    vars(changed)["_attn_implementation_internal"] = NAME  # the property would change configurations that are shared
    return changed


def bounds(given: Mapping[str, Any]) -> Tensor | None:
    """Where the texts end that a layer is given; None where it is not told."""
    found = given.get(BOUNDS)
    return found if isinstance(found, Tensor) and found.dim() == 1 and found.shape[0] > 1 else None


def serve(layer: Layer, hidden: Tensor, given: Mapping[str, Any]) -> bool:
    """Runs a layer over a few rows of what it is given, as it is and in this way, and says whether both compute the same: nothing else
    shows that it takes bounds for what they are here.

    Args:
        hidden: [tokens, width]. given: its arguments by name.
    """
    told = bounds(given)
    if layer.over_documents is None or told is None or hidden.dim() != 2:
        return False
    rows = min(_ROWS, hidden.shape[0])
    ends = torch.tensor([0, rows] if told.shape[0] == 2 else [0, rows // 3, rows], dtype=told.dtype, device=told.device)
    few = {name: _first(value, hidden.shape[0], rows) for name, value in given.items()} | {BOUNDS: ends}
    few.pop(layer.arguments[0], None)
    stream = hidden[:rows]
    try:
        with torch.no_grad():
            want, found = layer.module.forward(stream, **few), layer.over_documents.current().forward(stream, **arguments(few))
    except Exception as error:
        log.debug("%s is not run over documents", layer.path, exc_info=error)
        return False
    return (
        type(want) is Tensor and type(found) is Tensor and want.shape == found.shape == stream.shape and claims.alike(stream, want, found)
    )


def _first(value: Any, tokens: int, rows: int) -> Any:
    """The first rows of what has one for each token."""
    if type(value) in (tuple, list):
        return type(value)(_first(one, tokens, rows) for one in value)
    return value[:rows] if isinstance(value, Tensor) and value.dim() > 1 and value.shape[0] == tokens else value


def arguments(kwargs: dict[str, Any]) -> dict[str, Any]:
    """A layer's arguments, without its having to ask how long the longest text is: a mask needs no such number."""
    return {**kwargs, LONGEST: 0} if LONGEST in kwargs and kwargs[LONGEST] is None else kwargs
