"""Kernels over pages of codes in Triton's interpreter against the reference. Run with TRITON_INTERPRET=1."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from sparsify import policies
from sparsify.backends.cache import pages, pages_reference, quantised, reference
from sparsify.errors import UnsupportedError
from sparsify.ops.cache import NEVER_OVERWRITTEN, CacheAttentionCall, CacheBoundsCall, CacheDecodeCall, CacheStoreCall
from sparsify.ops.pages import Pages
from tests.backends.cache.test_quantised import buffers, counters

pytestmark = pytest.mark.interpreter

FEW = Pages(size=16, count=1, sinks=1, recent=1)
FULL = {"pinned": NEVER_OVERWRITTEN, "capacity": 256, "tokens": (190, 127)}
# a ring whose last group, of 4 slots, is filled while other slots of it hold older tokens; then the first group begins anew
RING = {"pinned": 5, "capacity": 196, "tokens": (388, 190), "before": 188}


def filled(codes, size, tokens, pinned, capacity, dim, dtype, before=0, forget=None):
    """A layer whose row b was given tokens[b] tokens at once and `before` one by one, the bounds of its pages, and what goes with codes."""
    batch, width = len(tokens), max(tokens)
    keys, values, more = buffers(batch, 2, capacity, codes, dtype, dims=(dim, dim))
    state = counters(batch, 2, capacity)
    bounds = torch.zeros(batch, 2, -(-capacity // size), 2, dim, dtype=dtype)
    is_token = torch.tensor([[0] * (width - n) + [1] * n for n in tokens], dtype=torch.bool)
    policy = policies.make("streaming_llm", sinks=pinned, window=capacity - pinned) if pinned >= 0 else policies.make("full")
    stored = {
        "pinned": pinned,
        "recent": max(0, capacity - pinned),
        "empty": True,
        "policy": policy.describe(),
        "scale": 0.3,
        "softcap": 0.0,
    }
    key, value = torch.randn(2, batch, 2, width, dim).to(dtype)
    if forget is not None:  # a value that is no number, of a token that is about to be replaced
        value[:, :, forget] = torch.nan
    layer = (keys, values, *state)
    reference.cache_store(CacheStoreCall(None, key, value, *layer, is_token=is_token, **stored, **more))
    for _ in range(before):
        key, value = torch.randn(2, batch, 2, 1, dim).to(dtype)
        reference.cache_store(CacheStoreCall(None, key, value, *layer, **{**stored, "empty": False}, **more))
    reference_bounds(layer, bounds, size, more)
    return layer, bounds, more


def reference_bounds(layer, bounds, size, more):
    pages_reference.cache_bounds(CacheBoundsCall(layer[0], layer[2], bounds, values=layer[1], size=size, **more))


def copied(layer, bounds, more):
    twin = {name: t.clone() if isinstance(t, torch.Tensor) else t for name, t in more.items()}
    return [t.clone() for t in layer], bounds.clone(), twin


def check(
    codes, read, pinned, capacity, tokens, dim=64, group=2, padding=False, dtype=torch.float32, steps=3, splits=2, before=0, **clauses
):
    """Steps of the kernels beside those of the reference: outputs, lists, states, bounds."""
    torch.manual_seed(0)
    batch, near = len(tokens), {torch.float32: 2e-5, torch.float16: 1e-2, torch.bfloat16: 2e-2}[dtype]
    layer, bounds, more = filled(codes, read.size, tokens, pinned, capacity, dim, dtype, before)
    theirs, want_bounds, twin = copied(layer, bounds, more)
    choose, listings = pages.choose, []
    closed, begun = 0, more["staged"].clone()
    for step in range(steps):
        query, key, value = (torch.randn(batch, 1, heads, dim).to(dtype).transpose(1, 2) for heads in (2 * group, 2, 2))
        options = {"pinned": pinned, "scale": 0.3, "softcap": 0.0, "window": 0, "sinks": 0, "pages": read, **clauses}
        if padding:
            options["is_token"] = torch.tensor([[(row + step) % 3 != 0] for row in range(batch)])
        call = CacheDecodeCall(query, key, value, *layer, bounds=bounds, **options, **more)
        want = reference.cache_decode(CacheDecodeCall(query, key, value, *theirs, bounds=want_bounds, **options, **twin))
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(pages, "choose", lambda *given: listings.append(choose(*given)) or listings[-1])
            got = quantised.cache_decode(call, splits=splits)
        torch.testing.assert_close(got, want, atol=near, rtol=near)
        changed = dict(zip(("keys", "values", "positions", "seen"), (*theirs[:3], theirs[4]), strict=True)) | twin
        asked = CacheAttentionCall(**call.common(CacheAttentionCall) | changed)
        wanted = pages_reference.choose(asked, read, want_bounds).flatten(0, 1)
        for found, count, row in zip(*listings[-1], wanted, strict=True):
            assert found[:count].tolist() == sorted(row[row >= 0].tolist())
        held = layer[2] >= 0
        for name, ours, other in zip(("positions", "counts", "seen", "length"), layer[2:], theirs[2:], strict=True):
            assert torch.equal(ours, other), name
        assert torch.equal(more["staged"], twin["staged"])
        for ours, other in zip(layer[:2], theirs[:2], strict=True):
            assert torch.equal(ours[held], other[held])
        torch.testing.assert_close(bounds, want_bounds, atol=1e-6, rtol=1e-6, msg=f"bounds after step {step}")
        closed += int(((more["staged"] != begun).all(-1) & (begun[..., 1] > begun[..., 0])).sum())
        begun = more["staged"].clone()
    reference_bounds(layer, want_bounds, read.size, more)
    torch.testing.assert_close(bounds, want_bounds, atol=1e-6, rtol=1e-6, msg="all bounds are those of keys as they are read")
    return got, closed


@pytest.mark.parametrize("codes", ["fp8", "int4"])
@pytest.mark.parametrize(
    "case",
    [
        {**RING, "steps": 6},
        FULL,
        {**RING, "padding": True, "softcap": 3.0, "steps": 6},
        {**FULL, "padding": True, "sink_logits": torch.tensor([0.5, -1.0, 2.0, 0.0])},
        {**FULL, "dim": 128, "group": 1},
        {**FULL, "group": 9, "steps": 2},
        # pages whose bounds are equal up to rounding may be taken one for the other
        {**FULL, "dtype": torch.bfloat16, "read": Pages(size=16, share=1.0)},
        {**FULL, "dtype": torch.float16},
    ],
    ids=str,
)
@pytest.mark.samples(2)
def test_against_the_reference(codes, case):
    _, closed = check(codes, **{"read": FEW, **case})
    assert closed, "a group became codes"


@pytest.mark.parametrize("codes", ["fp8", "int4"])
@pytest.mark.parametrize("size", [8, 32, 64])
@pytest.mark.parametrize("layout", [FULL, RING], ids=["full", "ring"])
@pytest.mark.samples(1)
def test_pages_of_other_sizes(codes, size, layout):
    check(codes, Pages(size=size, share=0.3, sinks=0, recent=1), **layout)


@pytest.mark.samples(1)
@pytest.mark.parametrize("codes", ["fp8", "int4"])
def test_all_pages_are_exact_and_few_are_not(codes):
    exact, _ = check(codes, Pages(size=16, share=1.0), **FULL)
    several, _ = check(codes, Pages(size=32, count=100), **FULL)
    torch.testing.assert_close(several, exact)
    few, _ = check(codes, FEW, **FULL)
    assert not torch.allclose(few, exact, atol=1e-3)


@pytest.mark.parametrize("codes", ["fp8", "int4"])
@pytest.mark.parametrize("read", [Pages(size=16, share=1.0), None], ids=["pages", "everything"])
@pytest.mark.samples(1)
def test_a_value_that_was_replaced_is_forgotten(codes, read):
    """A token's value that was no number leaves nothing behind once another token lies in its slot."""
    torch.manual_seed(0)
    sizes = {"pinned": 0, "capacity": 128, "tokens": (128,), "dim": 64, "dtype": torch.float32}
    layer, bounds, more = filled(codes, 16, forget=0, **sizes)
    paged = {} if read is None else {"pages": read, "bounds": bounds}
    options = {"pinned": 0, "scale": 0.3, "softcap": 0.0, "window": 0, "sinks": 0, **paged, **more}
    for _ in range(3):
        query, key, value = (torch.randn(1, heads, 1, 64) for heads in (4, 2, 2))
        call = CacheDecodeCall(query, key, value, *layer, **options)
        theirs, want_bounds, twin = copied(layer, bounds, more)
        twin |= {} if read is None else {"bounds": want_bounds}
        want = reference.cache_decode(CacheDecodeCall(query, key, value, *theirs, **{**options, **twin}))
        got = quantised.cache_decode(call, splits=2)
        assert not want.isnan().any()
        torch.testing.assert_close(got, want, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("codes", ["fp8", "int4"])
@pytest.mark.parametrize("size", [8, 16, 64])
@pytest.mark.parametrize("layout", [FULL, RING], ids=["full", "ring"])
@pytest.mark.samples(2)
def test_bounds(codes, size, layout):
    torch.manual_seed(0)
    layer, want, more = filled(codes, size, dim=64, dtype=torch.float32, **layout)
    assert (more["staged"][..., 1] > more["staged"][..., 0]).any(), "some lie as they came"
    call = CacheBoundsCall(layer[0], layer[2], want, values=layer[1], size=size, **more)
    changed = torch.tensor([[0, 70], [layout["capacity"], 1]], dtype=torch.int32)
    for since in (None, changed):
        kept = torch.zeros(()).bool() if since is None else (torch.arange(want.shape[2]) + 1) * size <= since[..., None]
        got = torch.where(kept[..., None, None].expand_as(want), want, torch.nan)
        pages.cache_bounds(dataclasses.replace(call, bounds=got, since=since))
        torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-6)


def test_columns_of_a_product_are_bounded():
    with pytest.raises(UnsupportedError, match="pages of 8 slots, 32 query heads"):
        quantised.QuantisedSpec("bf16", "fp8", 128, 128, 32, page=8)
    assert quantised.QuantisedSpec("bf16", "fp8", 128, 128, 32, page=16).spread == 4
