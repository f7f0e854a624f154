"""SparseCache(dtype="fp8") and "int4": close to the 16-bit cache, in fewer bytes, however it is called, moved and saved."""

from __future__ import annotations

import pytest
import torch

import tests.support.cache_reference as reference
from sparsify import Pages, SparseCache
from sparsify.backends.cache import quantised_reference
from sparsify.errors import ConfigError
from sparsify.ops.cache import CacheAttentionCall
from tests.generation.caches.test_pages import exact_bounds
from tests.support.cache_reference import left_padded, text
from tests.support.harness import compiled, holding
from tests.support.tiny_models import build

# largest difference of a tiny model's logits, which are some 0.3 large, and the least: codes are no numbers
NEAR = {"fp8": 0.05, "int4": 0.15}
CODES = sorted(NEAR)


@pytest.fixture(scope="module")
def llama():
    return build("llama")


@pytest.mark.parametrize("codes", CODES)
@pytest.mark.parametrize("policy, options", [("full", {}), ("streaming_llm", {"sinks": 3, "window": 70})])
@torch.no_grad()
def test_logits_are_near_those_of_16_bits_with_padding(llama, codes, policy, options):
    ids, mask = text(2, 100), left_padded([100, 71])
    at, cuts = (mask.cumsum(-1) - 1).clamp(min=0), [80, 1, 1, 10, 1, 1, 6]
    found = []
    for dtype in (None, codes):
        cache = SparseCache(llama.config, policy, 128 if policy == "full" else None, dtype=dtype, **options)
        found.append(reference.through(llama, cache, ids, cuts, mask, at)[mask.bool()])
    assert 1e-4 < (found[0] - found[1]).abs().max() < NEAR[codes]
    assert all(layer.keys.dtype == torch.uint8 for layer in cache.layers)


@torch.no_grad()
def test_fewer_bits_are_fewer_bytes(llama):
    sizes = {}
    for dtype in (None, *CODES):
        cache = SparseCache(llama.config, "full", 4096, batch_size=1, device="cpu", dtype=dtype)
        sizes[dtype] = sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values))
    assert sizes["fp8"] * 4 == sizes[None] and sizes["int4"] * 8 == sizes[None]


@pytest.mark.parametrize("codes", CODES)
@torch.no_grad()
def test_everything_that_moves_a_cache_moves_its_codes(llama, codes, tmp_path):
    ids = text(3, 100)
    cache = SparseCache(llama.config, "full", 128, dtype=codes)
    reference.through(llama, cache, ids, [90, 1, 1, 1])
    cache.save(tmp_path / "cache", llama)
    loaded = SparseCache.load(tmp_path / "cache", llama)
    assert loaded.codes == codes
    twin, grown = cache.fork(), cache.fork()
    grown.reserve(500)
    step = lambda held, tokens: llama(tokens, **holding(held)).logits
    want = step(cache, text(3, 1, seed=3))
    for other in (loaded, twin, grown):
        assert torch.equal(step(other, text(3, 1, seed=3)), want)
    cache.reorder_cache(torch.tensor([2, 0, 1]))
    twin.batch_select_indices(torch.tensor([2, 0, 1]))
    again = text(3, 1, seed=4)
    want = step(loaded, again[[1, 2, 0]])[[2, 0, 1]]
    for held in (cache, twin):
        torch.testing.assert_close(step(held, again), want, rtol=1e-4, atol=2e-5)
    # back into the open group, and behind its beginning
    for tokens in (3, 40):
        for held in (cache, grown):
            held.crop(-tokens)
        longer = reference.through(llama, grown, ids[:, :5], [3, 1, 1])
        assert longer.isfinite().all()
        grown.crop(-5)
    shorter = SparseCache(llama.config, "full", 128, dtype=codes)
    reference.through(llama, shorter, ids, [int(grown.get_seq_length())])
    assert (step(grown, again) - step(shorter, again)).abs().max() < NEAR[codes]
    cache.reset()
    fresh = reference.through(llama, SparseCache(llama.config, "full", 128, dtype=codes), ids, [70, 1, 1])
    torch.testing.assert_close(reference.through(llama, cache, ids, [70, 1, 1]), fresh, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("codes", ["fp8", pytest.param("int4", marks=pytest.mark.slow)])
@torch.no_grad()
def test_compiled_code_gives_the_same_tokens(codes):
    ids, model = text(2, 70), build("llama")
    make = lambda: SparseCache(model.config, "full", 128, batch_size=2, device="cpu", dtype=codes)
    want = model.generate(ids, **holding(make()), max_new_tokens=5, do_sample=False)
    with compiled(model, {"lower": "eager", "strict": True}) as plans:
        assert torch.equal(model.generate(ids, **holding(make()), max_new_tokens=5, do_sample=False), want)
    assert [d.method for plan in plans for d in plan.rewritten] == ["dense", "dense", "kv_evict", "kv_evict"]


def test_what_is_not_served_is_told(llama):
    with pytest.raises(ConfigError, match="int4"):
        SparseCache(llama.config, "full", dtype="int3")


# a text of several groups, with choices that do not depend on how keys are rounded: budgets that hold it, or heads that stream
LONG = {
    "room": ("knorm", 160, {"every": 30, "recent": 4}),
    "room and pages": ("knorm", 160, {"every": 30, "recent": 4, "read": Pages(size=16, share=1.0)}),
    "pages": ("full", 192, {"read": Pages(size=8, share=1.0)}),
    "pages of a ring": ("streaming_llm", None, {"sinks": 3, "window": 90, "read": Pages(size=16, share=1.0)}),
    "one head streams": ("duo", 110, {"every": 20, "streaming": [[0], [1]], "sinks": 2, "window": 60, "options": {"window": 4}}),
    "all heads stream": ("duo", 90, {"every": 20, "streaming": [[0, 1], [0, 1]], "sinks": 2, "window": 80, "options": {"window": 4}}),
}


@pytest.mark.parametrize("codes", CODES)
@pytest.mark.parametrize("way", LONG)
@pytest.mark.samples(2)
@torch.no_grad()
def test_pages_selections_and_heads_of_their_own_sizes_read_what_was_stored(codes, way):
    """Whole groups become codes while tokens come one by one, several at once, and when the policy selects."""
    model, ids, cuts = build("llama", layers=2), text(2, 150), [70, 1, 1, 1, 20, *[1] * 40, 9, *[1] * 8]
    mask = left_padded([150, 131])
    at = (mask.cumsum(-1) - 1).clamp(min=0)
    policy, budget, options = LONG[way]
    found, held = [], []
    for dtype in (None, codes):
        cache = SparseCache(model.config, policy, budget, dtype=dtype, **options)
        found.append(reference.through(model, cache, ids, cuts, mask, at)[mask.bool()])
        if "every" in options:
            cache.end_turn()
        held.append(cache)
        last = model(text(2, 1, seed=9), **holding(cache), attention_mask=torch.cat((mask, torch.ones(2, 1, dtype=mask.dtype)), 1)).logits
        found.append(last[:, 0])
    assert 1e-4 < (found[0] - found[2]).abs().max() < NEAR[codes]
    assert (found[1] - found[3]).abs().max() < NEAR[codes]
    for one, other in zip(*(cache.layers for cache in held), strict=True):
        assert torch.equal(one.positions, other.positions) and torch.equal(one.counts, other.counts)
        if one.starts is not None:
            assert torch.equal(one.starts, other.starts)
        assert (other.counts > 64).any(), "a group is whole"


@pytest.mark.parametrize("codes", ["fp8", pytest.param("int4", marks=pytest.mark.slow)])
@torch.no_grad()
def test_bounds_are_those_of_keys_as_they_are_read(llama, codes):
    few = Pages(size=16, count=2, recent=3)
    cache = SparseCache(llama.config, "full", 256, dtype=codes, read=few)
    ids, mask = text(2, 150), left_padded([150, 120])
    at = 0
    for cut in [70, 1, 1, 20, *[1] * 40, 18]:
        at += cut
        llama(ids[:, at - cut : at], **holding(cache), attention_mask=mask[:, :at])
        for layer in cache.layers:
            call = CacheAttentionCall(
                layer.recent_keys[:, :, :1], *layer.state[:3], layer.seen, **layer.coded(), scale=1.0, softcap=0.0, window=0, sinks=0
            )
            keys = quantised_reference.everything(call)[0]
            want, some = exact_bounds(keys, layer.positions, few.size)
            assert torch.equal(layer.bounds[some], want[some])
    all_pages = SparseCache(llama.config, "full", 256, dtype=codes, read=Pages(size=16, share=1.0))
    reference.through(llama, all_pages, ids, [150], mask)
    more = torch.ones(2, 151, dtype=torch.long)
    more[:, :150] = mask
    step = lambda held: llama(text(2, 1, seed=9), **holding(held), attention_mask=more).logits
    assert (step(cache) - step(all_pages)).abs().max() > 1e-4, "few pages are not all"


@pytest.fixture(scope="module")
def one_by_one():
    """Of a type and further options: a text's logits over a full cache whose groups fill one by one, and that cache. Made once each."""
    model, ids, cuts, made = build("llama", layers=3), text(2, 140), [60, 1, 1, 1, 1, 5, *[1] * 59, 7, 1, 1, 1, 1], {}

    def run(dtype, **more):
        key = (dtype, *more)
        if key not in made:
            cache = SparseCache(model.config, "full", 192, dtype=dtype, **more)
            made[key] = reference.through(model, cache, ids, cuts), cache
        return made[key]

    return run


@pytest.mark.parametrize("codes", CODES)
def test_a_group_that_was_filled_one_by_one_becomes_codes(one_by_one, codes):
    """When the next token comes, or several of them; what is newer lies as it came."""
    (exact, plain), (found, cache) = one_by_one(None), one_by_one(codes)
    assert 1e-4 < (exact - found).abs().max() < NEAR[codes] / 2
    for name in ("keys", "values"):
        for layer in cache.layers:
            held = layer.at_rest(name)
            assert held.dtype == torch.uint8 and held[:, :, :128].any(-1).all(), "whole groups are codes"
        # the first layer's do not depend on what was read of codes
        newest = getattr(cache.layers[0], f"recent_{name}")[:, :, :12]
        torch.testing.assert_close(newest, getattr(plain.layers[0], name)[:, :, 128:140])


@pytest.mark.parametrize("codes", CODES)
@pytest.mark.parametrize("more", [{"read": Pages(size=16, share=1.0)}, {"offloading": True}], ids=["pages", "offloading"])
def test_several_tokens_behind_a_group_that_is_full_keep_it(one_by_one, codes, more):
    (plain, held), (found, cache) = one_by_one(codes), one_by_one(codes, **more)
    torch.testing.assert_close(found, plain, rtol=1e-4, atol=2e-5)
    for one, other in zip(held.layers, cache.layers, strict=True):
        for name in ("keys", "values"):
            assert torch.equal(one.at_rest(name)[:, :, :128], other.at_rest(name)[:, :, :128])
        if (pages := other.read) is not None:
            call = CacheAttentionCall(
                other.recent_keys[:, :, :1], *other.state[:3], other.seen, **other.coded(), scale=1.0, softcap=0.0, window=0, sinks=0
            )
            want, some = exact_bounds(quantised_reference.everything(call)[0], other.positions, pages.size)
            assert torch.equal(other.bounds[some], want[some])


@pytest.mark.parametrize("codes", CODES)
@pytest.mark.parametrize("policy, options", [("streaming_llm", {}), ("knorm", {"recent": 8})])
@pytest.mark.samples(2)
@torch.no_grad()
def test_the_newest_group_lies_as_it_came_while_there_is_room(llama, codes, policy, options):
    """Policies that evict keep what "full" keeps, of each row: padded, in calls of any number of tokens, past a whole group."""
    ids, mask, cuts = text(3, 110), left_padded([110, 97, 53]), [58, 1, 1, 5, 1, 20, 1, 22, 1]
    at = (mask.cumsum(-1) - 1).clamp(min=0)
    found = {}
    for name, more in ((policy, options), ("full", {})):
        cache = SparseCache(llama.config, name, 128, dtype=codes, **more)
        found[name] = reference.through(llama, cache, ids, cuts, mask, at)
    exact = llama(ids, attention_mask=mask, position_ids=at).logits
    for row, length in enumerate([110, 97, 53]):
        own = slice(110 - length, 110)
        torch.testing.assert_close(found[policy][row, own], found["full"][row, own], rtol=1e-4, atol=2e-5)
        few = slice(110 - length, min(110, 110 - length + 63))
        torch.testing.assert_close(found[policy][row, few], exact[row, few], rtol=1e-4, atol=2e-5)
    assert (found[policy][0] - exact[0]).abs().max() > 1e-4, "a whole group is codes"


@pytest.mark.parametrize("codes", CODES)
@torch.no_grad()
def test_rows_of_one_column_move_with_what_lies_as_it_came(llama, codes):
    """The end of what lies there is no slot: it is not among the first ones that hold tokens."""
    mask = torch.tensor([[1, 1, 1], [0, 1, 1]])
    ids, rows = text(2, 3), torch.tensor([1, 0])
    moved, put = (SparseCache(llama.config, "full", 64, dtype=codes) for _ in range(2))
    reference.through(llama, moved, ids, [1], mask)
    moved.reorder_cache(rows)
    reference.through(llama, put, ids[rows], [1], mask[rows])
    assert torch.equal(moved.layers[0].staged, put.layers[0].staged)
