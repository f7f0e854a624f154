"""Generated decode and append kernels over a cache that evicts nothing, in Triton's interpreter. Run with TRITON_INTERPRET=1."""

from __future__ import annotations

import pytest
import torch

from sparsify import policies
from sparsify.backends.cache import append, reference
from sparsify.backends.cache.decode import DecodeTiling, cache_decode
from sparsify.ops.cache import NEVER_OVERWRITTEN, CacheAttentionCall, CacheDecodeCall, CacheStoreCall

pytestmark = pytest.mark.interpreter

BATCH, KV_HEADS, GROUP, DIM, CAPACITY = 2, 2, 3, 16, 64
CALL = {"scale": 0.3, "softcap": 0.0}
PINNED = {"pinned": NEVER_OVERWRITTEN}


def filled(tokens: tuple[int, ...]) -> tuple[torch.Tensor, ...]:
    """A layer whose row b holds tokens[b] tokens; beyond them lies what nobody may read."""
    ints = {"dtype": torch.int32}
    state = (
        torch.full((BATCH, KV_HEADS, CAPACITY, DIM), torch.nan),
        torch.full((BATCH, KV_HEADS, CAPACITY, DIM), torch.nan),
        torch.full((BATCH, KV_HEADS, CAPACITY), -1, **ints),
        torch.zeros(BATCH, KV_HEADS, **ints),
        torch.zeros(BATCH, **ints),
        torch.zeros((), dtype=torch.int64),
    )
    width = max(tokens)
    is_token = torch.tensor([[0] * (width - n) + [1] * n for n in tokens], dtype=torch.bool)
    key, value = torch.randn(2, BATCH, KV_HEADS, width, DIM)
    value.transpose(1, 2)[~is_token] = torch.nan
    policy = policies.make("full").describe()
    reference.cache_store(
        CacheStoreCall(None, key, value, *state, is_token=is_token, empty=True, policy=policy, recent=0, **PINNED, **CALL)
    )
    return state


def token() -> tuple[torch.Tensor, ...]:
    return tuple(torch.randn(BATCH, 1, heads, DIM).transpose(1, 2) for heads in (KV_HEADS * GROUP, KV_HEADS, KV_HEADS))


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize("tokens", [(50, 7), (64, 62), (1, 33)])
@pytest.mark.samples(4)
def test_decode(fused, padding, tokens):
    """(64, 62) outgrows the room: NaN from there on in that row, and in no other."""
    torch.manual_seed(0)
    ours = filled(tokens)
    theirs = tuple(t.clone() for t in ours)
    tickets = torch.zeros(BATCH * KV_HEADS + 1, dtype=torch.int32) if fused else None
    for step in range(4):
        query, key, value = token()
        options = {"is_token": torch.tensor([[step != 1], [step != 2]]) if padding else None, "window": 0, "sinks": 0, **PINNED, **CALL}
        want = reference.cache_decode(CacheDecodeCall(query, key, value, *theirs, **options))
        got = cache_decode(CacheDecodeCall(query, key, value, *ours, tickets=tickets, **options), tiling=DecodeTiling(16, 4, 2))
        torch.testing.assert_close(got, want, atol=2e-5, rtol=2e-5, equal_nan=True)
        lost = ours[4] > CAPACITY
        assert torch.equal(got.isnan().all((1, 2, 3)), lost) and torch.equal(got.isnan().any((1, 2, 3)), lost)
        for name, a, b in zip(("keys", "values", "positions", "counts", "seen", "length"), ours, theirs):
            torch.testing.assert_close(a, b, atol=0, rtol=0, equal_nan=True, msg=f"{name} after step {step}")


@pytest.mark.parametrize("padding", [False, True])
def test_several_tokens(padding):
    torch.manual_seed(0)
    keys, values, positions, _, seen, _ = filled((50, 7))
    query, key, value = (torch.randn(BATCH, 5, heads, DIM).transpose(1, 2) for heads in (KV_HEADS * GROUP, KV_HEADS, KV_HEADS))
    call = {"new_key": key, "new_value": value, "window": 0, "sinks": 0, **CALL}
    if padding:
        call["is_token"] = torch.tensor([[False, True, True, False, True], [True, False, False, True, True]])
    record = CacheAttentionCall(query, keys, values, positions, seen, **call)
    want, got = reference.cache_attention(record), append.cache_attention(record)
    torch.testing.assert_close(got, want, atol=2e-5, rtol=2e-5)
