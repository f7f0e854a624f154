"""Self-speculation on a real GPU: drafts and verifications are CUDA graphs, and greedy tokens are those without drafts."""

from __future__ import annotations

import warnings

import pytest
import torch

import sparsify
from sparsify import Pages, SparseCache
from sparsify.generation import generate
from sparsify.generation.decoding.runner import CudaGraphs
from tests.support.cache_reference import left_padded, text
from tests.support.harness import holding
from tests.support.tiny_models import build

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
FEW = Pages(size=8, count=1, sinks=1, recent=4)
PLAIN = {"input_ids": text(1, 60)}
PADDED = {"input_ids": text(3, 60), "attention_mask": left_padded([60, 41, 50])}


def run(model, cache, **arguments):
    given = {"max_new_tokens": 40, "do_sample": False, "pad_token_id": 0, "eos_token_id": None, **arguments}
    torch.manual_seed(0)
    on_device = {name: value.cuda() if isinstance(value, torch.Tensor) else value for name, value in given.items()}
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="sparsify decodes without")
        return model.generate(**on_device, **holding(cache))


@pytest.mark.parametrize("how", ["loop", "compiled"])
@pytest.mark.parametrize("tokens", [None, 1, 4])
@pytest.mark.parametrize("call", [PLAIN, PADDED, {**PLAIN, "repetition_penalty": 1.4}], ids=["plain", "padded", "penalty"])
def test_greedy_tokens_and_graphs(monkeypatch, how, tokens, call):
    model = build("llama").cuda()
    if how == "compiled":
        torch._dynamo.reset()
        sparsify.compile(model, progress=False)
    else:
        assert generate.install(model, shown=False) == ""
    recorded, record = [], CudaGraphs.record
    monkeypatch.setattr(CudaGraphs, "record", lambda self, function: recorded.append(function) or record(self, function))
    want = run(model, SparseCache(model.config, "full", 128), **call)
    plain = len(recorded)
    cache = SparseCache(model.config, "full", 128, draft=FEW, draft_tokens=tokens)
    assert torch.equal(run(model, cache, **call), want)
    assert cache.drafted > 0 and len(recorded) > plain
    cache.reset()
    assert torch.equal(run(model, cache, **call), want), "replayed from the first draft on"


def test_seeds_and_all_pages():
    model = build("llama").cuda()
    assert generate.install(model, shown=False) == ""
    make = lambda: SparseCache(model.config, "full", 128, draft=Pages(size=8, share=1.0), draft_tokens=4)
    cache = make()
    first = run(model, cache, **PLAIN, do_sample=True)
    assert cache.drafts_kept >= 0.9 * cache.drafted
    assert torch.equal(run(model, make(), **PLAIN, do_sample=True), first)
