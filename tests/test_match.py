"""Every attention of every family is found, described, and its description reproduces what the graph computes."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache, StaticCache

from tests.soundness import Capture
from tests.tiny_models import CORE_FAMILIES, EAGER_ONLY, FAMILIES, VOCAB, build

LENGTH = 12
WINDOWED = {"mistral_window", "gemma3", "gemma2", "gpt_oss"}


def prompt(batch: int = 2, length: int = LENGTH) -> torch.Tensor:
    return torch.randint(3, VOCAB, (batch, length), generator=torch.Generator().manual_seed(0))


def padding(side: str, length: int = LENGTH) -> torch.Tensor:
    mask = torch.ones(2, length, dtype=torch.long)
    mask[0, slice(0, 3) if side == "left" else slice(length - 3, length)] = 0
    return mask


def prefill(model, capture, dynamic, **inputs):
    torch.compile(model, backend=capture, dynamic=dynamic, fullgraph=True)(prompt(), **inputs)


def phases():
    """name -> function(model, capture, dynamic)."""

    def plain(model, capture, dynamic):
        prefill(model, capture, dynamic, use_cache=False)

    def cached(model, capture, dynamic):
        prefill(model, capture, dynamic)

    def left(model, capture, dynamic):
        prefill(model, capture, dynamic, attention_mask=padding("left"))

    def right(model, capture, dynamic):
        prefill(model, capture, dynamic, attention_mask=padding("right"), use_cache=False)

    def packed(model, capture, dynamic):
        positions = torch.cat([torch.arange(5), torch.arange(LENGTH - 5)])[None].repeat(2, 1)
        prefill(model, capture, dynamic, position_ids=positions, use_cache=False)

    def continued(model, capture, dynamic, tokens, mask):
        cache = DynamicCache(config=model.config)
        model(prompt(), past_key_values=cache)
        mask = torch.cat([mask, mask.new_ones(2, tokens)], 1) if mask is not None else None
        compiled = torch.compile(model, backend=capture, dynamic=dynamic, fullgraph=True)
        compiled(prompt(2, tokens), past_key_values=cache, attention_mask=mask)

    def static(model, capture, dynamic, mask):
        cache = StaticCache(config=model.config, max_cache_len=32)
        compiled = torch.compile(model, backend=capture, dynamic=dynamic, fullgraph=True)
        tokens = prompt()
        for _ in range(3):
            compiled(tokens, past_key_values=cache, attention_mask=mask)
            tokens = tokens[:, -1:]
            mask = torch.cat([mask, mask.new_ones(2, 1)], 1) if mask is not None else None

    def generate(model, capture, dynamic, cache):
        model.compile(backend=capture, dynamic=dynamic)
        model.generate(prompt(), attention_mask=padding("left"), max_new_tokens=4, do_sample=False, cache_implementation=cache)

    return {
        "prefill": plain,
        "prefill_cached": cached,
        "left_padded": left,
        "right_padded": right,
        "packed": packed,
        "chunk": lambda *a: continued(*a, 5, None),
        "chunk_padded": lambda *a: continued(*a, 5, padding("left")),
        "decode": lambda *a: continued(*a, 1, None),
        "decode_padded": lambda *a: continued(*a, 1, padding("left")),
        "static_cache": lambda *a: static(*a, None),
        "static_cache_padded": lambda *a: static(*a, padding("left")),
        "generate": lambda *a: generate(*a, None),
        "generate_static": lambda *a: generate(*a, "static"),
    }


PHASES = phases()
ALWAYS_PROVED = [p for p in PHASES if p != "generate_static"]


def run(family: str, phase: str, attention: str = "sdpa", dynamic: bool | None = None, layers: int = 2) -> Capture:
    torch._dynamo.reset()
    capture = Capture()
    with torch.no_grad():
        PHASES[phase](build(family, attention, layers), capture, dynamic)
    assert len(capture.flat) == layers * len(capture.sites), "one site per layer and graph"
    return capture


@pytest.mark.parametrize("phase", ALWAYS_PROVED)
@pytest.mark.parametrize("family", CORE_FAMILIES)
def test_core_families_are_proved(family, phase):
    capture = run(family, phase)
    assert not [s.near_miss or s.mask.reason for s in capture.flat if s.near_miss or s.mask.opaque]
    assert len(capture.checked) >= len(capture.flat)


@pytest.mark.parametrize("phase", ALWAYS_PROVED)
@pytest.mark.parametrize("family", ["llama", "mistral_window", "gemma3"])
def test_symbolic_sizes(family, phase):
    capture = run(family, phase, dynamic=True)
    assert not [s.near_miss or s.mask.reason for s in capture.flat if s.near_miss or s.mask.opaque]
    assert len(capture.checked) >= len(capture.flat)


def test_static_cache_under_generate_hands_over_an_opaque_mask():
    capture = run("llama", "generate_static")
    assert len(capture.sites) == 2
    assert set(capture.masks) == {"opaque: the mask is an input of the graph"}


BREADTH = [f for f in FAMILIES if f not in CORE_FAMILIES and f not in EAGER_ONLY]


@pytest.mark.parametrize("phase", ["prefill", "left_padded", "chunk", "static_cache"])
@pytest.mark.parametrize("family", BREADTH)
def test_other_families(family, phase):
    capture = run(family, phase, layers=1)
    opaque = {s.near_miss or s.mask.reason for s in capture.flat if s.near_miss or s.mask.opaque}
    if family == "falcon_alibi":
        assert len(capture.checked) == 0 and opaque
    else:
        assert not opaque and len(capture.checked) >= len(capture.flat)
