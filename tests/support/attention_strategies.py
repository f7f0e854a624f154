"""Hypothesis strategies for calls of the attention op: every clause together with every other."""

from __future__ import annotations

import dataclasses

import torch
from hypothesis import strategies as st

from tests.support.attention_cases import Case


@st.composite
def cases(draw, *, max_len: int = 40, dims=(1, 8, 16), dtypes=(torch.float32, torch.float64), block_sizes=(1, 8, 16)) -> Case:
    """Small calls in which every clause may appear with every other."""
    kv_heads, group = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    key_len = draw(st.integers(1, max_len))
    return Case(
        batch=draw(st.integers(1, 3)),
        kv_heads=kv_heads,
        group=group,
        query_len=draw(st.integers(1, max_len)),
        key_len=key_len,
        qk_head_dim=draw(st.sampled_from(dims)),
        v_head_dim=draw(st.sampled_from(dims)),
        dtype=draw(st.sampled_from(dtypes)),
        windows=draw(st.sampled_from([(), (5,), (0,)]) | st.tuples(*[st.integers(0, max_len)] * (kv_heads * group))),
        sinks=draw(st.integers(0, 4)),
        padding=draw(st.sampled_from(["", "", "left", "right", "holes"])),
        start=draw(st.none() | st.integers(-3, max_len + 3)),
        softcap=draw(st.sampled_from([0.0, 2.0])),
        block_size=draw(st.sampled_from(block_sizes)),
        seed=draw(st.integers(0, 1000)),
        **{field.name: draw(st.booleans()) for field in dataclasses.fields(Case) if field.type == "bool"},
    )
