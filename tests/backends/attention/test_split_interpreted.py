"""Attention of few queries whose keys are split among programs, in Triton's interpreter. Run with TRITON_INTERPRET=1."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sparsify.backends.attention import reference
from sparsify.backends.attention.triton import triton_attention
from sparsify.backends.attention.triton_source import AttentionTiling
from tests.support.attention_cases import CLAUSES, Case, make_call
from tests.support.attention_oracle import tolerance
from tests.support.attention_strategies import cases
from tests.support.cases import examples as drawn

pytestmark = pytest.mark.interpreter

TILING = AttentionTiling(16, 16, 4, 2, edge_keys=16)
# several tiles a part and a ragged end
DECODE = Case(batch=2, kv_heads=2, group=2, query_len=1, key_len=117, qk_head_dim=32, v_head_dim=16, seed=3)
SERVED = [name for name in CLAUSES if name not in ("lists", "not_causal")]


def check(case: Case, splits: int = 3, tiling: AttentionTiling | None = TILING, spoil=None):
    call = make_call(case)
    if spoil is not None:
        spoil(call)
    wanted, wanted_lse = reference.attention(call)
    output, lse = triton_attention(call, tiling=tiling, splits=splits)
    bound = tolerance(case.dtype, call)
    torch.testing.assert_close(output.double(), wanted.double(), atol=bound, rtol=bound, equal_nan=True)
    torch.testing.assert_close(lse, wanted_lse, atol=max(1e-4, bound / 10), rtol=1e-4, equal_nan=True)
    assert output.stride() == wanted.stride()
    return output


@pytest.mark.parametrize("clause", SERVED)
@pytest.mark.parametrize("query_len", [1, 5])
@pytest.mark.samples(6)
def test_every_clause(clause, query_len):
    case = dataclasses.replace(DECODE, query_len=query_len, **CLAUSES[clause])
    check(case)
    if clause == "start":
        check(dataclasses.replace(case, start=70))


@pytest.mark.parametrize("splits", [2, 7, 30])
@pytest.mark.parametrize("query_len", [1, 4])
@pytest.mark.parametrize("start", [0, 20, 112])
@pytest.mark.samples(7)
def test_more_parts_than_keys_in_use(start, query_len, splits):
    check(dataclasses.replace(DECODE, query_len=query_len, start=start), splits)


@pytest.mark.parametrize("query_len", [1, 3])
def test_slots_behind_the_last_query_are_not_read(query_len):
    def spoil(call):
        for tensor in (call.key, call.value):
            tensor[:, :, 40 + query_len :] = torch.nan

    assert check(dataclasses.replace(DECODE, query_len=query_len, start=40), spoil=spoil).isfinite().all()


@pytest.mark.parametrize("windows, sinks", [((), 0), ((9,), 0), ((9,), 3)])
def test_padding_is_not_read(windows, sinks):
    """The keys and values of padding may be anything, and rows of padding alone give 0."""

    def spoil(call):
        for tensor in (call.key, call.value):
            tensor.transpose(1, 2)[(call.key_flags & 1) == 0] = torch.nan

    for padding in ("left", "right", "holes"):
        output = check(dataclasses.replace(DECODE, batch=3, padding=padding, windows=windows, sinks=sinks, start=100), spoil=spoil)
        assert output.isfinite().all() and not output[2].any()


@pytest.mark.parametrize("query_len", [1, 4])
@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_poison_reaches_exactly_the_rows_that_see_it(query_len, poison):
    for operand, at in (("key", 60), ("value", 60), ("value", 115)):
        call = make_call(dataclasses.replace(DECODE, query_len=query_len))
        getattr(call, operand)[:, :, at] = poison
        wanted, _ = reference.attention(call)
        output, _ = triton_attention(call, tiling=TILING, splits=3)
        assert torch.equal(wanted.isfinite().all(-1), output.isfinite().all(-1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("dims", [(64, 64), (40, 128)])
def test_dtypes_and_head_dims(dtype, dims):
    check(dataclasses.replace(DECODE, batch=1, dtype=dtype, qk_head_dim=dims[0], v_head_dim=dims[1], padding="left"), 2, None)


def test_many_keys_are_split_by_themselves(monkeypatch):
    from sparsify.backends.attention import triton

    asked = []
    spec = triton.make_spec
    monkeypatch.setattr(triton, "make_spec", lambda *call: asked.append(spec(*call)) or asked[-1])
    call = make_call(dataclasses.replace(DECODE, batch=1, key_len=1100, start=1000))
    output, _ = triton_attention(call)
    assert asked[0].split_keys and asked[0].uniform
    torch.testing.assert_close(output, reference.attention(call)[0], atol=2e-5, rtol=2e-5)
    triton_attention(make_call(dataclasses.replace(DECODE, batch=1, key_len=1100, query_len=40)))
    assert not asked[1].split_keys


@drawn(quick=10, slow=100)
def test_clauses_together(examples):
    @given(
        case=cases(max_len=60, dims=(8, 16), dtypes=(torch.float32,), block_sizes=(16,)),
        query_len=st.integers(1, 6),
        splits=st.integers(2, 5),
    )
    @settings(max_examples=examples, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    def one(case, query_len, splits):
        check(dataclasses.replace(case, lists=False, query_len=query_len), splits)

    one()
