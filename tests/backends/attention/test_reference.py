"""The reference implementation against a fp64 oracle that goes row by row, over every clause of the op."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings

import sparsify.backends.attention.reference as reference
from tests.support.attention_cases import CLAUSES, Case, make_call
from tests.support.attention_oracle import attention_exact, tolerance
from tests.support.attention_strategies import cases


def check(case: Case):
    call = make_call(case)
    output, lse = reference.attention(call)
    exact, exact_lse = attention_exact(call)
    assert output.dtype == case.dtype and lse.dtype == torch.float32
    assert output.stride() == call.empty_outputs()[0].stride()
    torch.testing.assert_close(output.double(), exact, atol=tolerance(case.dtype), rtol=tolerance(case.dtype))
    torch.testing.assert_close(lse.double(), exact_lse, atol=1e-4, rtol=1e-5)
    return output, lse


@given(cases(max_len=24))
@settings(max_examples=60, deadline=None)
def test_matches_the_oracle(case):
    check(case)


@given(cases(max_len=24))
@settings(max_examples=25, deadline=None)
def test_chunks_do_not_change_the_answer(case):
    call = make_call(case)
    whole = reference.attention(call)
    kept, reference.CHUNK_ELEMENTS = reference.CHUNK_ELEMENTS, 3 * case.batch * case.heads * case.key_len
    try:
        chunked = reference.attention(call)
    finally:
        reference.CHUNK_ELEMENTS = kept
    torch.testing.assert_close(chunked, whole, atol=tolerance(case.dtype), rtol=1e-4)


BASE = Case(batch=2, kv_heads=2, group=2, query_len=24, key_len=40, windows=(), seed=3)


@pytest.mark.parametrize("clause", CLAUSES)
def test_every_clause_is_right_and_changes_the_answer(clause):
    output, _ = check(dataclasses.replace(BASE, **CLAUSES[clause]))
    plain, _ = check(BASE)
    assert not torch.allclose(output, plain, atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    check(dataclasses.replace(BASE, dtype=dtype, windows=(9,), sinks=2))


def test_rows_without_a_visible_key_are_zero_with_infinite_lse():
    case = Case(query_len=12, key_len=8, sink_logits=True, alibi=True)  # the first 4 rows stand before key 0
    output, lse = check(case)
    assert (output[:, :, :4] == 0).all() and (lse[:, :, :4] == -torch.inf).all()
    assert lse[:, :, 4:].isfinite().all()


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
@pytest.mark.parametrize("operand", ["key", "value"])
def test_poison_reaches_exactly_the_rows_that_see_it(operand, poison):
    call = make_call(dataclasses.replace(BASE, padding="left", windows=(9,)))
    clean, _ = reference.attention(call)
    place = 30
    getattr(call, operand)[:, :, place] = poison
    output, _ = reference.attention(call)
    position = torch.arange(BASE.query_len) + BASE.key_len - BASE.query_len
    sees = (position >= place) & (position - 9 < place)
    assert torch.equal(output[:, :, ~sees], clean[:, :, ~sees])
    real = call.key_flags[:, place] & 1 != 0
    assert real.any()
    assert not output[real][:, :, sees].isfinite().any(-1).all()


def test_poisoned_padding_harms_nobody():
    call = make_call(dataclasses.replace(BASE, padding="left"))
    clean = reference.attention(call)
    padded = call.key_flags & 1 == 0
    assert padded.any()
    for tensor in (call.key, call.value):
        tensor[padded[:, None].expand(tensor.shape[:3])] = torch.nan
    assert all(map(torch.equal, reference.attention(call), clean))


@pytest.mark.parametrize("empty", ["batch", "query_len", "key_len"])
def test_empty_operands(empty):
    call = make_call(BASE)
    cut = {"batch": {"query": 0, "key": 0, "value": 0}, "query_len": {"query": 2}, "key_len": {"key": 2, "value": 2}}[empty]
    call = dataclasses.replace(call, **{name: getattr(call, name).narrow(axis, 0, 0) for name, axis in cut.items()})
    output, lse = reference.attention(call)
    assert output.shape == (*call.query.shape[:3], BASE.v_head_dim) and not output.any() and (lse == -torch.inf).all()


def test_alibi_keeps_its_precision_far_from_key_zero():
    case = Case(query_len=2, key_len=30_000, alibi=True)
    call = make_call(case)
    far, _ = reference.attention(call)
    exact, _ = reference.attention(call.in_dtype(torch.float64))
    torch.testing.assert_close(far.double(), exact, atol=2e-5, rtol=1e-4)
