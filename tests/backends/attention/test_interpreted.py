"""Generated attention kernels in Triton's interpreter against the reference. Run with TRITON_INTERPRET=1."""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sparsify.backends.attention import reference
from sparsify.backends.attention.triton import triton_attention
from sparsify.backends.attention.triton_source import AttentionTiling
from tests.support.attention_cases import CLAUSES, Case, make_call
from tests.support.attention_oracle import attention_exact, tolerance
from tests.support.attention_strategies import cases
from tests.support.cases import examples as drawn

pytestmark = pytest.mark.interpreter

SMALL = AttentionTiling(32, 32, 4, 2, edge_keys=16)
# several tiles of queries and keys, ragged at both ends
PREFILL = Case(batch=2, kv_heads=2, group=2, query_len=40, key_len=85, qk_head_dim=32, v_head_dim=16, block_size=32, seed=3)
DECODE = dataclasses.replace(PREFILL, query_len=1, block_size=16)


def check(case: Case, tiling: AttentionTiling | None = SMALL):
    call = make_call(case)
    output, lse = triton_attention(call, tiling=tiling)
    wanted, wanted_lse = reference.attention(call)
    assert output.dtype == case.dtype and output.stride() == call.empty_outputs()[0].stride()
    bound = tolerance(case.dtype, call)
    torch.testing.assert_close(output.double(), wanted.double(), atol=bound, rtol=bound)
    torch.testing.assert_close(lse, wanted_lse, atol=max(1e-4, bound / 10), rtol=1e-4)
    return output, lse


@pytest.mark.parametrize("clause", CLAUSES)
@pytest.mark.samples(5)
def test_every_clause_in_prefill(clause):
    output, _ = check(dataclasses.replace(PREFILL, **CLAUSES[clause]))
    assert not torch.allclose(output, plain(), atol=1e-3)


@functools.cache
def plain():
    return check(PREFILL)[0]


@pytest.mark.parametrize("clause", [clause for clause in CLAUSES if clause != "not_causal"])
@pytest.mark.parametrize("query_len", [1, 5])
@pytest.mark.samples(7)
def test_every_clause_in_decode(clause, query_len):
    case = dataclasses.replace(DECODE, query_len=query_len, **CLAUSES[clause])
    check(case, AttentionTiling(16, 16, 4, 2, edge_keys=16) if case.lists else None)


@drawn(quick=15, slow=150)
def test_clauses_together(examples):
    @given(case=cases(max_len=60, dims=(8, 16), dtypes=(torch.float32,), block_sizes=(32,)), edge_keys=st.sampled_from([16, 32]))
    @settings(max_examples=examples, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    def one(case, edge_keys):
        check(case, dataclasses.replace(SMALL, edge_keys=edge_keys))

    one()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("dims", [(64, 64), (80, 80), (16, 48), (40, 128)])
@pytest.mark.samples(4)
def test_dtypes_and_head_dims(dtype, dims):
    case = Case(kv_heads=1, group=2, query_len=40, key_len=72, dtype=dtype, qk_head_dim=dims[0], v_head_dim=dims[1], windows=(30,), sinks=4)
    check(case)
    check(case, tiling=None)  # the tile sizes that a GPU would get


@pytest.mark.parametrize(("kv_heads", "group"), [(1, 1), (1, 8), (3, 1), (2, 3), (1, 7)])
@pytest.mark.parametrize("query_len", [1, 33])
@pytest.mark.samples(2)
def test_every_gqa_ratio(kv_heads, group, query_len):
    check(dataclasses.replace(PREFILL, kv_heads=kv_heads, group=group, query_len=query_len), None if query_len == 1 else SMALL)


@pytest.mark.parametrize("key_len", [1, 31, 32, 33, 64, 97])
@pytest.mark.parametrize("window", [(), (1,), (20,), (64,)])
@pytest.mark.samples(4)
def test_ragged_lengths(key_len, window):
    check(dataclasses.replace(PREFILL, batch=1, key_len=key_len, query_len=min(key_len, 40), windows=window, sinks=2))


@pytest.mark.parametrize("start", [0, 13, 45, 200])
def test_static_cache(start):
    """Slots behind the last query row are never read, even when they hold NaN."""
    case = dataclasses.replace(PREFILL, start=start, query_len=40)
    call = make_call(case)
    wanted = reference.attention(call)
    for tensor in (call.key, call.value):
        tensor[:, :, start + 40 :] = torch.nan
    for got, expected in zip(triton_attention(call, tiling=SMALL), wanted, strict=True):
        torch.testing.assert_close(got, expected, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("clause", ["window_and_sinks", "left_padding_sinks", "lists", "segments", "window_per_head"])
@pytest.mark.parametrize("operand", ["key", "value"])
@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
@pytest.mark.samples(4)
def test_poison_reaches_exactly_the_rows_that_see_it(clause, operand, poison):
    call = make_call(dataclasses.replace(PREFILL, **CLAUSES[clause]))
    clean, _ = triton_attention(call, tiling=SMALL)
    getattr(call, operand)[:, :, 60] = poison
    output, _ = triton_attention(call, tiling=SMALL)
    wanted, _ = reference.attention(call)
    harmed = ~wanted.isfinite().all(-1)
    assert harmed.any() and not harmed.all()
    assert torch.equal(harmed, ~output.isfinite().all(-1))
    torch.testing.assert_close(output[~harmed], clean[~harmed])


def test_rows_without_a_visible_key():
    case = dataclasses.replace(PREFILL, batch=3, query_len=50, key_len=40, padding="left", sink_logits=True, windows=(9,), sinks=2)
    output, lse = check(case)
    assert (output[2] == 0).all() and (lse[2] == -torch.inf).all()  # a batch row of padding alone
    assert (output[:, :, :10] == 0).all() and (lse[:, :, :10] == -torch.inf).all()  # rows before key 0


@pytest.mark.parametrize("seq_major", [False, True])
def test_strides(seq_major):
    case = dataclasses.replace(PREFILL, seq_major=seq_major, padding="left")
    call = make_call(case)
    wanted = triton_attention(call, tiling=SMALL)
    spread = lambda x: (
        torch.empty(*x.shape[:2], x.shape[2] * 2, x.shape[3] + 3).transpose(1, 2).contiguous().transpose(1, 2)[:, :, ::2, 3:].copy_(x)
    )
    views = {
        "query": call.query.transpose(1, 2).contiguous().transpose(1, 2),
        "key": spread(call.key),
        "value": call.value.mT.contiguous().mT,
        "key_flags": call.key_flags.repeat_interleave(2, 1)[:, ::2],
    }
    assert not any(view.is_contiguous() for view in views.values())
    for got, expected in zip(triton_attention(dataclasses.replace(call, **views), tiling=SMALL), wanted, strict=True):
        torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-6)


def test_against_the_exact_oracle():
    case = dataclasses.replace(PREFILL, query_len=20, key_len=50, windows=(0, 3, 9, 20), sinks=3, softcap=2.0, alibi=True, sink_logits=True)
    call = make_call(case)
    output, lse = triton_attention(call, tiling=SMALL)
    exact, exact_lse = attention_exact(call)
    torch.testing.assert_close(output.double(), exact, atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(lse.double(), exact_lse, atol=1e-4, rtol=1e-5)


def test_one_batch_row_of_flags_serves_all():
    call = make_call(dataclasses.replace(PREFILL, padding="left", windows=(9,), sinks=2))
    call = dataclasses.replace(call, key_flags=call.key_flags[:1])
    got = triton_attention(call, tiling=SMALL)
    for one, other in zip(got, reference.attention(call), strict=True):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=2e-5)


def test_the_op_itself_runs_the_kernel():
    import sparsify.backends as backends

    call = make_call(PREFILL)
    backends.use("triton")
    try:
        assert backends.available("cpu")[0] == "triton"
        output, lse = call.run()
    finally:
        backends.use("auto")
    wanted, wanted_lse = reference.attention(call)
    torch.testing.assert_close(output, wanted, atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(lse, wanted_lse, atol=2e-5, rtol=2e-5)
