"""locret keeps what its trained heads score best, token by token as they come."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from sparsify import SparseCache, policies
from sparsify.errors import ConfigError
from tests.support import retaining_heads
from tests.support.cache_reference import left_padded, text
from tests.support.harness import holding
from tests.support.tiny_models import build

BUDGET, EVERY, RECENT = 16, 8, 4


@pytest.fixture(scope="module")
def llama():
    return build("llama", layers=2)


@pytest.fixture(scope="module")
def heads(llama, tmp_path_factory):
    return retaining_heads.write(tmp_path_factory.mktemp("heads") / "heads.safetensors", llama.config)


def make(model, heads, budget=BUDGET, every=EVERY, **options):
    return SparseCache(model.config, "locret", budget, every=every, heads=str(heads), recent=RECENT, **options)


@torch.no_grad()
def through(model, cache, ids, cuts, mask=None, seen=None, position_ids=None):
    """Logits of calls; `seen` gets, of each layer, what its projections gave."""
    found, at, hooks = [], 0, []
    for layer in model.model.layers if seen is not None else ():
        for name in ("q_proj", "k_proj", "v_proj"):
            note = lambda module, args, out, name=name, layer=layer: seen.setdefault((layer.self_attn.layer_idx, name), []).append(out)
            hooks.append(getattr(layer.self_attn, name).register_forward_hook(note))
    for cut in cuts:
        part = slice(at, at + cut)
        at += cut
        more = {} if mask is None else {"attention_mask": mask[:, :at], "position_ids": position_ids[:, part]}
        found.append(model(ids[:, part], **holding(cache), **more).logits)
    for hook in hooks:
        hook.remove()
    return torch.cat(found, 1)


def held(cache, layer, row, head):
    at = cache.layers[layer].positions[row, head]
    return sorted(at[at >= 0].tolist())


def selected(scores, kept):
    """Of rising positions the last ones and the best of the others."""
    best = sorted(kept[:-RECENT], key=lambda at: -scores[at])[: BUDGET - RECENT]
    return sorted([*best, *kept[-RECENT:]])


@pytest.mark.parametrize("cuts", [[40], [25, 15], [20, *[1] * 9, 11]], ids=str)
def test_the_best_of_what_it_scores_stays_chunk_by_chunk(llama, heads, cuts):
    """Written out: each selection keeps the best of what the one before has left, by scores of projections before rotation."""
    weights, cache, seen = load_file(heads), make(llama, heads), {}
    through(llama, cache, text(1, 40), cuts, seen=seen)
    cache.end_turn()
    for layer in range(2):
        states = torch.cat([torch.cat(seen[layer, name], 1) for name in ("q_proj", "k_proj", "v_proj")], -1)
        scores = F.silu(states @ weights[f"layers.{layer}.w1"].T) @ weights[f"layers.{layer}.w2"].T
        for head in range(llama.config.num_key_value_heads):
            kept, end = [], 0
            select = functools.partial(selected, scores[0, :, head])
            for cut in cuts:
                if cut == 1 and len(kept) == BUDGET + EVERY:
                    kept = select(kept)
                kept = [*kept, *range(end, end + cut)]
                end += cut
                kept = select(kept) if cut > 1 and len(kept) > BUDGET + EVERY else kept
            assert held(cache, layer, 0, head) == select(kept)


@pytest.mark.parametrize("cuts", [[5, *[1] * 105], [30, *[1] * 70, 10]], ids=["one by one", "between calls"])
def test_more_single_tokens_than_queries_are_kept_for_are_scored(llama, heads, cuts):
    """A budget that is filled by single tokens alone: the policy is asked before it forgets how they asked."""
    ids = text(1, sum(cuts))
    one, once = make(llama, heads, 100, every=20), make(llama, heads, 100, every=20)
    through(llama, one, ids, cuts)
    through(llama, once, ids, [sum(cuts)])
    for cache in (one, once):
        cache.end_turn()
    for layer, other in zip(one.layers, once.layers, strict=True):
        assert torch.equal(layer.positions, other.positions)
        assert layer.carried[layer.positions >= 0].count_nonzero() == 200
        torch.testing.assert_close(layer.carried, other.carried, rtol=1e-3, atol=1e-4)


def test_a_budget_that_holds_everything_changes_nothing(llama, heads):
    ids, cuts = text(1, 40), [25, 1, 1, 13]
    with torch.no_grad():
        dense = llama(ids).logits
    torch.testing.assert_close(through(llama, make(llama, heads, 60), ids, cuts), dense, rtol=1e-4, atol=2e-5)
    assert not torch.allclose(through(llama, make(llama, heads), ids, cuts), dense, atol=1e-3)


def test_padding_does_not_matter(llama, heads):
    ids, mask = text(2, 40), left_padded([40, 33])
    both, alone = make(llama, heads), make(llama, heads)
    at = (mask.cumsum(-1) - 1).clamp(min=0)
    through(llama, both, ids, [25, 15], mask, position_ids=at)
    through(llama, alone, ids[1:, 7:], [18, 15])
    assert all(held(both, layer, 1, head) == held(alone, layer, 0, head) for layer in range(2) for head in range(2))


def test_it_scores_for_other_policies(llama, heads):
    cache = SparseCache(llama.config, "adakv", BUDGET, every=EVERY, of="locret", options={"heads": str(heads), "recent": RECENT})
    through(llama, cache, text(1, 40), [25, 15])
    assert sum(int(count) for count in cache.layers[0].counts.flatten()) == 2 * BUDGET


def test_files_are_those_of_the_cache(llama, heads, tmp_path):
    ids = text(1, 40)
    cache = make(llama, heads)
    through(llama, cache, ids, [30])
    cache.save(tmp_path / "cache", llama)
    loaded = SparseCache.load(tmp_path / "cache", llama)
    assert torch.equal(through(llama, loaded, ids[:, 30:], [10]), through(llama, cache, ids[:, 30:], [10]))
    other = tmp_path / "heads.safetensors"
    other.write_bytes(heads.read_bytes())
    policy = policies.make("locret", heads=str(other), recent=RECENT)
    other.write_bytes(other.read_bytes()[:-4] + b"\0\0\0\1")
    with pytest.raises(ConfigError, match="not the file"):
        SparseCache(llama.config, policy, BUDGET, every=EVERY)


def test_what_cannot_work_is_told(llama, heads, tmp_path):
    with pytest.raises(ConfigError, match="takes room"):
        make(llama, heads, every=None)
    with pytest.raises(ConfigError, match="no trained heads"):
        SparseCache(llama.config, "locret", BUDGET, every=8, recent=4)
    with pytest.raises(ConfigError, match="no file"):
        make(llama, tmp_path / "nothing")
    with pytest.raises(ConfigError, match="leaves nothing"):
        make(llama, heads, budget=RECENT)
    save_file({f"layers.{n}.{name}": torch.zeros(3, 3) for n in range(2) for name in ("w1", "w2")}, tmp_path / "small")
    with pytest.raises(ConfigError, match="numbers of a token"):
        through(llama, make(llama, tmp_path / "small"), text(1, 40), [40])
