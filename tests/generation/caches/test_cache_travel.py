"""SparseCaches that are saved, loaded, copied, used by copies of their model and by another process, and under autocast."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import DynamicCache

import tests.support.cache_reference as reference
from sparsify import SparseCache
from sparsify.errors import CacheError
from tests.support.cache_reference import text
from tests.support.tiny_models import build

ROOT = Path(__file__).parents[2]
CLOSE = {"rtol": 1e-4, "atol": 2e-5}
OPTIONS = {"streaming_llm": {"sinks": 2, "window": 10}, "snapkv": {"budget": 12, "window": 4}}


def through_disk(held):
    file = io.BytesIO()
    torch.save(held, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def through_pickle(held):
    return pickle.loads(pickle.dumps(held))


def filled(model, policy="snapkv", rows=1):
    cache = SparseCache(model.config, policy, **OPTIONS[policy])
    reference.through(model, cache, text(rows, 21), [20, 1])
    return cache


MORE, CUTS = text(1, 7, seed=5), [4, 1, 1, 1]


# --- copies of a cache, copies of a model ---


@pytest.mark.parametrize("policy", OPTIONS)
@pytest.mark.parametrize("moved", [through_disk, through_pickle, copy.deepcopy])
@torch.no_grad()
def test_a_moved_cache_goes_on_with_any_copy_of_its_model(policy, moved):
    model = build("llama")
    cache = filled(model, policy)
    want = reference.through(model, copy.deepcopy(cache), MORE, CUTS)
    for other in (model, copy.deepcopy(model), through_disk(model)):
        held = moved(cache)
        held.attach(other.config)
        assert torch.equal(reference.through(other, held, MORE, CUTS), want)
    # a copy of a model that had a SparseCache needs no more
    assert torch.equal(reference.through(copy.deepcopy(model), moved(cache), MORE, CUTS), want)
    assert torch.equal(reference.through(model, cache, MORE, CUTS), want)


@pytest.mark.parametrize("moved", [through_disk, copy.deepcopy])
@pytest.mark.parametrize("first", ["model", "cache"])
@torch.no_grad()
def test_a_model_and_its_cache_move_together(moved, first):
    model = build("llama")
    cache = filled(model)
    want = reference.through(model, copy.deepcopy(cache), MORE, CUTS)
    pair = moved((model, cache) if first == "model" else (cache, model))
    other, held = pair if first == "model" else pair[::-1]
    assert other.config is not model.config and held is not cache
    assert held.config is other.config or (first, moved) == ("cache", copy.deepcopy)
    assert torch.equal(reference.through(other, held, MORE, CUTS), want)
    assert torch.equal(reference.through(model, cache, MORE, CUTS), want)


@torch.no_grad()
def test_a_compiled_replica():
    model = build("llama", layers=1)
    cache = filled(model)
    want = reference.through(model, copy.deepcopy(cache), MORE, [1, 1])
    replica = copy.deepcopy(model)
    torch._dynamo.reset()
    replica.compile(backend="eager", fullgraph=True)
    torch.testing.assert_close(reference.through(replica, through_disk(cache), MORE, [1, 1]), want, **CLOSE)
    torch._dynamo.reset()


@torch.no_grad()
def test_state_that_hangs_on_a_cache_moves_with_it():
    model = build("llama")
    cache = filled(model, rows=2)
    loaded = through_disk(cache)
    assert loaded.get_seq_length() == 21 and loaded.kept_bytes() == cache.kept_bytes()
    assert all(layer.call is loaded.call for layer in loaded.layers) and loaded.call is not cache.call
    assert [layer.keys.data_ptr() for layer in loaded.layers] != [layer.keys.data_ptr() for layer in cache.layers]
    cache.call.storing = True  # a call that stopped in the middle
    with pytest.raises(CacheError, match="failed halfway"):
        reference.through(model, through_disk(cache), text(2, 1), [1])
    offloaded, meta = copy.deepcopy(loaded).layers[0], torch.device("meta")
    offloaded.device = meta
    assert through_pickle(offloaded).device == meta, "buffers that were offloaded go back to their device"
    file = io.BytesIO()
    torch.save(loaded, file)
    file.seek(0)
    elsewhere = torch.load(file, weights_only=False, map_location="meta").layers[0]
    assert elsewhere.keys.is_meta and elsewhere.device == meta
    empty = through_disk(SparseCache(model.config, "snapkv", 0.5))
    reference.through(model, empty, text(1, 80), [80])
    assert empty.layers[0].keys.shape[2] == 40


@torch.no_grad()
def test_models_that_differ_are_told_apart():
    model = build("llama")
    cache = filled(model)
    for other in (build("llama", rope_parameters={"rope_type": "default", "rope_theta": 500.0}), build("qwen2")):
        with pytest.raises(CacheError, match="another model"):
            cache.attach(other.config)
        SparseCache(other.config, budget=8)
        with pytest.raises(CacheError, match="another model"):
            reference.through(other, copy.deepcopy(cache), MORE, [7])
    fresh = build("llama")
    with pytest.raises(CacheError, match=r"cache\.attach\(model\.config\)"):
        reference.through(fresh, cache, MORE, [7])


# --- another process ---

_ELSEWHERE = """
import sys
sys.path[:0] = [{root!r}]
import torch
torch.set_num_threads(1)
folder, more = {folder!r}, {more!r}
read = lambda name: torch.load(f"{{folder}}/{{name}}.pt", weights_only=False)
more = torch.tensor(more)
with torch.no_grad():
    model, want = read("model"), read("want")
    assert torch.equal(model(more).logits, want["plain"]), "the model alone"
    assert "sparsify" not in sys.modules, "a model needs no sparsify"
    import tests.support.cache_reference as reference
    cache = read("cache").attach(model.config)
    assert torch.equal(reference.through(model, cache, more, {cuts}), want["cached"]), "a loaded cache"
    model, cache = read("pair")
    assert torch.equal(reference.through(model, cache, more, {cuts}), want["cached"]), "both together"
"""


@torch.no_grad()
def test_another_process_loads_model_and_cache(tmp_path):
    model = build("llama")
    cache = filled(model)
    for name, held in {"model": model, "cache": cache, "pair": (model, cache)}.items():
        torch.save(held, tmp_path / f"{name}.pt")
    want = {"plain": model(MORE).logits, "cached": reference.through(model, cache, MORE, CUTS)}
    torch.save(want, tmp_path / "want.pt")
    code = _ELSEWHERE.format(root=str(ROOT), folder=str(tmp_path), more=MORE.tolist(), cuts=CUTS)
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


@torch.no_grad()
def test_what_a_model_saves_does_not_name_sparsify(tmp_path):
    model = build("llama", "eager")
    SparseCache(model.config, budget=8)
    model.save_pretrained(tmp_path)
    assert "sparsify" not in (tmp_path / "config.json").read_text() and "sparsify" not in str(model.config.to_dict())
    assert through_pickle(model.config)._attn_implementation == "eager"
    assert type(through_pickle(model).config._attn_implementation) is str


# --- autocast ---


def autocast():
    return torch.autocast("cpu", torch.bfloat16)


@pytest.mark.parametrize("policy", OPTIONS)
@pytest.mark.parametrize("early", [{}, {"dtype": torch.float32}, {"dtype": torch.bfloat16}], ids=str)
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@torch.no_grad()
def test_autocast_rounds_no_more_than_with_an_ordinary_cache(policy, early, implementation):
    model, ids, cuts = build("llama", implementation), text(2, 40), [30, 1, 1, 7, 1]
    exact, given = model(ids).logits, []
    model.model.layers[1].self_attn.o_proj.register_forward_pre_hook(lambda module, inputs: given.append(inputs[0].dtype))
    with autocast():
        ordinary = reference.through(model, DynamicCache(config=model.config), ids, cuts)
        early = {**early, "batch_size": 2, "device": "cpu"} if early else {}
        cache = SparseCache(model.config, policy, 64, **early)
        got = reference.through(model, cache, ids, cuts)
    assert cache.layers[0].keys.dtype == cache.layers[0].values.dtype == early.get("dtype", torch.bfloat16)
    assert got.dtype == ordinary.dtype and set(given) == {torch.bfloat16} and len(given) == 2 * len(cuts)
    assert (got - exact).norm() < 1.3 * (ordinary - exact).norm()


@pytest.mark.slow
@torch.no_grad()
def test_autocast_compiled():
    model, ids = build("llama", layers=1), text(2, 23)
    mask = reference.left_padded([23, 15])
    make = lambda: SparseCache(model.config, sinks=2, window=9)
    with autocast():
        want = reference.through(model, make(), ids, [20, 1, 1, 1], mask)
        torch._dynamo.reset()
        model.compile(backend="aot_eager", fullgraph=True)
        got = reference.through(model, make(), ids, [20, 1, 1, 1], mask)
    torch._dynamo.reset()
    torch.testing.assert_close(got, want, rtol=0.02, atol=0.01)


@torch.no_grad()
def test_autocast_that_comes_and_goes():
    """A cache keeps the dtype that it began with; a call that cannot be stored in it is refused in one sentence."""
    model, ids = build("llama"), text(1, 20)
    cache = SparseCache(model.config, budget=40)
    reference.through(model, cache, ids, [10])
    with autocast():
        got = reference.through(model, cache, ids[:, 10:], [1, 9])
    assert (got.float() - model(ids).logits[:, 10:]).abs().max() < 0.02
    cache = SparseCache(model.config, budget=40)
    with autocast():
        reference.through(model, cache, ids, [10])
    with pytest.raises(CacheError, match=r"the call has torch\.float32 on cpu, the cache holds torch\.bfloat16 on cpu"):
        reference.through(model, cache, ids[:, 10:], [1])


@torch.no_grad()
def test_keys_and_values_of_two_dtypes_without_autocast():
    model = build("llama")
    for layer in model.model.layers:
        layer.self_attn.v_proj.register_forward_hook(lambda module, given, value: value.to(torch.bfloat16))
    for early in ({}, {"batch_size": 1, "device": "cpu"}):
        with pytest.raises(CacheError, match=r"keys are torch\.float32, values torch\.bfloat16"):
            reference.through(model, SparseCache(model.config, budget=16, **early), text(1, 8), [8])
