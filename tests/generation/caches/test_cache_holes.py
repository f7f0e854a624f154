"""Padding anywhere, between a row's tokens too, and any cut into calls: a SparseCache counts tokens, never columns."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache

import tests.support.cache_reference as reference
from sparsify import SparseCache, policies
from sparsify.backends.cache import reference as reference_cache
from tests.policies.test_policies import new_state, store
from tests.support.cache_reference import text
from tests.support.harness import compiled
from tests.support.tiny_models import build

CLOSE = {"rtol": 1e-4, "atol": 3e-5}
TOKENS = 14  # of each row
COLUMNS = 20

MODELS = {family: build(family) for family in ("llama", "gemma3")}


@st.composite
def padded_batches(draw, rows=2):
    """Mask [rows, COLUMNS] with TOKENS ones a row, anywhere, and lengths of calls."""
    mask = torch.zeros(rows, COLUMNS, dtype=torch.long)
    for row in mask:
        row[sorted(draw(st.permutations(range(COLUMNS)))[:TOKENS])] = 1
    edges = sorted({0, COLUMNS, *draw(st.lists(st.integers(1, COLUMNS - 1), max_size=5))})
    return mask, [b - a for a, b in itertools.pairwise(edges)]


def spread(ids, mask):
    """The tokens of each row at the ones of its mask; padding is a token like any other, which nothing may look at."""
    columns = torch.full(mask.shape, 77)
    columns[mask.bool()] = ids.flatten()
    return columns, (mask.cumsum(-1) - 1).clamp(min=0)


def calls_of(row, cuts):
    """How many tokens of a row each call has, calls of none left out."""
    return [int(part.sum()) for part in row.split(cuts) if part.any()]


def alone(model, make, ids, calls):
    """Each row by itself, without padding; calls: their lengths, by row."""
    return torch.cat([reference.through(model, make(), ids[row : row + 1], calls[row]) for row in range(len(ids))])


KINDS = {
    "sinks and window": {"sinks": 2, "window": 4},
    "no sinks": {"sinks": 0, "window": 3},
    "positions in the cache": {"sinks": 2, "window": 5, "positions": "in_cache"},
    "all of snapkv": {"policy": "snapkv", "budget": 32, "window": 8},
}


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=8)
@given(given_batch=padded_batches())
@torch.no_grad()
@pytest.mark.samples(3)
def test_padding_and_cuts_do_not_matter(family, kind, given_batch):
    """What is promised however a text is cut: as without padding, one token at a time."""
    model, ids, (mask, cuts) = MODELS[family], text(2, TOKENS), given_batch
    make = lambda: SparseCache(model.config, **KINDS[kind])
    columns, at = spread(ids, mask)
    got = reference.through(model, make(), columns, cuts, mask, at)
    want = alone(model, make, ids, [[1] * TOKENS] * 2)
    torch.testing.assert_close(got[mask.bool()].view(2, TOKENS, -1), want, **CLOSE)


@pytest.mark.parametrize("pool", ["avg", "max"])
@settings(max_examples=12)
@given(given_batch=padded_batches())
@torch.no_grad()
def test_snapkv_chooses_by_tokens(pool, given_batch):
    """Selections are made at the ends of calls: as without padding, cut where the row's own tokens are cut."""
    model, ids, (mask, cuts) = MODELS["llama"], text(2, TOKENS), given_batch
    make = lambda: SparseCache(model.config, "snapkv", 6, window=2, kernel=3, pool=pool)
    columns, at = spread(ids, mask)
    calls = [calls_of(row, cuts) for row in mask]
    cache = make()
    got = reference.through(model, cache, columns, cuts, mask, at)
    torch.testing.assert_close(got[mask.bool()].view(2, TOKENS, -1), alone(model, make, ids, calls), **CLOSE)
    for row in range(2):
        one = make()
        reference.through(model, one, ids[row : row + 1], calls[row])
        for layer, own in zip(cache.layers, one.layers):
            assert torch.equal(layer.positions[row], own.positions[0])


@pytest.mark.slow
@torch.no_grad()
def test_a_hole_is_no_part_of_the_window_compiled_too():
    model, ids = build("llama"), text(1, TOKENS)
    mask = torch.tensor([[0, 1, 1, 1, 1, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 0, 1, 1, 1]])
    make = lambda: SparseCache(model.config, sinks=1, window=5)
    columns, at = spread(ids, mask)
    want = alone(model, make, ids, [[TOKENS]])
    counted = reference.run(model, ids, reference.streaming(torch.ones_like(ids), 1, 5))
    torch.testing.assert_close(want, counted, **CLOSE)
    with compiled(model, {"strict": True, "lower": "eager"}) as plans:
        got = reference.through(model, make(), columns, [17, 1, 2], mask, at)
    assert {d.method for plan in plans for d in plan.decisions if d.phase == "decode"} == {"kv_evict"}
    torch.testing.assert_close(got[mask.bool()][None], want, **CLOSE)


@torch.no_grad()
def test_a_models_own_window_counts_tokens_too():
    """An ordinary cache counts columns there: equal without holes, whatever stands before and behind."""
    model, ids = MODELS["gemma3"], text(2, TOKENS)
    mask = torch.zeros(2, COLUMNS, dtype=torch.long)
    mask[0, 3 : 3 + TOKENS] = mask[1, 6:] = 1
    columns, at = spread(ids, mask)
    want = reference.through(model, DynamicCache(config=model.config), columns, [COLUMNS], mask, at)
    got = reference.through(model, SparseCache(model.config, "snapkv", 40), columns, [COLUMNS], mask, at)
    torch.testing.assert_close(got[mask.bool()], want[mask.bool()], **CLOSE)


@torch.no_grad()
def test_a_share_is_one_of_tokens():
    model, ids = MODELS["llama"], text(2, 40)
    mask = torch.zeros(2, 70, dtype=torch.long)
    mask[0, 20:60] = mask[1, 30:69:2] = 1
    cache = SparseCache(model.config, "snapkv", 0.25, window=4)
    reference.through(model, cache, text(2, 70), [70], mask)
    assert cache.layers[0].keys.shape[2] == 10
    cache.reset()
    reference.through(model, cache, ids, [40])
    assert cache.layers[0].keys.shape[2] == 10
    early = SparseCache(model.config, "snapkv", 0.25, window=4, prompt_len=80, batch_size=2, device="cpu")
    reference.through(model, early, text(2, 70), [70], mask)
    assert early.layers[0].keys.shape[2] == 20


# --- the store alone ---


@settings(max_examples=40)
@given(
    before=st.lists(st.booleans(), min_size=9, max_size=9),
    call=st.lists(st.booleans(), min_size=2, max_size=6),
    recent=st.sampled_from([0, 0.5]),
)
def test_a_row_of_a_call_is_the_row_alone(before, call, recent):
    """One row with padding, beside one without any, against the row alone without padding: the same slots, to the bit."""
    policy = policies.make("snapkv", window=2, kernel=3, recent_share=recent)
    layout = policy.layout(5)
    flags = torch.tensor([before + call])
    key, query = (torch.randn(1, 1, 9 + len(call), 4, generator=torch.Generator().manual_seed(i)) for i in range(2))
    batch, row = new_state(2, 1, 5, 4), new_state(1, 1, 5, 4)
    empty = True
    for part in (slice(0, 9), slice(9, None)):
        real = torch.cat((flags[:, part], torch.ones_like(flags[:, part])))
        padded = key[:, :, part].masked_fill(~flags[:, None, part, None], torch.nan)  # whatever a model computes for padding
        both = torch.cat((padded, key[:, :, part])), query[:, :, part].expand(2, -1, -1, -1)
        store(batch, policy, layout, *both, is_token=real, empty=part.start == 0)
        own = flags[0, part]
        if own.any():
            tokens = [tensor[:, :, part][:, :, own] for tensor in (key, query)]
            store(row, policy, layout, tokens[0], tokens[1], empty=empty)
            empty = False
    for name, mine, its in zip(("keys", "values", "positions", "counts", "seen"), batch, row):
        assert torch.equal(mine[:1], its), name


@pytest.mark.parametrize("holes", [[], [2, 3], [0, 4, 9]])
def test_policies_see_tokens_side_by_side(holes, monkeypatch):
    """A policy may look at neighbours: padding is never between them."""
    seen = []

    class Neighbours(policies.Policy):
        name = "neighbours"

        def score(self, candidates):
            seen.append((candidates.positions[0, 0], candidates.keys[0, 0, :, 0], candidates.values[0, 0, :, 0]))
            return candidates.positions.float()

    monkeypatch.setattr(reference_cache.policies, "parse", lambda text: Neighbours())
    layout = policies.Layout(4, pinned=0, recent=1)
    state = new_state(1, 1, 4, 2)
    real = torch.ones(1, 10, dtype=torch.bool)
    real[0, holes] = False
    tokens = 0
    for i in range(2):
        number = torch.where(real, tokens + real.cumsum(-1) - 1, -7).float()
        store(state, Neighbours(), layout, number[:, None, :, None].expand(1, 1, 10, 2).contiguous(), is_token=real, empty=i == 0)
        tokens += int(real.sum())
        positions, keys, values = seen[-1]
        count = int((positions >= 0).sum())
        assert (positions[:-count] == -1).all() and torch.equal(positions[-count:].float(), keys[-count:])
        assert torch.equal(values[-count:], keys[-count:] + 100)
        assert (positions[-10 + len(holes) :].diff() == 1).all() and int(positions[-1]) == tokens - 1


@pytest.mark.parametrize("positions", ["absolute", "in_cache"])
@torch.no_grad()
def test_what_a_failed_prompt_left_is_not_seen(positions):
    """Compiled code changes buffers before it says that it has."""
    model, ids = MODELS["llama"], text(1, TOKENS)
    cache = SparseCache(model.config, sinks=2, window=5, positions=positions)
    want = reference.through(model, cache, ids, [9, 5])
    for layer in cache.layers:
        layer.started = False
    torch.testing.assert_close(reference.through(model, cache, ids, [9, 5]), want, rtol=0, atol=0)
