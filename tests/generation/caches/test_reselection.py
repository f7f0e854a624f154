"""A cache whose policy selects anew every so many tokens, or after a turn: against the papers' loops, in memory, and wherever it goes."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import sparsify
from sparsify import SparseCache, api
from sparsify.errors import CacheError, ConfigError
from tests.support import cache_reference as reference
from tests.support.cache_reference import left_padded, text
from tests.support.harness import holding
from tests.support.tiny_models import build

BUDGET = 12
CLOSE = {"rtol": 1e-4, "atol": 1e-5}
OPTIONS = {"tova": {}, "h2o": {}, "knorm": {"recent": 4}, "snapkv": {"window": 4}, "expected_attention": {"future": 16}}


@pytest.fixture(scope="module")
def llama():
    return build("llama", layers=2)


# --- the papers, step by step ---


class Paper:
    """One layer of a multi-state RNN as the papers write it: keys and values of one row in lists by KV head, cut down after every step."""

    def __init__(self, policy: str, budget: int):
        self.policy, self.budget = policy, budget
        self.keys = self.values = self.scores = self.positions = None

    def step(self, query, key, value, scale):
        heads, count = query.shape[0], query.shape[1]
        kv_heads, group = key.shape[0], heads // key.shape[0]
        start = 0 if self.positions is None else int(self.newest) + 1
        fresh = torch.arange(start, start + count).expand(kv_heads, -1)
        self.newest = start + count - 1
        if self.keys is None:
            self.keys, self.values, self.positions, self.scores = key, value, fresh, torch.zeros(kv_heads, count)
        else:
            self.keys, self.values = torch.cat((self.keys, key), 1), torch.cat((self.values, value), 1)
            self.positions = torch.cat((self.positions, fresh), 1)
            self.scores = torch.cat((self.scores, torch.zeros(kv_heads, count)), 1)
        logits = scale * query.view(kv_heads, group, count, -1) @ self.keys[:, None].transpose(-1, -2)
        hidden = self.positions[:, None, None, :] > fresh[0][None, None, :, None]
        weights = logits.masked_fill(hidden, -torch.inf).softmax(-1)
        out = weights @ self.values[:, None]
        if self.policy == "tova":
            self.scores = weights[:, :, -1].mean((0, 1)).expand(kv_heads, -1).clone()
        else:
            self.scores = self.scores + weights.sum(2).mean(1)
        self.cut()
        return out.flatten(0, 1)

    def cut(self):
        recent = 1 if self.policy == "tova" else self.budget - round(self.budget / 2)
        while self.positions.shape[1] > self.budget:  # one token at a time goes, the worst of those that are not recent
            keep = []
            for head in range(len(self.positions)):
                old = [i for i, at in enumerate(self.positions[head].tolist()) if at <= self.newest - recent]
                worst = min(old, key=lambda i: float(self.scores[head, i]))
                keep.append([i for i in range(self.positions.shape[1]) if i != worst])
            index = torch.tensor(keep)
            self.positions, self.scores = self.positions.gather(1, index), self.scores.gather(1, index)
            wide = index[..., None].expand(-1, -1, self.keys.shape[-1])
            self.keys, self.values = self.keys.gather(1, wide), self.values.gather(1, wide)


_papers: list[Paper] = []


def _paper_attention(module, query, key, value, attention_mask, scaling=None, **kwargs):
    return _papers[module.layer_idx].step(query[0], key[0], value[0], scaling)[None].transpose(1, 2).contiguous(), None


ALL_ATTENTION_FUNCTIONS.register("paper", _paper_attention)


@torch.no_grad()
def by_the_paper(model, policy, ids, cuts):
    """Logits of the calls, and what every layer holds after them."""
    _papers[:] = [Paper(policy, BUDGET) for _ in range(model.config.num_hidden_layers)]
    before, model.config._attn_implementation = model.config._attn_implementation, "paper"
    found, at = [], 0
    try:
        for count in cuts:
            span = torch.arange(at, at + count)[None]
            found.append(model(ids[:, at : at + count], position_ids=span, use_cache=False).logits)
            at += count
    finally:
        model.config._attn_implementation = before
    return torch.cat(found, 1), [paper.positions for paper in _papers]


@pytest.mark.parametrize("policy", ["tova", "h2o"])
@torch.no_grad()
def test_every_token_is_the_papers_loop(llama, policy):
    ids, cuts = text(1, 34), [20, *[1] * 14]
    want, positions = by_the_paper(llama, policy, ids, cuts)
    cache = SparseCache(llama.config, policy, BUDGET, every=1)
    torch.testing.assert_close(reference.through(llama, cache, ids, cuts), want, **CLOSE)
    cache.end_turn()
    for layer, held in zip(cache.layers, positions, strict=True):
        assert torch.equal(layer.positions[0, :, :BUDGET].sort(-1).values, held.to(torch.int32))
    once = reference.through(llama, SparseCache(llama.config, policy, BUDGET), ids, cuts)
    assert (once - want)[:, 22:].abs().max() > 1e-4, "selecting once is something else"


@torch.no_grad()
def test_h2o_goes_on_from_turn_to_turn(llama):
    ids, cuts = text(1, 34), [20, 1, 1, 1, 5, 1, 1, 4]
    want, _ = by_the_paper(llama, "h2o", ids, cuts)
    found = reference.through(llama, SparseCache(llama.config, "h2o", BUDGET, every=1), ids, cuts)
    torch.testing.assert_close(found, want, **CLOSE)


@torch.no_grad()
def test_h2o_counts_every_token_of_a_long_answer(llama):
    """More single tokens come before the first selection than queries are kept of."""
    ids, cuts = text(1, 100), [3, *[1] * 92, 5]
    one, once = (SparseCache(llama.config, "h2o", 96, every=4) for _ in range(2))
    reference.through(llama, one, ids, cuts)
    reference.through(llama, once, ids, [100])
    for layer, other in zip(one.layers, once.layers, strict=True):
        assert torch.equal(layer.positions, other.positions)
        torch.testing.assert_close(layer.carried, other.carried, **CLOSE)


@torch.no_grad()
def test_policies_around_h2o_carry_its_sums(llama):
    """With one layer the same queries meet the same keys as long as nothing is evicted; then runs are cut by the sums of all calls."""
    model = build("llama", layers=1)
    ids, cuts, around = text(1, 24), [14, 1, 1, 1, 1, 4], {"of": "h2o", "options": {}}
    plain = SparseCache(model.config, "h2o", BUDGET, every=14)
    for policy, more in (("chunkkv", {"chunk": 3}), ("pyramidkv", {})):
        plain.reset()
        cache = SparseCache(model.config, policy, BUDGET, every=14, **around, **more)
        for one in (cache, plain):
            reference.through(model, one, ids, cuts)
        torch.testing.assert_close(cache.layers[0].carried, plain.layers[0].carried, **CLOSE)
        assert float(cache.layers[0].carried.sum()) > 0


# --- what is kept ---


@pytest.mark.parametrize("policy", OPTIONS)
@torch.no_grad()
def test_no_more_than_budget_and_room_is_stored_and_a_turn_ends_with_the_budget(llama, policy):
    cache = SparseCache(llama.config, policy, BUDGET, every=5, **OPTIONS[policy])
    at, ids, allocated = 0, text(1, 60), set()
    for count in [20, *[1] * 9, 3, 1, 1, 16, 1]:
        llama(ids[:, at : at + count], **holding(cache))
        at += count
        allocated.add((cache.kept_bytes(), *(layer.keys.data_ptr() for layer in cache.layers)))
        for layer in cache.layers:
            filled = (layer.positions >= 0).sum(-1)
            assert torch.equal(filled, layer.counts.long()) and int(filled.max()) <= BUDGET + 5
            assert at - 1 in layer.positions[0, 0] and layer.keys.shape[2] == BUDGET + 5
    assert len(allocated) == 1, "nothing else is allocated between calls"
    cache.end_turn()
    for layer in cache.layers:
        assert (layer.counts == BUDGET).all() and (layer.positions[..., BUDGET:] == -1).all() and not layer.keys[:, :, BUDGET:].any()
        assert at - 1 in layer.positions[0, 0]


@pytest.mark.parametrize("policy", OPTIONS)
@torch.no_grad()
def test_a_budget_that_holds_the_text_changes_nothing_and_padding_does_not_matter(llama, policy):
    ids, mask, cuts = text(2, 34), left_padded([34, 25]), [12, 1, 1, 9, 1, 1, 1, 1, 7]
    at = mask.cumsum(-1).sub(1).clamp(min=0)
    make = lambda budget: SparseCache(llama.config, policy, budget, every=3, **OPTIONS[policy])
    want = reference.through(llama, DynamicCache(config=llama.config), ids, cuts, mask, at)[mask.bool()]
    torch.testing.assert_close(reference.through(llama, make(40), ids, cuts, mask, at)[mask.bool()], want, **CLOSE)
    both, alone = make(BUDGET), make(BUDGET)
    found = reference.through(llama, both, ids, cuts, mask, at)
    assert (found[mask.bool()] - want).abs().max() > 1e-3
    torch.testing.assert_close(found[1, 9:], reference.through(llama, alone, ids[1:, 9:], [3, *cuts[1:]])[0], **CLOSE)
    for one, other in zip(both.layers, alone.layers, strict=True):
        assert torch.equal(one.positions[1], other.positions[0])


@torch.no_grad()
def test_what_a_policy_knows_is_saved_forked_and_reordered(llama, tmp_path):
    ids = text(2, 40)
    for policy in ("h2o", "snapkv"):
        cache = SparseCache(llama.config, policy, BUDGET, every=6, **OPTIONS[policy])
        for count, at in ((20, 0), (1, 20), (1, 21), (1, 22)):
            llama(ids[:, at : at + count], **holding(cache))
        cache.save(tmp_path / "cache", llama)
        others = [SparseCache.load(tmp_path / "cache", llama), cache.fork()]
        swapped = cache.fork()
        swapped.reorder_cache(torch.tensor([1, 0]))
        want = torch.cat([llama(ids[:, at : at + 1], **holding(cache)).logits for at in range(23, 34)], 1)
        for other in others:
            found = torch.cat([llama(ids[:, at : at + 1], **holding(other)).logits for at in range(23, 34)], 1)
            assert torch.equal(found, want)
        found = torch.cat([llama(ids[[1, 0], at : at + 1], **holding(swapped)).logits for at in range(23, 34)], 1)
        torch.testing.assert_close(found, want[[1, 0]], **CLOSE)


# --- compiled ---


@pytest.mark.parametrize("policy", ["h2o", "snapkv"])
@torch.no_grad()
@pytest.mark.samples(1)
def test_generate_over_compiled_layers_gives_the_same(policy):
    model = build("llama", layers=2)
    make = lambda: SparseCache(model.config, policy, BUDGET, every=3, **OPTIONS[policy])
    want = model.generate(text(1, 30), max_new_tokens=10, do_sample=False, **holding(make()))
    sparsify.compile(model, strict=True, inductor={"freezing": False}, lower="eager")
    with api.collect_plans() as plans:
        assert torch.equal(model.generate(text(1, 30), max_new_tokens=10, do_sample=False, **holding(make())), want)
    assert {d.method for plan in plans for d in plan.decisions if d.phase == "decode"} == {"kv_evict"}


@torch.no_grad()
@pytest.mark.samples(1)
def test_a_long_answer_of_a_compiled_model_is_counted():
    model = build("llama", layers=1)
    caches = [SparseCache(model.config, "h2o", 96, every=4) for _ in range(2)]
    generate = lambda cache: model.generate(text(1, 4), max_new_tokens=90, min_new_tokens=90, do_sample=False, **holding(cache))
    want = generate(caches[0])
    sparsify.compile(model, strict=True, inductor={"freezing": False}, lower="eager")
    with api.collect_plans() as plans:
        assert torch.equal(generate(caches[1]), want)
    assert {d.method for plan in plans for d in plan.decisions if d.phase == "decode"} == {"kv_evict"}
    for cache in caches:
        cache.layers[0].select(cache.layers[0].keys.shape[2])  # what waits is counted
    torch.testing.assert_close(*(cache.layers[0].carried for cache in caches), **CLOSE)


@torch.no_grad()
def test_a_compiled_call_without_room_is_noticed():
    model = build("llama", layers=1)
    ids = text(1, 40)
    cache = SparseCache(model.config, "knorm", BUDGET, every=2, recent=4)
    model(ids[:, :20], **holding(cache))
    whole = torch.compile(model.forward, backend="eager")
    for at in (20, 21):
        assert whole(ids[:, at : at + 1], **holding(cache)).logits.isfinite().all()
    cache.settle()
    assert whole(ids[:, 22:23], **holding(cache)).logits.isfinite().all()
    for at in (23, 24):
        last = whole(ids[:, at : at + 1], **holding(cache)).logits
    assert last.isnan().all()
    with pytest.raises(CacheError, match="more tokens than"):
        cache.get_seq_length()


# --- refusals ---


def test_what_cannot_select_anew_is_refused(llama):
    for policy, budget in (("full", None), ("streaming_llm", 32)):
        with pytest.raises(ConfigError, match="nothing to select anew"):
            SparseCache(llama.config, policy, budget, every=8)
    with pytest.raises(ConfigError, match="at least 1 token"):
        SparseCache(llama.config, "tova", 32, every=0)
    with pytest.raises(ConfigError, match="every call of several tokens"):
        SparseCache(llama.config, "tova", 32).end_turn()
    cache = SparseCache(llama.config, "tova", BUDGET, every=20)
    with torch.no_grad():
        llama(text(1, 18), **holding(cache))
    assert cache.is_croppable
    cache.end_turn()
    assert not cache.is_croppable, "18 tokens would fit into the slots, but 6 of them are gone"


@pytest.mark.parametrize("policy", [{"policy": "h2o"}, {"policy": "chunkkv", "of": "h2o", "chunk": 2}], ids=lambda given: given["policy"])
@torch.no_grad()
def test_queries_that_were_counted_are_not_taken_back_and_others_are(llama, policy):
    """What was added to the sums of tokens that stay stays there; single tokens' queries wait for the next selection."""
    ids, make = text(1, 60), lambda: SparseCache(llama.config, budget=16, every=20, **policy)
    cache, straight = make(), make()
    for one in (cache, straight):
        reference.through(llama, one, ids, [12])
    reference.through(llama, cache, text(1, 5, seed=1), [1] * 5)
    assert not cache.is_croppable, "drafts would be calls of several tokens"
    cache.crop(-5)
    for one in (cache, straight):
        reference.through(llama, one, ids[:, 12:], [3, 1, 9, 1])
        one.end_turn()
    for layer, other in zip(cache.layers, straight.layers, strict=True):
        assert torch.equal(layer.positions, other.positions)
        torch.testing.assert_close(layer.carried, other.carried, **CLOSE)
    counted = make()
    reference.through(llama, counted, ids, [12, 5])
    with pytest.raises(CacheError, match="has added what the last 5 queries look at"):
        counted.crop(-5)
    counted.crop(-17)
    assert counted.get_seq_length() == 0
