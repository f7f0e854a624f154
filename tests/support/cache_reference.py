"""What an evicting cache must equal: whole texts through models whose attention sees all keys under an explicit mask, no cache at all."""

from __future__ import annotations

import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tests.support.harness import holding
from tests.support.tiny_models import VOCAB

NAME = "cache_reference"

# what the reference attention does now: called with (layer index, query, key, scale), gives logits [batch, heads, queries, keys]
_logits = None


def _attention(module, query, key, value, attention_mask, scaling=None, softcap=None, s_aux=None, **kwargs):
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    logits = _logits(module.layer_idx, query, key, scaling)
    if s_aux is not None:
        logits = torch.cat((logits, s_aux.view(1, -1, 1, 1).expand(*logits.shape[:3], 1)), -1)
    weights = logits.softmax(-1)[..., : key.shape[2]]
    return (weights @ value).transpose(1, 2).contiguous(), weights


if NAME not in ALL_ATTENTION_FUNCTIONS:
    ALL_ATTENTION_FUNCTIONS.register(NAME, _attention)


@torch.no_grad()
def run(model, ids, logits, position_ids=None):
    """Logits [batch, tokens, vocabulary] of whole texts, with `logits` as the attention's logits."""
    global _logits
    before, _logits = model.config._attn_implementation, logits
    model.config._attn_implementation = NAME
    try:
        return model(ids, position_ids=position_ids, use_cache=False).logits
    finally:
        model.config._attn_implementation, _logits = before, None


def real_index(mask):
    """Position of each real token in its row, [batch, tokens]; -1 for padding."""
    return torch.where(mask.bool(), mask.cumsum(-1) - 1, -1)


def streaming_mask(mask, sinks, window):
    """Bool [batch, 1, queries, keys]: the first `sinks` real tokens and the last `window`, the query's own included."""
    at = real_index(mask)
    q, k = mask.cumsum(-1)[:, :, None] - 1, at[:, None, :]
    seen = (k >= 0) & (k <= q) & ((k > q - window) | (k < sinks))
    return (seen | torch.eye(mask.shape[1], dtype=torch.bool) & (at < 0)[:, :, None])[:, None]  # padding rows see themselves: finite


def streaming(mask, sinks, window, windows=None):
    """Attention logits of StreamingLLM at absolute positions; `windows` gives layers a window of their own, without sinks."""

    def logits(layer, query, key, scale):
        own = (windows or {}).get(layer)
        seen = streaming_mask(mask, sinks, window) if own is None else streaming_mask(mask, 0, own)
        return (query @ key.transpose(-1, -2) * scale).masked_fill(~seen, -torch.inf)

    return logits


def in_cache(model, mask, sinks, window, position_ids, layer_type=None):
    """Published StreamingLLM: keys without rotation, then query and kept keys turned to their places inside the cache."""
    rotary = model.model.rotary_emb if hasattr(model, "model") else model.gpt_neox.rotary_emb
    more = (layer_type,) if layer_type else ()

    def rotation(positions):
        cos, sin = rotary(torch.zeros(1, 1), positions, *more)
        angles = torch.atan2(sin, cos)[..., : cos.shape[-1] // 2].double()
        return torch.polar(torch.ones_like(angles), angles)

    def turned(x, r):
        half = r.shape[-1]
        z = torch.complex(x[..., :half].double(), x[..., half : 2 * half].double()) * r
        return torch.cat((z.real, z.imag, x[..., 2 * half :].double()), -1)

    def logits(layer, query, key, scale):
        batch, heads, count, _ = query.shape
        r = rotation(position_ids.expand(batch, -1))[:, None]
        query, key = turned(query, r.conj()), turned(key, r.conj())
        seen, at = streaming_mask(mask, sinks, window)[:, 0], real_index(mask)
        out = torch.full((batch, heads, count, count), -torch.inf, dtype=torch.float64)
        for b in range(batch):
            for q in range(count):
                kept = seen[b, q].nonzero()[:, 0]
                kept = kept[at[b, kept].argsort()]
                place = rotation(torch.arange(len(kept))[None])[0]
                own = turned(query[b, :, q], place[-1].expand(heads, -1))
                out[b, :, q, kept] = torch.einsum("hd,hkd->hk", own, turned(key[b][:, kept], place.expand(heads, -1, -1))) * scale
        return out.to(torch.float32)

    return logits


@torch.no_grad()
def through(model, cache, ids, cuts, mask=None, position_ids=None):
    """Logits of the same text given to a model with a cache in pieces; `cuts` are the pieces' lengths."""
    found, at = [], 0
    for cut in cuts:
        part = slice(at, at + cut)
        more = {} if position_ids is None else {"position_ids": position_ids[:, part]}
        seen = None if mask is None else mask[:, : at + cut]
        found.append(model(ids[:, part], **holding(cache), attention_mask=seen, **more).logits)
        at += cut
    return torch.cat(found, 1)


def text(rows, tokens, seed=0):
    return torch.randint(3, VOCAB, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def left_padded(lengths):
    """Attention mask of rows with so many real tokens, padded on the left."""
    width = max(lengths)
    return torch.tensor([[0] * (width - n) + [1] * n for n in lengths])
