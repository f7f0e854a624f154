"""A plan as `explain` gives it for a long prompt of a 32-layer model, made up: nothing is run."""

from __future__ import annotations

import torch

from sparsify.matching.beside import ELEMENTWISE, FEED_FORWARD, LOGITS, PROJECTIONS
from sparsify.ops.block_maps import BlockMap, block_map
from sparsify.ops.selection import SelectCall
from sparsify.planning.decision import Decision
from sparsify.planning.plan import Plan

# what a model's or a plan's text might try
HOSTILE = """</script><script>document.title = "run"</script><img src=x onerror="document.title='run'">'"&{{ 7 * 7 }}"""


def selection(length: int, heads: int, width: int, *, seed: int = 0, block: int = 128) -> BlockMap:
    """A map of a first block, a diagonal band of `width` blocks that is wider for later heads, and some others."""
    blocks, generator = length // block, torch.Generator().manual_seed(seed)
    query, key = torch.arange(blocks)[:, None], torch.arange(blocks)
    band = query - key < (1 + torch.arange(heads) % 5)[:, None, None] * width
    scattered = torch.rand(heads, 1, blocks, generator=generator) < 0.06 * (torch.arange(heads) % 3)[:, None, None]
    keep = ((key == 0) | band | scattered) & (key <= query)
    indices = keep.logical_not().to(torch.uint8).sort(dim=-1, stable=True).indices.to(torch.int16)
    empty = torch.empty(1, heads, length, 8, device="meta")
    call = SelectCall(empty, empty, scale=1.0, causal=True, block_size=block, threshold=(0.9,))
    return block_map(call, keep.sum(-1, dtype=torch.int32)[None], indices[None])


def plan(layers: int = 32, heads: int = 32, length: int = 32768) -> Plan:
    """Most layers choose blocks; two are dense, one keeps a window, one is left because of its mask; a feed-forward block is rewritten."""
    decisions, maps = [], {}
    sizes = {"batch": "1", "query_heads": str(heads), "kv_heads": "8", "query_len": str(length), "key_len": str(length)}
    sizes |= {"qk_head_dim": "128", "v_head_dim": "128"}
    for layer in range(layers):
        site, seconds = f"model.layers.{layer}.self_attn", 1.31e-2
        decision = Decision(site, layer, "prefill", dict(sizes), "causal", "xattention", {"stride": 8, "threshold": 0.9, "block": 128})
        decision.reason, decision.dense_seconds = "stride 8, max+pair+int8, τ 0.9, block 128", seconds
        decision.dense_formula = "hopper/causal 13.1 ms: 3.8e-13·B·H·N² + 6.0e-6"
        if layer < 2:
            decision.method, decision.options, decision.reason = "dense", {}, "exact; hopper"
            decision.refusals, decision.seconds = ["xattention: rule 0 names other methods for layers 0-1"], seconds
        elif layer == 9:
            decision.leave("the mask cannot be read: aten.cumsum of scores", f"xattention: {HOSTILE}")
            decision.mask = "not read: aten.cumsum of scores"
        elif layer == 12:
            decision.method, decision.options, decision.reason = "sink_window", {"sinks": 4, "window": 4096}, "4 sinks, window 4096"
            decision.seconds, decision.density = 3.1e-3, 0.24
        else:
            found = maps[site] = selection(length, heads, 1 + layer // 8, seed=layer)
            decision.seconds, decision.realised_density = 3.4e-3 + 1e-5 * layer, sum(found.density) / heads
            decision.formula, decision.scratch = "select 0.9 ms: 1.1e-13·B·H·N²; hopper/lists 2.5 ms: 7.9e-14·B·H·N² + 6.0e-6", 4.2e7
            decision.validation = "agrees on 12 instances"
        decisions.append(decision)
    parts = Decision("model.layers.3.mlp", 3, "prefill", {"rows": str(length), "hidden": "4096", "intermediate": "14336"}, "", "ffn_parts")
    parts.kind, parts.reason, parts.dense_seconds, parts.seconds = "ffn", "16384 rows at a time", 1.9e-2, 1.95e-2
    beside = {FEED_FORWARD: 0.61, PROJECTIONS: 0.15, LOGITS: 0.055, ELEMENTWISE: 0.04}
    return Plan([*decisions, parts], device="NVIDIA H200 (measured)", capture="one region for 32 layers", beside=beside, block_maps=maps)
