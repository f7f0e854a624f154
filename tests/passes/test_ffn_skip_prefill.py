"""Rows of a prompt that skip feed-forward blocks: only when asked for, only where the cost says that it pays, and then the right ones."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from transformers import DynamicCache

from sparsify.costs import compaction
from sparsify.costs.device import Device
from sparsify.costs.sizes import FeedForwardSizes
from sparsify.matching.feed_forward import find_feed_forward
from sparsify.matching.sites import FeedForwardSite
from sparsify.ops import feed_forward as ffn_ops
from sparsify.passes.ffn_skip import FfnSkip
from sparsify.planning.method import Context, Proposal, Refusal
from tests.matching.test_feed_forward import Block
from tests.passes.test_ffn_skip import FP32, prompt, without
from tests.support.harness import holding, run, strict, visible_error
from tests.support.tiny_models import build

H200 = Device("cuda", "H200", (9, 0), 680e12, 4.3e12, 8e-6)
BLOCK = FeedForwardSizes(hidden=4096, intermediate=14336, matrices=3, dtype=torch.bfloat16)  # of an 8B model


def options(**changes) -> dict:
    return strict(passes=["ffn_skip"], ffn_skip={"cold_first": 0, "cold_last": 0, "warmup": 0, "prefill": True, **changes})


@pytest.fixture(autouse=True)
def fresh_runs():
    ffn_ops.forget_runs()


def prefill_and_a_token(ids: torch.Tensor):
    def call(model):
        cache = DynamicCache(config=model.config)
        return torch.cat([model(input_ids=part, **holding(cache)).logits for part in ids.split([ids.shape[1] - 1, 1], 1)], 1)

    return call


def prefill(ids: torch.Tensor):
    return lambda model: model(input_ids=ids, use_cache=False).logits


def left_out_of_prompts(model, call, layers):
    """The model's logits with some layers' blocks giving 0 for every row."""
    handles = [model.model.layers[i].mlp.register_forward_hook(lambda m, inputs, out: torch.zeros_like(out)) for i in layers]
    try:
        with torch.no_grad():
            return call(model)
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.slow
def test_threshold_minus_one_leaves_out_every_second_block_of_a_prompt():
    """The warm-up counts generated tokens: the prompt skips from its first row on, the token after it not yet."""
    model = build("llama", layers=4)
    call = prefill_and_a_token(prompt(2, 12))
    got = run(model, call, options(threshold=-1.0, skip=1, warmup=5))
    assert got.rewritten("ffn_skip") == 4 * got.graphs
    want = left_out_of_prompts(model, call, (1, 3))
    assert visible_error(got.value[:, :-1], want[:, :-1]) < FP32
    with torch.no_grad():
        assert visible_error(call(model)[:, :-1], want[:, :-1]) > 1e-3
    assert visible_error(got.value[:, -1:], want[:, -1:]) > 1e-3


def test_a_threshold_above_one_is_dense():
    model = build("llama", layers=3)
    call = prefill(prompt(2, 9))
    with torch.no_grad():
        want = call(model)
    got = run(model, call, options(threshold=1.5))
    assert got.rewritten("ffn_skip") == 3 and torch.equal(got.value, want)


def test_static_layers_are_left_out_of_prompts_too():
    model = build("llama", layers=3)
    call = prefill(prompt(2, 9))
    want = left_out_of_prompts(model, call, (1,))
    rule = {"layers": "1", "method": "ffn_skip", "policy": "static", "warmup": 0, "prefill": True}
    assert visible_error(run(model, call, strict(passes=[], rules=[rule])).value, want) < FP32


def test_prompts_stay_dense_by_default_and_under_a_schedule():
    model = build("llama", layers=3)
    call = prefill_and_a_token(prompt(1, 9))
    with torch.no_grad(), without(model, lambda layer, step: layer == 1):
        want = call(model)
    got = run(model, call, options(prefill=False, threshold=-1.0))
    assert visible_error(got.value, want) < FP32
    scheduled = run(model, call, options(policy="schedule", most=0.5, length=0))
    assert any("a schedule counts generated tokens" in r for r in scheduled.refusals())


# -- the cost ----------------------------------------------------------------------------------------------------------------------------


def answer(rows: int, *, device: Device = H200, kernels: str = "triton", forced: int | None = None, **changes) -> Proposal | Refusal:
    """What the method says to a block of an 8B model over a prompt of `rows` rows."""
    graph = torch.fx.Graph()
    output = graph.placeholder("output")
    output.meta["example_value"] = torch.empty(1, rows, 4096, device="meta")
    site = FeedForwardSite(
        "model.layers.9.mlp", 9, 9, 32, output, residuals=(output,), layout="split", rows=rows, query_len=rows, hidden=4096,
        intermediate=14336, dtype=torch.bfloat16,
    )  # fmt: skip
    site = dataclasses.replace(site, **{k: changes.pop(k) for k in ("dtype", "layout") if k in changes})
    return FfnSkip(prefill=True, **changes).propose(site, Context(device, kernels, forced))


def test_the_cost_takes_long_prompts_and_refuses_what_does_not_pay():
    made = answer(16384, prefill_share=0.25)
    assert isinstance(made, Proposal) and "of prompts too" in made.note
    dense = compaction.dense_seconds(16384, BLOCK, H200)
    assert 0.5 * dense < made.seconds < dense
    for rows, share, words in [(16384, 0.0, "saves no time"), (16, 0.25, "fewer than")]:
        refused = answer(rows, prefill_share=share)
        assert isinstance(refused, Refusal) and words in refused.reason, refused
        assert isinstance(answer(rows, prefill_share=share, forced=0), Proposal)


def test_a_refused_prompt_still_ends_the_run_before_it():
    """The first block that may skip keeps its sum, over a copy; the others are left alone."""
    marks = answer(16384, prefill_share=0.0, cold_first=9)
    assert isinstance(marks, Proposal) and "saves no time" in marks.note and "counted from its end" in marks.note
    assert not marks.method.prefill and marks.seconds == compaction.dense_seconds(16384, BLOCK, H200)
    assert isinstance(answer(16384, prefill_share=0.0, cold_first=9, warmup=0), Refusal)
    assert isinstance(answer(16384, prefill_share=0.0, cold_first=9, cold_last=23), Refusal)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"device": dataclasses.replace(H200, capability=(8, 0))}, "compute capability 9.0"),
        ({"device": dataclasses.replace(H200, type="cpu", capability=None)}, "compute capability 9.0"),
        ({"dtype": torch.float32}, "half precision"),
        ({"kernels": "reference"}, "saves nothing"),
    ],
)
def test_what_no_kernel_serves_is_refused(changes, words):
    refused = answer(16384, **changes)
    assert isinstance(refused, Refusal) and words in refused.reason


def test_break_even_is_where_the_cost_changes_its_mind(monkeypatch):
    for efficiency in (0.6, 0.8, 0.95):
        monkeypatch.setattr(compaction, "COMPACTED", efficiency)
        even = compaction.break_even(BLOCK, H200)
        assert 0 <= even < 1
        for share, pays in ((even + 0.02, True), (even - 0.02, False)):
            if 0 < share < 1:
                compacted = compaction.compacted_seconds(1 << 18, BLOCK, H200, share)
                assert (compacted < compaction.dense_seconds(1 << 18, BLOCK, H200)) == pays
                assert (compaction.rows_from(BLOCK, H200, share) is not None) == pays
    # a slower kernel asks for more skipping
    monkeypatch.setattr(compaction, "COMPACTED", 0.5)
    assert compaction.break_even(BLOCK, H200) > 0.4


def test_prompts_of_any_length_get_a_graph_on_each_side_of_where_it_pays(monkeypatch):
    monkeypatch.setattr(compaction, "rows_from", lambda block, device, share: 64)
    answers = []

    def backend(gm, example_inputs):
        (site,) = find_feed_forward(gm)
        method = FfnSkip(prefill=True, cold_first=0, cold_last=0, warmup=0)
        answers.append(method.propose(site, Context(H200, "triton")))
        return gm.forward

    torch._dynamo.reset()
    block = torch.compile(Block().bfloat16(), backend=backend, dynamic=True)
    with torch.no_grad():
        for rows in (7, 30, 100, 200, 9, 64):
            block(torch.randn(2, rows, 8, dtype=torch.bfloat16))
    torch._dynamo.reset()
    assert [isinstance(a, Proposal) for a in answers] == [False, True]  # 2 x 30 is too few, 2 x 64 is not
    assert answers[1].seconds.free_symbols


def test_more_rows_only_help():
    first = compaction.rows_from(BLOCK, H200, 0.25)
    gain = lambda n: compaction.dense_seconds(n, BLOCK, H200) - compaction.compacted_seconds(n, BLOCK, H200, 0.25)
    gains = [gain(n) for n in (first, 4 * first, 64 * first)]
    assert 0 < gains[0] < gains[1] < gains[2]
    assert compaction.rows_from(BLOCK, H200, 0.5) <= first
