"""sirllm against the paper: token after token by its probability, forgotten by turns."""

from __future__ import annotations

import math

import pytest
import torch

import sparsify
from sparsify import SparseCache, policies
from sparsify.errors import CacheError, ConfigError
from tests.support.cache_reference import left_padded, text
from tests.support.harness import holding
from tests.support.tiny_models import VOCAB, build

BUDGET, SINKS, DECAY = 10, 2, 0.5


@pytest.fixture(scope="module")
def llama():
    return build("llama", layers=2)


def make(model, **options):
    return SparseCache(model.config, "sirllm", BUDGET, every=12, sinks=SINKS, turn_decay=DECAY, **options)


@torch.no_grad()
def read(model, cache, ids, mask=None):
    given = {} if mask is None else {"attention_mask": mask, "position_ids": mask.cumsum(-1).sub(1).clamp(min=0)[:, -ids.shape[1] :]}
    logits = model(ids, **given, **holding(cache)).logits
    cache.observe(logits, ids, mask)
    return logits


def surprises(calls):
    """Of one row's tokens in calls [(ids, logits)] of one turn, by the definition: -log p; the first token has the largest of its call."""
    found, before = [], None
    for ids, logits in calls:
        own = []
        for i, token in enumerate(ids.tolist()):
            foretold = logits[i - 1] if i else before
            own.append(None if foretold is None else -math.log(float(foretold.double().softmax(-1)[token])))
        found += [max((x for x in own if x is not None), default=math.log(VOCAB)) if x is None else x for x in own]
        before = logits[-1]
    return found


def kept(numbers):
    """Positions that stay of [(position, number)]: the first, the last, and the most surprising of the others."""
    first, last = [p for p, _ in numbers if p < SINKS], [numbers[-1][0]]
    others = sorted((one for one in numbers if one[0] not in first + last), key=lambda one: -one[1])
    return sorted(first + last + [p for p, _ in others[: BUDGET - SINKS - 1]])


def test_turns_leave_what_the_paper_keeps(llama):
    ids, cache, at, numbers = text(1, 60), make(llama), 0, []
    for turn in ([9, 1, 1], [6, 1, 1, 1], [8, 1]):
        calls = []
        for count in turn:
            part = ids[:, at : at + count]
            calls.append((part[0], read(llama, cache, part)[0]))
            at += count
        numbers += zip(range(at - sum(turn), at), surprises(calls), strict=True)
        cache.end_turn()
        stay = kept(numbers)
        for layer in cache.layers:
            for head in layer.positions[0]:
                assert head[head >= 0].tolist() == stay
        numbers = [(p, number * DECAY) for p, number in numbers if p in stay]
        carried = cache.layers[1].carried[0, 0, : len(numbers)]
        torch.testing.assert_close(carried, torch.tensor([number for _, number in numbers]), rtol=1e-4, atol=1e-5)


def test_padding_does_not_matter_and_a_call_without_room_selects_first(llama):
    ids, mask = text(2, 40), left_padded([40, 33])
    both, alone = make(llama), make(llama)
    at = 0
    for count in (12, 8, 1, 9, 10):
        read(llama, both, ids[:, at : at + count], mask[:, : at + count])
        if at + count > 7:
            read(llama, alone, ids[1:, max(at, 7) : at + count])
        at += count
    assert int(both.layers[0].counts.max()) <= BUDGET + 12
    both.end_turn()
    alone.end_turn()
    assert torch.equal(both.layers[1].positions[0] >= 0, both.layers[1].positions[1] >= 0)
    held = both.layers[1].positions[1, 0, :BUDGET]
    assert held[:SINKS].tolist() == [0, 1] and held[-1] == 32 and len(set(held.tolist())) == BUDGET


def test_a_row_that_begins_with_calls_of_padding_is_that_row_alone(llama):
    ids, mask = text(2, 14), torch.ones(2, 14, dtype=torch.long)
    mask[1, :5] = 0
    both, alone = make(llama), make(llama)
    for first, end in ((0, 3), (3, 5), (5, 6), (6, 14)):
        read(llama, both, ids[:, first:end], mask[:, :end])
        if first >= 5:
            read(llama, alone, ids[1:, first:end])
    for one, other in zip(both.layers, alone.layers, strict=True):
        torch.testing.assert_close(one.carried[1, :, :9], other.carried[0, :, :9], rtol=1e-4, atol=1e-5)


def test_what_it_is_not_told_is_an_error(llama):
    cache = make(llama)
    with torch.no_grad():
        llama(text(1, 11), **holding(cache))
        with pytest.raises(CacheError, match="not told the logits"):
            cache.end_turn()
        with pytest.raises(CacheError, match="13 tokens at once"):
            llama(text(1, 13), **holding(cache))
    cache, ids = make(llama), text(2, 9)
    with torch.no_grad():
        with pytest.raises(CacheError, match="nothing was stored"):
            cache.observe(torch.zeros(2, 9, VOCAB), ids)
        logits = llama(ids, **holding(cache)).logits
        with pytest.raises(CacheError, match=r"logits \[2, 1, \d+\] of tokens \[2, 1\], and the last call had 9 of each of 2 rows"):
            cache.observe(logits[:, -1:], ids[:, -1:])
        with pytest.raises(CacheError, match="the last call had 9 of each of 2 rows"):
            cache.observe(logits[:1], ids[:1])
        with pytest.raises(CacheError, match="the last call had 9 of each of 2 rows"):
            cache.observe(logits[:, -1:], ids)
        for unheard in (lambda: cache.crop(-1), lambda: llama(ids[:, :1], **holding(cache))):
            with pytest.raises(CacheError, match="not told the logits"):
                unheard()
        cache.observe(logits, ids)
        with pytest.raises(CacheError, match="nothing was stored"):
            cache.observe(logits, ids)
        share = SparseCache(llama.config, "sirllm", 0.5, every=12)
        with pytest.raises(CacheError, match="30 tokens at once"):
            llama(text(1, 30), **holding(share))
        llama(text(1, 12), **holding(share))
        with pytest.raises(CacheError, match="not told the logits"):
            share.end_turn()
    with pytest.raises(ConfigError, match="takes room"):
        SparseCache(llama.config, "sirllm", BUDGET)
    with pytest.raises(ConfigError, match="leaves none"):
        SparseCache(llama.config, "sirllm", 4, every=4)
    assert policies.parse(policies.make("sirllm", turn_decay=0.7).describe()).decay == 0.7


@pytest.mark.parametrize(
    "change, rows",
    [
        (lambda cache: cache.reorder_cache(torch.tensor([1, 0])), [1, 0]),
        (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1]),
        (lambda cache: cache.batch_select_indices(torch.tensor([1])), [1]),
    ],
    ids=["reorder", "repeat", "select"],
)
def test_what_foretells_the_next_token_goes_with_its_row(llama, change, rows):
    ids = text(2, 12)
    moved, alone = make(llama), make(llama)
    for cache in (moved, alone):
        read(llama, cache, ids[:, :8])
    change(moved)
    read(llama, moved, ids[rows, 8:])
    read(llama, alone, ids[:, 8:])
    torch.testing.assert_close(moved.layers[1].carried, alone.layers[1].carried[rows], rtol=1e-4, atol=1e-5)


def test_an_empty_cache_and_one_that_was_cropped_know_nothing_of_what_was_said(llama):
    ids = text(1, 12)
    used, new = make(llama), make(llama)
    read(llama, used, text(1, 9, seed=3))
    used.reset()
    for cache in (used, new):
        read(llama, cache, ids[:, :8])
    torch.testing.assert_close(used.layers[0].carried, new.layers[0].carried, rtol=1e-4, atol=1e-5)
    used.crop(-2)
    read(llama, used, ids[:, 6:])
    fresh = make(llama)
    read(llama, fresh, ids[:, :6])
    fresh.outlook.forget()
    read(llama, fresh, ids[:, 6:])
    torch.testing.assert_close(used.layers[0].carried[..., :12], fresh.layers[0].carried[..., :12], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("whole", [False, True])
@torch.no_grad()
def test_a_compiled_model_selects_before_a_call_without_room_and_waits_to_be_told(whole):
    """A call of several tokens selects by what was said of those before it, and none of its own, captured as one graph, too."""
    ids, cuts, found = text(1, 60), [12, 1, 1, 8, 1, 12, 1, 1], []
    for compiled in (False, True):
        model = build("llama", layers=2)
        if compiled:
            sparsify.compile(model, whole=whole, strict=True, lower="eager")
        cache, at = make(model, batch_size=1, device="cpu"), 0
        for count in cuts:
            found.append(read(model, cache, ids[:, at : at + count]))
            at += count
        model(ids[:, :1], **holding(cache))
        with pytest.raises(CacheError, match="not told the logits"):
            cache.end_turn()
    for one, other in zip(found[: len(cuts)], found[len(cuts) :], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
