"""Keys and values in pinned memory on a real GPU: the same logits, and no more than two layers' worth of memory."""

from __future__ import annotations

import pytest
import torch

import sparsify
from sparsify import SparseCache
from tests.generation.caches.test_offloading import CACHES, go_on, make, spoil
from tests.support.cache_reference import text
from tests.support.harness import holding
from tests.support.tiny_models import build

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("how", ["uncompiled", "compiled"])
@pytest.mark.parametrize("name", CACHES)
def test_logits(name, how):
    if how == "compiled" and name in ("a share", "pyramidkv"):
        pytest.skip("layers with budgets of their own are captured as one graph")
    model, plain = build("llama", layers=5).cuda(), build("llama", layers=5).cuda()
    ids = text(2, 60).cuda()
    want = go_on(plain, make(plain, name), ids)
    if how == "compiled":
        torch._dynamo.reset()
        sparsify.compile(model, progress=False)
    cache = make(model, name, offloading=True)
    for between in (lambda cache: None, lambda cache: (torch.cuda.synchronize(), spoil(cache))):
        cache.reset()
        torch.testing.assert_close(go_on(model, cache, ids, between=between), want, rtol=1e-3, atol=1e-3)
    assert all(layer.rest.tensors["keys"].is_pinned() for layer in cache.layers)


def test_memory():
    model = build("llama", layers=8).cuda()
    size = 2 * 2 * 16 * 65536 * 4  # of one layer's keys and values in fp32: both, heads, head dim, slots
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    cache = SparseCache(model.config, "full", 65536, batch_size=1, device="cuda", dtype=torch.float32, offloading=True)
    go_on(model, cache, text(1, 60).cuda())
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() - before < 3 * size and cache.host_bytes() == 8 * size


def test_generate():
    model = build("llama", layers=5).cuda()
    torch._dynamo.reset()
    sparsify.compile(model, progress=False)
    options = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    found = [
        model.generate(text(1, 30).cuda(), **options, **holding(SparseCache(model.config, "full", 64, offloading=kept)))
        for kept in (False, True)
    ]
    assert torch.equal(*found)
