"""Runs tiny models eager and compiled side by side, and computes what a block mask must give by a path of its own."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AttentionInterface, LlamaForCausalLM
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask

import sparsify.backends  # noqa: F401  (registers kernels)
from sparsify import api
from sparsify.generation.compat import with_cache
from sparsify.ops import block_lists
from sparsify.ops.selection import SelectCall
from sparsify.planning.plan import Plan

KEEP_ALL = {"xattention": {"threshold": 1.0}, "sink_window": {"sinks": 4, "window": 1 << 20}}


def holding(cache: Any) -> dict[str, Any]:
    """The keyword argument by which calls of the installed transformers' models, and `generate`, take a cache."""
    return with_cache(LlamaForCausalLM, cache)


@dataclass
class Run:
    """What one compiled run did."""

    value: Any
    plans: list[Plan] = field(default_factory=list)

    @property
    def graphs(self) -> int:
        return len(self.plans)

    @property
    def sites(self) -> int:
        return sum(len(p.decisions) for p in self.plans)

    def rewritten(self, method: str | None = None) -> int:
        return sum(d.method is not None and method in (None, d.method) for p in self.plans for d in p.decisions)

    def refusals(self) -> list[str]:
        return [r for p in self.plans for d in p.decisions if d.method is None for r in d.refusals]


def strict(**options: Any) -> dict[str, Any]:
    """Options for tests: no fallback, no Inductor, sparse methods at any length."""
    return {"strict": True, "lower": "eager", "min_length": 0, **options}


@contextlib.contextmanager
def compiled(model: torch.nn.Module, options: dict[str, Any], dynamic: bool | None = None):
    """The model compiled in place (fullgraph: a graph break is an error); the plans of its graphs; undone afterwards."""
    torch._dynamo.reset()
    model.compile(backend="sparsify", options=options, dynamic=dynamic, fullgraph=True)
    try:
        with api.collect_plans() as plans:
            yield plans
    finally:
        model._compiled_call_impl = None
        torch._dynamo.reset()


@torch.no_grad()
def run(model: torch.nn.Module, call, options: dict[str, Any], dynamic: bool | None = None) -> Run:
    """`call(model)` under compilation."""
    with compiled(model, options, dynamic) as plans:
        value = call(model)
        return Run(value, list(plans))


@torch.no_grad()
def reference_run(
    model: torch.nn.Module, call, *, sinks: int | None = None, window: int = 0, documents: bool = False, **selection: Any
) -> Any:
    """`call(model)` eagerly, with attention replaced by a plain masked softmax in float64: the model's own mask, and the sparse
    method's mask beside it, either sinks + window by token or a block selection (fields of `SelectCall`). documents: the
    prompt is packed."""

    def attend(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **unused):
        heads, kv_heads, query_len, key_len = query.shape[1], key.shape[1], query.shape[2], key.shape[2]
        scale = scaling if scaling is not None else query.shape[-1] ** -0.5
        visible = attention_mask
        if visible is None:  # transformers means SDPA's is_causal then, which counts from the top left; one row sees everything
            visible = torch.ones(query_len, key_len, dtype=torch.bool).tril(0 if query_len > 1 else key_len)
        visible = visible.expand(query.shape[0], heads, query_len, key_len)
        flags = visible.any(1).any(1)  # a key that no row sees is padding
        start = (visible[:, :, 0] * torch.arange(key_len)).amax()  # one row of every batch is without padding
        if query_len > 1 and selection:
            # of each position the first key of its document
            segments = visible[:, 0].int().argmax(-1).to(torch.int32) if documents else None
            preallocated = start.reshape(1) if start != key_len - query_len else None
            masks = {"key_flags": flags.to(torch.uint8), "segments": segments, "query_start": preallocated}
            chosen = SelectCall(query, key, scale=scale, causal=True, **masks, **selection)
            counts, indices = chosen.run()
            block = chosen.block_size
            dense = block_lists.to_dense(counts, indices, -(-key_len // block))
            visible = visible & dense.repeat_interleave(block, 2).repeat_interleave(block, 3)[:, :, :query_len, :key_len]
        if sinks is not None:
            visible = visible & sink_window_mask(visible, sinks, window)
        group = heads // kv_heads
        key, value = key.repeat_interleave(group, 1).double(), value.repeat_interleave(group, 1).double()
        scores = (query.double() @ key.mT * scale).masked_fill(~visible, float("-inf"))
        weights = torch.nan_to_num(scores.softmax(-1))
        return (weights @ value).to(query.dtype).transpose(1, 2).contiguous(), None

    AttentionInterface.register("masked_reference", attend)
    ALL_MASK_ATTENTION_FUNCTIONS.register("masked_reference", sdpa_mask)
    before = model.config._attn_implementation
    model.set_attn_implementation("masked_reference")
    try:
        return call(model)
    finally:
        model.set_attn_implementation(before)


def sink_window_mask(visible: torch.Tensor, sinks: int, window: int) -> torch.Tensor:
    """Where `sinks` first keys and a window of last keys lie, [batch, heads, query_len, key_len], given what is visible (same shape).

    Row 0 of the batch row without padding sees its own key last, which says where queries start."""
    query_len, key_len = visible.shape[-2:]
    keys = torch.arange(key_len)
    start = (visible[:, :, 0] * keys).amax()
    rank = visible[:, :, -1:].cumsum(-1)
    return ((rank > 0) & (rank <= sinks)) | (keys[None] > torch.arange(query_len)[:, None] + start - window)


def visible_error(got: torch.Tensor, want: torch.Tensor, attention_mask: torch.Tensor | None = None) -> float:
    """Largest difference of logits [batch, n, vocabulary] on rows that are not padding, relative to the largest logit."""
    if attention_mask is not None:
        rows = attention_mask[:, -got.shape[1] :].bool()
        got, want = got[rows], want[rows]
    return ((got - want).abs().max() / want.abs().max()).item()
