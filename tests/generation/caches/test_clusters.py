"""SparseCache(read="clusters"): a prepared prefix is read by clusters of its keys, what comes after it whole."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache

import sparsify
import tests.support.cache_reference as reference
from sparsify import Clusters, SparseCache
from sparsify.errors import CacheError, ConfigError, UnsupportedError
from sparsify.generation.caches.clusters import arranged
from sparsify.ops.pages import GROUP, Pages
from tests.support.cache_reference import left_padded, text
from tests.support.harness import holding
from tests.support.tiny_models import build

CLOSE = {"rtol": 1e-4, "atol": 2e-5}
ALL = Clusters(size=8, share=1.0, recent=5)
FEW = Clusters(size=8, count=3, sinks=2, recent=5, reach=5)
PREFIX = 205


@pytest.fixture(scope="module")
def llama():
    return build("llama", layers=2)


def prepared(model, ids, how=FEW, policy="full", budget=240, mask=None, **options):
    """A cache that holds `ids` as a prepared prefix."""
    cache = SparseCache(model.config, policy, budget, read=how, **options)
    with torch.no_grad():
        model(ids, **holding(cache), attention_mask=mask)
    cache.prepare()
    return cache


# -- clusters


@given(pages=st.integers(2, 70), size=st.sampled_from([8, 16]), first=st.integers(0, 40), seed=st.integers(0, 99))
@settings(max_examples=6, deadline=None)
def test_clusters_are_a_partition_within_groups_that_begin_at_whole_multiples(pages, size, first, seed):
    keys = torch.randn(pages * size, 6, generator=torch.Generator().manual_seed(seed))
    order = arranged(keys, size, first)
    assert torch.equal(order.sort().values, torch.arange(len(keys)))
    assert torch.equal(order, arranged(keys, size, first))
    spread = lambda keys, count: (keys.view(-1, count, 6) - keys.view(-1, count, 6).mean(1, keepdim=True)).square().sum()
    assert spread(keys[order], size) < 0.97 * spread(keys, size)
    # what a group holds is nearer to its mean than what any neighbouring pages hold
    groups = pages // GROUP
    if first % GROUP == 0 and groups > 1:
        whole = slice(0, groups * GROUP * size)
        assert spread(keys[order][whole], GROUP * size) < spread(keys[whole], GROUP * size)


def test_keys_that_lie_together_come_into_one_cluster():
    torch.manual_seed(0)
    centres = 10 * torch.randn(12, 16)
    keys = (centres.repeat(8, 1) + 0.1 * torch.randn(96, 16))[torch.randperm(96)]
    nearest = torch.cdist(keys[arranged(keys, 8)], centres).argmin(-1).view(12, 8)
    assert (nearest == nearest[:, :1]).all()


# -- what is read


def read_by(query, keys, at, held, pages, several):
    """Which tokens some queries [group, rows, head_dim] of a KV head read of a prefix, written out: bool [prefix].

    at: token of each slot of the prefix. held: pages that hold tokens, with those behind the prefix. several: more than one token asks.
    """
    size, count = pages.size, len(at) // pages.size
    clusters = [at[page * size : (page + 1) * size] for page in range(pages.first, count)]
    chosen = pages.count or math.ceil(held * round(pages.share * 10**6) / 10**6)
    means = torch.stack([keys[one].mean(0) for one in clusters])
    near = query @ means.T  # [group, rows, clusters]
    if several:
        weight = (near * keys.shape[1] ** -0.5).softmax(-1).amax((0, 1))
    else:
        weight = near.amax((0, 1))
        if pages.reach:
            number = (torch.arange(len(clusters)) + pages.first) // GROUP
            coarse = torch.stack(
                [torch.cat([keys[one] for one, group in zip(clusters, number) if group == g]).mean(0) for g in number.unique()]
            )
            looked_at = (
                math.ceil(pages.count * pages.reach / GROUP) if pages.count else math.ceil(len(coarse) * min(1, pages.share * pages.reach))
            )
            best = (query @ coarse.T).amax((0, 1)).topk(min(looked_at, len(coarse))).indices
            weight = weight.masked_fill(~torch.isin(number, number.unique()[best]), -1e30)
    read = torch.zeros(len(at), dtype=torch.bool)
    read[at[: pages.first * size]] = True
    for one in weight.topk(min(chosen, len(clusters))).indices:
        read[clusters[one]] = True
    return read


def over_clusters(cache, pages, cuts):
    """Logits of attention in which calls of so many tokens, after the prefix of `cache`, read clusters of it."""
    ends = torch.tensor([PREFIX, *cuts]).cumsum(0).tolist()

    def logits(layer, query, key, scale):
        found = query @ key.transpose(-1, -2) * scale
        found = found.masked_fill(torch.ones(found.shape[-2:], dtype=torch.bool).triu(1), -torch.inf)
        held = cache.layers[layer]
        for begin, end in itertools.pairwise(ends):
            for b in range(len(query)):
                for head in range(key.shape[1] // 2):
                    members = slice(head * 2, head * 2 + 2)
                    at = held.positions[b, head, : held.prepared[b, head]].long()
                    read = torch.ones(key.shape[2], dtype=torch.bool)
                    # a token is stored before it asks; several are not
                    filled = -(-(begin + (end - begin == 1)) // pages.size)
                    seen = read_by(query[b, members, begin:end], key[b, head * 2], at, filled, pages, end - begin > 1)
                    read[at.sort().values] = seen[at.sort().values]
                    found[b, members, begin:end] = found[b, members, begin:end].masked_fill(~read, -torch.inf)
        return found

    return logits


@pytest.mark.parametrize("cuts", [[1] * 5, [9, 1, 12]], ids=str)
@pytest.mark.parametrize(
    "how", [FEW, Clusters(size=8, share=0.15, recent=1, reach=0), Clusters(size=16, share=0.1, sinks=0, reach=3)], ids=str
)
@pytest.mark.samples(3)
@torch.no_grad()
def test_calls_read_the_clusters_of_a_masked_reference(llama, how, cuts):
    ids = text(1, PREFIX + sum(cuts))
    cache = prepared(llama, ids[:, :PREFIX], how)
    got = reference.through(llama, cache, ids[:, PREFIX:], cuts)
    want = reference.run(llama, ids, over_clusters(cache, how, cuts))[:, PREFIX:]
    torch.testing.assert_close(got, want, **CLOSE)
    assert not torch.allclose(got, llama(ids).logits[:, PREFIX:], atol=1e-3)


@torch.no_grad()
def test_several_blocks_of_queries_choose_for_themselves(llama):
    """The first 64 tokens of a call give what they give alone."""
    ids = text(2, PREFIX + 80)
    cache = prepared(llama, ids[:, :PREFIX])
    other = cache.fork()
    both = reference.through(llama, cache, ids[:, PREFIX:], [80])
    torch.testing.assert_close(both[:, :64], reference.through(llama, other, ids[:, PREFIX:], [64]), **CLOSE)
    torch.testing.assert_close(both[:, 64:], reference.through(llama, other, ids[:, PREFIX + 64 :], [16]), **CLOSE)


@pytest.mark.parametrize("how", [FEW, Clusters(size=8, share=0.2, recent=5, reach=0)], ids=str)
@pytest.mark.samples(1)
@torch.no_grad()
def test_rows_of_a_batch_read_what_they_read_alone(llama, how):
    """A short row, which has few clusters or none, takes none from a long one: single tokens and several."""
    lengths, cuts = [PREFIX, 90, 9], [1, 5, 1, 70, 1]
    ids, mask = text(3, PREFIX + sum(cuts)), left_padded([length + sum(cuts) for length in lengths])
    at = (mask.cumsum(-1) - 1).clamp(min=0)
    cache = SparseCache(llama.config, "full", 300, read=how)
    alone = [SparseCache(llama.config, "full", 300, read=how) for _ in lengths]
    ends = torch.tensor([0, PREFIX, *cuts]).cumsum(0).tolist()
    for begin, end in itertools.pairwise(ends):
        found = llama(ids[:, begin:end], attention_mask=mask[:, :end], position_ids=at[:, begin:end], **holding(cache)).logits
        for row, length in enumerate(lengths):
            own = slice(max(begin, PREFIX - length), end)
            want = llama(ids[row : row + 1, own], **holding(alone[row])).logits
            torch.testing.assert_close(found[row, own.start - begin :], want[0], **CLOSE)
        if begin == 0:
            for one in (cache, *alone):
                one.prepare()
            assert [*map(bool, cache.layers[0].prepared[:, 0])] == [True, True, False]


@pytest.mark.parametrize("family", ["llama", pytest.param("gemma3", marks=pytest.mark.slow)])
@torch.no_grad()
def test_all_clusters_are_exact(family):
    """Padded, prepared twice, grown, after which nothing is left out and slots of the prefix do not lie in order."""
    model, ids, mask = build(family), text(2, PREFIX + 41), left_padded([PREFIX + 41, PREFIX + 2])
    cuts, at = [PREFIX, 1, 7, 1, 30, 1, 1], (mask.cumsum(-1) - 1).clamp(min=0)
    want = reference.through(model, DynamicCache(config=model.config), ids, cuts, mask, at)
    cache = SparseCache(model.config, "full", 210, read=ALL)
    found = []
    for number, cut in enumerate(cuts):
        begin = sum(cuts[:number])
        part = slice(begin, begin + cut)
        found.append(model(ids[:, part], **holding(cache), attention_mask=mask[:, : part.stop], position_ids=at[:, part]).logits)
        if number in (0, 4):
            cache.prepare()
    torch.testing.assert_close(torch.cat(found, 1)[mask.bool()], want[mask.bool()], **CLOSE)
    layer = next(layer for layer in cache.layers if not layer.is_sliding)
    ends = layer.prepared[:, 0].tolist()
    assert ends == [(PREFIX + 39 - 5) // 8 * 8, (PREFIX - 5) // 8 * 8]
    assert not torch.equal(layer.positions[0, 0, : ends[0]], torch.arange(ends[0], dtype=torch.int32))
    assert torch.equal(layer.positions[0, 0, : ends[0]].sort().values, torch.arange(ends[0], dtype=torch.int32))


@torch.no_grad()
def test_before_it_is_prepared_everything_is_read(llama):
    ids = text(1, PREFIX + 3)
    got = reference.through(llama, SparseCache(llama.config, "full", 210, read=FEW), ids, [PREFIX, 1, 1, 1])
    torch.testing.assert_close(got, llama(ids).logits, **CLOSE)


# -- with eviction


@pytest.mark.parametrize("policy, options", [("snapkv", {"window": 8}), ("knorm", {"recent": 8}), ("h2o", {"every": 16}), ("tova", {})])
@pytest.mark.samples(2)
@torch.no_grad()
def test_after_an_eviction_what_is_left_and_all_that_comes_is_read(llama, policy, options):
    ids, cuts, every = text(2, PREFIX + 24), [1, 1, 20, 1, 1], options.get("every")
    cache = SparseCache(llama.config, policy, 60, read=ALL, **options)
    reference.through(llama, cache, ids[:, :PREFIX], [PREFIX])
    if every:
        cache.end_turn()
    cache.prepare()
    kept = [[[set(head[head >= 0].tolist()) for head in row] for row in layer.positions] for layer in cache.layers]
    assert all(len(head) == 60 for layer in kept for row in layer for head in row)

    def logits(layer, query, key, scale):
        found = query @ key.transpose(-1, -2) * scale
        found = found.masked_fill(torch.ones(found.shape[-2:], dtype=torch.bool).triu(1), -torch.inf)
        for b, row in enumerate(kept[layer]):
            for head, held in enumerate(row):
                gone = [at for at in range(PREFIX) if at not in held]
                found[b, head * 2 : head * 2 + 2, PREFIX:, gone] = -torch.inf
        return found

    got = reference.through(llama, cache, ids[:, PREFIX:], cuts)
    torch.testing.assert_close(got, reference.run(llama, ids, logits)[:, PREFIX:], **CLOSE)
    few = prepared(llama, ids[:, :PREFIX], Clusters(size=8, count=1, sinks=0, recent=1), policy, 60, **options)
    assert not torch.allclose(reference.through(llama, few, ids[:, PREFIX:], cuts), got, atol=1e-3)
    assert cache.get_seq_length() == PREFIX + 24


# -- moved, kept, taken back


@pytest.mark.parametrize("policy", ["full", "snapkv"])
@torch.no_grad()
def test_a_prepared_cache_goes_on_wherever_it_is_taken(llama, policy, tmp_path):
    ids = text(2, PREFIX + 30)
    more = {"window": 8} if policy == "snapkv" else {}
    cache = prepared(llama, ids[:, :PREFIX], FEW, policy, 80, **more)
    rest, cuts = ids[:, PREFIX:], [1, 9, 1, 1]
    cache.save(tmp_path / "cache", llama)
    loaded, forked, swapped, one = SparseCache.load(tmp_path / "cache", llama), cache.fork(), cache.fork(), cache.fork()
    assert (
        loaded.read == FEW and loaded.layers[0].final and torch.equal(loaded.layers[1].bounds[:, :, :5], cache.layers[1].bounds[:, :, :5])
    )
    swapped.reorder_cache(torch.tensor([1, 0]))
    one.batch_select_indices(torch.tensor([1]))
    forked.reserve(1500)
    want = reference.through(llama, cache, rest[:, :12], cuts)
    assert torch.equal(reference.through(llama, loaded, rest[:, :12], cuts), want)
    torch.testing.assert_close(reference.through(llama, forked, rest[:, :12], cuts), want, **CLOSE)
    torch.testing.assert_close(reference.through(llama, swapped, rest[[1, 0], :12], cuts), want[[1, 0]], **CLOSE)
    torch.testing.assert_close(reference.through(llama, one, rest[1:, :12], cuts), want[1:], **CLOSE)
    if policy == "full":
        with pytest.raises(CacheError, match="clusters"):
            cache.crop(-13)
        cache.crop(-12)
        assert torch.equal(reference.through(llama, cache, rest[:, :12], cuts), want)
    cache.reset()
    fresh = SparseCache(llama.config, policy, 80, read=FEW, **more)
    for held in (cache, fresh):
        reference.through(llama, held, ids[:, :PREFIX], [150, 54, 1])
    assert [layer.keys.shape for layer in cache.layers] == [layer.keys.shape for layer in fresh.layers] or policy == "full"
    cache.prepare()
    fresh.prepare()
    assert torch.equal(reference.through(llama, cache, rest[:, :12], cuts), reference.through(llama, fresh, rest[:, :12], cuts))


@torch.no_grad()
def test_keys_in_the_hosts_memory_are_prepared_there(llama):
    ids = text(1, PREFIX + 5)
    found = []
    for offloading in (False, True):
        cache = prepared(llama, ids[:, :PREFIX], offloading=offloading)
        found.append(reference.through(llama, cache, ids[:, PREFIX:], [1, 3, 1]))
    assert torch.equal(*found)


@pytest.mark.parametrize("policy", ["full", pytest.param("snapkv", marks=pytest.mark.slow)])
@torch.no_grad()
def test_compiled_calls_read_the_same_clusters(policy):
    """One prefix, two questions; and another prefix over the same graphs."""
    model, options = build("llama", layers=2), {"window": 8} if policy == "snapkv" else {}
    ids = [text(1, PREFIX + 12, seed=seed) for seed in (0, 1)]

    def answers():
        found = []
        for own in ids:
            cache = prepared(model, own[:, :PREFIX], FEW, policy, 80, **options)
            for last in (8, 12):
                twin = cache.fork()
                twin.reserve(PREFIX + 40)
                found.append(model.generate(own[:, : PREFIX + last], **holding(twin), max_new_tokens=6, do_sample=False))
        return found

    want = answers()
    sparsify.compile(model, strict=True, inductor={"freezing": False}, lower="eager")
    assert all(torch.equal(one, other) for one, other in zip(answers(), want, strict=True))


def test_what_makes_no_sense_is_told(llama):
    for wrong in ({"size": 12}, {"share": 0.0}, {"recent": 0}, {"reach": -1}):
        with pytest.raises(ConfigError, match=f"Clusters: {next(iter(wrong))}"):
            Clusters(**wrong)
    assert Pages.parse(str(FEW)) == FEW and Pages.parse(str(Pages())) == Pages()
    with pytest.raises(ConfigError, match="reads no clusters"):
        SparseCache(llama.config, "full", 64, read="pages").prepare()
    with pytest.raises(CacheError, match="nothing is stored"):
        SparseCache(llama.config, "full", 64, read="clusters").prepare()
    with pytest.raises(UnsupportedError, match="no prefix"):
        SparseCache(llama.config, "streaming_llm", 64, read="clusters")
    with pytest.raises(UnsupportedError, match="fp8"):
        SparseCache(llama.config, "full", 64, read="clusters", dtype="fp8")
    with pytest.raises(ConfigError, match="drafts read pages"):
        SparseCache(llama.config, "full", 64, draft=Clusters())
