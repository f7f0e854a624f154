"""Translation validation: what holds agrees at any size, and a wrong claim about any clause is found by running it."""

from __future__ import annotations

import dataclasses
import functools
import operator
import random

import pytest
import sympy
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed
from torch.utils._sympy.numbers import int_oo
from torch.utils._sympy.value_ranges import ValueRanges

from sparsify import api
from sparsify.backends import dispatch
from sparsify.masks.predicate import Leaf, QueryStart
from sparsify.matching.attention import find_attention
from sparsify.matching.sites import AttentionSite, ScoreBias
from sparsify.ops.selection import observing
from sparsify.passes.dense import Dense
from sparsify.passes.sink_window import SinkWindow
from sparsify.passes.xattention import XAttention
from sparsify.rewriting import instances, validate
from sparsify.rewriting.validate import Validator
from tests.support.harness import strict

LOWEST = torch.finfo(torch.float32).min
DENSE = Dense(kernel="attention")


def positions(query, key):
    """Rows, as positions among the keys, and keys."""
    rows, keys = (torch.arange(x.shape[2], device=x.device) for x in (query, key))
    return rows[:, None] + key.shape[2] - query.shape[2], keys[None]


def repeated(x, query):
    batch, heads, length, dim = x.shape
    groups = query.shape[1] // heads
    return x[:, :, None].expand(batch, heads, groups, length, dim).reshape(batch, heads * groups, length, dim)


def windowed(query, key, value, keep, slopes, counter):
    rows, keys = positions(query, key)
    mask = (keys <= rows) & (keys > rows - WINDOW)
    return F.scaled_dot_product_attention(query, repeated(key, query), repeated(value, query), attn_mask=mask[None, None])


def padded(query, key, value, keep, slopes, counter):
    rows, keys = positions(query, key)
    mask = (keys <= rows)[None, None] & keep.bool()[:, None, None, : key.shape[2]]
    return F.scaled_dot_product_attention(query, repeated(key, query), repeated(value, query), attn_mask=mask)


def packed(query, key, value, keep, slopes, counter):
    rows, keys = positions(query, key)
    mask = (keys <= rows) & (keep[:, None, : key.shape[2]] == keep[:, key.shape[2] - query.shape[2] :, None])
    return F.scaled_dot_product_attention(query, repeated(key, query), repeated(value, query), attn_mask=mask[:, None])


def written_out(query, key, value, keep, slopes, counter):
    rows, keys = positions(query, key)
    scores = query @ repeated(key, query).transpose(-1, -2) * 0.25
    scores = torch.tanh(scores / 3.0) * 3.0
    return scores.masked_fill(keys > rows, LOWEST).softmax(-1) @ repeated(value, query)


def biased(query, key, value, keep, slopes, counter):
    rows, keys = positions(query, key)
    scores = query @ repeated(key, query).transpose(-1, -2) * 0.25 + slopes[:, None, None] * keys
    return (scores + torch.where(keys <= rows, 0.0, LOWEST)).softmax(-1) @ repeated(value, query)


def counted(query, key, value, keep, slopes, counter):
    """Rows begin where a counter stands, which moves before the attention runs."""
    rows = torch.arange(query.shape[2])[:, None] + counter
    mask = torch.arange(key.shape[2])[None] <= rows
    counter.add_(query.shape[2])
    return F.scaled_dot_product_attention(query, repeated(key, query), repeated(value, query), attn_mask=mask[None, None])


PROGRAMS = [windowed, padded, packed, written_out, biased, counted]
WINDOW = 5


def inputs(query_len=9, key_len=14, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 4, query_len, 16), (2, 2, key_len, 16), (2, 2, key_len, 16)]
    query, key, value = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    keep = torch.ones(2, key_len, dtype=torch.int64)
    keep[1, :3] = 0
    return query, key, value, keep, torch.tensor([0.5, 0.25, 0.125, 0.0625]), torch.tensor([5])


@functools.cache
def proved(program, dynamic):
    """`captured` of the usual inputs; nothing changes a graph that was captured."""
    return captured(program, dynamic)


def captured(program, dynamic, arguments=None):
    """The graph of a program and its only attention. dynamic: batch and lengths are symbolic."""
    graphs = []
    arguments = arguments or inputs()
    for tensor, dims in zip(arguments, ((0, 2), (0, 2), (0, 2), (0, 1)), strict=False) if dynamic else ():
        for dim in dims:
            torch._dynamo.mark_dynamic(tensor, dim)

    def backend(gm, example_inputs):
        graphs.append(gm)
        return gm.forward

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(program, backend=backend, dynamic=None if dynamic else False, fullgraph=True)(*arguments)
    (site,) = find_attention(graphs[0])
    return graphs[0], site


def verdict(gm, site, method=DENSE):
    return Validator(gm.graph).check(site, method)


@pytest.mark.parametrize("program, dynamic", [(p, d) for p in PROGRAMS for d in (True, False) if p is not packed or not d])
def test_what_was_proved_holds(program, dynamic):
    gm, site = proved(program, dynamic)
    assert not site.mask.opaque and not site.near_miss
    outcome = verdict(gm, site)
    assert outcome.verdict == "agrees", outcome
    assert outcome.instances >= 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("program", [padded, windowed])
def test_half_precision_agrees(program, dtype):
    assert verdict(*captured(program, True, inputs(dtype=dtype))).verdict == "agrees"


def mask(**changes):
    return lambda site: dataclasses.replace(site, mask=dataclasses.replace(site.mask, **changes))


def fields(**changes):
    return lambda site: dataclasses.replace(site, **changes)


def leaf(name, **changes):
    return lambda site: mask(**{name: dataclasses.replace(getattr(site.mask, name), **changes)})(site)


def later(site):
    start = site.mask.query_start
    return mask(query_start=QueryStart(start.leaf, sympy.Integer(1) + (start.constant or 0)))(site)


def swapped(site):
    return dataclasses.replace(site, key=site.value, value=site.key)


EVERYWHERE = {
    "not causal": mask(causal=False),
    "a window": mask(window=3),
    "scale": lambda site: dataclasses.replace(site, scale=site.scale * 1.5),
    "softcap": lambda site: dataclasses.replace(site, softcap=site.softcap + 1.0),
    "keys for values": swapped,
    "aligned top left": mask(query_start=QueryStart(constant=sympy.Integer(0))),
}
WRONG = [(program, name, change) for program in PROGRAMS for name, change in EVERYWHERE.items()] + [
    (windowed, "one token more", mask(window=WINDOW + 1)),
    (windowed, "one token less", mask(window=WINDOW - 1)),
    (windowed, "no window", mask(window=None)),
    (padded, "no padding", mask(padding=None)),
    (padded, "the other keys", leaf("padding", relation="eq")),
    (padded, "shifted padding", leaf("padding", shift=sympy.Integer(1))),
    (packed, "no documents", mask(documents=None)),
    (packed, "documents as padding", lambda site: mask(padding=Leaf(site.mask.documents.node), documents=None)(site)),
    (written_out, "no softcap", fields(softcap=0.0)),
    (written_out, "rows without a key", lambda site: later(dataclasses.replace(site, empty_rows="zero"))),
    (biased, "no slopes", fields(alibi_slopes=None)),
    (biased, "slopes as a sink", lambda site: dataclasses.replace(site, alibi_slopes=None, sink_logits=site.alibi_slopes)),
    (biased, "a bias per key", lambda site: dataclasses.replace(site, bias=(ScoreBias(site.alibi_slopes),), alibi_slopes=None)),
    (counted, "one row later", later),
]


@pytest.mark.parametrize("dynamic", [True, False], ids=["dynamic", "static"])
@pytest.mark.parametrize("program, name, change", WRONG, ids=[f"{p.__name__}-{n}" for p, n, _ in WRONG])
@pytest.mark.samples(50)
def test_a_wrong_claim_is_found(program, name, change, dynamic):
    gm, site = proved(program, dynamic and program is not packed)  # which is read at fixed sizes alone
    outcome = verdict(gm, change(site))
    # some claims name operands that the op would not take, which the rewriting finds first
    assert outcome.verdict == "differs" or "cannot be rewritten" in outcome.why, (outcome, site.mask)


def large(window):
    """Sizes and a window that the graph has fixed, as the first call of a model leaves them."""

    def program(query, key, value, keep, slopes, counter):
        rows, keys = positions(query, key)
        mask = (keys <= rows) & (keys > rows - window) & keep.bool()[:, None, None, :]
        return F.scaled_dot_product_attention(query, repeated(key, query), repeated(value, query), attn_mask=mask)

    return program


@pytest.mark.parametrize("lengths", [(4096, 4096), (1000, 1037), (4096, 32768)])
def test_large_fixed_sizes_are_made_small(lengths):
    query_len, key_len = lengths
    shapes = [(1, 4, query_len, 64), (1, 2, key_len, 64), (1, 2, key_len, 64)]
    # nothing of that size is made
    arguments = (*(torch.empty(s, device="meta") for s in shapes), torch.ones(1, key_len, dtype=torch.int64, device="meta"), None, None)
    gm, site = captured(large(500), False, arguments)
    assert site.mask.window == 500 and site.mask.padding is not None
    outcome = verdict(gm, site)
    assert outcome.verdict == "agrees" and outcome.instances >= 2, outcome
    for change in (mask(window=501), mask(window=499), mask(window=None), mask(padding=None), mask(causal=False)):
        assert verdict(gm, change(site)).verdict == "differs"


METHODS = {
    "xattention": XAttention(),
    "xattention, small blocks": XAttention(block=64, stride=4, density=0.1),
    "sink_window": SinkWindow(sinks=4, window=64),
    "dense": Dense(),
}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("length", [2000, 4096, 32768])
@pytest.mark.parametrize("keep", [True, False], ids=["padding", "none"])
@pytest.mark.samples(8)
def test_every_method_is_run_on_long_prompts_of_a_fixed_length(name, length, keep):
    """As the first call of a model has them: block lists are as long as the small instance makes them."""

    def prompt(query, key, value, keep):
        rows, keys = positions(query, key)
        mask = (keys <= rows)[None, None]
        mask = mask if keep is None else mask & keep.bool()[:, None, None, :]
        return F.scaled_dot_product_attention(query, repeated(key, query), repeated(value, query), attn_mask=mask)

    operands = [torch.empty(1, heads, length, 64, device="meta") for heads in (4, 2, 2)]
    gm, site = captured(prompt, False, (*operands, torch.ones(1, length, dtype=torch.int64, device="meta") if keep else None))
    outcome = verdict(gm, site, METHODS[name])
    assert outcome.verdict == "agrees" and outcome.instances >= 2, outcome
    assert verdict(gm, mask(causal=False)(site), METHODS[name]).verdict != "agrees"


# -- within a compilation --------------------------------------------------------------------------------------------------------------


class Two(nn.Module):
    def forward(self, query, key, value, keep, slopes, counter):
        return windowed(query, key, value, keep, slopes, counter), padded(query, key, value, keep, slopes, counter)


def wrong_windows(monkeypatch):
    """A proof that is wrong about windows alone."""
    from sparsify.masks import prove

    right = prove._Proof.classify

    def wrong(self, condition):
        found = right(self, condition)
        return dataclasses.replace(found, window=found.window + 1) if found.window else found

    monkeypatch.setattr(prove._Proof, "classify", wrong)


def test_a_wrong_proof_costs_its_site_alone(monkeypatch):
    wrong_windows(monkeypatch)
    arguments = inputs()
    torch._dynamo.reset()
    options = {"passes": ["dense"], "lower": "eager", "dense": {"kernel": "attention"}}
    with torch.no_grad(), api.collect_plans() as plans:
        got = torch.compile(Two(), backend="sparsify", options=options)(*arguments)
    assert [d.method for d in plans[0].decisions] == [None, "dense"]
    refused, kept = plans[0].decisions
    assert "does not hold when it is run: element [0, 0," in refused.refusals[-1] and "agree" in kept.validation
    torch.testing.assert_close(got, Two()(*arguments))


def test_a_wrong_proof_is_an_error_under_strict(monkeypatch):
    wrong_windows(monkeypatch)
    torch._dynamo.reset()
    with torch.no_grad(), pytest.raises(BackendCompilerFailed, match=r"VerifyError: .*does not hold when it is run"):
        torch.compile(Two(), backend="sparsify", options=strict(passes=["dense"]))(*inputs())


def test_validation_can_be_left_out(monkeypatch):
    monkeypatch.setattr(validate.Validator, "check", lambda *unused: pytest.fail("validated"))
    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(Two(), backend="sparsify", options=strict(passes=["dense"], validation=False))(*inputs())


def test_nothing_of_an_instance_reaches_the_caller():
    """No observer sees its selections, and the random state stays."""
    seen = []
    torch._dynamo.reset()
    state = torch.get_rng_state()
    options = strict(passes=["xattention"], xattention={"threshold": 0.9, "block": 64})
    with torch.no_grad(), observing(lambda *call: seen.append(call)):
        torch.compile(Two(), backend="sparsify", options=options)(*inputs())
    assert len(seen) == 2  # the call's own
    assert torch.equal(state, torch.get_rng_state())


def test_the_process_choice_of_kernels_does_not_serve_instances():
    """Triton cannot serve the CPU: were it asked, no claim would hold."""
    before = dispatch._kernels
    dispatch.use("triton")
    try:
        torch._dynamo.reset()
        options = {"passes": ["dense"], "lower": "eager", "strict": True, "kernels": "reference", "dense": {"kernel": "attention"}}
        with torch.no_grad(), api.collect_plans() as plans:
            torch.compile(Two(), backend="sparsify", options=options)(*inputs())
    finally:
        dispatch.use(before)
    assert len(plans[0].rewritten) == 2


def test_one_site_stands_for_all_of_its_kind(monkeypatch):
    runs = []
    run = validate.Validator._run
    monkeypatch.setattr(validate.Validator, "_run", lambda *call: runs.append(call) or run(*call))

    def layers(query, key, value, keep, slopes, counter):
        for _ in range(5):
            query = padded(query, key, value, keep, slopes, counter)
        return windowed(query, key, value, keep, slopes, counter)

    torch._dynamo.reset()
    with torch.no_grad(), api.collect_plans() as plans:
        torch.compile(layers, backend="sparsify", options=strict(passes=["dense"]))(*inputs())
    assert len(plans[0].rewritten) == 6
    assert len(runs) == 2


def test_writes_are_run_in_the_graphs_order():
    """A site whose operand changes after the attention read it, were it matched, would be found."""

    def program(query, key, value, keep, slopes, counter):
        scores = query @ repeated(key, query).transpose(-1, -2)
        query.zero_()
        return scores.softmax(-1) @ repeated(value, query)

    graphs = []
    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(program, backend=lambda gm, _: graphs.append(gm) or gm.forward, fullgraph=True)(*inputs())
    (refused,) = find_attention(graphs[0])
    assert refused.near_miss  # the matcher sees it too
    nodes = {n.name: n for n in graphs[0].graph.nodes}
    weights = [n for n in nodes.values() if n.target is operator.matmul][-1]
    query, key, value = (nodes[f"l_{name}_"] for name in ("query", "key", "value"))
    gm, other = captured(lambda q, k, v, keep, slopes, counter: (q @ repeated(k, q).transpose(-1, -2)).softmax(-1) @ repeated(v, q), False)
    moved = {f.name: getattr(other, f.name) for f in dataclasses.fields(AttentionSite)}
    site = AttentionSite(**{**moved, "output": weights, "query": query, "key": key, "value": value, "covered": ()})
    assert verdict(gm, other).verdict == "agrees"
    assert verdict(graphs[0], site).verdict == "differs"


# -- what a region must not leave out ----------------------------------------------------------------------------------------------------


def opened(write):
    """Causal attention whose mask is opened at three keys by a write of its own."""

    def program(query, key, value, keep, slopes, counter):
        rows, keys = positions(query, key)
        mask = torch.where(keys <= rows, 0.0, LOWEST)
        write(mask)
        return F.scaled_dot_product_attention(query, repeated(key, query), repeated(value, query), attn_mask=mask[None, None])

    return program


def item(mask):
    mask[:, -3:] = 0.0


def in_place(mask):
    mask.__imul__(0.0)


def flagged(mask):
    F.threshold(mask, 1.0, 0.0, True)


@pytest.mark.parametrize("write", [item, in_place, flagged])
def test_writes_without_a_value_or_a_telling_name_are_run(write):
    gm, site = captured(opened(write), False)
    _, causal = captured(opened(lambda mask: None), False)
    claimed = dataclasses.replace(site, mask=causal.mask, near_miss="", empty_rows="impossible", scale=0.25)
    assert causal.mask.causal and verdict(gm, claimed).verdict == "differs"


def test_an_instance_with_nothing_to_compare_is_none():
    def merged(query, key, value, keep, slopes, counter):
        scores = query @ repeated(key, query).transpose(-1, -2) * 0.3 + keep.float()[:, None, None, :].sub(2.0).log()
        return scores.softmax(-1) @ repeated(value, query)

    gm, site = captured(merged, False)
    assert verdict(gm, dataclasses.replace(site, scale=7.0)).verdict == "unchecked"


def test_random_numbers_are_the_callers():
    def noisy(query, key, value, keep, slopes, counter):
        rows, keys = positions(query, key)
        mask = torch.where(keys <= rows, 0.0, LOWEST) * torch.rand(())
        return F.scaled_dot_product_attention(query, repeated(key, query), repeated(value, query), attn_mask=mask[None, None])

    gm, site = captured(noisy, False)
    state = torch.get_rng_state()
    assert "random" in verdict(gm, site).why
    assert torch.equal(state, torch.get_rng_state())


def test_rows_that_only_the_cpu_averages_are_not_compared(monkeypatch):
    """Fused kernels of GPUs take the lowest finite number for -inf."""

    def added(query, key, value, keep, slopes, counter):
        rows, keys = positions(query, key)
        mask = torch.where((keys <= rows)[None, None] & keep.bool()[:, None, None, :], 0.0, LOWEST)
        return F.scaled_dot_product_attention(query, repeated(key, query), repeated(value, query), attn_mask=mask)

    gm, site = captured(added, False)
    there = dataclasses.replace(site, empty_rows="zero")
    assert verdict(gm, there).verdict == "differs"  # on the CPU
    monkeypatch.setattr(validate._Pair, "cpu_alone_averages", lambda pair: True)
    assert verdict(gm, there).verdict == "agrees"
    assert verdict(gm, mask(padding=None)(there)).verdict == "differs"


def test_scores_beside_a_large_bias_are_rounded():
    """Eager's sum leaves float32 scores three decimal places beside -10000, which only rows without another key show."""

    def hidden(query, key, value, keep, slopes, counter):
        scores = query @ repeated(key, query).transpose(-1, -2) * 0.25 + slopes[:, None, None] * torch.arange(key.shape[2])
        return (scores + torch.where(keep.bool()[:, None, None, :], 0.0, -10000.0)).softmax(-1) @ repeated(value, query)

    gm, site = captured(hidden, False)
    assert site.bias
    assert verdict(gm, site).verdict == "agrees"
    assert verdict(gm, dataclasses.replace(site, scale=0.26)).verdict == "differs"


def test_half_precision_beside_a_bias_is_compared_to_the_digits_that_it_leaves():
    """Slopes times distances up to 130: bfloat16 has steps of one half there, and eager's own result shows it."""

    def distant(query, key, value, keep, slopes, counter):
        scores = query @ repeated(key, query).transpose(-1, -2) * 0.25
        scores = scores + slopes[:, None, None].to(query.dtype) * (torch.arange(key.shape[2]) - 129).to(query.dtype)
        return scores.softmax(-1) @ repeated(value, query)

    gm, site = captured(distant, False, inputs(dtype=torch.bfloat16))
    assert verdict(gm, site).verdict == "agrees"
    assert verdict(gm, dataclasses.replace(site, scale=0.6)).verdict == "differs"
    assert verdict(gm, dataclasses.replace(site, bias=(), alibi_slopes=None)).verdict == "differs"


def test_scores_of_which_half_precision_leaves_nothing_show_no_difference(monkeypatch):
    """Steps of 4 beside 900: some instances differ by eager's rounding, which says nothing about the rewriting."""

    def distant(query, key, value, keep, slopes, counter):
        scores = query @ repeated(key, query).transpose(-1, -2) * 8.0 + (torch.arange(key.shape[2]) * 0.001 + 900).to(query.dtype)
        return scores.softmax(-1) @ repeated(value, query)

    gm, site = captured(distant, False, inputs(dtype=torch.bfloat16))
    assert verdict(gm, site).verdict == "agrees", "those that can be compared"
    monkeypatch.setattr(validate._Pair, "rounded_scores", lambda *_: 0.0)
    assert verdict(gm, site).verdict == "differs"


def test_sizes_that_guards_compare_are_mapped_together():
    """Of a chunk behind a cache: the mask's sizes are symbols of their own, which equal the queries' and 150 keys more."""
    rows, same, keys = sympy.symbols("rows same keys", integer=True, positive=True)
    guards = instances.Guards(None)
    guards.hints = {rows: 50, same: 50, keys: 200}
    guards.statements = [sympy.Eq(rows, same), sympy.Eq(rows + 150, keys)]
    draw = random.Random(0)
    assert guards.related({rows}) == [keys, rows, same]
    fixed = instances.shrink([150, *guards.hints.values()], set(), draw)
    found = guards.draw({rows}, fixed, 27, draw)
    assert found[rows] == found[same] == found[keys] - fixed[150] and found[keys] < 100


def test_sizes_that_are_equal_are_drawn_within_the_narrowest_range():
    """Of a cache that keeps a share of a prompt: one of the equal sizes has to be large enough for the policy, and says so alone."""
    queries, keys, mask = sympy.symbols("queries keys mask", integer=True, positive=True)
    for narrow in (queries, keys, mask):
        guards = instances.Guards(None)
        guards.ranges = {size: ValueRanges(65 if size == narrow else 2, int_oo) for size in (queries, keys, mask)}
        guards.hints = dict.fromkeys((queries, keys, mask), 540)
        guards.statements = [sympy.Eq(queries, keys), sympy.Eq(keys, mask)]
        draw = random.Random(0)
        found = guards.draw({queries, keys, mask}, instances.shrink([540], set(), draw), 12, draw)
        assert found[queries] == found[keys] == found[mask] and 65 <= found[queries] < 100
