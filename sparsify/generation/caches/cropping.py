"""Takes back the last tokens of a SparseCache's layer, exactly or not at all."""

from __future__ import annotations

from typing import Any

import torch

from sparsify.errors import CacheError
from sparsify.generation.caches import provisional


def check(layer: Any, tokens: int) -> None:
    """Raises CacheError when the last `tokens` tokens of a SparseLayer cannot be taken back exactly; changes nothing."""
    where = f"layer {layer.index}"
    if layer.shard is not None:
        raise CacheError("the text is divided among processes, and nothing of it can be taken back", where=where)
    if layer.held is not None:
        if tokens > layer.held.count:
            what = f"{tokens} tokens are to be removed, and what was evicted before the last {layer.held.count} is gone"
            raise CacheError(what, where=where, hint="give a budget that holds the whole text")
        return
    layer.check_told()  # tokens are counted from the newest one
    length = int(layer.length)
    if tokens > length + layer.left_out:
        raise CacheError(f"{tokens} tokens are to be removed, {length + layer.left_out} were seen", where=where)
    if length - tokens < layer.fixed:
        raise CacheError(
            f"the layer was not given all of the text, or has put it into clusters: {tokens} tokens cannot be taken back",
            where=where,
            hint="crop no more than what came after them or after prepare(), and the window that token_select keeps",
        )
    why = f"; {reason}" if (reason := provisional.unrecorded(layer)) else ""
    if bool((layer.seen != length).any()):
        raise CacheError(f"a padded batch cannot be cropped: which columns were padding is not kept{why}", where=where)
    kept = min(int(layer.counts.min()), layer.keys.shape[2])
    if bool((layer.seen > layer.keys.shape[2]).any()) or (layer.every and bool((layer.counts != layer.seen[:, None]).any())):
        raise CacheError(
            f"{length} tokens were seen and {kept} are kept: what came before the removed tokens is evicted{why}",
            where=where,
            hint="give a budget that holds the whole text; assisted decoding and rollback need it",
        )
    if 0 < tokens < length and sums_queries(layer):
        waiting = (layer.query_positions >= (layer.seen - tokens)[:, None]).sum(-1)
        if bool((waiting < tokens).any()):
            raise CacheError(
                f"policy {layer.policy.name} has added what the last {tokens} queries look at to the sums of tokens that stay",
                where=where,
                hint="crop no more than the tokens that were given one by one since the last call of several",
            )


def sums_queries(layer: Any) -> bool:
    """Whether tokens carry sums over queries, of which none can be taken out again once it was counted."""
    return layer.query_positions is not None and layer.policy.carries and not layer.policy.scores_once


def check_amount(tokens_to_remove: int) -> None:
    """Raises CacheError for what `crop` does not take."""
    if tokens_to_remove > 0:
        hint = f"crop({-tokens_to_remove}) removes that many, crop({tokens_to_remove} - cache.get_seq_length()) leaves that many"
        raise CacheError("crop takes a negative number of tokens to remove", where="crop", hint=hint)


def crop(layer: Any, tokens_to_remove: int) -> None:
    """As `SparseLayer.crop`."""
    check_amount(tokens_to_remove)
    if not layer.is_initialized or (tokens_to_remove == 0 and layer.held is None):
        return
    check(layer, -tokens_to_remove)
    if layer.held is not None:
        layer.settle_past(-tokens_to_remove)
        return
    layer.length += tokens_to_remove
    layer.seen += tokens_to_remove
    layer.counts += tokens_to_remove
    gone = layer.positions >= layer.seen[:, None, None]
    layer.positions.masked_fill_(gone, -1)
    if layer.staged is not None:
        layer.staged.copy_(torch.minimum(layer.staged, layer.counts[..., None]))
    with layer.present():
        layer.values.masked_fill_(gone[..., None], 0)  # kernels count on zeros in empty slots
        layer.renew_bounds()
    if layer.carried is not None:
        layer.carried.masked_fill_(gone, 0)
    if layer.query_positions is not None:
        layer.query_positions.masked_fill_(layer.query_positions >= layer.seen[:, None], -1)
    layer.started, layer.used = int(layer.length) > 0, None
