"""Decode kernels over codes in Triton's interpreter against the reference. Run with TRITON_INTERPRET=1."""

from __future__ import annotations

import itertools

import pytest
import torch

from sparsify import policies
from sparsify.backends.cache import append, quantised, quantised_reference, reference
from sparsify.ops.cache import NEVER_OVERWRITTEN, CacheAttentionCall, CacheDecodeCall, CacheStoreCall
from sparsify.ops.quantised import packed_groups
from sparsify.ops.reselection import CacheReselectCall
from tests.backends.cache.test_quantised import buffers, counters

pytestmark = pytest.mark.interpreter


def check(
    codes,
    tokens=(127, 30),
    pinned=NEVER_OVERWRITTEN,
    capacity=192,
    dim=64,
    group=2,
    padding=False,
    steps=4,
    dtype=torch.float32,
    large=1.0,
    **clauses,
):
    torch.manual_seed(0)
    batch, width, near = len(tokens), max(tokens), {torch.float32: 2e-5, torch.float16: 1e-2, torch.bfloat16: 2e-2}[dtype]
    keys, values, more = buffers(batch, 2, capacity, codes, dtype, dims=(dim, dim))
    state = counters(batch, 2, capacity)
    is_token = torch.tensor([[0] * (width - n) + [1] * n for n in tokens], dtype=torch.bool)
    policy = policies.make("streaming_llm", sinks=pinned, window=capacity - pinned) if pinned >= 0 else policies.make("full")
    common = {"pinned": pinned, "scale": 0.3, "softcap": clauses.pop("softcap", 0.0)}
    stored = {"recent": max(0, capacity - pinned), "empty": True, "policy": policy.describe(), "is_token": is_token, **common}
    key, value = torch.randn(2, batch, 2, width, dim)
    # a first token that most queries look at, and values of very different sizes
    key[:, :, 0] *= 1 + large
    value = (value * torch.logspace(0, -torch.tensor(large).log10(), width)[:, None]).to(dtype)
    key = key.to(dtype)
    reference.cache_store(CacheStoreCall(None, key, value, keys, values, *state, **stored, **more))
    twin = [t.clone() for t in (keys, values, *state)]
    twin_more = {name: t.clone() if isinstance(t, torch.Tensor) else t for name, t in more.items()}
    if clauses.pop("sink_logits", False):
        common["sink_logits"] = torch.randn(2 * group)
    closed = 0
    for step in range(steps):
        query, key, value = (torch.randn(batch, 1, heads, dim).to(dtype).transpose(1, 2) for heads in (2 * group, 2, 2))
        options = {"is_token": torch.tensor([[(row + step) % 3 != 0] for row in range(batch)])} if padding else {}
        options |= {"window": 0, "sinks": 0, **common}
        want = reference.cache_decode(CacheDecodeCall(query, key, value, *twin, **options, **twin_more))
        got = quantised.cache_decode(CacheDecodeCall(query, key, value, keys, values, *state, **options, **more), splits=2)
        torch.testing.assert_close(got, want, atol=near, rtol=near)
        closed += int((more["staged"][..., 1] - more["staged"][..., 0] == 1).sum())
        filled = state[0] >= 0
        for name, a, b in zip(("positions", "counts", "seen", "length"), state, twin[2:], strict=True):
            assert torch.equal(a, b), name
        assert torch.equal(more["staged"], twin_more["staged"])
        for ours, theirs in ((keys, twin[0]), (values, twin[1])):
            assert torch.equal(ours[filled], theirs[filled])
        for name in ("key_scales", "value_scales"):
            torch.testing.assert_close(more[name], twin_more[name], atol=1e-6, rtol=1e-6)
    assert closed, "a group was filled"
    return got


@pytest.mark.parametrize("codes", ["fp8", "int4"])
@pytest.mark.parametrize(
    "case",
    [
        {},
        {"padding": True, "softcap": 3.0, "sink_logits": True},
        {"pinned": 5, "capacity": 100, "tokens": (193, 97)},
        {"dim": 128, "group": 1},
        {"group": 9, "steps": 2},
        {"dtype": torch.bfloat16, "large": 1e4},
        {"dtype": torch.float16, "large": 100.0, "softcap": 3.0},
    ],
    ids=str,
)
@pytest.mark.samples(2)
def test_against_the_reference(codes, case):
    check(codes, **case)


def test_the_two_kinds_of_codes_differ():
    assert not torch.allclose(check("fp8"), check("int4"), atol=1e-4)


def several(codes, tokens=(100, 23), window=0, dtype=torch.float32, splits=1, count=7, new=True, padding=False, dim=64, **clauses):
    """Several tokens over what is kept, of which some lie as they came."""
    torch.manual_seed(0)
    batch, width, capacity = len(tokens), max(tokens), 128
    keys, values, more = buffers(batch, 2, capacity, codes, dtype, dims=(dim, dim))
    state, common = counters(batch, 2, capacity), {"pinned": NEVER_OVERWRITTEN, "scale": 0.3, "softcap": 0.0}
    is_token = torch.tensor([[0] * (width - n) + [1] * n for n in tokens], dtype=torch.bool)
    key, value = torch.randn(2, batch, 2, width, dim).to(dtype)
    stored = {"recent": 0, "empty": True, "policy": policies.make("full").describe(), "is_token": is_token, **common}
    reference.cache_store(CacheStoreCall(None, key, value, keys, values, *state, **stored, **more))
    query, key, value = (torch.randn(batch, count, heads, dim).to(dtype).transpose(1, 2) for heads in (4, 2, 2))
    options = {"scale": 0.3, "softcap": 0.0, "window": window, "sinks": 2 if window else 0, **more, **clauses}
    options |= {"new_key": key, "new_value": value} if new else {}
    if padding:
        options["is_token"] = torch.arange(batch * count).view(batch, count) % 3 != 0
        value.transpose(1, 2)[~options["is_token"]] = torch.nan
    call = CacheAttentionCall(query, keys, values, state[0], state[2], **options)
    want, got = reference.cache_attention(call), append.cache_attention(call, tiling=append.AppendTiling(16, 32, 4, 2), splits=splits)
    near = {torch.float32: 2e-5, torch.bfloat16: 3e-2}[dtype]
    torch.testing.assert_close(got, want, atol=near, rtol=near)
    unread = CacheAttentionCall(**{**vars(call), "staged": torch.zeros_like(call.staged)})
    assert not torch.allclose(append.cache_attention(unread, splits=splits), got, atol=1e-2), "what lies as it came is read there"
    return got


@pytest.mark.parametrize("codes", ["fp8", "int4"])
@pytest.mark.parametrize(
    "case",
    [
        {"splits": 3},
        {"window": 40, "padding": True},
        {"softcap": 3.0, "sink_logits": torch.ones(4), "splits": 2},
        {"new": False, "count": 1},
        {"dtype": torch.bfloat16},
    ],
    ids=str,
)
@pytest.mark.samples(2)
def test_several_tokens(codes, case):
    several(codes, **case)


def packed_state(codes, dim=64):
    """Two heads of a row with slots of their own, groups counted from each head's first, some tokens as they came."""
    torch.manual_seed(1)
    starts = torch.tensor([[0, 150, 200], [0, 70, 200]], dtype=torch.int32)
    counts = torch.tensor([[127, 47], [64, 126]], dtype=torch.int32)
    keys, values, more = buffers(2, 2, 100, codes, dims=(dim, dim))
    more["key_scales"] = more["key_scales"].new_zeros(2, 2, packed_groups(100), *more["key_scales"].shape[3:])
    positions, _, seen, length = counters(2, 2, 100)
    for row, head in itertools.product(range(2), range(2)):
        begin, count = int(starts[row, head]), int(counts[row, head])
        positions[row].view(-1)[begin : begin + count] = torch.arange(count, dtype=torch.int32)
    key, value = torch.randn(2, 2, 2, 129, dim)
    state = (keys, values, positions, counts, seen + 140, length + 140)
    common = {"limit": 100, "kept": 80, "recent": 4, "empty": False, "policy": "", "scale": 1.0, "softcap": 0.0}
    call = CacheReselectCall(None, key[:, :, :0], value[:, :, :0], *state, starts=starts, **common, **more)
    quantised_reference.store_in_order(call, key, value, counts)
    return state, more | {"starts": starts}


@pytest.mark.parametrize("codes", ["fp8", "int4"])
@pytest.mark.samples(1)
def test_heads_of_their_own_sizes(codes):
    ours, more = packed_state(codes)
    theirs, twin = packed_state(codes)
    for step in range(3):
        query, key, value = (torch.randn(2, 1, heads, 64).transpose(1, 2) for heads in (4, 2, 2))
        options = {"pinned": NEVER_OVERWRITTEN, "scale": 0.3, "softcap": 0.0, "window": 0, "sinks": 0}
        want = reference.cache_decode(CacheDecodeCall(query, key, value, *theirs, **options, **twin))
        got = quantised.cache_decode(CacheDecodeCall(query, key, value, *ours, **options, **more), splits=2)
        torch.testing.assert_close(got, want, atol=2e-5, rtol=2e-5)
        for a, b in zip((*ours, more["staged"], more["value_scales"]), (*theirs, twin["staged"], twin["value_scales"]), strict=True):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6, msg=f"after step {step}")
    assert (more["staged"][0, 0] == torch.tensor([128, 130])).all(), "a group became codes, another was begun"
    query, key, value = (torch.randn(2, 3, heads, 64).transpose(1, 2) for heads in (4, 2, 2))
    options = {"new_key": key, "new_value": value, "scale": 0.3, "softcap": 0.0, "window": 0, "sinks": 0, **more}
    call = CacheAttentionCall(query, *ours[:3], ours[4], **options)
    torch.testing.assert_close(append.cache_attention(call, splits=2), reference.cache_attention(call), atol=2e-5, rtol=2e-5)
