"""Generated decode and append kernels over heads with numbers of slots of their own, in Triton's interpreter. TRITON_INTERPRET=1."""

from __future__ import annotations

import pytest
import torch

from sparsify.backends.cache import append, reference
from sparsify.backends.cache.decode import DecodeTiling, cache_decode
from sparsify.ops.cache import NEVER_OVERWRITTEN, CacheAttentionCall, CacheDecodeCall

pytestmark = pytest.mark.interpreter

BATCH, KV_HEADS, GROUP, DIM, CAPACITY = 2, 3, 2, 16, 32
CALL = {"scale": 0.3, "softcap": 0.0, "window": 0, "sinks": 0}
# sizes of the heads and what they hold; head 1 of row 0 is full after two tokens
SIZES = torch.tensor([[60, 12, 24], [7, 70, 19]])
COUNTS = torch.tensor([[41, 10, 0], [1, 66, 17]], dtype=torch.int32)


def state() -> tuple[torch.Tensor, ...]:
    """What lies behind a head's tokens is NaN in keys and values, so that nobody may read it."""
    starts = torch.cat((torch.zeros(BATCH, 1), SIZES.cumsum(-1)), 1).to(torch.int32)
    assert (starts[:, -1] == KV_HEADS * CAPACITY).all()
    keys, values = torch.full((2, BATCH, KV_HEADS, CAPACITY, DIM), torch.nan)
    positions = torch.full((BATCH, KV_HEADS, CAPACITY), -1, dtype=torch.int32)
    for row in range(BATCH):
        for head in range(KV_HEADS):
            begin, count = int(starts[row, head]), int(COUNTS[row, head])
            part = slice(begin, begin + count)
            keys[row].view(-1, DIM)[part], values[row].view(-1, DIM)[part] = torch.randn(2, count, DIM)
            positions[row].view(-1)[part] = torch.randperm(90)[:count].sort().values.to(torch.int32)
    return keys, values, positions, COUNTS.clone(), torch.full((BATCH,), 90, dtype=torch.int32), torch.tensor(95), starts


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("padding", [False, True])
def test_decode(fused, padding):
    torch.manual_seed(0)
    *ours, starts = state()
    theirs = [t.clone() for t in ours]
    tickets = torch.zeros(BATCH * KV_HEADS + 1, dtype=torch.int32) if fused else None
    for step in range(4):
        query, key, value = (torch.randn(BATCH, 1, heads, DIM).transpose(1, 2) for heads in (KV_HEADS * GROUP, KV_HEADS, KV_HEADS))
        options = {"is_token": torch.tensor([[step != 1], [step != 2]]) if padding else None, "starts": starts, **CALL}
        options["pinned"] = NEVER_OVERWRITTEN
        want = reference.cache_decode(CacheDecodeCall(query, key, value, *theirs, **options))
        got = cache_decode(CacheDecodeCall(query, key, value, *ours, tickets=tickets, **options), tiling=DecodeTiling(16, 4, 2))
        torch.testing.assert_close(got, want, atol=2e-5, rtol=2e-5, equal_nan=True)
        full = (ours[3] > SIZES).repeat_interleave(GROUP, 1)
        assert torch.equal(got.isnan().any(-1)[..., 0], full) and bool(full.any()) == (step >= (3 if padding else 2))
        for name, a, b in zip(("keys", "values", "positions", "counts", "seen", "length"), ours, theirs, strict=True):
            torch.testing.assert_close(a, b, atol=0, rtol=0, equal_nan=True, msg=f"{name} after step {step}")


@pytest.mark.parametrize("splits", [1, 3])
def test_several_tokens(splits):
    torch.manual_seed(0)
    keys, values, positions, _, seen, _, starts = state()
    keys, values = keys.nan_to_num(0), values.nan_to_num(0)  # this kernel reads a head's slots up to the row's tokens
    query, key, value = (torch.randn(BATCH, 5, heads, DIM).transpose(1, 2) for heads in (KV_HEADS * GROUP, KV_HEADS, KV_HEADS))
    record = CacheAttentionCall(query, keys, values, positions, seen, new_key=key, new_value=value, starts=starts, **CALL)
    want, got = reference.cache_attention(record), append.cache_attention(record, splits=splits)
    torch.testing.assert_close(got, want, atol=2e-5, rtol=2e-5)
    assert not torch.allclose(got, reference.cache_attention(CacheAttentionCall(**{**vars(record), "starts": None})), atol=1e-3)
