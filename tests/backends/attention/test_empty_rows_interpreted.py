"""Kernels that write rows without a key, in Triton's interpreter against written-out attention. Run with TRITON_INTERPRET=1."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sparsify.backends import registration
from sparsify.backends.attention import empty_rows_triton
from tests.support.empty_rows_oracle import BIASED, CALLS, make

pytestmark = pytest.mark.interpreter


def check(call) -> None:
    """The kernels' rows are the oracle's, and they touch no other."""
    dtype = call.op.query.dtype
    bound = {torch.float32: 2e-5, torch.bfloat16: 3e-2, torch.float16: 5e-3}[dtype]
    output, lse = registration.attend(dataclasses.replace(call.op, empty_rows="zero", lowest=0.0, hidden_bias=None))
    before = output.clone()
    empty_rows_triton.fill(output, lse, call.op)
    torch.testing.assert_close(output.float(), call.written_out(), atol=bound, rtol=0, equal_nan=True)
    seeing = lse > -1e30
    assert torch.equal(output[seeing], before[seeing]) and not seeing.all()


@pytest.mark.parametrize("form", ["mean", "nan"])
@pytest.mark.parametrize("name", CALLS)
@pytest.mark.samples(4)
def test_against_written_out_attention(name, form):
    check(make(form, **CALLS[name]))


@pytest.mark.parametrize("form", ["mean", "nan"])
@pytest.mark.parametrize("name", BIASED)
@pytest.mark.samples(3)
def test_with_a_bias_per_key(name, form):
    check(make(form, **BIASED[name]))


@given(st.integers(1, 3), st.integers(1, 2), st.integers(1, 3), st.integers(1, 70), st.integers(2, 70), st.booleans(), st.integers(0, 99))
@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_sizes_together(batch, kv_heads, group, query_len, more, documents, seed):
    sizes = {"batch": batch, "heads": kv_heads * group, "kv_heads": kv_heads, "query_len": query_len, "key_len": query_len + more}
    call = make("mean", documents=documents, seed=seed, **sizes)
    if not call.seen.any(-1).all():
        check(call)
