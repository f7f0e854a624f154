"""sink_window: each row sees its first `sinks` visible keys and its last `window` keys, by token and exactly so.

The mask of StreamingLLM (arXiv 2309.17453) and LM-Infinite (arXiv 2308.16137), here over an unshortened cache with its original
positions: cost no longer grows with the prompt, memory still does.
"""

from __future__ import annotations

from typing import ClassVar

import sympy
from pydantic import Field

from sparsify.planning.method import AttentionSite, Context, Editor, Pass, Proposal, Refusal, attention_call, refuse_common, work


class SinkWindow(Pass):
    """sinks: first visible keys of each row that stay visible, tokens. window: last keys, the row's own included, tokens."""

    name: ClassVar[str] = "sink_window"

    sinks: int = Field(4, ge=0, le=1 << 20, description="first visible keys of each row that every later row still sees, in tokens")
    window: int = Field(4096, ge=1, le=1 << 30, description="last keys that each row sees, its own included, in tokens")

    def propose(self, site: AttentionSite, context: Context) -> Proposal | Refusal:
        refusal = refuse_common(self, site)
        if refusal is not None:
            return refusal
        if not site.mask.causal:
            return self.refuse("attention is not causal", "sinks and a window of last keys need an order")
        if site.mask.window is not None:
            return self.refuse(f"the layer has a sliding window of {site.mask.window} tokens already")
        if site.mask.documents is not None and self.sinks:
            return self.refuse("packed documents have sinks of their own", "set sinks = 0")
        if site.empty_rows in ("mean", "nan") and not self.sinks:
            return self.refuse("rows beyond every window cannot be told from rows that the mask leaves without a key", "set sinks = 1")
        band = self.sinks + self.window
        if site.query_len == 1:
            works = lambda sizes: (work.decode(sizes, work.step_kernel(context.family), sympy.Min(band, sizes.key_len)),)
        else:
            works = lambda sizes: (work.attention(sizes, context.family, window=band),)
        # at sinks + window keys the mask says nothing yet; a forced min_length still yields the same values
        start = band + 1 if context.min_length is None else context.min_length
        note = f"{self.sinks} sinks + window {self.window} by token"
        return Proposal.from_work(self, site, context, works, min_key_len=start, note=note)

    def rewrite(self, editor: Editor, site: AttentionSite) -> None:
        editor.replace(site, attention_call(editor.at(site), site, sinks=self.sinks, windows=(self.window,)))

    def keep_all(self) -> SinkWindow:
        return self.model_copy(update={"window": 1 << 30})
