"""What methods between layers are asked at every call costs no prediction that nobody reads, and none twice that decides."""

from __future__ import annotations

import dataclasses
import time
from collections import Counter

import pytest
import torch

import sparsify
from sparsify import SparseCache, api, pipeline
from sparsify.costs.sizes import AttentionSizes
from sparsify.matching.padded import PaddedSite
from sparsify.matching.stream import StreamSite
from sparsify.matching.token import TokenSite
from sparsify.passes.divprune import DivPrune
from sparsify.passes.fastv import FastV
from sparsify.passes.skip_layers import SkipLayers
from sparsify.passes.token_select import TokenSelect
from sparsify.passes.unpad import Unpad
from sparsify.planning.config.config import Config
from sparsify.planning.method import Proposal
from tests.support.harness import holding, strict
from tests.support.tiny_models import VOCAB, build

LENGTH = 60
IDS = torch.randint(3, VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(0))
CPU = torch.device("cpu")
MATRICES = (((64, 64), (64, 128), (128, 64)),) * 8

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


@pytest.fixture
def predicted(monkeypatch) -> Counter:
    """How often each prediction of a site was asked."""
    asked = Counter()
    for site, names in {
        StreamSite: ("choosing_seconds", "later_seconds"),
        TokenSite: ("layer_seconds",),
        PaddedSite: ("layer_seconds", "packing_seconds"),
    }.items():
        for name in names:
            before = getattr(site, name)

            def counting(self, *given, before=before, key=f"{site.__name__}.{name}"):
                asked[key] += 1
                return before(self, *given)

            monkeypatch.setattr(site, name, counting)
    return asked


def told(plans, kind):
    return [d for plan in plans for d in plan.decisions if d.kind == kind]


@torch.no_grad()
def test_tokens_that_go_on(predicted):
    model = build("llama", layers=3)
    select = {"layer": 0, "heads": "all", "keep": 24, "queries": 4, "window": 8, "sinks": 2, "kernel": 3}
    sparsify.compile(model, **strict(passes=["token_select", "dense"], token_select=select))
    want = model(IDS, use_cache=False).logits[:, -1]
    assert not predicted
    with api.collect_plans() as plans:  # who looks later is told all the same
        assert torch.equal(model(IDS, use_cache=False).logits[:, -1], want) and want.isfinite().all()
    (decision,) = told(plans, "stream")
    assert decision.method == "token_select" and decision.seconds > 0 and decision.dense_seconds > 0
    assert predicted == {"StreamSite.choosing_seconds": 1, "StreamSite.later_seconds": 2}
    with api.collect_plans() as plans:
        model(IDS, use_cache=False)
    assert not told(plans, "stream"), "once for each number of tokens"


@torch.no_grad()
def test_layers_that_tokens_bypass(predicted):
    model = build("llama", layers=4)
    sparsify.compile(model, passes=["skip_layers", "dense", "kv_evict"], skip_layers={"most": 0.5, "warmup": 1, "length": 2}, lower="eager")

    def generated():
        cache = SparseCache(model.config, "full", 2 * LENGTH)
        return model.generate(IDS, max_new_tokens=6, do_sample=False, **holding(cache))

    want = generated()
    assert not predicted
    with api.collect_plans() as plans:
        assert torch.equal(generated(), want)
    (decision,) = told(plans, "token")
    assert decision.method == "skip_layers" and 0 < decision.seconds < decision.dense_seconds
    assert predicted["TokenSite.layer_seconds"] > 0


@torch.no_grad()
def test_padded_batches_are_predicted_once_for_each_shape(predicted):
    model = build("llama", layers=2)
    sparsify.compile(model, **strict(passes=["unpad", "dense"], unpad={"least": 0.0}))

    def call(columns):
        mask = torch.ones(2, columns, dtype=torch.int64)
        mask[0, : columns // 2] = 0
        return model(IDS[:, :columns] * mask, attention_mask=mask, use_cache=False).logits

    want = call(40)
    first = predicted.copy()
    assert first["PaddedSite.packing_seconds"] == 1
    assert torch.equal(call(40), want) and predicted == first
    call(50)
    assert predicted["PaddedSite.packing_seconds"] == 2


ASKED = {
    "token_select": (TokenSelect(layer=1, heads="all", keep=128), lambda n: stream(n)),
    "fastv": (FastV(keep=0.5), lambda n: stream(n, rows=((n, n // 2),))),
    "divprune": (DivPrune(keep=0.5), lambda n: stream(n, rows=((n, n // 2),))),
    "skip_layers": (
        SkipLayers(most=0.5),
        lambda n: TokenSite("model.layers", AttentionSizes(1, 4, 2, 1, n, 16, 16, torch.float32), MATRICES),
    ),
}


def stream(tokens, **more):
    sizes = AttentionSizes(1, 4, 2, tokens, tokens, 16, 16, torch.float32)
    return StreamSite("model.layers.1", 1, 8, 1, tokens, tokens, sizes, 64, MATRICES[2:], **more)


@pytest.mark.parametrize("name", ASKED)
def test_the_answer_is_the_same_without_its_cost(name):
    method, site = ASKED[name]
    with api.collect_plans():
        whole = pipeline.context_of_call(CPU, Config())
    quick = pipeline.context_of_call(CPU, Config())
    assert whole.costs and not quick.costs
    for length in (300, 1000):
        full, bare = (method.propose(site(length), context) for context in (whole, quick))
        assert isinstance(full, Proposal) and isinstance(bare, Proposal)
        assert (full.note, full.method) == (bare.note, bare.method) and float(full.seconds) > 0 == float(bare.seconds)


def test_asking_without_costs_takes_a_small_part_of_the_time():
    """As a ratio, of processor time and the least of several rounds: for lengths that were never asked for."""
    method, site = ASKED["skip_layers"]
    lengths = iter(range(1000, 10**6))

    def seconds(costs: bool, count: int = 20) -> float:
        context = dataclasses.replace(pipeline.context_of_call(CPU, Config()), costs=costs)
        begin = time.process_time()
        for _ in range(count):
            method.propose(site(next(lengths)), context)
        return time.process_time() - begin

    assert min(seconds(True) for _ in range(3)) > 10 * min(seconds(False) for _ in range(3))


def test_unpad_is_decided_by_costs_whoever_looks():
    """What decides is predicted always."""
    quick = pipeline.context_of_call(CPU, Config())
    site = PaddedSite("model.layers", 8, 4, 400, 500, 2, 400, AttentionSizes(4, 4, 2, 400, 400, 16, 16, torch.float32), 64, (), False)
    assert isinstance(Unpad(least=0.0).propose(site, quick), Proposal) and Unpad(least=0.0).propose(site, quick).seconds > 0
