"""kv_evict: a decode step over a SparseCache as one op: the token stored, what it evicts overwritten, and attention over what is kept.

What stays is the policy's choice, made where the cache is made (`sparsify.SparseCache`); this pass changes no result. Prompts keep their
attention as a site of its own, for which other methods may choose, followed by the store that scores and evicts.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import fx

from sparsify.ops.cache import CacheAttentionCall, CacheDecodeCall, CacheStoreCall
from sparsify.ops.pages import Clusters
from sparsify.planning.method import AttentionSite, CacheSite, Context, Editor, Pass, Proposal, Refusal, SiteKind, work

_HINT = "pass a sparsify.SparseCache(model.config, policy=..., budget=...) as the model's cache"


class KvEvict(Pass):
    name: ClassVar[str] = "kv_evict"
    lossy: ClassVar[bool] = False
    kinds: ClassVar[tuple[SiteKind, ...]] = ("cache", "attention")

    def propose(self, site: CacheSite | AttentionSite, context: Context) -> Proposal | Refusal:
        if isinstance(site, AttentionSite):
            kind = cache_kind(site.key)
            if kind is None:
                return self.refuse("keys of this very call: no cache is read", "a SparseCache evicts what later calls would read")
            return self.refuse(f"keys lie in a {kind}, which eviction would silently corrupt", _HINT)
        if site.phase == "prefill":
            return self.refuse("a prompt: its attention is a site of its own, and the store after it scores and evicts")
        if site.phase == "chunk":
            return self.refuse("several tokens at once: attention over slots and the store stay two ops")
        note = f"store, evict and attend over {site.key_len} slots as one op ({context.kernels})"
        pages, codes = site.pages, site.codes
        if codes:
            note += f"; keys and values are {codes} codes"
        if codes and pages is None:
            return Proposal.from_work(self, site, context, lambda sizes: (work.code_reading(sizes, codes),), note=note)
        if pages is None:
            return Proposal.from_work(self, site, context, lambda sizes: (work.decode(sizes, "cache"),), note=note)
        read = f"{pages.count} of its" if pages.count else f"{100 * pages.share:g} % of its"
        if isinstance(pages, Clusters):
            note += f"; of a prepared prefix reads {read} clusters of {pages.size} keys and the first {pages.sinks} tokens, of the rest all"
        else:
            note += f"; reads {read} pages of {pages.size} slots, the first {pages.sinks} tokens and the last {pages.recent}"
        return Proposal.from_work(self, site, context, lambda sizes: work.page_reading(sizes, pages, codes), note=note)

    def rewrite(self, editor: Editor, site: CacheSite) -> None:
        store = CacheStoreCall.bind(*site.store.args, **site.store.kwargs)
        attention = CacheAttentionCall.bind(*site.output.args, **site.output.kwargs)
        call = store.common(CacheDecodeCall) | attention.common(CacheDecodeCall)
        call["is_token"] = store.is_token  # the attention need not know: the token is stored by then
        fused = editor.move_to(site).emit(CacheDecodeCall(**call))
        editor.replace(site, fused)
        editor.supersede(site.store)


def cache_kind(key: fx.Node) -> str | None:
    """Which ordinary cache a site's keys come from: concatenated to an input, copied into an input, or none that shows."""
    seen, pending = set(), [key]
    while pending:
        node = pending.pop()
        if node in seen:
            continue
        seen.add(node)
        name = getattr(node.target, "__name__", str(node.target))
        if node.op == "call_function" and node.target in (torch.cat, torch.concat):
            parts = node.args[0] if node.args else node.kwargs["tensors"]
            if isinstance(parts, list | tuple) and any(isinstance(part, fx.Node) and part.op == "placeholder" for part in parts):
                return "DynamicCache"
        if any(getattr(user.target, "__name__", str(user.target)) == "index_copy_" and user.args[0] is node for user in node.users):
            return "StaticCache"
        if name in ("index_copy_", "getitem", "contiguous", "expand", "reshape", "to"):
            pending += node.all_input_nodes[:1]
    return None
