"""sink_window: exact by token, in prefill, chunk and decode, padded or not."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsify.passes.sink_window import SinkWindow
from tests.support import attention_functions as attention
from tests.support.ir import changed_region, check_golden, rewritten_graph


def options(sinks: int, window: int) -> dict:
    return {"passes": ["sink_window"], "strict": True, "min_length": 0, "lower": "eager", "sink_window": {"sinks": sinks, "window": window}}


def masked(query, key, value, sinks, window, visible=None):
    """The definition, row by row, in float64."""
    batch, heads, query_len, dim = query.shape
    groups, key_len = heads // key.shape[1], key.shape[2]
    out = torch.zeros_like(query)
    for b in range(batch):
        seen = [k for k in range(key_len) if visible is None or visible[b, k]]
        for q in range(query_len):
            position = q + key_len - query_len
            causal = [k for k in seen if k <= position]
            keep = sorted(set(causal[:sinks]) | {k for k in causal if k > position - window})
            for h in range(heads):
                if keep:
                    scores = key[b, h // groups, keep].double() @ query[b, h, q].double() * dim**-0.5
                    out[b, h, q] = (scores.softmax(0) @ value[b, h // groups, keep].double()).to(query.dtype)
    return out


def run(function, inputs, sinks, window):
    torch._dynamo.reset()
    with torch.no_grad():
        return torch.compile(function, backend="sparsify", options=options(sinks, window), fullgraph=True)(*inputs)


@settings(max_examples=12, deadline=None)
@given(st.integers(1, 12), st.integers(0, 9), st.integers(0, 5), st.integers(1, 9), st.integers(0, 99))
def test_equals_the_definition(query_len, before, sinks, window, seed):
    inputs = attention.operands(query_len=query_len, key_len=query_len + before, seed=seed)
    torch.testing.assert_close(run(attention.causal, inputs, sinks, window), masked(*inputs, sinks, window), atol=1e-5, rtol=1e-5)


@settings(max_examples=12, deadline=None)
@given(st.integers(2, 10), st.integers(0, 9), st.booleans(), st.integers(1, 4), st.integers(1, 6), st.integers(0, 99))
def test_sinks_are_the_first_visible_keys_of_each_row(query_len, pads, left, sinks, window, seed):
    inputs = attention.operands(query_len=query_len, seed=seed)
    pads = min(pads, query_len - 1)
    visible = torch.ones(2, query_len, dtype=torch.long)
    visible[0, slice(0, pads) if left else slice(query_len - pads, None)] = 0
    got = run(attention.padded, (*inputs, visible), sinks, window)
    want = masked(*inputs, sinks, window, visible)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


def in_documents(query, key, value, documents, shown):
    at = torch.arange(query.shape[2])
    seen = (at[None] <= at[:, None])[None] & (documents[:, :, None] == documents[:, None, :]) & shown[:, None, :]
    return torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=seen[:, None], enable_gqa=True)


@settings(max_examples=6, deadline=None)
@given(st.integers(2, 12), st.integers(0, 2), st.integers(1, 3), st.integers(0, 99), st.sampled_from([torch.int32, torch.int64]))
def test_packed_documents_have_sinks_of_their_own(query_len, sinks, window, seed, dtype):
    """Documents in any order, and padding among them: each sees itself as if it were alone."""
    inputs = attention.operands(query_len=query_len, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    documents = torch.randint(0, 3, (2, query_len), generator=generator).sort(-1).values.flip(0).to(dtype)
    shown = torch.rand(2, query_len, generator=generator) > 0.2
    got = run(in_documents, (*inputs, documents, shown), sinks, window)
    for number in range(3):
        mine = shown & (documents == number)
        want = masked(*inputs, sinks, window, mine)
        rows = (documents == number)[:, None, :, None].expand_as(got)
        torch.testing.assert_close(got[rows], want[rows], atol=1e-5, rtol=1e-5)


def test_it_is_sparse_and_differs_from_dense():
    inputs = attention.operands(query_len=12)
    assert (run(attention.causal, inputs, 1, 3) - attention.causal(*inputs)).abs().max() > 0.05


def test_golden():
    before, after, plan = rewritten_graph(attention.causal, attention.operands(query_len=12), options(1, 3))
    assert plan.decisions[0].method == "sink_window"
    check_golden("sink_window", changed_region(before, after))


def test_below_its_own_size_it_steps_aside():
    given = options(4, 64) | {"min_length": "auto"}
    _, after, plan = rewritten_graph(attention.causal, attention.operands(query_len=12), given)
    assert after is None
    assert "69" in plan.decisions[0].refusals[0]


def test_it_needs_an_order():
    _, after, plan = rewritten_graph(attention.full, attention.operands(), options(1, 3))
    assert after is None
    assert "not causal" in plan.decisions[0].refusals[0]


def test_keep_all_covers_everything():
    assert SinkWindow(sinks=1, window=3).keep_all().window == 1 << 30


@pytest.mark.parametrize("bad", [{"sinks": -1}, {"window": 0}, {"window": 1.5}])
def test_impossible_values(bad):
    with pytest.raises(ValueError):
        SinkWindow(**bad)


def test_a_window_per_head_and_heads_that_see_everything():
    inputs = attention.operands(query_len=12)
    got = run(attention.causal, inputs, 1, [3, 0, 5, 0])
    whole = attention.causal(*inputs)
    torch.testing.assert_close(got[:, [1, 3]], whole[:, [1, 3]], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(got[:, 0], masked(*inputs, 1, 3)[:, 0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(got[:, 2], masked(*inputs, 1, 5)[:, 2], atol=1e-5, rtol=1e-5)
    assert (got - whole)[:, 0].abs().max() > 0.05


@pytest.mark.parametrize("window", [0, [0, 0], [-1, 3], []])
def test_windows_that_say_nothing_are_refused(window):
    with pytest.raises(ValueError, match="must"):
        SinkWindow(window=window if isinstance(window, int) else tuple(window))
