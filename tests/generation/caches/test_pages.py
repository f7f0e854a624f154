"""SparseCache(read="pages"): a token reads some pages of what is kept, and nothing is forgotten."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache

import tests.support.cache_reference as reference
from sparsify import Pages, SparseCache, policies
from sparsify.errors import ConfigError
from sparsify.ops import cache as cache_ops
from tests.support.cache_reference import left_padded, text
from tests.support.harness import compiled, holding
from tests.support.tiny_models import build

CLOSE = {"rtol": 1e-4, "atol": 2e-5}
FEW = Pages(size=8, count=2, sinks=2, recent=3)


@pytest.fixture(scope="module")
def llama():
    return build("llama")


def visible_slots(keys, positions, query, seen, pages, sinks=0):
    """Which slots [capacity] one KV head's queries [group, head_dim] read, written out page by page."""
    bounds, always, known = {}, [], positions.tolist()
    for page in range(math.ceil(len(positions) / pages.size)):
        slots = [s for s in range(page * pages.size, min((page + 1) * pages.size, len(positions))) if known[s] >= 0]
        if not slots:
            continue
        if any(known[s] < max(pages.sinks, sinks) or known[s] > seen - 1 - pages.recent for s in slots):
            always.append(page)
            continue
        least, largest = keys[slots].amin(0), keys[slots].amax(0)
        bounds[page] = max(float(torch.maximum(q * least, q * largest).sum()) for q in query)
    held = len(bounds) + len(always)
    count = pages.count or math.ceil(held * round(pages.share * 10**6) / 10**6)
    chosen = sorted(bounds, key=lambda page: (-bounds[page], page))[:count]
    read = torch.zeros(len(positions), dtype=torch.bool)
    for page in (*always, *chosen):
        read[page * pages.size : (page + 1) * pages.size] = True
    return read & (positions >= 0)


def over_pages(prompt, pages):
    """Logits of attention whose queries from `prompt` on read pages of the keys so far; slot n holds token n."""

    def logits(layer, query, key, scale):
        found = query @ key.transpose(-1, -2) * scale
        batch, heads, count, _ = query.shape
        found = found.masked_fill(torch.ones(count, count, dtype=torch.bool).triu(1), -torch.inf)
        for b in range(batch):
            for head in range(heads // 2):
                members = slice(head * 2, head * 2 + 2)
                for at in range(prompt, count):
                    held = torch.where(torch.arange(count) <= at, torch.arange(count), -1)
                    seen = visible_slots(key[b, head * 2], held, query[b, members, at], at + 1, pages)
                    found[b, members, at] = found[b, members, at].masked_fill(~seen, -torch.inf)
        return found

    return logits


@pytest.mark.parametrize("pages", [FEW, Pages(size=8, share=0.3, sinks=0, recent=1), Pages(size=16, count=1, recent=20)], ids=str)
@torch.no_grad()
def test_tokens_read_the_pages_of_a_masked_reference(llama, pages):
    assert llama.config.num_attention_heads == 2 * llama.config.num_key_value_heads
    ids = text(1, 80)
    cache = SparseCache(llama.config, "full", 96, read=pages)
    got = reference.through(llama, cache, ids, [70] + [1] * 10)
    want = reference.run(llama, ids, over_pages(70, pages))
    torch.testing.assert_close(got, want, **CLOSE)
    dense = llama(ids).logits
    torch.testing.assert_close(got[:, :70], dense[:, :70], **CLOSE)
    assert not torch.allclose(got[:, 70:], dense[:, 70:], atol=1e-3)


@pytest.mark.parametrize("family", ["llama", "gemma3", pytest.param("mistral_window", marks=pytest.mark.slow)])
@torch.no_grad()
def test_all_pages_are_exact(family):
    model, ids, mask = build(family), text(2, 40), left_padded([40, 21])
    at, cuts = (mask.cumsum(-1) - 1).clamp(min=0), [28, 1, 1, 8, 1, 1]
    want = reference.through(model, DynamicCache(config=model.config), ids, cuts, mask, at)
    for pages in (Pages(size=8, share=1.0), Pages(size=16, count=100)):
        cache = SparseCache(model.config, "full", 64, read=pages)
        got = reference.through(model, cache, ids, cuts, mask, at)
        torch.testing.assert_close(got[mask.bool()], want[mask.bool()], **CLOSE)


@torch.no_grad()
def test_padding_leaves_a_row_what_it_is_alone(llama):
    ids, mask = text(2, 60), left_padded([60, 41])
    at = (mask.cumsum(-1) - 1).clamp(min=0)
    both = reference.through(llama, SparseCache(llama.config, "full", 64, read=FEW), ids, [50] + [1] * 10, mask, at)
    alone = reference.through(llama, SparseCache(llama.config, "full", 64, read=FEW), ids[1:, 19:], [31] + [1] * 10)
    torch.testing.assert_close(both[1, 50:], alone[0, 31:], **CLOSE)


POLICIES = {
    "full": {},
    "streaming_llm": {"sinks": 3},
    "snapkv": {"window": 8},
    "knorm": {"recent": 6},
}


def masked_step(state, call, pages, kept=None):
    """Output of one stored token's attention over the slots that `visible_slots` names."""
    keys, values, positions, _, seen, _ = state
    query, sinks = call["query"], call["sinks"]
    batch, heads = query.shape[:2]
    group = heads // keys.shape[1]
    out = torch.zeros(batch, heads, 1, values.shape[3])
    for b in range(batch):
        for h in range(keys.shape[1]):
            members = slice(h * group, (h + 1) * group)
            read = visible_slots(keys[b, h], positions[b, h], query[b, members, 0], int(seen[b]), pages, sinks)
            logits = (query[b, members, 0] @ keys[b, h].nan_to_num().T * call["scale"]).masked_fill(~read, -torch.inf)
            out[b, members, 0] = logits.softmax(-1) @ values[b, h].masked_fill(~read[:, None], 0)
            if kept is not None:
                kept.append(int(read.sum()) / int((positions[b, h] >= 0).sum()))
    return out


def exact_bounds(keys, positions, size):
    """Bounds [batch, kv_heads, pages, 2, head_dim] of pages with tokens, and which those are, one by one."""
    batch, kv_heads, capacity, dim = keys.shape
    total = math.ceil(capacity / size)
    bounds, held = torch.zeros(batch, kv_heads, total, 2, dim), torch.zeros(batch, kv_heads, total, dtype=torch.bool)
    for b in range(batch):
        for h in range(kv_heads):
            for page in range(total):
                slots = slice(page * size, (page + 1) * size)
                own = keys[b, h, slots][positions[b, h, slots] >= 0]
                if len(own):
                    bounds[b, h, page, 0], bounds[b, h, page, 1], held[b, h, page] = own.amin(0), own.amax(0), True
    return bounds, held


@pytest.mark.parametrize("name", POLICIES)
@given(
    cuts=st.lists(st.integers(1, 30), min_size=1, max_size=6),
    pages=st.builds(
        Pages,
        size=st.sampled_from([8, 16]),
        share=st.sampled_from([0.01, 0.3, 1.0]),
        count=st.integers(0, 3),
        sinks=st.integers(0, 9),
        recent=st.integers(1, 20),
    ),
    seed=st.integers(0, 1000),
    padded=st.booleans(),
)
@settings(max_examples=10, deadline=None)
def test_after_any_calls_bounds_are_those_of_the_keys_and_steps_those_of_a_mask(name, cuts, pages, seed, padded):
    """Evict first, then read pages, whatever came before."""
    torch.manual_seed(seed)
    policy = policies.make(name, **POLICIES[name])
    layout = policy.layout(45)
    capacity = 192 if layout.grows else layout.capacity
    state = (
        torch.full((2, 2, capacity, 8), torch.nan if layout.grows else 0.0), torch.zeros(2, 2, capacity, 8),
        torch.full((2, 2, capacity), -1, dtype=torch.int32), torch.zeros(2, 2, dtype=torch.int32), torch.zeros(2, dtype=torch.int32),
        torch.zeros((), dtype=torch.int64),
    )  # fmt: skip
    bounds = torch.full((2, 2, pages.of(capacity), 2, 8), torch.nan)
    common = {"pinned": layout.pinned, "scale": 0.4, "softcap": 0.0, "version": cache_ops.VERSION, "bounds": bounds, "pages": str(pages)}
    for number, cut in enumerate([*cuts, 1, 1]):
        query, (key, value) = torch.randn(2, 4, cut, 8), torch.randn(2, 2, 2, cut, 8)
        is_token = torch.rand(2, cut) < 0.7 if padded else None
        if cut == 1 and number and (is_token is None or is_token.all()):
            sinks = layout.sinks if layout.window else 0
            got = cache_ops.decode(query, key, value, *state, is_token=is_token, window=layout.window, sinks=sinks, **common)
            kept: list[float] = []
            torch.testing.assert_close(got, masked_step(state, {"query": query, "sinks": sinks, "scale": 0.4}, pages, kept), **CLOSE)
            assert pages.share < 1 or pages.count or kept == [1.0] * 4
        else:
            stored = {"recent": layout.recent, "empty": number == 0, "policy": policy.describe(), "is_token": is_token}
            cache_ops.store(query if policy.observed else None, key, value, *state, **stored, **common)
        want, held = exact_bounds(state[0], state[2], pages.size)
        assert torch.equal(bounds[held], want[held])


@torch.no_grad()
def test_everything_that_moves_a_cache_moves_its_bounds(llama, tmp_path):
    ids, mask = text(3, 50), torch.ones(3, 50, dtype=torch.long)
    cache = SparseCache(llama.config, "full", 64, read=FEW)
    reference.through(llama, cache, ids, [40] + [1] * 10, mask)
    cache.save(tmp_path / "cache", llama)
    loaded = SparseCache.load(tmp_path / "cache", llama)
    assert loaded.read == FEW and loaded.layers[0].read == FEW
    twin, grown = cache.fork(), cache.fork()
    grown.reserve(500)
    assert grown.layers[1].bounds.shape[2] == grown.layers[1].keys.shape[2] // 8
    more = text(3, 1, seed=3)
    step = lambda held, tokens=more: llama(tokens, **holding(held)).logits
    want = step(cache)
    for other in (loaded, twin, grown):
        assert torch.equal(step(other), want)
    cache.reorder_cache(torch.tensor([2, 0, 1]))
    twin.batch_select_indices(torch.tensor([2, 0, 1]))
    again = text(3, 1, seed=4)
    want = step(loaded, again[[1, 2, 0]])[[2, 0, 1]]
    for held in (cache, twin):
        torch.testing.assert_close(step(held, again), want, **CLOSE)
    cache.crop(-20)
    for held in (cache, twin, loaded, grown):
        for layer in held.layers:
            want_bounds, some = exact_bounds(layer.keys, layer.positions, 8)
            assert torch.equal(layer.bounds[some], want_bounds[some])
    assert sum(t.numel() * t.element_size() for t in (cache.layers[0].bounds,)) * len(cache.layers) < cache.kept_bytes()


@torch.no_grad()
def test_a_reset_cache_starts_anew(llama):
    cache, ids = SparseCache(llama.config, "full", 64, read=FEW), text(1, 60)
    want = reference.through(llama, SparseCache(llama.config, "full", 64, read=FEW), ids, [50] + [1] * 10)
    reference.through(llama, cache, text(1, 64, seed=9), [64])
    cache.reset()
    torch.testing.assert_close(reference.through(llama, cache, ids, [50] + [1] * 10), want, **CLOSE)


@pytest.mark.parametrize(
    "policy, options",
    [
        ("full", {}),
        pytest.param("snapkv", {"window": 8}, marks=pytest.mark.slow),
        pytest.param("streaming_llm", {"positions": "in_cache"}, marks=pytest.mark.slow),
    ],
)
@torch.no_grad()
def test_compiled_code_reads_the_same_pages(policy, options):
    ids, budget = text(2, 60), 80 if policy == "full" else 40
    model = build("llama")
    make = lambda: SparseCache(model.config, policy, budget, read=FEW, batch_size=2, device="cpu", **options)
    want = model.generate(ids, **holding(make()), max_new_tokens=6, do_sample=False)
    with compiled(model, {"lower": "eager", "strict": True}) as plans:
        assert torch.equal(model.generate(ids, **holding(make()), max_new_tokens=6, do_sample=False), want)
    prefill = [] if "positions" in options else ["dense"] * 2  # keys that are turned anew at each call are no plain attention
    assert [d.method for plan in plans for d in plan.rewritten] == [*prefill, "kv_evict", "kv_evict"]


@torch.no_grad()
def test_layers_with_a_window_of_their_own_read_it_whole():
    model = build("gemma3")
    cache = SparseCache(model.config, "full", 64, read="pages")
    assert {layer.is_sliding: layer.read for layer in cache.layers} == {True: None, False: Pages()}


def test_what_makes_no_sense_is_told(llama):
    for wrong in ({"size": 12}, {"share": 0.0}, {"share": 1.5}, {"count": -1}, {"sinks": -1}, {"recent": 0}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            Pages(**wrong)
    with pytest.raises(ConfigError, match="read"):
        SparseCache(llama.config, "full", 64, read="some")
    with pytest.raises(ConfigError, match="not what a Pages writes"):
        Pages.parse("size=8")
    assert Pages.parse(str(FEW)) == FEW


@given(st.builds(Pages, size=st.sampled_from([8, 16, 32, 64]), share=st.floats(0.001, 1), count=st.integers(0, 9), sinks=st.integers(0, 90),
                 recent=st.integers(1, 90)), st.integers(1, 5000))  # fmt: skip
def test_there_is_room_for_all_pages_that_are_read(pages, slots):
    """The longest list that tokens in order of place can make."""
    total = pages.of(slots)
    always = {page for page in range(total) if page * pages.size < pages.sinks or (page + 1) * pages.size > slots - pages.recent}
    assert min(total, len(always) + min(pages.chosen(total), total - len(always))) <= pages.most(slots, 0, in_order=True)
