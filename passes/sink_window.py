"""sink_window: each row sees its first `sinks` visible keys and its last `window` keys, by token and exactly so.

The mask of StreamingLLM (arXiv 2309.17453) and LM-Infinite (arXiv 2308.16137), here over an unshortened cache with its original
positions: cost no longer grows with the prompt, memory still does. Packed documents have sinks of their own.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import sympy
from pydantic import Field, field_validator

from sparsify.planning.method import (
    AttentionSite,
    AttentionSizes,
    Context,
    Editor,
    PromptPass,
    Proposal,
    Refusal,
    Work,
    attention_call,
    links,
    refuse_common,
    work,
)

_LONGEST = 1 << 30


class SinkWindow(PromptPass):
    """sinks: first visible keys of each row that stay visible, tokens. window: last keys, the row's own included, tokens."""

    name: ClassVar[str] = "sink_window"
    by_head: ClassVar[tuple[str, ...]] = ("window",)

    sinks: int = Field(4, ge=0, le=1 << 20, description="first visible keys of each row that every later row still sees, in tokens")
    window: int | tuple[int, ...] = Field(
        4096,
        description="last keys that each row sees, its own included, in tokens; a list gives one number per query head, 0 for a head "
        "that sees every key",
    )

    decode: bool = Field(True, description="whether single tokens after a prompt see as little; off: every key")

    @field_validator("window")
    @classmethod
    def _in_range(cls, value: int | tuple[int, ...]) -> int | tuple[int, ...]:
        if isinstance(value, tuple):
            if not any(value) or not all(0 <= one <= _LONGEST for one in value):
                raise ValueError(f"must hold numbers between 0 and {_LONGEST}, not all of them 0")
        elif not 1 <= value <= _LONGEST:
            raise ValueError(f"must lie between 1 and {_LONGEST}")
        return value

    @property
    def windows(self) -> tuple[int, ...]:
        """One for all heads, or one per query head, 0 for none."""
        return self.window if isinstance(self.window, tuple) else (self.window,)

    def propose(self, site: AttentionSite, context: Context) -> Proposal | Refusal:
        refusal = refuse_common(self, site)
        if refusal is not None:
            return refusal
        if not site.mask.causal:
            return self.refuse("attention is not causal", "sinks and a window of last keys need an order")
        if site.mask.window is not None:
            return self.refuse(f"the layer has a sliding window of {site.mask.window} tokens already")
        if site.empty_rows not in ("impossible", "zero") and not self.sinks:
            return self.refuse("rows beyond every window cannot be told from rows that the mask leaves without a key", "set sinks = 1")
        if (refusal := self.refuse_last_rows(site, context)) is not None:
            return refusal
        heads = site.query_heads
        if site.query_len == 1 and not self.decode:
            return self.refuse("one query row, and decode = false keeps those dense")
        if len(self.windows) not in (1, heads):
            return self.refuse(f"{len(self.windows)} windows for {heads} query heads")
        if not any(self.windows):
            return self.refuse("every head of this process sees all keys")
        if len(self.windows) > 1 and site.bias:
            return self.refuse("rows with a bias per key take one window for all heads")
        widest = self.sinks + max(self.windows) if all(self.windows) else _LONGEST
        if site.query_len == 1:
            works = lambda sizes: (work.decode(sizes, work.step_kernel(context.family), sympy.Min(widest, sizes.key_len)),)
        else:
            works = lambda sizes: self.works(sizes, context.family)
        narrowest = self.sinks + min(window for window in self.windows if window)
        # at sinks + window keys the mask says nothing yet; a forced min_length still yields the same values
        start = narrowest + 1 if context.min_length is None else context.min_length
        shown = self.windows[0] if len(self.windows) == 1 else f"{min(filter(None, self.windows))} to {max(self.windows)}"
        note = f"{self.sinks} sinks + window {shown} by token"
        if not all(self.windows):
            note += f", {self.windows.count(0)} of {heads} heads dense"
        note += self.last_rows_note
        note += context.travels("keys and values of sinks and windows", site, lambda sizes, count: links.window_bytes(sizes, count, widest))
        return Proposal.from_work(self, site, context, works, min_key_len=start, note=note)

    def rewrite(self, editor: Editor, site: AttentionSite) -> None:
        self.replace(editor, site, attention_call(editor.move_to(site), site, sinks=self.sinks, windows=self.windows))

    def works(self, sizes: AttentionSizes, kernel: str) -> tuple[Work, ...]:
        """What heads of each width do, one kernel for all of them: its time is counted as if it ran once for each width."""
        if len(self.windows) == 1:
            return *self.last_rows_works(sizes, kernel), work.attention(sizes, kernel, window=self.sinks + self.windows[0])
        found = [*self.last_rows_works(sizes, kernel)]
        for window in dict.fromkeys(self.windows):
            some = dataclasses.replace(sizes, query_heads=self.windows.count(window))
            found.append(work.attention(some, kernel, window=self.sinks + window if window else None))
        return tuple(found)

    def keep_all(self) -> SinkWindow:
        return self.for_heads_alike(window=_LONGEST)
