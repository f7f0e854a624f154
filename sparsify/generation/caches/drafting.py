"""Tokens that are drafted over some pages of an exact cache, and taken back before they are computed again over all of it."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sparsify.backends import dispatch
from sparsify.errors import ConfigError, UnsupportedError
from sparsify.ops.pages import Clusters, Pages
from sparsify.ops.taking_back import Counters, Places
from sparsify.policies import Policy

if TYPE_CHECKING:
    from sparsify.generation.caches.layer import SparseLayer

# more rows than a verification's kernels are made for
MOST = 15


def checked(
    draft: str | Pages | None, draft_tokens: object, policy: Policy, dtype: torch.dtype | str | None, read: Pages | None
) -> Pages | None:
    """The pages that drafted tokens read; None where none are drafted.

    Raises:
        ConfigError: an impossible value, or options that do not go together.
        UnsupportedError: a policy or a dtype under which no draft can be taken back.
    """
    if draft is None:
        if draft_tokens is not None:
            raise ConfigError("there is no `draft` whose tokens these are", where="draft_tokens", hint='give draft="pages" too')
        return None
    if not isinstance(draft, Pages) and draft != "pages":
        raise ConfigError(f'must be "pages", a sparsify.Pages or None, not {draft!r}', where="draft")
    if draft_tokens is not None and (isinstance(draft_tokens, bool) or not isinstance(draft_tokens, int) or not 0 < draft_tokens <= MOST):
        raise ConfigError(f"must be 1 to {MOST} tokens, not {draft_tokens!r}", where="draft_tokens")
    if isinstance(draft, Clusters):
        raise ConfigError("clusters are of a prefix, and drafts read pages of any text", where="draft", hint="a sparsify.Pages")
    if read is not None:
        raise ConfigError("drafts are verified over everything that is kept", where="draft", hint="leave `read` out")
    if not policy.layout(1 << 30).grows:
        what = f"policy {policy.name} evicts what a rejected draft would need again"
        raise UnsupportedError(what, where="draft", hint='policy "full"')
    if isinstance(dtype, str):
        what = f"{dtype} codes of a group of slots are made together, and rejected drafts would have taken part in them"
        raise UnsupportedError(what, where="draft", hint="leave `dtype` out")
    return draft if isinstance(draft, Pages) else Pages()


def exact(draft: Pages) -> Pages:
    """What a token reads that is no draft: every page, of the same size, so that both share their bounds."""
    return dataclasses.replace(draft, share=1.0, count=0)


def check_layers(layers: Sequence[SparseLayer]) -> None:
    """Raises UnsupportedError where a layer cannot take tokens back."""
    for layer in layers:
        if layer.is_sliding:
            what = "a layer with a sliding window of the model's own overwrites what a rejected draft would need again"
            raise UnsupportedError(what, where=f"draft, layer {layer.index}", hint="leave `draft` out")


@contextlib.contextmanager
def reading_drafts(layers: Sequence[SparseLayer]) -> Generator[None]:
    """Single tokens read the pages of drafts."""
    before = [layer.read_text for layer in layers]
    for layer in layers:
        layer.read_text = layer.read_text if layer.draft is None else str(layer.draft)
    try:
        yield
    finally:
        for layer, text in zip(layers, before, strict=True):
            layer.read_text = text


_take_back = dispatch.serve("take_back")


def take_back(layers: Sequence[SparseLayer], tokens: Tensor, most: int, places: Places) -> None:
    """As `SparseCache.take_back`. places: of the cache."""
    _take_back(tokens, [Counters(layer.positions, layer.counts, layer.seen, layer.length) for layer in layers], most, places)
