"""Decoders of transformers whose attention is written in older words: all of it is rewritten, keeping all and dropping a lot."""

from __future__ import annotations

import pytest
import torch
import transformers

from tests.models.matrix_reference import sink_window_run
from tests.support.harness import KEEP_ALL, run, strict, visible_error
from tests.support.tiny_models import VOCAB, build_class

LENGTH, FP32 = 40, 2e-5
WINDOW = {"sinks": 3, "window": 5}
# class: what its attention is written in that others' is not
OLDER = {
    "XGLMForCausalLM": "products of merged heads, the mask added to separate ones, the larger of scores and the lowest number",
    "GraniteSWAForCausalLM": "a sink that scales the output",
    "WhisperForCausalLM": "positions by repeat",
}
OVERRIDES = {"GraniteSWAForCausalLM": {"num_hidden_layers": 1, "layer_types": ["full_attention"]}}


@pytest.mark.parametrize("name", OLDER)
@pytest.mark.parametrize("padded", [pytest.param(False, marks=pytest.mark.slow), True])
@pytest.mark.samples(1)
def test_older_words_are_read(name, padded):
    if not hasattr(transformers, name):
        pytest.skip("this transformers has no such model")
    attention = "eager" if name != "WhisperForCausalLM" else None
    model = build_class(getattr(transformers, name), attention, layers=1, overrides=OVERRIDES.get(name, {}))
    ids = torch.randint(3, VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    mask[0, : 7 * padded] = 0
    call = lambda m: m(input_ids=ids * mask, use_cache=False, **({"attention_mask": mask} if padded else {})).logits
    with torch.no_grad():
        want = call(model)
    words = "causal, padding" if padded else "causal"
    for method, settings, target in (
        ("dense", {}, want),
        ("sink_window", KEEP_ALL["sink_window"], want),
        ("sink_window", WINDOW, sink_window_run(model, call, **WINDOW)),
    ):
        got = run(model, call, strict(passes=[method], **({method: settings} if settings else {})))
        assert [(d.method, d.mask) for plan in got.plans for d in plan.decisions if d.kind == "attention"] == [(method, words)]
        assert visible_error(got.value, target, mask) < FP32
    assert visible_error(got.value, want, mask) > 50 * FP32
