"""The kernels that tests look at: one spec for each clause and for each regime of tile sizes."""

from __future__ import annotations

from sparsify.backends.attention.triton_source import AttentionSpec, choose_tiling

CLAUSES = {
    "causal": {},
    "everything_visible": {"causal": False},
    "window": {"window": "one"},
    "window_sinks": {"window": "one", "sinks": "count"},
    "padding": {"key_flags": True},
    "padded_window_per_head": {"window": "per_head", "sinks": "flags", "key_flags": True},
    "static_cache": {"has_start": True},
    "segments": {"segments": True},
    "block_lists": {"block_lists": True, "block_size": 128},
    "block_lists_64": {"block_lists": True, "block_size": 64},
    "block_lists_padded": {"block_lists": True, "block_size": 128, "key_flags": True},
    "block_lists_and_windows": {"block_lists": True, "block_size": 128, "window": "per_head", "sinks": "flags", "key_flags": True},
    "logits": {"softcap": True, "alibi": True, "sink_logits": True},
    "key_bias": {"key_bias": True},
    "bias": {"bias": "bf16"},
    "softcap_window": {"softcap": True, "window": "one"},
    "decode_key_bias": {"packed": True, "key_bias": True, "key_flags": True},
    "decode": {"packed": True, "has_start": True},
    "decode_window": {"packed": True, "window": "per_head", "sinks": "flags", "key_flags": True, "alibi": True, "sink_logits": True},
}


def spec(clause: str, *, dtype: str = "bf16", dims: tuple[int, int] = (128, 128), capability: tuple[int, int] = (9, 0)) -> AttentionSpec:
    """The spec that a call with these clauses gets on a GPU of this capability, with 4 query heads per KV head."""
    chosen = CLAUSES[clause]
    tiling = choose_tiling(
        dtype,
        *dims,
        capability,
        block_size=chosen.get("block_size", 0),
        packed_rows=4 if chosen.get("packed") else 0,
        masked=chosen.get("segments", False) or bool(chosen.get("bias")),
    )
    return AttentionSpec(dtype, *dims, 4, tiling, **chosen)
