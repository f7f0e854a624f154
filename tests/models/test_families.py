"""The families of the first release × how they are run: keep-all equals eager token for token, forced sparse equals a masked reference."""

from __future__ import annotations

import itertools

import pytest
import torch
from transformers import DynamicCache, StaticCache

from sparsify.ops.estimate import DEFAULT
from tests.support.harness import KEEP_ALL, holding, reference_run, run, strict, visible_error
from tests.support.tiny_models import CORE_FAMILIES, VOCAB, build

# The quick run has every family once in tests/models/test_matrix.py; here it has those that differ most, and the rest is slow.
TELLING = ("llama", "gemma3", "mistral_window")
LAYERS = 2
FP32 = 2e-5


def quick(cells, chosen):
    """The cells as parameters, all but the chosen ones marked slow."""
    return [pytest.param(*c, marks=() if c in chosen else pytest.mark.slow) for c in cells]


def product(*axes):
    return list(itertools.product(*axes))


def prompt(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB, (batch, length), generator=generator)


def padded(batch: int, length: int, side: str) -> dict[str, torch.Tensor]:
    """Rows of different lengths, the last one full."""
    mask = torch.zeros(batch, length, dtype=torch.long)
    for row in range(batch):
        real = length - 7 * (batch - 1 - row)
        mask[row, length - real :] = 1
    mask = mask if side == "left" else mask.flip(1)
    return {"input_ids": prompt(batch, length) * mask, "attention_mask": mask}


def keep_all_options(*passes: str) -> dict:
    return strict(passes=[*passes, "dense"], **{p: KEEP_ALL[p] for p in passes})


METHODS = ("dense", "xattention", "sink_window")


@pytest.mark.parametrize(("family", "method"), quick(product(CORE_FAMILIES, METHODS), product(["gemma3"], METHODS)))
@pytest.mark.samples(1)
def test_prefill_under_keep_all_equals_eager(family, method):
    model = build(family, layers=LAYERS)
    ids = prompt(2, 70)
    call = lambda m: m(input_ids=ids, use_cache=False).logits
    with torch.no_grad():
        want = call(model)
    got = run(model, call, keep_all_options(*({method} - {"dense"})))
    assert got.graphs == 1
    assert got.rewritten() == got.sites == LAYERS
    windowed = sum("window" in d.mask for p in got.plans for d in p.decisions)
    assert got.rewritten(method) == LAYERS - (windowed if method == "sink_window" else 0)
    assert visible_error(got.value, want) < FP32
    assert torch.equal(got.value.argmax(-1), want.argmax(-1))


@pytest.mark.parametrize(("family", "side"), quick(product(CORE_FAMILIES, ("left", "right")), product(["gemma3"], ("right",))))
@pytest.mark.slow
def test_padded_batch_under_keep_all_equals_eager(family, side):
    model = build(family, layers=LAYERS)
    inputs = padded(3, 40, side)
    call = lambda m: m(**inputs, use_cache=False).logits
    with torch.no_grad():
        want = call(model)
    for options in (keep_all_options(), keep_all_options("xattention"), keep_all_options("sink_window")):
        got = run(model, call, options)
        assert got.rewritten() == got.sites == LAYERS
        assert all("padding" in d.mask for p in got.plans for d in p.decisions)
        assert visible_error(got.value, want, inputs["attention_mask"]) < FP32


PROMPTS = {"alone": {"input_ids": prompt(1, 33)}, "padded": padded(2, 33, "left")}


@pytest.mark.parametrize(("family", "prompts"), quick(product(CORE_FAMILIES, PROMPTS), [("llama", "alone"), ("gemma3", "padded")]))
@pytest.mark.samples(1)
def test_generate_with_a_dynamic_cache(family, prompts):
    inputs = PROMPTS[prompts]
    model = build(family, layers=LAYERS)
    call = lambda m: m.generate(**inputs, max_new_tokens=6, do_sample=False, pad_token_id=0)
    with torch.no_grad():
        want = call(model)
    got = run(model, call, keep_all_options("xattention"))
    assert torch.equal(got.value, want)
    assert got.graphs <= 3
    assert got.rewritten() == got.sites == LAYERS * got.graphs
    assert got.rewritten("xattention") == LAYERS  # prefill alone: decode is refused
    assert any("decode" in r for p in got.plans for d in p.decisions for r in d.refusals)


@pytest.mark.parametrize("family", quick(product(CORE_FAMILIES), product(["llama"])))
def test_generate_with_a_static_cache(family):
    """generate() hands static-cache graphs their mask as a tensor. Of one row it says which keys are visible: dense takes it, and
    xattention refuses decode anyway."""
    model = build(family, layers=LAYERS)
    ids = prompt(1, 21)
    call = lambda m: m.generate(input_ids=ids, max_new_tokens=6, do_sample=False, pad_token_id=0, cache_implementation="static")
    with torch.no_grad():
        want = call(model)
    got = run(model, call, keep_all_options("xattention"))
    assert torch.equal(got.value, want)
    decode = got.plans[-1]
    assert all(d.method == "dense" and d.mask == "padding" for d in decode.decisions)
    assert len(decode.decisions) == LAYERS


@pytest.mark.parametrize("family", quick(product(["llama", "qwen3", "mistral_window"]), product(["mistral_window"])))
@pytest.mark.slow
def test_own_calls_with_a_static_cache(family):
    """Prefill, a chunk and decode into a preallocated cache: the start is the cache's length, not bottom-right."""
    model = build(family, layers=LAYERS)
    ids = prompt(1, 30)

    def call(m):
        cache = StaticCache(config=m.config, max_cache_len=64)
        steps = [ids[:, :20], ids[:, 20:29], ids[:, 29:]]
        return torch.cat([m(input_ids=s, **holding(cache)).logits for s in steps], 1)

    with torch.no_grad():
        want = call(model)
    got = run(model, call, keep_all_options())
    assert got.rewritten() > 0
    assert visible_error(got.value, want) < FP32


@pytest.mark.parametrize("family", quick(product(CORE_FAMILIES), product(["gemma3"])))
@pytest.mark.slow
def test_chunked_prefill_and_second_turn(family):
    model = build(family, layers=LAYERS)
    ids = prompt(2, 60)

    def call(m):
        cache = DynamicCache(config=m.config)
        return torch.cat([m(input_ids=s, **holding(cache)).logits for s in (ids[:, :32], ids[:, 32:57], ids[:, 57:])], 1)

    with torch.no_grad():
        want = call(model)
    got = run(model, call, keep_all_options("xattention"))
    assert got.rewritten() == got.sites
    assert visible_error(got.value, want) < FP32


SPARSE = {"stride": 8, "block": 64, "threshold": 0.5, "pool": "max"}
WIDE = {"hidden_size": 256, "head_dim": 64}


@pytest.mark.parametrize(("family", "side"), quick(product(CORE_FAMILIES, (None, "left")), [("llama", None), *product(TELLING, ["left"])]))
@pytest.mark.samples(2)
def test_forced_xattention_equals_the_masked_reference(family, side):
    wide = {k: v for k, v in WIDE.items() if k != "head_dim" or family in ("qwen3", "gemma3")}
    extra = {"sliding_window": 4096} if family in ("gemma3", "mistral_window") else {}
    model = build(family, layers=LAYERS, **wide, **extra)
    inputs = {"input_ids": prompt(2, 300)} if side is None else padded(2, 300, side)
    call = lambda m: m(**inputs, use_cache=False).logits
    with torch.no_grad():
        dense = call(model)
    got = run(model, call, strict(passes=["xattention"], xattention=SPARSE))
    assert got.rewritten("xattention") == got.sites == LAYERS
    options = {"estimate": DEFAULT, "stride": 8, "block_size": 64, "threshold": (0.5,)}
    want = reference_run(model, call, **options)
    mask = inputs.get("attention_mask")
    assert visible_error(got.value, want, mask) < FP32
    assert visible_error(got.value, dense, mask) > 100 * FP32


@pytest.mark.parametrize(
    ("family", "side"), quick(product(("llama", "qwen2", "phi3"), (None, "left", "right")), product(["llama"], ("left", "right")))
)
def test_forced_sink_window_equals_the_masked_reference(family, side):
    model = build(family, layers=LAYERS)
    inputs = {"input_ids": prompt(2, 50)} if side is None else padded(2, 50, side)
    call = lambda m: m(**inputs, use_cache=False).logits
    with torch.no_grad():
        dense = call(model)
    got = run(model, call, strict(passes=["sink_window"], sink_window={"sinks": 3, "window": 9}))
    assert got.rewritten("sink_window") == got.sites == LAYERS
    want = reference_run(model, call, sinks=3, window=9)
    mask = inputs.get("attention_mask")
    assert visible_error(got.value, want, mask) < FP32
    assert visible_error(got.value, dense, mask) > 100 * FP32


@pytest.mark.slow
def test_sink_window_in_decode_equals_the_masked_reference():
    model = build("llama", layers=LAYERS)
    ids = prompt(1, 40)
    call = lambda m: m.generate(
        input_ids=ids, max_new_tokens=12, do_sample=False, pad_token_id=0, return_dict_in_generate=True, output_logits=True
    )
    got = run(model, call, strict(passes=["sink_window"], sink_window={"sinks": 2, "window": 5}))
    assert got.rewritten("sink_window") == got.sites
    want = reference_run(model, call, sinks=2, window=5)
    assert torch.equal(got.value.sequences, want.sequences)
    got_logits, want_logits = torch.stack(got.value.logits), torch.stack(want.logits)
    assert ((got_logits - want_logits).abs().max() / want_logits.abs().max()).item() < FP32
