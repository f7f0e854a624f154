"""locret on a real GPU: what it keeps against the definition, and a compiled model against an uncompiled one."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import sparsify
from sparsify import SparseCache
from tests.policies.test_locret import RECENT, through
from tests.support import retaining_heads
from tests.support.harness import holding
from tests.support.tiny_models import VOCAB, build

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

BUDGET, EVERY = 200, 64


@pytest.fixture(scope="module")
def heads(tmp_path_factory):
    return retaining_heads.write(tmp_path_factory.mktemp("heads") / "heads.safetensors", build("llama", layers=2).config)


def make(model, heads):
    return SparseCache(model.config, "locret", BUDGET, every=EVERY, heads=str(heads), recent=RECENT)


@pytest.mark.parametrize("dtype, close, alike", [(torch.float32, 1e-4, 0.98), (torch.bfloat16, 0.1, 0.9)], ids=str)
@pytest.mark.parametrize("cuts", [[1500], [700, 1, 1, 1, 797]], ids=str)
def test_what_stays_has_the_best_scores_of_projections_before_rotation(heads, dtype, close, alike, cuts):
    """In 16 bits queries and keys are rounded once more when they are rotated."""
    torch.manual_seed(0)
    model = build("llama", layers=2).to("cuda", dtype)
    ids, weights, cache, seen = torch.randint(3, VOCAB, (1, 1500), device="cuda"), load_file(heads), make(model, heads), {}
    through(model, cache, ids, cuts, seen=seen)
    cache.end_turn()
    for number, layer in enumerate(cache.layers):
        states = torch.cat([torch.cat(seen[number, name], 1) for name in ("q_proj", "k_proj", "v_proj")], -1)[0].float()
        w1, w2 = (weights[f"layers.{number}.{name}"].cuda() for name in ("w1", "w2"))
        scores = F.silu(states @ w1.T) @ w2.T
        assert layer.counts.tolist() == [[BUDGET] * 2]
        for head in range(2):
            at = layer.positions[0, head, :BUDGET].long()
            assert at[-RECENT:].tolist() == list(range(1500 - RECENT, 1500))
            off = (layer.carried[0, head, :BUDGET] - scores[at, head]).square().mean().sqrt()
            assert float(off) < close * float(scores[:, head].std())
            if len(cuts) == 1:  # otherwise each selection chooses of what the one before has left
                best = scores[:-RECENT, head].topk(BUDGET - RECENT).indices
                assert int(torch.isin(best, at).sum()) >= alike * len(best)


@torch.no_grad()
def test_a_compiled_model_keeps_what_an_uncompiled_one_keeps(heads):
    """But for tokens of about equal scores, which other kernels round otherwise."""
    torch.manual_seed(0)
    model, ids = build("llama", layers=2).cuda(), torch.randint(3, VOCAB, (2, 900), device="cuda")
    how = {"max_new_tokens": 150, "do_sample": False}
    eager, compiled = make(model, heads), make(model, heads)
    want = model.generate(ids, **holding(eager), **how)
    sparsify.compile(model, strict=True, progress=False)
    got = model.generate(ids, **holding(compiled), **how)
    assert torch.equal(got, want)
    for one, other in zip(eager.layers, compiled.layers, strict=True):
        assert torch.equal(one.counts, other.counts)
        for mine, theirs in zip(one.positions.flatten(0, 1), other.positions.flatten(0, 1), strict=True):
            mine, theirs = mine[mine >= 0], theirs[theirs >= 0]
            assert int(torch.isin(mine, theirs).sum()) >= 0.97 * len(mine)
