"""Calls of the attention kernels for compute-sanitizer. `run` runs them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch

from sparsify.backends.attention import empty_rows_triton, hopper, triton
from sparsify.ops.attention import AttentionCall
from tests.support import empty_rows_oracle, hopper_calls
from tests.support.attention_cases import Case, make_call

MANY = ("lists_ragged", "window_sinks", "segments_padding", "lists_chunk", "dim_64_64_lists", "padding_left_lists", "softcap_lists")
_FEW = Case(batch=2, kv_heads=2, group=4, query_len=1, key_len=1801, qk_head_dim=128, v_head_dim=128, dtype=torch.bfloat16)
FEW: dict[str, dict[str, Any]] = {
    "one query": {},
    "three queries, padding": {"query_len": 3, "padding": "left"},
    "window, sinks": {"windows": (300,), "sinks": 4},
    "a start, softcap, sink logits": {"query_len": 2, "start": 1003, "softcap": 20.0, "sink_logits": True},
    "bias by row": {"query_len": 2, "bias": (2, 1), "bias_rows": True},
}
EMPTY_ROWS: dict[str, dict[str, Any]] = {
    "padding": {"query_len": 140, "key_len": 140, "dim": 64, "dtype": torch.bfloat16},
    "bias, window, sinks": empty_rows_oracle.BIASED["bias, window, sinks"],
}


def with_messages(device: str) -> Iterator[tuple[str, Callable[[], Any]]]:
    """The Hopper kernel, whose warps hand over messages."""
    for name, call in _many(device):
        yield name, lambda name=name, call=call: _on_hopper(name, call())


def _on_hopper(name: str, call: AttentionCall) -> None:
    if reason := hopper.obstacle(call):
        print("NOT SERVED", name, reason, flush=True)
    else:
        hopper.launch(call)


def plain(device: str) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Many rows and few."""
    for name, call in _many(device):
        yield name, lambda call=call: triton.triton_attention(call())
    for name, changes in FEW.items():
        case = dataclasses.replace(_FEW, **changes)
        yield name, lambda case=case: triton.triton_attention(make_call(case).map_tensors(lambda tensor: tensor.to(device)))


def _many(device: str) -> Iterator[tuple[str, Callable[[], AttentionCall]]]:
    matrix = hopper_calls.matrix()
    for name in MANY:
        yield name, lambda name=name: hopper_calls.make_call(matrix[name], device)


def empty_rows(device: str) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Rows that see no key, which are written after the others."""
    for name, changes in EMPTY_ROWS.items():
        yield f"mean, {name}", lambda changes=changes: _fill("mean", changes, device)
        yield f"nan, {name}", lambda changes=changes: _fill("nan", changes, device)


def _fill(form: str, changes: dict[str, Any], device: str) -> None:
    call = empty_rows_oracle.make(form, **changes).to(device).op
    plain_call = dataclasses.replace(call, empty_rows="zero", lowest=0.0, hidden_bias=None)
    empty_rows_triton.fill(*triton.triton_attention(plain_call), call)
