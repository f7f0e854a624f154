"""One query row on a CPU: keys in one piece are read alone, with the reference's answers; every other call is left to it."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from sparsify.backends.attention import one_row, reference
from tests.support.attention_cases import CLAUSES, Case, make_call

BASE = Case(batch=2, kv_heads=2, group=3, query_len=1, key_len=90, qk_head_dim=16, v_head_dim=8, block_size=32, seed=1)


def check(call):
    got, wanted = one_row.attention(call), reference.attention(call)
    assert got is not None
    for mine, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(mine, other, atol=2e-5, rtol=2e-5)
        assert mine.stride() == other.stride()


@pytest.mark.parametrize("changes", [{}, {"windows": (30,)}, {"windows": (0,)}, {"causal": False}, {"seq_major": True}], ids=str)
def test_ranges(changes):
    check(make_call(dataclasses.replace(BASE, **changes)))


@pytest.mark.parametrize("start", [0, 40, 89, 200])
def test_a_static_caches_empty_slots_are_not_read(start):
    call = dataclasses.replace(make_call(BASE), query_start=torch.tensor([start]))
    call.key[:, :, start + 1 :], call.value[:, :, start + 1 :] = torch.nan, torch.nan
    got = one_row.attention(call)
    assert got is not None and all(part.isfinite().all() for part in got)
    cut = dataclasses.replace(call, key=call.key[:, :, : start + 1], value=call.value[:, :, : start + 1])
    for mine, other in zip(got, reference.attention(cut), strict=True):
        torch.testing.assert_close(mine, other, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("hidden", [[], [3], [*range(40)], [*range(50, 90)], [0, 7, 89]], ids=str)
def test_padding_hides_keys_at_the_begin_at_the_end_and_between(hidden):
    call = make_call(BASE)
    flags = torch.ones(2, 90, dtype=torch.uint8)
    flags[1, hidden] = 0
    check(dataclasses.replace(call, key_flags=flags))
    call.key[1, :, hidden] = torch.nan  # nobody's
    check(dataclasses.replace(call, key_flags=flags))


def test_padding_that_leaves_a_row_without_keys_or_is_not_finite_is_left():
    call, flags = make_call(BASE), torch.ones(2, 90, dtype=torch.uint8)
    flags[1] = 0
    assert one_row.attention(dataclasses.replace(call, key_flags=flags)) is None
    flags[1, 9:] = 1
    call.value[1, :, 3] = torch.inf
    assert one_row.attention(dataclasses.replace(call, key_flags=flags)) is None


@pytest.mark.parametrize("clause", CLAUSES)
def test_every_clause_is_served_rightly_or_left(clause):
    call = make_call(dataclasses.replace(BASE, **CLAUSES[clause]))
    if one_row.attention(call) is not None:
        check(call)


def test_what_is_not_finite_or_sees_nothing_is_left():
    for name, number in (("value", torch.inf), ("key", torch.nan)):
        call = make_call(BASE)
        getattr(call, name)[:, :, 5] = number
        assert one_row.attention(call) is None
    assert one_row.attention(dataclasses.replace(make_call(BASE), query_start=torch.tensor([-1]))) is None
    assert one_row.attention(make_call(dataclasses.replace(BASE, query_len=2))) is None
    assert one_row.attention(make_call(dataclasses.replace(BASE, dtype=torch.bfloat16))) is None


def test_outputs_that_are_given():
    call = make_call(BASE)
    into = torch.zeros(2, 8, 1, 8)[:, 1:7], torch.zeros(2, 8, 1)[:, 1:7]
    assert one_row.attention(call, into=into) is not None
    for mine, other in zip(into, reference.attention(call), strict=True):
        torch.testing.assert_close(mine, other, atol=2e-5, rtol=2e-5)
