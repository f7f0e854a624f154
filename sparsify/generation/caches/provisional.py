"""Tokens that may be taken back from a cache that evicts: transformers' assisted decoding stores drafts and crops those that were wrong.

What a token replaces is gone, so that such tokens are kept apart until `crop` says how many of them stay. transformers announces drafts by
`activate_past_recording`; from then on

- a call of drafts to verify is attended to and stored token after token, as it would be without drafts, and what its tokens replace is
  remembered: cropped, the cache holds what it would hold without drafts;
- the first call, if it is a prompt, may end in drafts. Where they begin is known by the prompt's length, if that was said: it is divided
  there, into two calls. Otherwise it is attended to as ever and stored only once it was cropped; drafts that were kept are then part of the
  prompt.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparsify.ops import cache

# a `layer.SparseLayer`, whose module uses this one
SparseLayer = Any
# a call of more tokens is no draft
MOST = 64
# what a token replaces, by slot, and what it counts
_BY_SLOT = ("keys", "values", "positions")
_COUNTS = ("counts", "seen", "length")


@dataclass
class Deferred:
    """A call that is not stored yet, but for its number of tokens.

    observed: its queries, for policies that look at them. stored: the other arguments of `cache.store`.
    """

    observed: Tensor | None
    key: Tensor
    value: Tensor
    is_token: Tensor | None
    empty: bool
    stored: dict[str, Any]

    @property
    def count(self) -> int:
        return self.key.shape[2]

    def settle(self, layer: SparseLayer, taken_back: int) -> None:
        """Stores all but the last tokens."""
        layer.length.sub_(self.count)
        rest = self.count - taken_back
        if not rest:
            layer.started = not self.empty
            return
        observed = None if self.observed is None else self.observed[:, :, :rest]
        is_token = None if self.is_token is None else self.is_token[:, :rest]
        key, value = self.key[:, :, :rest], self.value[:, :, :rest]
        cache.store(observed, key, value, *layer.state, is_token=is_token, empty=self.empty, **self.stored)


@dataclass
class Replaced:
    """What the tokens of a call that was stored one by one have replaced.

    slots: int64 [batch, kv_heads, tokens]. before: keys, values and positions there, and the layer's counts, by name.
    """

    key: Tensor
    value: Tensor
    is_token: Tensor | None
    slots: Tensor
    before: dict[str, Tensor]
    stored: dict[str, Any]

    @property
    def count(self) -> int:
        return self.key.shape[2]

    def settle(self, layer: SparseLayer, taken_back: int) -> None:
        """Puts back what the last tokens replaced: everything, and the tokens that stay once more, since one slot may have been replaced
        several times."""
        if not taken_back:
            return
        for name in _BY_SLOT:
            state: Tensor = getattr(layer, name)
            state.scatter_(2, _over(self.slots, state), self.before[name])
        for name in _COUNTS:
            getattr(layer, name).copy_(self.before[name])
        layer.renew_bounds()
        for at in range(self.count - taken_back):
            token = slice(at, at + 1)
            is_token = None if self.is_token is None else self.is_token[:, token]
            cache.store(
                None,
                self.key[:, :, token],
                self.value[:, :, token],
                *layer.state,
                is_token=is_token,
                empty=False,
                tickets=layer.tickets,
                **self.stored,
            )


Held = Deferred | Replaced


def refusal(layer: SparseLayer) -> str:
    """Why tokens cannot be kept apart, in a clause; empty where they can."""
    if layer.every:
        return "the policy selects anew while drafts are verified (`every`)"
    if layer.codes and not layer.grows:
        return f"what a token replaces is kept as {layer.codes} codes, in groups of slots"
    if layer.shard is not None:
        return "the text is divided among processes"
    if layer.left_out:
        return "the layer was given some of the prompt's tokens"
    return ""


def unrecorded(layer: SparseLayer) -> str:
    """Why what the last tokens replaced was not kept apart, in a clause; empty where it is."""
    return refusal(layer) if layer.record_past else "nobody said before them that tokens may be cropped (`activate_past_recording`)"


def prompt_of(layer: SparseLayer, tokens: int) -> int | None:
    """Before a call's attention, in uncompiled code: how many of its tokens are a prompt's, behind which the others are drafts; None where
    nobody said so, or it makes no difference. Asked once after that was said."""
    prompt, layer.before_drafts = layer.before_drafts, None
    if not layer.record_past or not layer.awaiting or prompt is None or refusal(layer) or (layer.grows and layer.read is None):
        return None
    prompt -= int(layer.length) if layer.started else 0
    # of another text, or more drafts than are kept apart
    return prompt if 0 < prompt <= tokens <= prompt + MOST else None


@contextlib.contextmanager
def reading_prompt(layer: SparseLayer) -> Generator[None]:
    """Within the block tokens are a prompt's, which is attended to and stored as ever; drafts may follow."""
    layer.record_past = layer.awaiting = False
    try:
        yield
    finally:
        layer.record_past = True


def begin(layer: SparseLayer, tokens: int, empty: bool) -> bool:
    """Before a call's attention, in uncompiled code: whether its tokens are attended to and stored one by one (`attend`).

    empty: nothing was stored before it.
    """
    if not layer.record_past or refusal(layer):
        return False
    if layer.grows and layer.read is None:  # nothing is replaced, and all of it is read however many tokens ask
        return False
    if tokens > MOST and not layer.awaiting:
        layer.record_past = False
    if empty or tokens > MOST:
        return False
    layer.awaiting = False
    return True


def defers(layer: SparseLayer, tokens: int, empty: bool) -> bool:
    """After a call's attention, in uncompiled code: whether storing it waits for `crop`. empty: as for `begin`."""
    awaiting, layer.awaiting = layer.awaiting, False
    if not awaiting or not layer.record_past or refusal(layer) or layer.grows or layer.layout is None:
        return False
    held = 0 if empty else min(int(layer.seen.max()), layer.layout.capacity)
    return held + tokens > layer.layout.capacity


def attend(
    layer: SparseLayer,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    is_token: Tensor | None,
    decoding: dict[str, Any],
    stored: dict[str, Any],
) -> Tensor:
    """Attention of a call's tokens, each over what the cache holds once it is stored, [batch, query_heads, tokens, v_head_dim].

    Args:
        decoding: the other arguments of `cache.decode`. stored: those of `cache.store`.
    """
    if not layer.grows:
        ahead = torch.arange(key.shape[2], device=key.device, dtype=layer.counts.dtype)
        counts = layer.counts[..., None] + ahead
        slots = torch.cat(
            [cache.next_slot(counts[..., at], layer.keys.shape[2], stored["pinned"]) for at in range(key.shape[2])],
            -1,
        )
        states = {name: getattr(layer, name) for name in _BY_SLOT}
        before = {name: state.gather(2, _over(slots, state)) for name, state in states.items()}
        before |= {name: getattr(layer, name).clone() for name in _COUNTS}
        layer.held = Replaced(key, value, is_token, slots, before, stored)
    found = []
    for at in range(key.shape[2]):
        token = slice(at, at + 1)
        own = None if is_token is None else is_token[:, token]
        found.append(cache.decode(query[:, :, token], key[:, :, token], value[:, :, token], *layer.state, is_token=own, **decoding))
    return torch.cat(found, 2)


def _over(slots: Tensor, state: Tensor) -> Tensor:
    """Slots as an index along dimension 2 of a state [batch, kv_heads, capacity] or with one dimension more."""
    return slots if state.dim() == 3 else slots[..., None].expand(-1, -1, -1, state.shape[-1])
