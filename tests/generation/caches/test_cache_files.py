"""SparseCaches saved to files and loaded again, in this process and another, on another device, for the same model and no other."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, safe_open, save_file

import tests.support.cache_reference as reference
from sparsify import SparseCache
from sparsify.errors import CacheError
from tests.support.cache_reference import left_padded, text
from tests.support.harness import holding
from tests.support.tiny_models import build, spread_weights

ROOT = Path(__file__).parents[3]
SETTINGS = {
    "full": ("full", None, {}),
    "streaming_llm": ("streaming_llm", None, {"sinks": 2, "window": 10}),
    "in_cache": ("streaming_llm", 12, {"positions": "in_cache"}),
    "snapkv": ("snapkv", 12, {"window": 4}),
    "a share": ("snapkv", 0.5, {"window": 4}),
    "chunkkv": ("chunkkv", 12, {"of": "knorm", "options": {"recent": 3}}),
}
MORE, CUTS = text(2, 40, seed=5), [4, 1, 1, 34]


@pytest.fixture(scope="module")
def llama():
    return build("llama", layers=2)


def filled(model, setting="snapkv"):
    policy, budget, options = SETTINGS[setting]
    cache = SparseCache(model.config, policy, budget, **options)
    reference.through(model, cache, text(2, 21), [20, 1], left_padded([21, 15]))
    return cache


def going_on(model, cache):
    """Logits of more tokens; a mask covers all so far."""
    mask, start, logits = torch.cat((left_padded([21, 15]), torch.ones_like(MORE)), 1), 21, []
    for size in CUTS:
        ids, start = MORE[:, start - 21 : start - 21 + size], start + size
        logits.append(model(ids, attention_mask=mask[:, :start], **holding(cache)).logits)
    return torch.cat(logits, 1)


@pytest.mark.parametrize("setting", SETTINGS)
@torch.no_grad()
def test_a_loaded_cache_goes_on_as_the_saved_one(llama, tmp_path, setting):
    cache = filled(llama, setting)
    cache.save(tmp_path / "prompt.safetensors", llama)
    loaded = SparseCache.load(tmp_path / "prompt.safetensors", copy.deepcopy(llama))
    assert loaded.policy == cache.policy and loaded.get_seq_length() == 21
    for one, other in zip(loaded.layers, cache.layers, strict=True):
        assert one.layout == other.layout and one.call is loaded.call
    assert torch.equal(going_on(llama, loaded), going_on(llama, cache))
    # the file is not what the buffers live in
    again = SparseCache.load(tmp_path / "prompt.safetensors", llama)
    assert again.get_seq_length() == 21


@pytest.mark.parametrize("policy, options", [("tova", {}), ("snapkv", {"window": 4}), ("adakv", {"options": {"window": 4}})])
@torch.no_grad()
def test_a_policy_that_selects_before_the_next_call_weighs_keys_as_the_model_does(tmp_path, policy, options):
    """The scale of the logits comes with calls, and the first selection after loading comes before any."""
    model = build("llama", layers=2)
    spread_weights(model)
    cache = SparseCache(model.config, policy, 12, every=8, **options)
    reference.through(model, cache, text(2, 20), [20])
    cache.save(tmp_path / "prompt", model)
    loaded = SparseCache.load(tmp_path / "prompt", model)
    for one in (cache, loaded):
        one.end_turn()
    for one, other in zip(loaded.layers, cache.layers, strict=True):
        assert torch.equal(one.positions, other.positions)
    assert torch.equal(model(MORE[:, :9], **holding(loaded)).logits, model(MORE[:, :9], **holding(cache)).logits)


@torch.no_grad()
def test_a_loaded_cache_still_waits_for_what_its_policy_is_told(llama, tmp_path):
    cache = SparseCache(llama.config, "sirllm", 12, every=20)
    llama(text(1, 18), **holding(cache))
    cache.save(tmp_path / "prompt", llama)
    with pytest.raises(CacheError, match="was not told the logits"):
        SparseCache.load(tmp_path / "prompt", llama).end_turn()


@torch.no_grad()
def test_a_file_without_the_scale_is_refused_where_it_is_needed(llama, tmp_path):
    cache = SparseCache(llama.config, "tova", 12, every=8)
    reference.through(llama, cache, text(1, 20), [20])
    cache.save(tmp_path / "prompt", llama)
    with safe_open(tmp_path / "prompt", "pt") as file:
        header = json.loads(file.metadata()["sparsify_cache"])
    for layer in header["layers"]:
        del layer["logits"]
    save_file(load_file(tmp_path / "prompt"), tmp_path / "old", {"sparsify_cache": json.dumps(header)})
    with pytest.raises(CacheError, match="how the layer's logits are scaled"):
        SparseCache.load(tmp_path / "old", llama)


@torch.no_grad()
def test_windows_of_the_models_own_travel_too(tmp_path):
    model = build("gemma3")
    cache = filled(model)
    cache.save(tmp_path / "prompt", model)
    assert torch.equal(going_on(model, SparseCache.load(tmp_path / "prompt", model)), going_on(model, cache))


@torch.no_grad()
def test_a_full_cache_saves_what_it_holds_and_no_more(llama, tmp_path):
    cache = SparseCache(llama.config, "full", 4096)
    reference.through(llama, cache, text(1, 21), [21])
    cache.save(tmp_path / "prompt", llama)
    assert load_file(tmp_path / "prompt")["0.keys"].shape[2] == 21 and cache.layers[0].keys.shape[2] == 4096
    empty = SparseCache(llama.config, "full")
    empty.save(tmp_path / "empty", llama)
    loaded = SparseCache.load(tmp_path / "empty", llama)
    assert loaded.get_seq_length() == 0 and not loaded.layers[0].is_initialized


@torch.no_grad()
def test_a_fork_is_independent(llama):
    cache = filled(llama)
    other = cache.fork()
    want = going_on(llama, cache.fork())
    assert torch.equal(going_on(llama, other), want)
    assert cache.get_seq_length() == 21 and torch.equal(going_on(llama, cache), want)


@torch.no_grad()
def test_other_models_are_refused(llama, tmp_path):
    filled(llama).save(tmp_path / "prompt", llama)
    trained = copy.deepcopy(llama)
    trained.model.layers[1].mlp.up_proj.weight.mul_(1.5)
    for other, message in (
        (trained, "this llama has another configuration or other weights"),
        (build("qwen2", layers=2), "for a llama, and this is a qwen2"),
    ):
        with pytest.raises(CacheError, match=message):
            SparseCache.load(tmp_path / "prompt", other)


@torch.no_grad()
def test_what_is_no_such_file_is_refused(llama, tmp_path):
    filled(llama).save(tmp_path / "prompt", llama)
    whole = (tmp_path / "prompt").read_bytes()
    (tmp_path / "cut").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text").write_text("no tensors here")
    save_file({"x": torch.ones(1)}, tmp_path / "weights")
    with safe_open(tmp_path / "prompt", "pt") as file:
        header = json.loads(file.metadata()["sparsify_cache"])
    tensors = load_file(tmp_path / "prompt")
    changed = lambda name, header, tensors: save_file(tensors, tmp_path / name, {"sparsify_cache": json.dumps(header)})
    changed("newer", header | {"format": 99}, tensors)
    changed("more", header | {"pages": 3}, tensors)
    changed("missing", header, {name: held for name, held in tensors.items() if name != "1.values"})
    changed("shape", header, tensors | {"0.seen": torch.zeros(3, dtype=torch.int32)})
    for name, message in {
        "cut": "damaged",
        "text": "damaged",
        "weights": "no SparseCache was saved",
        "newer": "format 99 is not read",
        "more": "header is not read",
        "missing": "a tensor is missing",
        "shape": r"seen is \(3,\), not \(2,\)",
    }.items():
        with pytest.raises(CacheError, match=message):
            SparseCache.load(tmp_path / name, llama)


@torch.no_grad()
def test_of_the_format_before_4_bits_alone_are_refused(llama, tmp_path):
    for codes, message in ((None, None), ("fp8", None), ("int4", "format 2 is not read where it has 4-bit codes")):
        cache = SparseCache(llama.config, "full", 64, dtype=codes)
        with torch.no_grad():
            llama(text(1, 10), **holding(cache))
        cache.save(tmp_path / "new", llama)
        with safe_open(tmp_path / "new", "pt") as file:
            header = json.loads(file.metadata()["sparsify_cache"])
        save_file(load_file(tmp_path / "new"), tmp_path / "old", {"sparsify_cache": json.dumps(header | {"format": 2})})
        if message is None:
            assert SparseCache.load(tmp_path / "old", llama).get_seq_length() == 10
        else:
            with pytest.raises(CacheError, match=message):
                SparseCache.load(tmp_path / "old", llama)


@torch.no_grad()
def test_a_cache_that_stopped_halfway_is_not_saved(llama, tmp_path):
    cache = filled(llama)
    cache.call.storing = True
    with pytest.raises(CacheError, match="failed halfway"):
        cache.save(tmp_path / "prompt", llama)
    assert not list(tmp_path.iterdir()), "no half a file is left"


@pytest.mark.slow
@torch.no_grad()
def test_another_process_goes_on(llama, tmp_path):
    cache = filled(llama)
    cache.save(tmp_path / "prompt", llama)
    llama.save_pretrained(tmp_path / "model")  # which writes into the configuration
    assert SparseCache.load(tmp_path / "prompt", llama).get_seq_length() == 21
    script = (
        "import sys, torch; from transformers import AutoModelForCausalLM; from sparsify import SparseCache\n"
        "torch.set_grad_enabled(False)\n"
        "from tests.generation.caches.test_cache_files import going_on\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1] + '/model').eval()\n"
        "torch.save(going_on(model, SparseCache.load(sys.argv[1] + '/prompt', model)), sys.argv[1] + '/logits')\n"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True, cwd=ROOT)
    torch.testing.assert_close(torch.load(tmp_path / "logits"), going_on(llama, cache), rtol=1e-4, atol=1e-5)
