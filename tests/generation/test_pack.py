"""`sparsify.pack`: every prompt's cache and logits are those of the prompt alone, and what is generated from them is too."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache

import sparsify
from sparsify import SparseCache, api
from sparsify.errors import CacheError, UnsupportedError
from tests.support.cases import every
from tests.support.harness import holding, strict
from tests.support.tiny_models import EAGER_ONLY, VOCAB, build, spread_weights

CLOSE = {"rtol": 1e-4, "atol": 1e-4}
LENGTHS = (20, 1, 33, 9)

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def made(family: str = "llama"):
    model = build(family, "eager" if family in EAGER_ONLY else "sdpa")
    spread_weights(model)
    return model


def prompts_of(lengths=LENGTHS) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(sum(lengths))
    return [torch.randint(3, VOCAB, (length,), generator=generator) for length in lengths]


@torch.no_grad()
def alone(model, prompt: torch.Tensor, cache, tokens: int) -> tuple[torch.Tensor, list[int]]:
    """Logits of the prompt's last token, and the greedy tokens that follow, one call after the other."""
    logits = model(prompt[None], **holding(cache)).logits[:, -1]
    first, found = logits, []
    for _ in range(tokens):
        token = logits.argmax(-1, keepdim=True)
        found.append(int(token))
        logits = model(token, **holding(cache)).logits[:, -1]
    return first, found


@torch.no_grad()
def followed(model, packed, tokens: int) -> list[int]:
    logits, found = packed.logits, []
    for _ in range(tokens):
        token = logits.argmax(-1, keepdim=True)
        found.append(int(token))
        logits = model(token, **holding(packed.cache)).logits[:, -1]
    return found


FAMILIES = ("llama", "mistral_window", "qwen3", "gemma3", "gpt_oss", "gpt2", "phi3", "qwen3_moe")
KINDS = {
    "ordinary": lambda config: None,
    "full": lambda config: SparseCache(config, "full", 64),
    "snapkv": lambda config: SparseCache(config, "snapkv", 16, window=4),
    "streaming": lambda config: SparseCache(config, "streaming_llm", 12, sinks=2),
    "every": lambda config: SparseCache(config, "h2o", 16, every=8),
}


@pytest.mark.parametrize(
    ("family", "kind"), every(100, [*((f, "ordinary") for f in FAMILIES), *(("llama", kind) for kind in KINDS if kind != "ordinary")])
)
def test_each_prompt_is_as_if_it_were_alone(family, kind):
    model, prompts = made(family), prompts_of()
    cache = lambda: KINDS[kind](model.config) or DynamicCache(config=model.config)
    want = [alone(model, prompt, cache(), 6) for prompt in prompts]
    sparsify.compile(model, **strict(passes=["dense"]))
    with api.collect_plans() as plans:
        found = sparsify.pack(model, prompts, cache=KINDS[kind](model.config))
    assert [d.method for plan in plans for d in plan.decisions if d.kind == "batch"] == ["unpad"]
    for packed, prompt, (logits, tokens) in zip(found, prompts, want, strict=True):
        torch.testing.assert_close(packed.logits, logits, **CLOSE)
        assert packed.cache.get_seq_length() == len(prompt)
        assert followed(model, packed, 6) == tokens
        assert packed.cache.get_seq_length() == len(prompt) + 6


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("kind", ["ordinary", "full"])
def test_generate_goes_on_from_a_returned_cache(kind):
    model, prompts = made(), prompts_of((12, 30))
    want = [model.generate(prompt[None], max_new_tokens=8, do_sample=False, eos_token_id=-1)[0] for prompt in prompts]
    sparsify.compile(model, **strict(passes=["dense"]))
    for (cache, logits), prompt, tokens in zip(sparsify.pack(model, prompts, cache=KINDS[kind](model.config)), prompts, want, strict=True):
        whole = torch.cat([prompt, logits.argmax(-1)])[None]
        assert torch.equal(model.generate(whole, **holding(cache), max_new_tokens=7, do_sample=False, eos_token_id=-1)[0], tokens)


_SHARED: list = []


@pytest.mark.slow
@settings(max_examples=8, deadline=None)
@given(lengths=st.lists(st.integers(1, 20), min_size=1, max_size=5))
def test_any_lengths(lengths):
    if not _SHARED:
        _SHARED.append(made())
    model, prompts = _SHARED[0], prompts_of(lengths)
    model._compiled_call_impl = None
    want = [alone(model, prompt, DynamicCache(config=model.config), 0)[0] for prompt in prompts]
    sparsify.compile(model, **strict(passes=["dense"]))
    for packed, logits in zip(sparsify.pack(model, [prompt.tolist() for prompt in prompts]), want, strict=True):
        torch.testing.assert_close(packed.logits, logits, **CLOSE)


def test_what_is_refused():
    model, prompts = made(), prompts_of((4, 7))
    with pytest.raises(UnsupportedError, match="not compiled"):
        sparsify.pack(model, prompts)
    sparsify.compile(model, **strict(passes=["dense"]))
    assert sparsify.pack(model, []) == []
    with pytest.raises(UnsupportedError, match="prompt 1 has no tokens"):
        sparsify.pack(model, [[3], []])
    for prompt, said in (
        (torch.ones(3), "torch.float32"),
        ([True, False], "torch.bool"),
        (torch.ones(2, 5, dtype=torch.int64), r"\(2, 5\)"),
    ):
        with pytest.raises(UnsupportedError, match=f"prompt 1 is {said}"):
            sparsify.pack(model, [[3], prompt])
    with pytest.raises(UnsupportedError, match="DynamicCache"):
        sparsify.pack(model, prompts, cache=DynamicCache())
    with pytest.raises(CacheError, match="share"):
        sparsify.pack(model, prompts, cache=SparseCache(model.config, "snapkv", 0.5, window=4))
    used = SparseCache(model.config, "full", 64)
    with torch.no_grad():
        model(prompts[0][None], **holding(used))
    with pytest.raises(CacheError, match="holds tokens"):
        sparsify.pack(model, prompts, cache=used)
    with pytest.raises(UnsupportedError, match="turns sinks"):
        sparsify.pack(model, prompts, cache=SparseCache(model.config, "streaming_llm", 16, sinks=2, positions="in_cache"))
    whole = made("bloom")
    sparsify.compile(whole, **strict(passes=["dense"]))
    with pytest.raises(UnsupportedError, match="captured whole"):
        sparsify.pack(whole, prompts)
