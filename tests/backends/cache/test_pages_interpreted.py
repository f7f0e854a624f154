"""Kernels over pages of keys in Triton's interpreter against the reference. Run with TRITON_INTERPRET=1."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from sparsify import policies
from sparsify.backends.cache import pages, pages_reference, reference
from sparsify.backends.cache.decode import DecodeTiling, cache_decode
from sparsify.ops.cache import NEVER_OVERWRITTEN, CacheAttentionCall, CacheBoundsCall, CacheDecodeCall, CacheStoreCall
from sparsify.ops.pages import Pages

pytestmark = pytest.mark.interpreter

STATE = ("keys", "values", "positions", "counts", "seen", "length")
SMALL = Pages(size=8, count=2, sinks=2, recent=3)


def whole_numbers(*shape, dtype=torch.float32):
    """Products of these are exact, and equal bounds are frequent."""
    return torch.randint(-3, 4, shape).to(dtype)


def filled(tokens, capacity, pinned, size, dim, dtype=torch.float32, window=0):
    """A layer whose row b holds tokens[b] tokens, of more those that a policy keeps, and the bounds of its pages."""
    batch, width = len(tokens), max(tokens)
    unread = torch.nan if pinned == NEVER_OVERWRITTEN else 0.0
    state = (
        torch.full((batch, 2, capacity, dim), unread, dtype=dtype), torch.full((batch, 2, capacity, dim), unread, dtype=dtype),
        torch.full((batch, 2, capacity), -1, dtype=torch.int32), torch.zeros(batch, 2, dtype=torch.int32),
        torch.zeros(batch, dtype=torch.int32), torch.zeros((), dtype=torch.int64),
    )  # fmt: skip
    bounds = torch.full((batch, 2, -(-capacity // size), 2, dim), torch.nan, dtype=dtype)
    is_token = torch.tensor([[0] * (width - n) + [1] * n for n in tokens], dtype=torch.bool)
    policy = policies.make("knorm", recent=4) if pinned != NEVER_OVERWRITTEN else policies.make("full")
    if window:
        policy = policies.make("streaming_llm", sinks=pinned, window=window)
    key, value = whole_numbers(batch, 2, width, dim, dtype=dtype), torch.randn(batch, 2, width, dim).to(dtype)
    stored = {
        "pinned": pinned,
        "recent": window or (4 if pinned >= 0 else 0),
        "empty": True,
        "policy": policy.describe(),
        "scale": 1.0,
        "softcap": 0.0,
    }
    reference.cache_store(CacheStoreCall(None, key, value, *state, is_token=is_token, **stored))
    reference_bounds(state, bounds, size)
    return state, bounds


def reference_bounds(state, bounds, size):
    pages_reference.cache_bounds(CacheBoundsCall(state[0], state[2], bounds, size=size))


def check(
    read, tokens=(70, 23), capacity=44, pinned=7, dim=16, group=2, padding=False, fused=True, dtype=torch.float32, steps=2, **clauses
):
    torch.manual_seed(0)
    ours, bounds = filled(tokens, capacity, pinned, read.size, dim, dtype, clauses.get("window", 0))
    theirs, want_bounds, batch = tuple(t.clone() for t in ours), bounds.clone(), len(tokens)
    tickets = torch.zeros(batch * 2 + 1, dtype=torch.int32) if fused else None
    for step in range(steps):
        query = whole_numbers(batch, 1, 2 * group, dim, dtype=dtype).transpose(1, 2)
        key, value = whole_numbers(batch, 1, 2, dim, dtype=dtype).transpose(1, 2), torch.randn(batch, 1, 2, dim).to(dtype).transpose(1, 2)
        options = {"pinned": pinned, "scale": 0.3, "softcap": 0.0, "window": 0, "sinks": 0, "pages": read, **clauses}
        if padding:
            options["is_token"] = torch.tensor([[(row + step) % 3 != 0] for row in range(batch)])
        call = CacheDecodeCall(query, key, value, *ours, bounds=bounds, tickets=tickets, **options)
        listed, chosen = pages.choose(call, read)
        want = reference.cache_decode(CacheDecodeCall(query, key, value, *theirs, bounds=want_bounds, **options))
        asked = CacheAttentionCall(
            **call.common(CacheAttentionCall) | dict(zip(("keys", "values", "positions", "seen"), (*theirs[:3], theirs[4])))
        )
        wanted = pages_reference.choose(asked, read, want_bounds).flatten(0, 1)
        for found, count, row in zip(listed, chosen, wanted, strict=True):
            assert found[:count].tolist() == sorted(row[row >= 0].tolist())
        got = cache_decode(call, tiling=DecodeTiling(16, 4, 2))
        bound = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
        torch.testing.assert_close(got, want, atol=bound, rtol=bound)
        for name, a, b in zip(STATE, ours, theirs):
            torch.testing.assert_close(a, b, atol=0, rtol=0, equal_nan=True, msg=f"{name} after step {step}")
        held = (torch.arange(bounds.shape[2]) * read.size < ours[3][..., None].clamp(max=capacity))[..., None, None].expand_as(bounds)
        assert torch.equal(bounds[held], want_bounds[held])
    return got


@pytest.mark.parametrize(
    "case",
    [
        {},
        {"fused": False},
        {"padding": True},
        {"padding": True, "fused": False, "softcap": 3.0, "tokens": (1, 39)},
        {"dim": 24, "group": 3},
        {"group": 1, "pinned": 0},
        {"capacity": 64, "pinned": NEVER_OVERWRITTEN, "tokens": (50, 7)},
        {"capacity": 64, "pinned": NEVER_OVERWRITTEN, "tokens": (55, 16), "padding": True, "fused": False},
        {"dtype": torch.bfloat16},
    ],
    ids=str,
)
@pytest.mark.samples(4)
def test_against_the_reference(case):
    check(SMALL, **case)


@pytest.mark.parametrize("pinned", [7, NEVER_OVERWRITTEN])
def test_a_share_of_the_pages(pinned):
    check(Pages(size=16, share=0.3, sinks=0, recent=1), pinned=pinned, capacity=128, tokens=(150 if pinned > 0 else 120, 70))


def test_all_pages_are_exact_and_few_are_not():
    sizes = {"capacity": 64, "pinned": NEVER_OVERWRITTEN, "tokens": (50, 30)}
    exact = check(Pages(size=8, share=1.0), **sizes)
    torch.testing.assert_close(check(Pages(size=16, count=100), **sizes), exact)
    assert not torch.allclose(check(SMALL, **sizes), exact, atol=1e-3)


def test_sinks_that_are_turned_are_always_read():
    turned = {"inverse_frequencies": 1.0 / 10.0 ** torch.linspace(0, 2, 4), "window": 37, "sinks": 7}
    few = Pages(size=8, count=1, sinks=0, recent=1)
    assert not torch.allclose(check(few, **turned), check(few, window=37, sinks=7), atol=1e-3)


@pytest.mark.parametrize("since", [False, True])
@pytest.mark.parametrize("sizes", [(8, 100, 16), (16, 44, 24), (64, 64, 8)], ids=str)
def test_bounds(since, sizes):
    size, capacity, dim = sizes
    torch.manual_seed(0)
    keys, positions = torch.randn(2, 2, capacity, dim), torch.arange(capacity, dtype=torch.int32).repeat(2, 2, 1)
    positions[0, :, capacity // 2 :], keys[0, :, capacity // 2 :] = -1, torch.nan
    want = torch.full((2, 2, -(-capacity // size), 2, dim), torch.nan)
    call = CacheBoundsCall(keys, positions, want, size=size)
    pages_reference.cache_bounds(call)
    assert not want.isnan().any()
    changed = torch.tensor([[0, capacity // 3], [capacity, 1]], dtype=torch.int32)
    got = torch.where((torch.arange(want.shape[2])[:, None, None] + 1) * size <= changed[..., None, None, None], want, torch.nan)
    pages.cache_bounds(dataclasses.replace(call, bounds=got, since=changed if since else None))
    assert torch.equal(got, want)


@pytest.mark.parametrize("read", [Pages(size=8, count=7, recent=9), Pages(size=8, share=0.4), Pages(size=8, share=1.0)], ids=str)
def test_more_pages_than_a_program_holds(read, monkeypatch):
    monkeypatch.setattr(pages, "_LANES", 8), monkeypatch.setattr(pages, "_PIECES", (1, 2))
    sizes = {"capacity": 320, "pinned": NEVER_OVERWRITTEN, "tokens": (300, 130, 9), "steps": 1}
    check(read, **sizes)


def test_pieces_that_are_no_power_of_two(monkeypatch):
    monkeypatch.setattr(pages, "_LANES", 16), monkeypatch.setattr(pages, "_PIECES", (3,))
    check(Pages(size=8, count=7, recent=9), capacity=320, pinned=NEVER_OVERWRITTEN, tokens=(300, 9), steps=1)


SCORES = {
    "ordinary": lambda n: torch.randn(n),
    "equal": lambda n: torch.full((n,), -0.5),
    "few values": lambda n: torch.randint(-1, 2, (n,)).float(),
    "half of them zero": lambda n: torch.randn(n).clamp(min=0),
    "of all sizes": lambda n: torch.randn(n) * 10.0 ** torch.randint(-40, 38, (n,)),
    "the largest numbers among them": lambda n: torch.where(torch.arange(n) % 7 == 0, 3e38 * torch.randn(n).sign(), torch.randn(n)),
    "neighbours": lambda n: (torch.randint(0, 9, (n,)) + 0x3F800000).int().view(torch.float32),
}


@pytest.mark.parametrize("kind", SCORES)
@pytest.mark.parametrize("pieces", [(5, True), (2, False)], ids=["at once", "in turns"])
@pytest.mark.parametrize("counted", [False, True])
@pytest.mark.samples(4)
def test_the_highest_scores_are_listed(kind, pieces, counted):
    torch.manual_seed(0)
    lanes, total = 16, 75
    spec = pages.PagesSpec("fp32", 16, 1, 16, pages.PagesTiling(16, 1), "bounds", lanes, *pieces, counted=counted)
    span = -(-total // (lanes * pieces[0])) * lanes * pieces[0]
    at = eval(pages._lane_of("page", pieces[0], lanes), {"page": torch.arange(total)})
    assert len(at.unique()) == total and at.max() < span
    for most, number in ((total, 9 if counted else 120000), (total, 1), (4, 30 if counted else 400000), (total, 10**6)):
        own = SCORES[kind](total).clamp(-3e38, 3e38) + 0.0
        own[torch.randperm(total)[:9]] = -torch.inf
        own[torch.randperm(total)[:3]] = torch.inf
        scores = torch.full((span,), torch.nan)
        scores[at] = own
        listed, chosen = torch.full((most,), -1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
        pages._module(spec).choose[(1,)](scores, span, total, listed, chosen, most, number)
        held, always = int((own > -torch.inf).sum()), int((own == torch.inf).sum())
        wanted = min(always + min(number if counted else -(-held * number // 10**6), held - always), most)
        assert chosen.item() == wanted
        assert listed[:wanted].tolist() == own.sort(descending=True, stable=True).indices[:wanted].sort().values.tolist()


def test_bounds_that_are_no_numbers_hide_nothing():
    torch.manual_seed(0)
    state, bounds = filled((60, 60), 64, NEVER_OVERWRITTEN, 8, 16)
    for page, what in ((2, torch.nan), (4, torch.inf)):
        state[0][:, :, page * 8 + 1, 3] = what
    reference_bounds(state, bounds, 8)
    query, key, value = torch.ones(2, 4, 1, 16), torch.ones(2, 2, 1, 16), torch.ones(2, 2, 1, 16)
    options = {"pinned": NEVER_OVERWRITTEN, "scale": 0.3, "softcap": 0.0, "window": 0, "sinks": 0, "pages": SMALL}
    listed, chosen = pages.choose(CacheDecodeCall(query, key, value, *state, bounds=bounds, **options), SMALL)
    assert len(listed) == 4, "one list for each KV head of each row"
    assert all({2, 4} <= set(row[:count].tolist()) for row, count in zip(listed, chosen, strict=True))


def test_the_newest_tokens_are_read_where_a_policy_has_selected():
    """Slots are fewer than tokens then, and in order of position still."""
    torch.manual_seed(0)
    state, bounds = filled((60, 60), 64, NEVER_OVERWRITTEN, 8, 16)
    state[2][:, :, :60] += 500
    state[4].add_(500)
    read = Pages(size=8, count=1, sinks=0, recent=20)
    query, key, value = whole_numbers(2, 4, 1, 16), whole_numbers(2, 2, 1, 16), torch.ones(2, 2, 1, 16)
    options = {"pinned": NEVER_OVERWRITTEN, "scale": 0.3, "softcap": 0.0, "window": 0, "sinks": 0, "pages": read}
    listed, chosen = pages.choose(CacheDecodeCall(query, key, value, *state, bounds=bounds, **options), read)
    assert len(listed) == 4
    assert all({5, 6, 7} <= set(row[:count].tolist()) and count == 4 for row, count in zip(listed, chosen, strict=True))
