"""What docs/cache.md promises of every policy, however slots are stored and whenever it selects, over a small model."""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from transformers import DynamicCache

import sparsify
from sparsify import SparseCache, policies
from sparsify.errors import CacheError, ConfigError, UnsupportedError
from sparsify.ops.pages import Clusters, Pages
from tests.support import retaining_heads
from tests.support.assisted import refused
from tests.support.cache_reference import left_padded, text
from tests.support.cases import every
from tests.support.harness import holding
from tests.support.tiny_models import build

# options with which a budget of 16 evicts and keeps something of everything
SNAPKV = {"window": 4}
OPTIONS: dict[str, dict[str, Any]] = {
    "full": {},
    "streaming_llm": {},
    "snapkv": SNAPKV,
    "knorm": {"recent": 4},
    "keydiff": {"recent": 4},
    "tova": {},
    "h2o": {},
    "expected_attention": {"future": 32},
    "sirllm": {"turn_decay": 0.5},
    "pyramidkv": {"of": "snapkv", "options": SNAPKV, "beta": 2},
    "chunkkv": {"of": "snapkv", "options": SNAPKV, "chunk": 3},
    "locret": {"heads": retaining_heads.of_tiny_llama(), "recent": 4},
    "adakv": {"of": "snapkv", "options": SNAPKV},
    "duo": {"streaming": [[0], [1]], "sinks": 2, "window": 6, "options": SNAPKV},
}
BUDGET, ROOMY = 16, 80
CLOSE = {"rtol": 1e-4, "atol": 1e-5}
ALL_PAGES = Pages(size=8, share=1.0)
ALL_CLUSTERS = Clusters(size=8, share=1.0, sinks=0, recent=1)


@dataclass(frozen=True)
class Way:
    """A cache: policy, storage and when it selects."""

    policy: str
    every: int | None = None
    pages: bool = False
    clusters: bool = False
    in_cache: bool = False
    codes: str = ""
    offloading: bool = False

    def make(self, model, budget=BUDGET, **more):
        more |= {"positions": "in_cache"} if self.in_cache else {}
        read = ALL_PAGES if self.pages else ALL_CLUSTERS if self.clusters else None
        how = {"every": self.every, "read": read, "dtype": self.codes or None, "offloading": self.offloading}
        return SparseCache(model.config, self.policy, budget, **how, **OPTIONS[self.policy], **more)

    def __str__(self):
        when = f" every={self.every}" * (self.every is not None)
        stored = f" {self.codes}" * bool(self.codes) + " offloading" * self.offloading
        return self.policy + when + " pages" * self.pages + " clusters" * self.clusters + " in_cache" * self.in_cache + stored


def ways():
    for policy in OPTIONS:
        if policy in ("full", "streaming_llm"):
            times = [None]
        elif policy in ("sirllm", "adakv", "duo", "locret"):
            times = [6, 3] if policy != "sirllm" else [12]
        else:
            times = [None, 1, 5]
        for when in times:
            for pages in (False, True) if policy not in ("adakv", "duo") else (False,):
                yield Way(policy, when, pages)
    yield Way("streaming_llm", in_cache=True)
    for policy, when in (("full", None), ("snapkv", None), ("knorm", None), ("h2o", 5), ("pyramidkv", None)):
        yield Way(policy, when, clusters=True)


WAYS = list(ways())
IN_CODES = [dataclasses.replace(way, codes=("fp8", "int4")[place % 2]) for place, way in enumerate(WAYS) if not way.clusters]
OFFLOADED = [
    dataclasses.replace(way, codes="" if way.clusters else ("fp8", "", "int4")[place % 3], offloading=True)
    for place, way in enumerate(way for way in WAYS if way.policy not in ("adakv", "duo"))
]
by_way = pytest.mark.parametrize(
    "way",
    [
        pytest.param(*one.values, marks=one.marks, id=str(one.values[0]))
        for one in [*every(3, WAYS), *every(8, IN_CODES), *every(12, OFFLOADED)]
    ],
)
IDS, MASK, CUTS = text(2, 34), left_padded([34, 25]), [12, 1, 1, 9, 1, 10]
# of the second row alone
FEWER = [3, *CUTS[1:]]
AT = MASK.cumsum(-1).sub(1).clamp(min=0)


@pytest.fixture(scope="module")
def llama():
    return build("llama", layers=2)


@torch.no_grad()
def through(model, cache, ids, cuts, mask=None, position_ids=None):
    """As `cache_reference.through`; policies that await it are told the logits, and caches of clusters are prepared after the second
    call of several tokens."""
    found, at = [], 0
    for number, cut in enumerate(cuts, 1):
        part = slice(at, at + cut)
        at += cut
        seen = None if mask is None else mask[:, :at]
        more = {} if position_ids is None else {"position_ids": position_ids[:, part]}
        found.append(model(ids[:, part], **holding(cache), attention_mask=seen, **more).logits)
        if isinstance(cache, SparseCache):
            cache.observe(found[-1], ids[:, part], seen)
            if isinstance(cache.read, Clusters) and number > 1 and cut > 1 and not cache.layers[0].final:
                cache.prepare()
    return torch.cat(found, 1)


def held(layer, row):
    """Positions that each head holds, in order."""
    flat, heads = layer.positions[row].flatten(), layer.positions.shape[1]
    starts = [head * layer.keys.shape[2] for head in range(heads + 1)] if layer.starts is None else layer.starts[row].tolist()
    return [sorted(at for at in flat[begin:end].tolist() if at >= 0) for begin, end in itertools.pairwise(starts)]


def test_every_policy_is_here():
    assert set(OPTIONS) == set(policies.discover())
    assert {way.policy for way in WAYS} == set(OPTIONS)


@by_way
@torch.no_grad()
def test_a_budget_that_holds_the_text_changes_nothing_and_a_smaller_one_does(llama, way):
    """A padded batch with a second turn, taken back and given again."""
    want = through(llama, DynamicCache(config=llama.config), IDS, CUTS, MASK)[MASK.bool()]
    near = {"rtol": 0, "atol": {"fp8": 0.05, "int4": 0.15}[way.codes]} if way.codes else CLOSE
    torch.testing.assert_close(through(llama, way.make(llama, ROOMY), IDS, CUTS, MASK)[MASK.bool()], want, **near)
    small = way.make(llama)
    assert ((through(llama, small, IDS, CUTS, MASK)[MASK.bool()] - want).abs().max() > 1e-3) == (way.policy != "full")
    whole = way.make(llama, ROOMY)
    first = through(llama, whole, IDS[:1], CUTS)
    assert not small.is_croppable, "padded, or something is gone"
    if way.policy == "h2o" and way.every and not way.clusters:  # what the call's queries look at is part of sums
        assert not whole.is_croppable
        with pytest.raises(CacheError, match="to the sums of tokens that stay"):
            whole.crop(-10)
        return
    assert whole.is_croppable
    whole.crop(-10)
    torch.testing.assert_close(through(llama, whole, IDS[:1, 24:], [10]), first[:, 24:], **near)


@by_way
@torch.no_grad()
def test_padding_and_other_rows_do_not_matter_and_no_more_than_the_budget_is_stored(llama, way):
    """A padded row beside a longer one keeps what it keeps alone."""
    both, alone = way.make(llama), way.make(llama)
    got = through(llama, both, IDS, CUTS, MASK, AT)[1, 9:]
    torch.testing.assert_close(got, through(llama, alone, IDS[1:, 9:], FEWER)[0], **CLOSE)
    mean = 0.0
    for one, other in zip(both.layers, alone.layers, strict=True):
        assert held(one, 1) == held(other, 0)
        kept, most, heads = one.layout.kept, one.layout.capacity, one.keys.shape[1]
        mean += kept / len(both.layers)
        if way.policy == "full":
            assert held(one, 0) == [list(range(34))] * heads
            continue
        if way.clusters:  # what came after is kept, too
            assert all(len(set(head) & set(range(23))) < 23 and set(range(23, 34)) <= set(head) for head in held(one, 0))
            continue
        assert one.keys.shape[2] == one.values.shape[2] == most == kept + (way.every or 0)
        for row, newest in ((0, 33), (1, 24)):
            tokens = held(one, row)
            assert all(newest in head and len(set(head)) == len(head) for head in tokens)
            assert heads * kept <= sum(map(len, tokens)) <= heads * most
    assert way.policy == "full" or way.clusters or mean == BUDGET
    if way.every is not None and not way.clusters:
        both.end_turn()
        assert all(sum(map(len, held(layer, 0))) == layer.layout.kept * layer.keys.shape[1] for layer in both.layers)


@by_way
@torch.no_grad()
def test_a_cache_goes_on_wherever_it_is_taken(llama, way, tmp_path):
    """Saved and loaded, forked, with its rows in another order, and emptied."""
    cache, ids, cuts = way.make(llama), text(2, 40), [1, 1, 1, 4, 1]
    through(llama, cache, ids, [12, 10, 1, 1, 8])
    if way.policy == "sirllm":
        cache.end_turn()  # what it was told last is not part of a file
    cache.save(tmp_path / "cache", llama)
    loaded, forked, swapped, one = SparseCache.load(tmp_path / "cache", llama), cache.fork(), cache.fork(), cache.fork()
    swapped.reorder_cache(torch.tensor([1, 0]))
    one.batch_select_indices(torch.tensor([1]))
    if way.policy == "sirllm":
        for moved in (cache, swapped, one):
            moved.outlook.forget()
    want = through(llama, cache, ids[:, 32:], cuts)
    for other in (loaded, forked):
        assert torch.equal(through(llama, other, ids[:, 32:], cuts), want)
    torch.testing.assert_close(through(llama, swapped, ids[[1, 0], 32:], cuts), want[[1, 0]], **CLOSE)
    torch.testing.assert_close(through(llama, one, ids[1:, 32:], cuts), want[1:], **CLOSE)
    cache.reset()
    fresh = way.make(llama)
    cuts = [12, 10, 1, 1, 8]
    assert torch.equal(through(llama, cache, ids[:, :32], cuts), through(llama, fresh, ids[:, :32], cuts))


def lookup_refusal(way):
    """Why tokens that transformers drafted cannot be taken back; empty where they can."""
    if way.every is not None:
        return "selects anew"
    return "codes, in groups of slots" if way.codes and way.policy != "full" else ""


def draft_refusal(way):
    """Why a cache does not draft by itself; empty where it does."""
    reasons = {
        "verified over everything": way.pages or way.clusters,
        "evicts what a rejected draft would need": way.policy != "full",
        "rejected drafts would have taken part": bool(way.codes),
        "bring all keys": way.offloading,
    }
    return next((reason for reason, applies in reasons.items() if applies), "")


@by_way
@torch.no_grad()
def test_speculation_gives_the_tokens_without_it_or_says_why_not(llama, way, caplog):
    """Prompt lookup, behind a prompt whose length was said, and drafts of the cache's own."""
    ids = text(1, 10).repeat(1, 3)
    options = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    cache, lookup = way.make(llama, ROOMY if way.policy == "full" else BUDGET), {"prompt_lookup_num_tokens": 4}
    cache.activate_past_recording(prompt_len=30)
    if way.policy == "sirllm":  # nobody tells it the logits within `generate()`
        with pytest.raises(CacheError, match="tokens at once"):
            llama.generate(ids, **options, **lookup, **holding(cache))
    elif reason := lookup_refusal(way):
        with refused(caplog, reason):
            llama.generate(ids, **options, **lookup, **holding(cache))
    else:
        plain = way.make(llama, ROOMY if way.policy == "full" else BUDGET)
        got = llama.generate(ids, **options, **lookup, **holding(cache))
        assert torch.equal(got, llama.generate(ids, **options, **holding(plain)))
        for one, other in zip(cache.layers, plain.layers, strict=True):
            assert torch.equal(one.positions, other.positions) and torch.equal(one.counts, other.counts)
        again = [llama(ids[:, :1], **holding(one)).logits for one in (cache, plain)]
        torch.testing.assert_close(*again, **({"rtol": 0, "atol": 0.05} if way.codes else CLOSE))
    if reason := draft_refusal(way):
        with pytest.raises((ConfigError, UnsupportedError), match=reason):
            way.make(llama, draft=ALL_PAGES)
    else:
        assert way.make(llama, draft=ALL_PAGES).draft == ALL_PAGES


def test_what_does_not_go_together_says_why(llama):
    for policy in ("adakv", "duo"):
        for codes in ("", "fp8"):
            with pytest.raises(ConfigError, match="pages are of heads with as many each"):
                Way(policy, 6, pages=True, codes=codes).make(llama)
            with pytest.raises(UnsupportedError, match="packs slots by head"):
                Way(policy, 6, offloading=True, codes=codes).make(llama)


@pytest.mark.parametrize(
    "policy", every(3, [name for name in OPTIONS if name not in ("full", "streaming_llm", "snapkv", "sirllm", "adakv", "duo", "locret")])
)
@torch.no_grad()
@pytest.mark.samples(1)
def test_compiled_calls_give_the_same(policy):
    """The others are compiled in tests/generation/caches and beside their own tests."""
    model = build("llama", layers=2)
    ids = text(1, 40)
    want = model.generate(ids, max_new_tokens=8, do_sample=False, **holding(Way(policy).make(model)))
    sparsify.compile(model, strict=True, inductor={"freezing": False}, lower="eager")
    assert torch.equal(model.generate(ids, max_new_tokens=8, do_sample=False, **holding(Way(policy).make(model))), want)
