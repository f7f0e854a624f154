"""The last rows of a prompt see every key, whatever a method hides from the others: exactly those rows, by token."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention
from transformers import StaticCache

import sparsify
from sparsify import api
from sparsify.passes.minference import MInference
from sparsify.passes.sink_window import SinkWindow
from sparsify.passes.xattention import XAttention
from tests.support import attention_functions as attention
from tests.support.harness import holding, strict
from tests.support.ir import rewritten_graph
from tests.support.tiny_models import VOCAB, build, spread_weights

METHODS = {
    "sink_window": {"sinks": 1, "window": 9},
    "minference": {"columns": 0, "diagonals": 0, "queries": 4, "block": 64},
    "xattention": {"threshold": 0.1, "block": 64},
}


def options(method, last_rows, **more):
    own = METHODS[method] | {"last_rows": last_rows}
    return {"passes": [method], "strict": True, "min_length": 0, "lower": "eager", method: own, **more}


def run(function, inputs, method, last_rows, **more):
    torch._dynamo.reset()
    with torch.no_grad(), api.collect_plans() as plans:
        output = torch.compile(function, backend="sparsify", options=options(method, last_rows, **more), fullgraph=True)(*inputs)
    assert [d.method for plan in plans for d in plan.rewritten] == [method]
    return output


def compared(function, inputs, method, last_rows, is_last):
    """is_last: bool, broadcastable to [batch, 1, query_len, 1]."""
    got = run(function, inputs, method, last_rows)
    sparse, dense = run(function, inputs, method, 0), function(*inputs)
    torch.testing.assert_close(got, torch.where(is_last, dense, sparse), atol=1e-5, rtol=1e-5)
    changed = (sparse - dense).abs().amax((1, 3), keepdim=True) > 1e-3
    assert (changed & is_last).any() and (changed & ~is_last).any()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("query_len, key_len", [(330, 330), (200, 330)])
def test_the_last_rows_of_a_call_are_dense(method, query_len, key_len):
    inputs = attention.operands(query_len=query_len, key_len=key_len)
    compared(attention.causal, inputs, method, 21, (torch.arange(query_len) >= query_len - 21)[None, None, :, None])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("side", ["left", "right", "gaps"])
def test_padded_rows_have_last_tokens_of_their_own(method, side):
    query_len, key_len = (330, 330) if side != "gaps" else (260, 330)
    inputs = attention.operands(query_len=query_len, key_len=key_len)
    visible = torch.ones(2, key_len, dtype=torch.long)
    if side == "gaps":
        visible[0, ::3], visible[1, 300:317] = 0, 0
    else:
        visible[0, slice(0, 150) if side == "left" else slice(180, None)] = 0
    tokens = visible[:, key_len - query_len :].bool()
    later = tokens.flip(-1).cumsum(-1).flip(-1)
    compared(attention.padded, (*inputs, visible), method, 21, (tokens & (later <= 21))[:, None, :, None])


@settings(max_examples=6, deadline=None)
@given(st.integers(2, 40), st.integers(0, 30), st.integers(1, 12), st.integers(0, 999))
def test_any_padding(query_len, before, last_rows, seed):
    """Rows with fewer tokens than are asked for, and without any, too."""
    last_rows = min(last_rows, query_len - 1)
    inputs = attention.operands(query_len=query_len, key_len=query_len + before, seed=seed)
    visible = (torch.rand(2, query_len + before, generator=torch.Generator().manual_seed(seed)) > 0.5).long()
    tokens = visible[:, before:].bool()
    last = (tokens & (tokens.flip(-1).cumsum(-1).flip(-1) <= last_rows))[:, None, :, None]
    got = run(attention.padded, (*inputs, visible), "sink_window", last_rows)
    sparse, dense = run(attention.padded, (*inputs, visible), "sink_window", 0), attention.padded(*inputs, visible)
    torch.testing.assert_close(got, torch.where(last, dense, sparse), atol=1e-5, rtol=1e-5)


def biased(query, key, value, bias):
    rows = torch.arange(query.shape[2])[:, None]
    mask = torch.zeros(query.shape[2], key.shape[2]).masked_fill(torch.arange(key.shape[2]) > rows, -torch.inf)
    return scaled_dot_product_attention(query, key.repeat_interleave(2, 1), value.repeat_interleave(2, 1), attn_mask=mask + bias)


def with_start(query, key, value, start):
    """Over the slots of a static cache, of which the later ones are not written yet."""
    rows = torch.arange(query.shape[2]) + start
    mask = torch.arange(key.shape[2]) <= rows[:, None]
    return scaled_dot_product_attention(query, key.repeat_interleave(2, 1), value.repeat_interleave(2, 1), attn_mask=mask[None, None])


def with_start_and_padding(query, key, value, start, visible):
    rows = torch.arange(query.shape[2]) + start
    mask = (torch.arange(key.shape[2]) <= rows[:, None])[None, None] & visible.bool()[:, None, None]
    return scaled_dot_product_attention(query, key.repeat_interleave(2, 1), value.repeat_interleave(2, 1), attn_mask=mask)


@pytest.mark.parametrize("rows", [1, 60])
def test_a_bias_is_cut_with_the_rows(rows):
    inputs = attention.operands(query_len=60)
    bias = torch.randn(1, 4, rows, 60, generator=torch.Generator().manual_seed(1))
    compared(biased, (*inputs, bias), "sink_window", 7, (torch.arange(60) >= 53)[None, None, :, None])


@pytest.mark.parametrize("method", METHODS)
def test_slots_that_are_not_written_are_no_last_tokens(method):
    inputs = attention.operands(query_len=200, key_len=330)
    last = (torch.arange(200) >= 179)[None, None, :, None]
    compared(with_start, (*inputs, torch.tensor(100)), method, 21, last)
    visible = torch.ones(2, 330, dtype=torch.long)
    visible[:, :120] = 0
    compared(with_start_and_padding, (*inputs, torch.tensor(100), visible), method, 21, last)


@torch.no_grad()
@pytest.mark.parametrize("rows", [20, pytest.param(59, marks=pytest.mark.slow)])
def test_a_chunk_of_a_static_cache(rows):
    """Its graph has one number of query rows, which validation makes smaller than the last ones."""
    model = build("llama", layers=1)
    spread_weights(model)
    ids, cache = torch.randint(3, VOCAB, (2, 150)), StaticCache(config=model.config, max_cache_len=200)
    dense = model(ids).logits
    sparsify.compile(
        model, **strict(passes=["sink_window", "dense"], sink_window={"sinks": 1, "window": 9, "last_rows": rows}, min_length=0)
    )
    found = torch.cat([model(part, **holding(cache)).logits for part in ids.split((90, 60), 1)], 1)
    is_last = torch.cat([torch.arange(length) >= length - rows for length in (90, 60)])
    torch.testing.assert_close(found[:, is_last], dense[:, is_last], atol=1e-4, rtol=1e-4)
    assert (found - dense).abs().amax((0, 2))[~is_last].max() > 0.1


@pytest.mark.parametrize("method", METHODS)
def test_one_graph_serves_all_lengths(method):
    torch._dynamo.reset()
    compiled = torch.compile(attention.padded, backend="sparsify", options=options(method, 21), fullgraph=True)
    with torch.no_grad(), api.collect_plans() as plans:
        for length in (300, 230, 500):
            inputs = attention.operands(query_len=length)
            visible = torch.ones(2, length, dtype=torch.long)
            visible[1, :40] = 0
            for operand, dim in ((inputs[0], 2), (inputs[1], 2), (inputs[2], 2), (visible, 1)):
                torch._dynamo.mark_dynamic(operand, dim)
            dense = attention.padded(*inputs, visible)
            got = compiled(*inputs, visible)
            torch.testing.assert_close(got[:, :, -21:], dense[:, :, -21:], atol=1e-5, rtol=1e-5)
            assert not torch.allclose(got, dense, atol=1e-3)
    assert len(plans) == 1


@pytest.mark.parametrize("kept", [XAttention(block=64), MInference(block=64), SinkWindow()])
def test_keep_all_is_dense(kept):
    inputs = attention.operands(query_len=330)
    kept = kept.model_copy(update={"last_rows": 21}).keep_all()
    got = run(attention.causal, inputs, kept.name, 21, **{kept.name: kept.options()})
    torch.testing.assert_close(got, attention.causal(*inputs), atol=1e-5, rtol=1e-5)


def in_documents(query, key, value, documents):
    at = torch.arange(query.shape[2])
    seen = (at[None] <= at[:, None])[None] & (documents[:, :, None] == documents[:, None, :])
    return scaled_dot_product_attention(query, key, value, attn_mask=seen[:, None], enable_gqa=True)


@pytest.mark.parametrize("method", METHODS)
def test_what_is_refused(method):
    inputs = attention.operands(query_len=100)
    for function, operands, rows, reason in (
        (attention.causal, inputs, 100, "at most 100 rows"),
        (attention.causal, attention.operands(query_len=1, key_len=99), 21, "one query row|at most 21 rows"),
        (in_documents, (*inputs, torch.zeros(2, 100, dtype=torch.long)), 21, "documents"),
        (attention.full, inputs, 21, "not causal"),
    ):
        _, after, plan = rewritten_graph(function, operands, options(method, rows) | {"strict": False})
        assert after is None
        assert any(word in plan.decisions[0].refusals[0] for word in reason.split("|")), plan.decisions[0].refusals


def test_their_time_is_counted():
    from sparsify.costs.sizes import AttentionSizes

    sizes = AttentionSizes(1, 8, 2, 32768, 32768, 64, 64)
    for method in (XAttention, MInference, SinkWindow):
        without, counted = method().works(sizes, "triton"), method(last_rows=128).works(sizes, "triton")
        (extra,) = set(counted) - set(without)
        assert len(counted) == len(without) + 1
        assert float(extra.flops) == pytest.approx(2 * 8 * 128 * (32768 - 64 + 64) * 128, rel=0.01)
