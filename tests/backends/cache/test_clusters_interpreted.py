"""Kernels over clusters of a prefix in Triton's interpreter against the reference. Run with TRITON_INTERPRET=1."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from sparsify.backends.cache import append, pages, pages_reference, reference
from sparsify.backends.cache.decode import DecodeTiling, cache_decode
from sparsify.ops.cache import NEVER_OVERWRITTEN, CacheAttentionCall, CacheBoundsCall, CacheDecodeCall
from sparsify.ops.pages import Clusters

pytestmark = pytest.mark.interpreter

STATE = ("keys", "values", "positions", "counts", "seen", "length")
SMALL = Clusters(size=8, count=3, sinks=2, recent=3, reach=6)


def whole_numbers(*shape):
    """Products of these are exact, and equal ones are frequent."""
    return torch.randint(-3, 4, shape).float()


def prepared(read, tokens, clusters, capacity, dim=16):
    """A layer with tokens[b] tokens in row b, of whose pages the first clusters[b] are clusters with means of whole numbers."""
    torch.manual_seed(0)
    batch, total = len(tokens), read.of(capacity)
    filled = torch.arange(capacity) < torch.tensor(tokens)[:, None, None].expand(-1, 2, 1)
    keys, values = whole_numbers(batch, 2, capacity, dim), torch.randn(batch, 2, capacity, dim)
    hidden = torch.where(filled[..., None], 0.0, torch.nan)
    counts = torch.tensor(tokens, dtype=torch.int32)
    order = torch.stack([torch.cat((torch.randperm(n), torch.full((capacity - n,), -1))) for n in tokens for _ in range(2)])
    positions = order.view(batch, 2, capacity).int()
    state = (keys + hidden, values + hidden, positions, counts[:, None].repeat(1, 2), counts + 40, torch.tensor(max(tokens) + 40))
    bounds = whole_numbers(batch, 2, total, 2, dim)
    groups = torch.arange(total) // 16 * 16
    bounds[:, :, :, 1] = bounds[:, :, groups.clamp(min=min(read.first, total - 1)), 1]
    held = torch.tensor(clusters, dtype=torch.int32)[:, None].repeat(1, 2) * read.size
    return state, bounds, held


def call_of(state, bounds, held, read, group=2, padding=False):
    batch, dim = len(state[4]), state[0].shape[3]
    query, key, value = (whole_numbers(batch, 1, heads, dim).transpose(1, 2) for heads in (2 * group, 2, 2))
    options = {"pinned": NEVER_OVERWRITTEN, "scale": 0.3, "softcap": 0.0, "window": 0, "sinks": 0, "pages": read}
    if padding:
        options["is_token"] = torch.tensor([[row % 2 == 1] for row in range(batch)])
    tickets = torch.zeros(batch * 2 + 1, dtype=torch.int32)
    return CacheDecodeCall(query, key, value, *state, bounds=bounds, prepared=held, tickets=tickets, **options)


@pytest.mark.parametrize(
    "case",
    [
        {},
        {"read": Clusters(size=8, share=0.2, reach=0)},
        {"read": Clusters(size=8, share=0.1, reach=2, sinks=0), "group": 1, "dim": 24},
        {"padding": True, "tokens": (380, 130), "clusters": (46, 3)},
        {"clusters": (0, 36)},
        {"read": Clusters(size=8, share=1.0)},
        {"read": Clusters(size=8, count=2, sinks=150, reach=2)},
    ],
    ids=str,
)
@pytest.mark.samples(4)
def test_against_the_reference(case):
    read, tokens, clusters = case.get("read", SMALL), case.get("tokens", (370, 300)), case.get("clusters", (45, 36))
    state, bounds, held = prepared(read, tokens, clusters, 400, case.get("dim", 16))
    ours, theirs = (tuple(t.clone() for t in state) for _ in range(2))
    call = call_of(ours, bounds.clone(), held, read, case.get("group", 2), case.get("padding", False))
    other, dense = (dataclasses.replace(call, **dict(zip(STATE, buffers))) for buffers in (theirs, state))
    listed, chosen = pages.choose(call, read)
    want = reference.cache_decode(dataclasses.replace(other, bounds=bounds.clone()))
    asked = CacheAttentionCall(**other.common(CacheAttentionCall) | {"bounds": bounds})
    for found, count, row in zip(listed, chosen, pages_reference.choose(asked, read, bounds).flatten(0, 1), strict=True):
        assert found[:count].tolist() == sorted(row[row >= 0].tolist())
    got = cache_decode(call, tiling=DecodeTiling(16, 4, 2))
    torch.testing.assert_close(got, want, atol=2e-5, rtol=2e-5)
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, atol=0, rtol=0, equal_nan=True)
    stays = (torch.arange(bounds.shape[2]) * read.size < held[..., None])[..., None, None].expand_as(bounds)
    assert torch.equal(call.bounds[stays], bounds[stays])
    everything = reference.cache_decode(dataclasses.replace(dense, bounds=None, pages=None, prepared=None))
    assert torch.allclose(everything, want, atol=1e-4) == (read.share == 1)


def test_more_pages_than_a_program_holds(monkeypatch):
    monkeypatch.setattr(pages, "_LANES", 8), monkeypatch.setattr(pages, "_PIECES", (1, 2))
    test_against_the_reference({})


@pytest.mark.parametrize("queries", [5, 70])
def test_several_tokens(queries):
    state, bounds, held = prepared(SMALL, (370, 300), (45, 36), 400)
    query, key, value = whole_numbers(2, 4, queries, 16), whole_numbers(2, 2, queries, 16), torch.randn(2, 2, queries, 16)
    keys, values, positions, _, seen, _ = state
    call = CacheAttentionCall(query, keys, values, positions, seen, new_key=key, new_value=value, bounds=bounds, prepared=held, pages=SMALL,
                              scale=0.3, softcap=0.0, window=0, sinks=0)  # fmt: skip
    want = reference.cache_attention(call)
    torch.testing.assert_close(append.cache_attention(call), want, atol=2e-5, rtol=2e-5)
    dense = reference.cache_attention(dataclasses.replace(call, bounds=None, prepared=None, pages=None))
    assert not torch.allclose(dense, want, atol=1e-3)


def test_bounds_of_clusters_stay_where_tokens_come():
    keys, positions = torch.randn(1, 2, 128, 16), torch.arange(128, dtype=torch.int32).repeat(1, 2, 1)
    since = torch.tensor([[40, 88]], dtype=torch.int32)
    for serve in (pages.cache_bounds, pages_reference.cache_bounds):
        bounds = torch.full((1, 2, 16, 2, 16), torch.nan)
        serve(CacheBoundsCall(keys, positions, bounds, since=since, size=8))
        assert (bounds.isnan().flatten(3).any(3) == (torch.arange(16) * 8 + 8 <= since[..., None])).all()
