"""adakv and duo: heads with budgets of their own, in packed slots."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sparsify
from sparsify import SparseCache, policies
from sparsify.errors import ConfigError
from tests.support import cache_reference as reference
from tests.support.cache_reference import text
from tests.support.harness import holding
from tests.support.tiny_models import build

BUDGET, CLOSE = 12, {"rtol": 1e-4, "atol": 1e-5}
ADA = {"options": {"window": 4}, "floor": 0.1}
DUO = {"streaming": [[0], [1]], "sinks": 1, "window": 5, "options": {"window": 4}}


@pytest.fixture(scope="module")
def llama():
    return build("llama", layers=2)


def held(layer, row, head):
    """Positions of the tokens that a head holds, read from the packed slots."""
    begin = int(layer.starts[row, head])
    return layer.positions[row].flatten()[begin : begin + int(layer.counts[row, head])].tolist()


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 1 << 20), heads=st.integers(1, 6), budget=st.integers(3, 20), floor=st.sampled_from([0.0, 0.2, 1.0]))
def test_heads_share_as_in_the_papers_algorithm(seed, heads, budget, floor):
    recent, count = 2, 40
    scores = torch.randn(1, heads, count, generator=torch.Generator().manual_seed(seed))
    scores[..., -recent:] = torch.inf
    found = policies.make("adakv", floor=floor).share(scores, budget, recent)[0].tolist()
    free = budget - recent
    ranked = sorted(((float(scores[0, h, i]), h) for h in range(heads) for i in range(count - recent)), reverse=True)[: heads * free]
    own = [sum(h == head for _, h in ranked) for head in range(heads)]
    assert sum(found) == heads * budget
    for head in range(heads):
        assert abs(found[head] - recent - (floor * free + (1 - floor) * own[head])) < 1
        assert found[head] >= recent + int(floor * free)


@pytest.mark.parametrize("policy, options", [("adakv", ADA), ("duo", DUO)])
@torch.no_grad()
def test_tokens_attend_to_what_their_head_keeps_and_memory_is_the_budgets(llama, policy, options):
    """Decoding, then a second turn, against a model that sees all keys under a mask by head."""
    ids = text(1, 40)
    cache = SparseCache(llama.config, policy, BUDGET, every=12, **options)
    llama(ids[:, :30], **holding(cache))
    kept = [[held(layer, 0, head) for head in range(2)] for layer in cache.layers]
    assert any(len(one) != len(other) for one, other in kept), "heads differ"
    assert all(sum(map(len, layer)) == 2 * BUDGET for layer in kept)
    found = [llama(ids[:, at : at + 1], **holding(cache)).logits for at in range(30, 36)]
    found = torch.cat([*found, llama(ids[:, 36:], **holding(cache)).logits], 1)
    group = llama.config.num_attention_heads // 2

    def logits(layer, query, key, scale):
        seen = torch.ones(40, 40, dtype=torch.bool).tril().repeat(2 * group, 1, 1)
        for head in range(2):
            gone = [at for at in range(30) if at not in kept[layer][head]]
            seen[head * group : (head + 1) * group, 30:][..., gone] = False
        return (scale * query @ key.transpose(-1, -2)).masked_fill(~seen, -torch.inf)

    torch.testing.assert_close(found, reference.run(llama, ids, logits)[:, 30:], **CLOSE)
    even = SparseCache(llama.config, "snapkv", BUDGET, every=12, window=4)
    llama(ids[:, :30], **holding(even))
    starts = sum(layer.starts.numel() * 4 for layer in cache.layers)
    assert cache.kept_bytes() == even.kept_bytes() + starts
    cache.end_turn()
    assert all(len(held(layer, 0, head)) >= 4 and 39 in held(layer, 0, head) for layer in cache.layers for head in range(2))
    assert all(int(layer.counts.sum()) == 2 * BUDGET for layer in cache.layers)


@torch.no_grad()
def test_streaming_heads_keep_first_and_last_and_the_others_what_the_policy_says(llama):
    ids = text(1, 30)
    cache = SparseCache(llama.config, "duo", BUDGET, every=2, **DUO)
    alone = SparseCache(llama.config, "snapkv", 18, every=2, window=4)
    for one in (cache, alone):
        llama(ids, **holding(one))
    for index, (streaming,) in enumerate(DUO["streaming"]):
        layer = cache.layers[index]
        assert held(layer, 0, streaming) == [0, 25, 26, 27, 28, 29]
        assert held(layer, 0, 1 - streaming) == alone.layers[index].positions[0, 1 - streaming, :18].tolist()


@pytest.mark.parametrize("policy, options", [("adakv", ADA), ("adakv", {"of": "h2o"}), ("duo", DUO)])
@torch.no_grad()
def test_shares_travel(llama, tmp_path, policy, options):
    ids = text(2, 44)
    cache = SparseCache(llama.config, policy, BUDGET, every=5, **options)
    for count, at in ((30, 0), (1, 30), (3, 31)):
        llama(ids[:, at : at + count], **holding(cache))
    cache.save(tmp_path / "cache", llama)
    others, swapped = [SparseCache.load(tmp_path / "cache", llama), cache.fork()], cache.fork()
    swapped.reorder_cache(torch.tensor([1, 0]))
    go_on = lambda one, rows: torch.cat([llama(ids[rows, at : at + 1], **holding(one)).logits for at in range(34, 44)], 1)
    want = go_on(cache, [0, 1])
    assert all(torch.equal(go_on(other, [0, 1]), want) for other in others)
    torch.testing.assert_close(go_on(swapped, [1, 0]), want[[1, 0]], **CLOSE)
    cache.reset()
    first = SparseCache(llama.config, policy, BUDGET, every=5, **options)
    assert torch.equal(llama(ids, **holding(cache)).logits, llama(ids, **holding(first)).logits)
    assert all(torch.equal(one.starts, other.starts) for one, other in zip(cache.layers, first.layers, strict=True))


@pytest.mark.parametrize(("policy", "options"), [("adakv", ADA), ("duo", DUO)])
@torch.no_grad()
@pytest.mark.samples(1)
def test_compiled_calls_give_the_same(policy, options):
    model = build("llama", layers=2)
    make = lambda: SparseCache(model.config, policy, BUDGET, every=3, **options)
    want = model.generate(text(1, 30), max_new_tokens=8, do_sample=False, **holding(make()))
    sparsify.compile(model, strict=True, inductor={"freezing": False}, lower="eager")
    assert torch.equal(model.generate(text(1, 30), max_new_tokens=8, do_sample=False, **holding(make())), want)
    cache, found = make(), []  # and a loop of one's own, of which no Python of the cache runs under "duo", whose layers differ
    for at in range(30, 38):
        tokens = want[:, :30] if at == 30 else want[:, at - 1 : at]
        found.append(model(input_ids=tokens, **holding(cache)).logits[:, -1].argmax(-1))
    assert torch.equal(torch.stack(found, 1), want[:, 30:])


def test_refusals(llama):
    with pytest.raises(ConfigError, match="takes room"):
        SparseCache(llama.config, "adakv", BUDGET)
    with pytest.raises(ConfigError, match="pages are of heads with as many each"):
        SparseCache(llama.config, "adakv", BUDGET, every=4, read="pages", **ADA)
    with pytest.raises(ConfigError, match="heads of 1 layers, 2 evict"):
        SparseCache(llama.config, "duo", BUDGET, every=4, **DUO | {"streaming": [[0]]})
    for heads in ([[2], []], [[0], [-1]]):
        with pytest.raises(ConfigError, match=f"names KV head {heads[0][0] or -1}, layers have 2"):
            SparseCache(llama.config, "duo", BUDGET, every=4, **DUO | {"streaming": heads})
    with pytest.raises(ConfigError, match="not one of streaming heads"):
        SparseCache(llama.config, "duo", BUDGET, every=4, **DUO | {"window": 30})
    with pytest.raises(ConfigError, match="not one of streaming heads"):
        SparseCache(llama.config, "duo", BUDGET, every=4, **DUO | {"window": 3})
