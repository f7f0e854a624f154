"""ffn_skip: a decode step leaves out feed-forward blocks, and their weights are not read; attention always runs.

policy "similarity" (FFN-SkipLLM, arXiv 2404.03865): a row whose residual stream enters and leaves a block with a cosine of at least
`threshold` skips its next `skip` blocks; the first and last blocks of the model never skip. "schedule" (SkipDecode, arXiv 2307.02628): the
number of skipped blocks grows linearly with the generated token, the same for every row, and the top blocks always run. "static":
the block is left out at every decode step; choose its layers with rules or a plan file.

Prompts and the first `warmup` generated tokens stay dense. With `prefill`, rows of a prompt skip too, where the cost says that products
over the rows that are left take less time than the dense block. The KV cache stays complete under every policy.
"""

from __future__ import annotations

import operator
import zlib
from typing import ClassVar, Literal

import sympy
import torch
from pydantic import Field
from torch import fx

from sparsify.ops import feed_forward, limits
from sparsify.planning.method import (
    Context,
    Editor,
    FeedForwardSite,
    Pass,
    Proposal,
    Refusal,
    SiteKind,
    compaction,
    feed_forward_seconds,
)

# rows that share one stream of the weights in the generated kernels
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# nothing is that alike
_NEVER = 2.0


class FfnSkip(Pass):
    """See the options' descriptions; `sparsify calibrate ffn` proposes values for a model."""

    name: ClassVar[str] = "ffn_skip"
    kinds: ClassVar[tuple[SiteKind, ...]] = ("ffn",)
    across_layers: ClassVar[bool] = True

    policy: Literal["similarity", "schedule", "static"] = Field("similarity", description="what decides which blocks are skipped")
    threshold: float = Field(0.99, ge=-1, le=2, description="cosine of the residual stream before and after a block from which rows skip")
    skip: int = Field(1, ge=1, le=1 << 20, description="blocks skipped after one that reached the threshold")
    cold_first: int = Field(4, ge=0, description="first blocks of the model, never skipped")
    cold_last: int = Field(4, ge=0, description="last blocks of the model, never skipped")
    warmup: int = Field(16, ge=0, le=1 << 30, description="first generated tokens that stay dense")
    most: float = Field(0.5, ge=0, le=1, description="schedule: share of the blocks between the cold ones that is skipped at its end")
    length: int = Field(1024, ge=0, le=1 << 30, description="schedule: generated tokens until its end")
    prefill: bool = Field(False, description="rows of a prompt skip too (similarity and static)")
    prefill_share: float = Field(
        0.25, ge=0, le=1, description="share of a prompt's rows that is expected to skip a block; whether that pays is decided with it"
    )

    def propose(self, site: FeedForwardSite, context: Context) -> Proposal | Refusal:
        if site.needs_grad:
            return self.refuse("gradients are required", "run under torch.no_grad() or torch.inference_mode()")
        if site.dtype not in _DTYPES:
            return self.refuse(f"dtype {site.dtype} is not served", "use float32, float16 or bfloat16")
        if site.phase != "decode" and (not self.prefill or self.policy == "schedule"):
            why = "a schedule counts generated tokens" if self.prefill else "more than one token per row"
            return self._dense_prompt(site, context, f"{why}: prompts stay dense")
        if self.policy != "static" and (site.index < self.cold_first or site.index >= site.count - self.cold_last):
            return self.refuse("cold: one of the first or last blocks")
        if context.min_length is None and context.kernels == "reference":
            return self.refuse("no skipping kernel on this device: the plain reference saves nothing", "min_length = 0 forces it")
        if site.phase != "decode":
            return self._propose_prompt(site, context)
        if self._needs_position and site.positions is None and site.cached is None:
            return self.refuse("the graph shows no position to count generated tokens from", "set warmup = 0")
        if context.min_length is None and isinstance(site.rows, int) and site.rows > limits.FFN_MAX_ROWS:
            return self.refuse(
                f"{site.rows} rows: more than {limits.FFN_MAX_ROWS} rarely skip together, and one that does not reads the weights"
            )
        share = {"similarity": 1 / (1 + self.skip), "schedule": 1 - self.most, "static": 0.0}[self.policy]
        return Proposal(self, sympy.sympify(feed_forward_seconds(site.sizes, context.device, share)), note=self._note(self.warmup))

    def _propose_prompt(self, site: FeedForwardSite, context: Context) -> Proposal | Refusal:
        """Asking for the number of rows installs a guard where it is symbolic: torch compiles one graph on each side of it."""
        if self.policy == "static":
            return Proposal(self, sympy.Integer(0), note="left out, of prompts too")
        share = self.prefill_share
        if context.min_length is None:
            forced = "min_length = 0 forces it"
            if site.dtype == torch.float32 or (context.device.capability or (0, 0)) < limits.DESCRIPTOR_CAPABILITY:
                return self._dense_prompt(site, context, "prompts are compacted in half precision from compute capability 9.0 on", forced)
            first = compaction.rows_from(site.sizes, context.device, share)
            if first is None:
                even = compaction.break_even(site.sizes, context.device)
                return self._dense_prompt(
                    site, context, f"{share:.0%} of a prompt's rows skipping saves no time: it takes {even:.0%}", forced
                )
            if not bool(site.output.meta["example_value"].numel() >= first * int(site.hidden)):
                return self._dense_prompt(site, context, f"fewer than {first} rows, from which on compacting a prompt pays", forced)
        seconds = compaction.compacted_seconds(site.rows, site.sizes, context.device, share)
        return Proposal(self, seconds, note=f"{self._note(0)}, of prompts too")

    def _dense_prompt(self, site: FeedForwardSite, context: Context, reason: str, hint: str = "") -> Proposal | Refusal:
        """Refused, except where generated tokens are counted: there the first block that may skip ends the run before."""
        nothing_skips = context.min_length is None and context.kernels == "reference"
        if nothing_skips or not self._counts_from(site):
            return self.refuse(reason, hint)
        dense = self.model_copy(update={"prefill": False})
        seconds = compaction.dense_seconds(site.rows, site.sizes, context.device)
        return Proposal(dense, seconds, note=f"{reason}; generated tokens are counted from its end")

    def _note(self, warmup: int) -> str:
        what = {
            "similarity": f"cosine ≥ {self.threshold:g} skips the next {self.skip}",
            "schedule": f"up to {self.most:.0%} after {self.length} tokens",
            "static": "left out",
        }
        return what[self.policy] + (f", dense for {warmup} tokens" if warmup else "")

    @property
    def _needs_position(self) -> bool:
        return self.warmup > 0 or (self.policy == "schedule" and self.length > 0)

    def _counts_from(self, site: FeedForwardSite) -> bool:
        """Whether this block of a prompt ends the run before. Which blocks rules leave to "static" is not known: there each does."""
        first = site.index == self.cold_first < site.count - self.cold_last
        return self._needs_position and (self.policy == "static" or first)

    def rewrite(self, editor: Editor, site: FeedForwardSite) -> None:
        editor.move_to(site)
        if site.phase != "decode" and not self.prefill:
            editor.replace(site, self._after_prompt(editor, site))
            return
        residual, *others = (editor.current(term) for term in site.residuals)
        for term in others:
            residual = editor.call(torch.add, residual, term)
        if site.phase != "decode" and self._counts_from(site):
            residual = editor.call(feed_forward.ffn_prompt, residual, key=self._key(site), version=feed_forward.VERSION)
        # a prompt is no generated token: it has no warm-up
        warmup = self.warmup if site.phase == "decode" else 0
        if self.policy == "static":
            if not warmup:
                # a copy, since the graph may write to the sum in place
                editor.replace(site, editor.method("clone", residual, memory_format=torch.contiguous_format))
                return
            thread = ("ffn_skip", self.policy, warmup)
            remaining = editor.shared(thread, lambda: self._start(editor, site, residual, warmup, 1, 0))
            editor.replace(site, self._block(editor, site, residual, remaining)[0])
            return
        most = self._most(site)
        thread = ("ffn_skip", self.policy, warmup, most, self.length)
        length = self.length if most else 0
        remaining = editor.shared(thread, lambda: self._start(editor, site, residual, warmup, most, length))
        out, remaining = self._block(editor, site, residual, remaining)
        editor.share(thread, remaining)
        editor.replace(site, out)

    def _after_prompt(self, editor: Editor, site: FeedForwardSite) -> fx.Node:
        """The block's sum as it was, over a copy of one term that ends the run."""
        output = site.output
        first = next(i for i, argument in enumerate(output.args) if isinstance(argument, fx.Node))
        copied = editor.call(feed_forward.ffn_prompt, output.args[first], key=self._key(site), version=feed_forward.VERSION)
        arguments = (*output.args[:first], copied, *output.args[first + 1 :])
        if isinstance(output.target, str):
            return editor.method(output.target, *arguments, **output.kwargs)
        return editor.call(output.target, *arguments, **output.kwargs)

    def _most(self, site: FeedForwardSite) -> int:
        """Blocks that a schedule skips at its end."""
        return round(self.most * max(0, site.count - self.cold_first - self.cold_last)) if self.policy == "schedule" else 0

    def _key(self, site: FeedForwardSite) -> int:
        """Of the run: the same for all graphs of one model, and from process to process, so that compiled graphs are found again."""
        thread = (self.policy, self.warmup, self._most(site), self.length)
        return zlib.crc32(f"{site.name.partition(str(site.layer))[0]} {site.count} {site.hidden} {site.intermediate} {thread}".encode())

    def _start(self, editor: Editor, site: FeedForwardSite, residual: fx.Node, warmup: int, most: int, length: int) -> fx.Node:
        positions, slot = None, -1
        if warmup or length:
            positions = site.positions
            if positions is None and site.cached is not None:
                slot = editor.call(operator.sub, editor.length(site.cached, 2), 1)
        call = {"warmup": warmup, "most": most, "length": length, "key": self._key(site), "version": feed_forward.VERSION}
        return editor.call(feed_forward.ffn_start, residual, positions, slot, **call)

    def _block(self, editor: Editor, site: FeedForwardSite, residual: fx.Node, remaining: fx.Node) -> tuple[fx.Node, fx.Node]:
        assert site.input is not None  # a site without one is a near miss
        pair = editor.call(
            feed_forward.ffn,
            residual,
            editor.current(site.input),
            remaining,
            site.up,
            site.down,
            gate=site.gate,
            up_bias=site.up_bias,
            gate_bias=site.gate_bias,
            down_bias=site.down_bias,
            norm_weight=site.norm.weight,
            norm_bias=site.norm.bias,
            post_weight=site.post_norm.weight,
            post_bias=site.post_norm.bias,
            layout=site.layout,
            transposed=site.transposed,
            activation=site.activation,
            norm=site.norm.kind,
            eps=site.norm.eps,
            post_norm=site.post_norm.kind,
            post_eps=site.post_norm.eps,
            scale=site.scale,
            threshold=self.threshold if self.policy == "similarity" else _NEVER,
            skip_next=self.skip,
            version=feed_forward.VERSION,
        )
        out, after = editor.items(pair, 2)
        return out, after

    def keep_all(self) -> FfnSkip:
        """Similarity that nothing reaches, at the same blocks; the run's position stays untouched, so verification does not disturb it."""
        everywhere = {"cold_first": 0, "cold_last": 0} if self.policy == "static" else {}
        return self.model_copy(update={"policy": "similarity", "threshold": _NEVER, "warmup": 0, **everywhere})
