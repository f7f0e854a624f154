"""dense: the same attention by a faster route. Exact.

Traced transformers hand SDPA a materialised 4-D mask and repeated keys and values, which shuts the fast kernels out. Where the
mask is proved, both go: plain causal prefill becomes SDPA with is_causal and enable_gqa, everything else (offsets, windows,
padding, documents) becomes sparsify's attention op with the mask's clauses as operands. On Hopper the op serves long plain prefill too.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

import torch.nn.functional as F
from pydantic import Field

from sparsify.ops import limits
from sparsify.planning.method import (
    AttentionSite,
    Context,
    Editor,
    MaskKind,
    Pass,
    Proposal,
    Refusal,
    attention_call,
    crossovers,
    links,
    refuse_common,
    work,
)


class Dense(Pass):
    name: ClassVar[str] = "dense"
    lossy: ClassVar[bool] = False

    kernel: Literal["auto", "sdpa", "attention"] = Field(
        "auto",
        description="what computes plain causal or unmasked attention: SDPA, the attention op, or whichever is expected to be faster",
    )

    def propose(self, site: AttentionSite, context: Context) -> Proposal | Refusal | tuple[Proposal, ...]:
        refusal = refuse_common(self, site)
        if refusal is not None:
            return refusal
        operands = f"exact; mask as operands of {context.family} attention"
        operands += context.travels("all keys and values", site, links.exact_bytes)
        on = lambda kernel: lambda sizes: (work.attention(sizes, kernel),)
        ours = Proposal.from_work(self._by("attention"), site, context, on(context.family), note=operands)
        if self.kernel == "attention" or context.sequence or not serves_sdpa(site):
            return ours
        sdpa = Proposal.from_work(self._by("sdpa"), site, context, on("sdpa"), note="exact; SDPA without mask")
        head_dim = site.qk_head_dim
        fast = isinstance(head_dim, int) and limits.HOPPER.faster_than_sdpa(site.dtype, head_dim)
        hopper = context.family == "hopper" and site.phase != "decode" and fast
        if self.kernel == "sdpa" or not hopper:
            return sdpa
        sizes = site.example
        start = crossovers.kernel_from(context.device, context.family, sizes.qk_head_dim, (sizes.query_heads, sizes.kv_heads))
        return dataclasses.replace(ours, min_key_len=start, solved=True, note=f"exact; Hopper attention kernel, from {start} keys on"), sdpa

    def _by(self, kernel: str) -> Dense:
        return self.model_copy(update={"kernel": kernel})

    def rewrite(self, editor: Editor, site: AttentionSite) -> None:
        editor.move_to(site)
        if self.kernel == "attention" or not serves_sdpa(site):
            editor.replace(site, attention_call(editor, site))
            return
        grouped = site.query_heads != site.kv_heads
        causal = site.mask.causal and site.query_len != 1
        call = {"is_causal": causal, "scale": site.scale} | ({"enable_gqa": True} if grouped else {})
        editor.replace(site, editor.call(F.scaled_dot_product_attention, site.query, site.key, site.value, **call))


def serves_sdpa(site: AttentionSite) -> bool:
    """Whether SDPA can express the site without a mask tensor: no mask, one query row at the end, or a square causal mask.

    SDPA's is_causal is aligned top-left, so a chunk (query_len < key_len) needs the op's bottom-right offset.
    """
    mask = site.mask
    if site.softcap or site.sink_logits is not None or site.qk_head_dim != site.v_head_dim:
        return False
    if site.alibi_slopes is not None or site.bias:
        return False
    if mask.kind is MaskKind.NONE:
        return True
    if mask.window is not None or mask.padding is not None or mask.documents is not None or not mask.query_start.bottom_right:
        return False
    if site.query_len == 1:
        return True
    # torch's CPU kernel masks before it scales: with is_causal and a scale that is not positive its rows become NaN
    positive = isinstance(site.scale, (int, float)) and site.scale > 0
    return site.query_len == site.key_len and (positive or not mask.causal)
