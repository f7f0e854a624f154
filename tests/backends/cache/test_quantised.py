"""Keys and values in 8 and 4 bits: what a code may differ from its number by, and what any calls leave in a cache."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsify import policies
from sparsify.backends.cache import packed as packed_heads
from sparsify.backends.cache import quantised_reference as quantised
from sparsify.backends.cache import reference
from sparsify.ops.cache import CacheAttentionCall, CacheDecodeCall, CacheStoreCall
from sparsify.ops.quantised import GROUP, groups, packed, packed_groups, parts

DIM = 16


def buffers(batch, kv_heads, capacity, codes, dtype=torch.float32, dims=(DIM, DIM)):
    """Empty keys and values as codes, and what goes with them."""
    scales = {
        "key_scales": torch.zeros(batch, kv_heads, groups(capacity), parts(codes), dims[0], dtype=dtype),
        "value_scales": torch.zeros(batch, kv_heads, capacity, parts(codes), dtype=dtype),
        "recent_keys": torch.full((batch, kv_heads, GROUP, dims[0]), torch.nan, dtype=dtype),
        "recent_values": torch.full((batch, kv_heads, GROUP, dims[1]), torch.nan, dtype=dtype),
        "staged": torch.zeros(batch, kv_heads, 2, dtype=torch.int32),
    }
    keys, values = (torch.zeros(batch, kv_heads, capacity, packed(dim, codes), dtype=torch.uint8) for dim in dims)
    return keys, values, scales | {"codes": codes}


def counters(batch, kv_heads, capacity):
    ints = {"dtype": torch.int32}
    slots = torch.full((batch, kv_heads, capacity), -1, **ints)
    return slots, torch.zeros(batch, kv_heads, **ints), torch.zeros(batch, **ints), torch.zeros((), dtype=torch.int64)


def rounding(numbers, scales, codes):
    """The most that a code may be away from its number."""
    scale = scales[..., 0, :].float()
    if codes == "fp8":  # half of the last of three bits behind the first, or of the smallest step
        return torch.maximum(numbers.abs() / 16, scale / 1024) * (1 + 1e-5)
    return scale / 2 * (1 + 1e-4) + 1e-6 + numbers.abs() * 2.0**-22  # fp32 knows numbers far from zero less well


@pytest.mark.parametrize("codes", ["fp8", "int4"])
@given(seed=st.integers(0, 10**6), exponent=st.integers(-6, 6), offset=st.sampled_from([0.0, 3.0, -100.0]))
@settings(max_examples=25, deadline=None)
def test_codes_are_as_near_as_their_steps(codes, seed, exponent, offset):
    torch.manual_seed(seed)
    numbers = torch.randn(3, 5, 8) * 2.0**exponent * torch.rand(3, 1, 8) + offset
    scales = quantised.scales_of(numbers.amin(1), numbers.amax(1), codes, torch.float32)
    got = quantised.decode(quantised.encode(numbers, scales[:, None], codes), scales[:, None], codes)
    assert ((got - numbers).abs() <= rounding(numbers, scales[:, None], codes)).all()
    again = quantised.scales_of(got.amin(1), got.amax(1), codes, torch.float32)
    twice = quantised.decode(quantised.encode(got, again[:, None], codes), again[:, None], codes)
    torch.testing.assert_close(twice, got, atol=2e-5 * float(numbers.abs().max()), rtol=1e-5, msg="once more changes nothing")


def test_four_bits_lie_where_the_format_says():
    scales = torch.stack((torch.ones(8), torch.zeros(8)))
    stored = quantised.encode(torch.tensor([[1.0, 2, 3, 4, 5, 6, 7, 15]]), scales, "int4")
    assert stored.view(torch.int16)[0, 0] & 0xFFFF == 1 | 3 << 4 | 5 << 8 | 7 << 12
    assert stored.tolist() == [[1 | 3 << 4, 5 | 7 << 4, 2 | 4 << 4, 6 | 15 << 4]]


POLICIES = {"full": {}, "streaming_llm": {"sinks": 3, "window": 100}, "streaming_llm, aligned": {"sinks": 0, "window": 128}}


@pytest.mark.parametrize("codes", ["fp8", "int4"])
@pytest.mark.parametrize("name", POLICIES)
@given(
    cuts=st.lists(st.sampled_from([1, 1, 1, 2, 30, 64, 90, 130]), min_size=1, max_size=5), seed=st.integers(0, 1000), padded=st.booleans()
)
@settings(max_examples=4, deadline=None)
def test_any_calls_leave_what_16_bits_would_up_to_rounding(name, codes, cuts, seed, padded):
    """Every slot lies as near as its group's steps allow, the newest tokens lie there as they came, and attention reads just that."""
    torch.manual_seed(seed)
    policy = policies.make(name.split(",")[0], **POLICIES[name])
    layout = policy.layout(None)
    capacity = 1024 if layout.grows else layout.capacity
    keys, values, more = buffers(2, 2, capacity, codes)
    plain_keys, plain_values = torch.zeros(2, 2, capacity, DIM), torch.zeros(2, 2, capacity, DIM)
    ours, theirs = counters(2, 2, capacity), counters(2, 2, capacity)
    common = {"pinned": layout.pinned, "scale": 0.4, "softcap": 0.0}
    offset = torch.randn(DIM) * 4
    widest: list[torch.Tensor] = []  # steps that any group has had, by channel
    for number, cut in enumerate([*cuts, *[1] * (3 + seed % 70)]):
        query, key, value = torch.randn(2, 4, cut, DIM), torch.randn(2, 2, cut, DIM) + offset, torch.randn(2, 2, cut, DIM)
        is_token = torch.rand(2, cut) < 0.8 if padded else None
        if cut == 1 and number:
            step = {"is_token": is_token, "window": 0, "sinks": 0, **common}
            got = reference.cache_decode(CacheDecodeCall(query, key, value, keys, values, *ours, **step, **more))
            reference.cache_decode(CacheDecodeCall(query, key, value, plain_keys, plain_values, *theirs, **step))
        else:
            store = {"recent": layout.recent, "empty": number == 0, "policy": policy.describe(), "is_token": is_token, **common}
            reference.cache_store(CacheStoreCall(None, key, value, keys, values, *ours, **store, **more))
            reference.cache_store(CacheStoreCall(None, key, value, plain_keys, plain_values, *theirs, **store))
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
        widest.append(more["key_scales"].amax(2, keepdim=True))
    read = {"scale": 0.4, "softcap": 0.0, "window": 0, "sinks": 0}
    call = CacheAttentionCall(query, keys, values, ours[0], ours[2], **read, **more)
    got_keys, got_values = quantised.everything(call)
    held, staged = ours[0] >= 0, quantised.lies_as_it_came(call, torch.arange(capacity).expand(2, 2, -1))
    assert (staged & held).sum() == staged.sum()
    assert torch.equal(got_keys[staged], plain_keys[staged]) and torch.equal(got_values[staged], plain_values[staged])
    if name == "full":
        assert torch.equal(staged.sum(-1) % GROUP, ours[1] % GROUP), "all tokens since the last whole group"
    # tokens that move to another group are rounded once more, with that group's steps
    times = 1.01 if layout.grows else len(cuts) + 3.0
    key_steps = more["key_scales"].repeat_interleave(GROUP, 2)[:, :, :capacity]
    key_steps = key_steps if layout.grows else torch.stack(widest).amax(0)
    near = (got_keys - plain_keys).abs() <= times * rounding(plain_keys, key_steps, codes) + 1e-5
    assert near[held & ~staged].all()
    near = (got_values - plain_values).abs() <= times * rounding(plain_values, more["value_scales"][..., None], codes) + 1e-5
    assert near[held & ~staged].all()
    dense = CacheAttentionCall(query, got_keys, got_values, ours[0], ours[2], **read)
    torch.testing.assert_close(reference.cache_attention(call), reference.cache_attention(dense))
    if len(cuts) > 1 or cuts[0] > 1:
        exact = reference.cache_attention(CacheAttentionCall(query, plain_keys, plain_values, theirs[0], theirs[2], **read))
        assert staged.sum() == held.sum() or not torch.equal(reference.cache_attention(call), exact)
    assert got.isfinite().all()


@given(sizes=st.lists(st.integers(1, 200), min_size=1, max_size=6))
def test_groups_of_packed_heads_have_places_of_their_own(sizes):
    """Heads of any sizes, each of whose groups begin at its own first slot."""
    capacity = -(-sum(sizes) // len(sizes))
    starts = torch.tensor([[0, *itertools.accumulate(sizes)]])
    first, end = packed_heads._groups(starts)
    assert (first[:, 1:] >= end[:, :-1]).all() and int(end[0, -1]) <= len(sizes) * packed_groups(capacity)
    assert (end - first)[0].tolist() == [groups(size) for size in sizes]
