"""SparseCache against references that see whole texts: every known pitfall of evicting caches is a test here."""

from __future__ import annotations

import copy
import itertools
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache

import tests.support.cache_reference as reference
from sparsify import SparseCache
from tests.support.cache_reference import left_padded, text
from tests.support.cases import every
from tests.support.harness import holding
from tests.support.tiny_models import EAGER_ONLY, build

CLOSE = {"rtol": 1e-4, "atol": 2e-5}


@pytest.fixture(scope="module")
def llama():
    return build("llama")


def positions_of(mask):
    return (mask.cumsum(-1) - 1).clamp(min=0)


def cuts_of(total, at):
    edges = sorted({0, total, *(a for a in at if 0 < a < total)})
    return [b - a for a, b in itertools.pairwise(edges)]


# --- exactness: whole budget ---


FAMILIES = ("qwen2", "qwen3", "gptj", "mistral", "phi3", "gpt_neox", "olmo2", "mixtral", "cohere", "granite", "gemma")


@pytest.mark.parametrize(
    "family, policy",
    [(f, p) for f in ("llama", "mistral_window", "gemma3") for p in ("streaming_llm", "snapkv")]
    + [pytest.param(f, "snapkv", marks=() if f in FAMILIES[:3] else pytest.mark.slow) for f in FAMILIES],
)
@torch.no_grad()
def test_a_budget_that_holds_the_text_gives_the_same_tokens(family, policy):
    model, ids, mask = build(family, "eager" if family in EAGER_ONLY else "sdpa"), text(2, 40), left_padded([40, 33])
    if not model._supports_attention_backend:
        pytest.skip("this release's model does not go through AttentionInterface")
    want = model.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False)
    cache = SparseCache(model.config, policy=policy, budget=64)
    assert torch.equal(model.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False, **holding(cache)), want)


@pytest.mark.parametrize("family", ["gpt_oss", "gemma2"])
@torch.no_grad()
def test_sink_logits_and_softcap_are_kept(family):
    model, ids = build(family, "eager"), text(1, 30)
    want = reference_logits = model(ids).logits
    cache = SparseCache(model.config, policy="snapkv", budget=40, window=4)
    got = reference.through(model, cache, ids, [20, 1, 1, 8])
    torch.testing.assert_close(got, want, **CLOSE)
    assert reference_logits.isfinite().all()


# --- exactness: StreamingLLM equals the mask over a full cache, however a text is cut into calls ---


@settings(max_examples=15, deadline=None)
@given(
    sinks=st.integers(0, 5),
    window=st.integers(1, 12),
    cuts=st.lists(st.integers(1, 29), max_size=8),
    lengths=st.tuples(st.integers(1, 30), st.just(30)),
    padded=st.booleans(),
)
def test_streaming_equals_the_masked_full_cache(llama, sinks, window, cuts, lengths, padded):
    ids = text(2, 30)
    mask = left_padded(lengths) if padded else torch.ones(2, 30, dtype=torch.long)
    at = positions_of(mask)
    want = reference.run(llama, ids, reference.streaming(mask, sinks, window), at)
    cache = SparseCache(llama.config, sinks=sinks, window=window)
    got = reference.through(llama, cache, ids, cuts_of(30, cuts), mask if padded else None, at)
    torch.testing.assert_close(got[mask.bool()], want[mask.bool()], **CLOSE)
    assert cache.layers[0].keys.shape[2] == sinks + window


@torch.no_grad()
def test_streaming_differs_from_dense(llama):
    ids = text(1, 30)
    got = reference.through(llama, SparseCache(llama.config, budget=12), ids, [20] + [1] * 10)
    assert (got - llama(ids).logits).abs().max() > 1e-3


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt_neox", "phi", "gemma3"])
def test_in_cache_positions_equal_the_published_scheme(family):
    model = build(family)
    ids, mask = text(2, 26), left_padded([26, 19])
    at = positions_of(mask)
    moved, own = reference.in_cache(model, mask, 3, 7, at, family == "gemma3" and "full_attention"), reference.streaming(mask, 0, 8)
    windowed = lambda layer: family == "gemma3" and model.config.layer_types[layer] == "sliding_attention"
    want = reference.run(model, ids, lambda layer, *call: (own if windowed(layer) else moved)(layer, *call), at)
    for cuts in ([26], [12] + [1] * 14, [5, 1, 9, 11]):
        cache = SparseCache(model.config, sinks=3, window=7, positions="in_cache")
        got = reference.through(model, cache, ids, cuts, mask, at)
        torch.testing.assert_close(got[mask.bool()], want[mask.bool()], **CLOSE)
    absolute = reference.run(model, ids, reference.streaming(mask, 3, 7, {i: 8 for i in range(2) if windowed(i)}), at)
    assert (absolute - want)[mask.bool()].abs().max() > 1e-4


@pytest.mark.parametrize("family", ["mistral_window", "gemma3"])
def test_a_models_own_window_is_kept(family):
    model, ids = build(family), text(1, 30)
    mask = torch.ones_like(ids)
    types = getattr(model.config, "layer_types", None) or ["sliding_attention"] * 2
    windows = {i: 8 for i, kind in enumerate(types) if kind == "sliding_attention"}
    want = reference.run(model, ids, reference.streaming(mask, 2, 12, windows), None)
    for cuts in ([30], [10] + [1] * 20, [3, 9, 1, 17]):
        cache = SparseCache(model.config, sinks=2, window=12)
        torch.testing.assert_close(reference.through(model, cache, ids, cuts), want, **CLOSE)
    assert [layer.keys.shape[2] for layer in cache.layers] == [8 if i in windows else 14 for i in range(2)]


# --- exactness: SnapKV equals the full cache with what was evicted hidden ---


@pytest.mark.parametrize("padded", [False, True])
def test_snapkv_decodes_over_what_it_kept(llama, padded):
    ids = text(2, 40)
    mask = left_padded([40, 29]) if padded else torch.ones(2, 40, dtype=torch.long)
    at, prompt = positions_of(mask), 34
    cache = SparseCache(llama.config, policy="snapkv", budget=16, window=4)
    got = [reference.through(llama, cache, ids[:, :prompt], [prompt], mask[:, :prompt], at)]
    kept = [layer.positions.clone() for layer in cache.layers]
    assert all((k >= 0).all() and len(set(k[0, 0].tolist())) == 16 for k in kept)
    assert not torch.equal(kept[0][:, 0], kept[0][:, 1]), "KV heads choose for themselves"
    overwritten = 0
    hidden = [torch.zeros(2, 4, 40, 40, dtype=torch.bool) for _ in kept]
    for step in range(prompt, 40):
        logits = llama_step(llama, cache, ids, mask, at, step)
        got.append(logits)
        for layer, rows in zip(cache.layers, hidden):
            stays = (layer.positions[..., None] == reference.real_index(mask)[:, None, None, :]).any(2)
            overwritten += int((~stays).sum())
            rows[:, :, step] = ~stays.repeat_interleave(2, 1)

    def logits(layer, query, key, scale):
        dense = reference.streaming_mask(mask, 0, 1000) & ~hidden[layer]
        return (query @ key.transpose(-1, -2) * scale).masked_fill(~dense, -torch.inf)

    want = reference.run(llama, ids, logits, at)
    torch.testing.assert_close(torch.cat(got, 1)[mask.bool()], want[mask.bool()], **CLOSE)
    assert overwritten


@torch.no_grad()
def llama_step(model, cache, ids, mask, at, step):
    part = slice(step, step + 1)
    return model(ids[:, part], **holding(cache), attention_mask=mask[:, : step + 1], position_ids=at[:, part]).logits


# --- ways to call ---


@pytest.mark.parametrize("policy", ["streaming_llm", "snapkv"])
@pytest.mark.parametrize("budget", [24, 200])
@torch.no_grad()
def test_a_second_turn_on_the_same_cache(llama, policy, budget):
    first, second = text(1, 40), text(1, 15, seed=1)
    cache = SparseCache(llama.config, policy=policy, budget=budget, **({"window": 8} if policy == "snapkv" else {}))
    said = llama.generate(first, **holding(cache), max_new_tokens=6, do_sample=False)
    assert cache.get_seq_length() == 45
    whole = torch.cat((said, second), 1)
    got = llama.generate(whole, **holding(cache), max_new_tokens=6, do_sample=False)
    assert cache.get_seq_length() == whole.shape[1] + 5
    if budget == 200:
        assert torch.equal(got, llama.generate(whole, max_new_tokens=6, do_sample=False))
    if policy == "streaming_llm":
        mask = torch.ones_like(got)
        want = reference.run(llama, got, reference.streaming(mask, 4, budget - 4))
        assert torch.equal(want[:, whole.shape[1] - 1 : -1].argmax(-1), got[:, whole.shape[1] :])


@torch.no_grad()
def test_an_own_loop_without_position_ids(llama):
    ids, mask = text(2, 30), left_padded([30, 21])
    plain = torch.arange(30)[None]
    want = reference.run(llama, ids, reference.streaming(mask, 2, 8), plain)
    got = reference.through(llama, SparseCache(llama.config, sinks=2, window=8), ids, [12] + [1] * 18, mask)
    torch.testing.assert_close(got[mask.bool()], want[mask.bool()], **CLOSE)


@pytest.mark.parametrize("policy", ["streaming_llm", "snapkv"])
@torch.no_grad()
def test_an_own_loop_with_turns_equals_an_ordinary_cache(llama, policy):
    """A padded batch without position_ids, and a second turn in it, with a budget that holds everything."""
    ids, mask, cuts = text(2, 34), left_padded([34, 25]), [12, 1, 1, 9, 1, 10]
    got = reference.through(llama, SparseCache(llama.config, policy, 40), ids, cuts, mask)
    want = reference.through(llama, DynamicCache(config=llama.config), ids, cuts, mask)
    torch.testing.assert_close(got[mask.bool()], want[mask.bool()], **CLOSE)


@pytest.mark.parametrize("policy", ["streaming_llm", "snapkv"])
@torch.no_grad()
def test_beam_search(llama, policy):
    ids = text(2, 20)
    options = {"max_new_tokens": 12, "num_beams": 3, "do_sample": False}
    cache = SparseCache(llama.config, policy=policy, budget=40)
    assert torch.equal(llama.generate(ids, **holding(cache), **options), llama.generate(ids, **options))
    if policy == "streaming_llm":
        small = SparseCache(llama.config, budget=12)
        got = llama.generate(ids, **holding(small), output_scores=True, return_dict_in_generate=True, **options)
        rows = got.sequences
        logits = reference.run(llama, rows, reference.streaming(torch.ones_like(rows), 4, 8))
        logp = logits.log_softmax(-1)[:, 19:-1].gather(-1, rows[:, 20:, None]).sum((1, 2)) / (rows.shape[1] - 20)
        torch.testing.assert_close(got.sequences_scores, logp, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("policy", ["streaming_llm", "snapkv"])
@torch.no_grad()
def test_prefill_in_chunks(llama, policy):
    ids = text(1, 50)
    options = {"max_new_tokens": 6, "do_sample": False}
    cache = SparseCache(llama.config, policy=policy, budget=64)
    assert torch.equal(llama.generate(ids, **holding(cache), prefill_chunk_size=16, **options), llama.generate(ids, **options))
    if policy == "streaming_llm":
        at_once, cut = (SparseCache(llama.config, budget=20) for _ in range(2))
        want = llama.generate(ids, **holding(at_once), **options)
        assert torch.equal(llama.generate(ids, **holding(cut), prefill_chunk_size=16, **options), want)
        for a, b in zip(at_once.layers, cut.layers):
            assert torch.equal(a.positions.sort(-1).values, b.positions.sort(-1).values)


@torch.no_grad()
def test_a_prompt_shorter_than_the_sinks(llama):
    ids = text(1, 25)
    want = reference.run(llama, ids, reference.streaming(torch.ones_like(ids), 6, 5))
    got = reference.through(llama, SparseCache(llama.config, sinks=6, window=5), ids, [3] + [1] * 22)
    torch.testing.assert_close(got, want, **CLOSE)


@torch.no_grad()
def test_a_model_without_sparse_cache_is_as_before():
    for implementation in ("sdpa", "eager"):
        model, ids, mask = build("llama", implementation), text(2, 20), left_padded([20, 13])
        want = model(ids, attention_mask=mask).logits
        said = model.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False)
        SparseCache(model.config, budget=8)
        assert torch.equal(model(ids, attention_mask=mask).logits, want)
        assert torch.equal(model.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False), said)


# --- memory ---


@pytest.mark.parametrize("policy, budget", [("streaming_llm", 16), ("snapkv", 40), ("snapkv", 0.5)])
@torch.no_grad()
def test_memory_is_the_budget(llama, policy, budget):
    cache = SparseCache(llama.config, policy=policy, budget=budget)
    reference.through(llama, cache, text(2, 90), [80] + [1] * 10)
    tokens = budget if budget > 1 else 40
    per_token = 2 * 2 * 2 * 16 * 4  # rows, keys and values, KV heads, head dim, bytes
    assert cache.layers[0].keys.shape[2] == tokens
    assert cache.kept_bytes() <= 1.05 * tokens * per_token * 2


def test_a_share_of_a_known_prompt(llama):
    cache = SparseCache(llama.config, policy="snapkv", budget=0.1, prompt_len=1000, batch_size=1, device="cpu")
    assert cache.layers[1].keys.shape == (1, 2, 100, 16) and cache.layers[1].is_initialized


# --- what moves with a cache ---


@pytest.mark.parametrize("policy", ["streaming_llm", "snapkv"])
@torch.no_grad()
def test_rows_move_with_all_their_state(llama, policy):
    ids, mask = text(3, 40), left_padded([40, 26, 33])
    at = positions_of(mask)
    make = lambda: SparseCache(llama.config, policy=policy, budget=12, window=5)

    def step(cache, more, after, start, i):
        part = slice(i, i + 1)
        return llama(more[:, part], **holding(cache), attention_mask=after[:, : 41 + i], position_ids=start[:, part]).logits

    def finish(cache, rows):
        after = torch.cat((mask[rows], torch.ones(len(rows), 9, dtype=torch.long)), 1)
        more = text(1, 9, seed=4).expand(len(rows), -1)
        start = positions_of(after)[:, 40:]
        return torch.cat([step(cache, more, after, start, i) for i in range(9)], 1)

    def filled():
        cache = make()
        reference.through(llama, cache, ids, [30] + [1] * 10, mask, at)
        return cache

    want = finish(filled(), [0, 1, 2])
    cache = filled()
    cache.reorder_cache(torch.tensor([2, 0, 0]))
    torch.testing.assert_close(finish(cache, [2, 0, 0]), want[[2, 0, 0]], **CLOSE)
    cache = filled()
    cache.batch_select_indices(torch.tensor([1]))
    torch.testing.assert_close(finish(cache, [1]), want[[1]], **CLOSE)
    cache = filled()
    cache.batch_repeat_interleave(2)
    torch.testing.assert_close(finish(cache, [0, 0, 1, 1, 2, 2]), want[[0, 0, 1, 1, 2, 2]], **CLOSE)
    cache = filled()
    for layer in cache.layers:
        layer.offload()
        layer.prefetch()
    torch.testing.assert_close(finish(cache, [0, 1, 2]), want, **CLOSE)
    cache = filled()
    cache.reset()
    assert cache.get_seq_length() == 0
    reference.through(llama, cache, ids, [30] + [1] * 10, mask, at)
    torch.testing.assert_close(finish(cache, [0, 1, 2]), want, **CLOSE)


@torch.no_grad()
def test_offloading_moves_everything(llama):
    cache = SparseCache(llama.config, policy="snapkv", budget=40, batch_size=2, device="cpu")
    layer = cache.layers[1]
    layer.batch_repeat_interleave(2)
    assert layer.keys.shape == (4, 2, 40, 16) and layer.tickets.shape == (9,)
    layer.device = torch.device("meta")
    layer.prefetch()
    assert all(t.is_meta for t in (*layer.state, layer.tickets)) and layer.keys.shape == (4, 2, 40, 16)


@pytest.mark.parametrize("policy", ["streaming_llm", "snapkv"])
@torch.no_grad()
def test_a_copy_goes_its_own_way(llama, policy):
    """One prompt, several continuations: transformers' way is a deep copy of the cache."""
    ids, first, second = text(2, 30), text(2, 6, seed=1), text(2, 6, seed=2)
    make = lambda: SparseCache(llama.config, policy=policy, budget=14, window=6)
    cache = make()
    reference.through(llama, cache, ids, [30])
    twin = copy.deepcopy(cache)
    got = [reference.through(llama, held, more, [4, 1, 1]) for held, more in ((cache, first), (twin, second))]
    for more, logits in zip((first, second), got):
        fresh = make()
        reference.through(llama, fresh, ids, [30])
        torch.testing.assert_close(logits, reference.through(llama, fresh, more, [4, 1, 1]))
    assert (got[0] - got[1]).abs().max() > 1e-3


@torch.no_grad()
def test_keys_live_no_longer_than_their_layer(llama):
    """The whole prompt's keys of one layer exist at a time, whatever the budget: those of all layers would be the cache that was saved."""
    cache, given, most = SparseCache(llama.config, policy="snapkv", budget=40), [], 0
    for layer in cache.layers:
        update = layer.update

        def watched(keys, values, *args, update=update, **given_too):
            nonlocal most
            most = max(most, sum(held() is not None for held in given))
            given.extend(map(weakref.ref, (keys, values)))
            return update(keys, values, *args, **given_too)

        layer.update = watched
    llama(text(1, 90), **holding(cache))
    assert len(given) == 4 and most == 0
    assert all(held() is None for held in given)


# --- torch.compile ---


PADDINGS = [("streaming_llm", False), ("snapkv", False), ("snapkv", True), ("streaming_llm", True)]


@pytest.mark.parametrize(("policy", "padded"), every(2, PADDINGS))
@torch.no_grad()
@pytest.mark.samples(1)
def test_compiled_whole_and_never_again(llama, policy, padded):
    from torch._dynamo.testing import CompileCounterWithBackend

    ids = text(2, 40)
    options = {"max_new_tokens": 24, "do_sample": False} | ({"attention_mask": left_padded([40, 31])} if padded else {})
    make = lambda: SparseCache(llama.config, policy=policy, budget=48)
    want = llama.generate(ids, **holding(make()), **options)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    llama.compile(backend=counter, fullgraph=True)
    try:
        assert torch.equal(llama.generate(ids, **holding(make()), **options), want)
        assert counter.frame_count == 2  # one graph for the prompt, one for all later tokens
        assert torch.equal(llama.generate(ids, **holding(make()), **options), want)
        assert counter.frame_count == 2
    finally:
        llama._compiled_call_impl = None
        torch._dynamo.reset()


@pytest.mark.slow
@torch.no_grad()
def test_compiled_buffers_change_in_place(llama):
    from torch._inductor.utils import run_and_get_code

    cache = SparseCache(llama.config, sinks=4, window=37, batch_size=1, device="cpu")
    held = [t.data_ptr() for layer in cache.layers for t in layer.state]
    ids, logits = text(1, 60), []
    want = reference.run(llama, ids, reference.streaming(torch.ones_like(ids), 4, 37))
    reference.through(llama, cache, ids[:, :50], [50])
    torch._dynamo.reset()
    forward = torch.compile(llama, backend="inductor", fullgraph=True)

    def step(i):
        logits.append(forward(ids[:, i : i + 1], **holding(cache)).logits)

    _, code = run_and_get_code(step, 50)
    for i in range(51, 60):
        step(i)
    torch.testing.assert_close(torch.cat(logits, 1), want[:, 50:], **CLOSE)
    assert [t.data_ptr() for layer in cache.layers for t in layer.state] == held
    made = [line for source in code for line in source.splitlines() if "empty_strided" in line]
    assert made and not any("41" in line for line in made), "a buffer of 41 slots is copied"
    torch._dynamo.reset()
