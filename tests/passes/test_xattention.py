"""xattention: what it proposes and refuses, the nodes it emits, and models under it against a masked float64 reference."""

from __future__ import annotations

import dataclasses
import operator

import pytest
import sympy
import torch
from pydantic import ValidationError
from torch import fx
from transformers import DynamicCache

import sparsify.backends  # noqa: F401  (registers kernels)
from sparsify import pipeline
from sparsify.backends import sparse_attention
from sparsify.costs import crossovers
from sparsify.costs import device as hardware
from sparsify.distributed.shards import Shard
from sparsify.masks.predicate import Leaf, MaskKind, MaskPredicate, QueryStart
from sparsify.matching.sites import AttentionSite
from sparsify.ops import block_lists, scratch
from sparsify.ops.attention import AttentionCall
from sparsify.ops.estimate import EXAMPLES
from sparsify.ops.selection import SelectCall, observing
from sparsify.ops.sparse_attention import SparseAttentionCall
from sparsify.passes.xattention import XAttention
from sparsify.planning.config import config
from sparsify.planning.method import Context, Proposal, Refusal, lists_are_large
from sparsify.planning.registry import discover
from sparsify.rewriting.trace import Trace
from tests.support.harness import holding, reference_run, run, strict, visible_error
from tests.support.tiny_models import VOCAB, build

FP32 = 2e-5
HOPPER = hardware.Device("cuda", "test", (9, 0), 680e12, 4.3e12, 8e-6)
CONTEXT = Context(HOPPER, "triton")
ESTIMATES = [estimate.variants for estimate in EXAMPLES]
names = lambda estimate: "+".join(estimate) or "exact"


def site(**changes) -> AttentionSite:
    graph = fx.Graph()
    node = graph.placeholder("q")
    length = sympy.Symbol("s0", integer=True, positive=True)
    base = AttentionSite(
        name="model.layers.0.self_attn",
        layer=0,
        index=0,
        output=node,
        query=node,
        key=node,
        value=node,
        mask_node=None,
        mask=MaskPredicate(MaskKind.PROVED, causal=True),
        batch=1,
        query_heads=32,
        kv_heads=8,
        query_len=length,
        key_len=length,
        qk_head_dim=128,
        v_head_dim=128,
        scale=128**-0.5,
        softcap=0.0,
        dropout=0.0,
        dtype=torch.bfloat16,
        device=torch.device("cpu"),
        needs_grad=False,
        output_stride_order="bhqd",
    )
    return dataclasses.replace(base, **changes)


def proposal(method=None, at=None, context=CONTEXT) -> Proposal:
    found = (method or XAttention()).propose(at or site(), context)
    assert isinstance(found, Proposal), found
    return found


def test_a_proposal_costs_less_than_dense_when_long_and_says_what_it_is():
    found = proposal()
    assert found.note == "stride 8 (τ 0.95), then 4, row+quad+int8+peak, τ 0.8 and shares of 0.05, block 128"
    assert 1024 < found.min_key_len < 131072
    assert (
        proposal(XAttention(density=0.1, pool="sum", estimate=("int8", "half"))).note == "stride 8, sum+half+int8, density 0.1, block 128"
    )
    single = XAttention(stride=4, threshold=0.7, min_share=0.03)
    assert proposal(single).note == "stride 4, row+pair+int8+peak, τ 0.7 and shares of 0.03, block 128"
    assert proposal(context=dataclasses.replace(CONTEXT, min_length=7)).min_key_len == 7


STAGED, SINGLE = ("quad", "int8", "peak"), ("pair", "int8", "peak")


@pytest.mark.parametrize(
    "options, want",
    [
        ({}, (8, 4, STAGED, "row", 0.8, 0.05)),
        ({"threshold": 0.8}, (8, 4, STAGED, "row", 0.8, 0)),
        ({"stride": 4}, (4, None, SINGLE, "row", 0.8, 0.05)),
        ({"refine_stride": None}, (4, None, SINGLE, "row", 0.8, 0.05)),
        ({"stride": 16, "refine_stride": 4, "estimate": ("int8",)}, (16, 4, ("int8",), "row", 0.8, 0.05)),
        ({"refine_stride": 8}, (16, 8, STAGED, "row", 0.8, 0.05)),
        ({"density": 0.1}, (8, None, SINGLE, "max", 0.95, 0)),
        ({"density": 0.1, "pool": "sum", "stride": 16}, (16, None, SINGLE, "sum", 0.95, 0)),
        ({"pool": "max"}, (8, None, SINGLE, "max", 0.95, 0)),
        ({"pool": "sum", "threshold": 0.9}, (8, None, SINGLE, "sum", 0.9, 0)),
    ],
    ids=str,
)
def test_defaults_that_go_together(options, want):
    found = XAttention(**options)
    assert (found.stride, found.refine_stride, found.estimate, found.pool, found.threshold, found.min_share) == want
    again = XAttention(**found.options())
    assert again.options() == found.options(), "what a plan writes down is what it says"


def test_a_first_stage_keeps_no_less_than_the_second():
    assert XAttention(threshold=(0.3, 0.97, 1.0)).coarse_threshold == 0.97
    assert XAttention(threshold=1.0).coarse_threshold == XAttention(threshold=0.3).coarse_threshold == 0.95


def test_cheaper_estimates_cost_less_in_proposals():
    at = {next(iter(proposal().seconds.free_symbols)): 131072}
    seconds = {estimate: float(proposal(XAttention(estimate=estimate)).seconds.subs(at)) for estimate in ESTIMATES}
    exact = seconds.pop(())
    assert all(value < exact for value in seconds.values()), seconds
    # what a group shares is not scored by the kernels that keys pass by
    assert min(seconds, key=seconds.get) == ("half", "pair", "int8")
    assert proposal(XAttention(estimate=("group",))).min_key_len <= proposal(XAttention(estimate=())).min_key_len


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"query_len": 1}, "decode"),
        ({"softcap": 30.0}, "softcap"),
        ({"dropout": 0.1}, "dropout"),
        ({"needs_grad": True}, "gradients"),
        ({"dtype": torch.float64}, "float64"),
        ({"mask": MaskPredicate(MaskKind.OPAQUE, reason="a table of numbers")}, "a table of numbers"),
        ({"alibi_slopes": fx.Graph().placeholder("slopes")}, "alibi"),
        ({"sink_logits": fx.Graph().placeholder("sinks")}, "sink logits"),
    ],
)
def test_what_it_does_not_model_is_refused(changes, reason):
    found = XAttention().propose(site(**changes), CONTEXT)
    assert isinstance(found, Refusal) and reason in found.reason


def causal(**other):
    return {"mask": MaskPredicate(MaskKind.PROVED, causal=True, **other)}


@pytest.mark.parametrize(
    "options, changes, reason",
    [
        ({}, causal(padding=Leaf(fx.Graph().placeholder("padding"))), "beside padding"),
        ({}, causal(documents=Leaf(fx.Graph().placeholder("ids"))), "beside packed documents"),
        ({}, causal(window=512), "beside a window"),
        ({"windows": (64,) + (0,) * 31}, {}, "beside a window"),
        ({"estimate": ("group",)}, {}, "of an estimate that a group shares"),
        ({"refine_stride": 8, "block": 64}, {}, "of 8 cells of a query block"),
        ({"refine_stride": 8, "estimate": ("half", "int8")}, {}, "of 8 cells of a query block"),
    ],
    ids=str,
)
def test_two_stages_that_no_kernel_serves_are_one(options, changes, reason):
    """The reference would serve them, on a GPU in more time than dense attention takes."""
    method = XAttention(**{"refine_stride": 4, "threshold": 0.6, **options})
    found = proposal(method, site(**changes), dataclasses.replace(CONTEXT, min_length=0))
    assert found.note.endswith("no two stages " + reason)
    single = found.method
    assert isinstance(single, XAttention) and single.refine_stride is None and single.stride == method.refine_stride
    assert (single.threshold, single.windows, single.block) == (method.threshold, method.windows, method.block)
    assert single.estimate == (method.estimate if "estimate" in options else ("pair", "int8", "peak"))
    assert proposal(XAttention(refine_stride=4)).method.refine_stride == 4


def test_what_a_plan_writes_down_goes_with_one_stage_as_what_nobody_gave():
    padded = site(**causal(padding=Leaf(fx.Graph().placeholder("padding"))))
    for method in (XAttention(), XAttention(threshold=0.6)):
        planned = XAttention.model_validate(method.options())
        assert planned == method and planned.refine_stride == 4
        singles = [proposal(one, padded, dataclasses.replace(CONTEXT, min_length=0)).method for one in (method, planned)]
        assert singles[0] == singles[1] and singles[0].estimate == ("pair", "int8", "peak")


def test_some_heads_in_one_stage_are_planned_as_all_heads_are():
    padded, forced = causal(padding=Leaf(fx.Graph().placeholder("padding"))), dataclasses.replace(CONTEXT, min_length=0)
    whole = XAttention(threshold=(0.5, 0.6) * 16)
    planned = proposal(whole, site(**padded), forced).method
    own = proposal(whole.of_heads(Shard(1, 2, ""), 16), site(**padded, query_heads=16, kv_heads=4), forced).method
    assert own.refine_stride is None and own.threshold == (0.5, 0.6) * 8
    assert own.options() == planned.options() and planned.options()["stride"] == 4


def test_heads_that_choose_nothing_are_expected_to_visit_what_they_visit():
    """A density that is published for chosen blocks says nothing of heads that see every block, or a window."""
    at = {next(iter(proposal().seconds.free_symbols)): 131072}
    forced = dataclasses.replace(CONTEXT, min_length=0)
    seconds = lambda **options: float(proposal(XAttention(**options), context=forced).seconds.subs(at))
    plain, windowed, dense = seconds(), seconds(windows=(128,) * 16 + (0,) * 16), seconds(threshold=1.0)
    assert windowed < plain < seconds(threshold=(1.0,) * 16 + (0.8,) * 16) < dense
    assert dense == seconds(threshold=(1.0,) * 32) > 2 * plain
    share = lambda **options: XAttention(**options).density_at(131072)
    assert share() == pytest.approx(0.07, abs=0.01) and share(threshold=1.0) == 1.0 and share(density=0.1) == 0.1
    assert share(windows=(128,) * 8 + (0,) * 8) < share() < share(threshold=(1.0, 0.8)) < 0.6
    every = XAttention(threshold=1.0).propose(site(), CONTEXT)
    assert isinstance(every, Refusal) and "visits every block" in every.reason
    proposal(XAttention(threshold=(1.0,) * 32))
    given = {"expected": (0.2, 0.5), "refine_stride": None}
    assert seconds(threshold=1.0, **given) == seconds(threshold=0.8, **given)


def test_a_second_stage_does_not_do_more_beside_heads_that_keep_everything():
    """What the first lists is the same, so that the second costs what it costs where all heads choose; attention costs more."""
    sizes = site().sizes
    works = lambda *thresholds, **more: XAttention(threshold=thresholds, **more).works(sizes, "hopper")
    plain, beside = works(*(0.8,) * 32), works(*(1.0,) * 8, *(0.8,) * 24)
    assert len(plain) == 3 and beside[:2] == plain[:2] and beside[2] != plain[2]
    # a calibrated density is that of all heads: 8 dense ones, and .1 of the others
    measured = works(*(1.0,) * 8, *(0.8,) * 24, expected=((8 + 0.1 * 24) / 32, 0.5))
    assert measured[1] == works(*(0.8,) * 32, expected=(0.1, 0.5))[1]


def test_two_stages_pay_later_than_their_first_one_alone():
    one, two = (proposal(XAttention(stride=16, **more)) for more in ({}, {"refine_stride": 4}))
    assert one.min_key_len < two.min_key_len
    at = {next(iter(two.seconds.free_symbols)): two.min_key_len}
    dense = float(crossovers.fastest_dense(site().sizes, HOPPER, "triton").subs(at))
    assert 0.45 < float(two.seconds.subs(at)) / dense <= 0.5, "as much as `max_cost_ratio` allows, and little less"


def test_thresholds_per_head_must_fit_the_site():
    found = XAttention(threshold=(0.9,) * 16).propose(site(), CONTEXT)
    assert isinstance(found, Refusal) and "16 thresholds for 32 query heads" in found.reason
    proposal(XAttention(threshold=(0.9,) * 32))
    assert isinstance(XAttention().propose(site(), Context(HOPPER, "reference", family="reference")), Refusal)


@pytest.mark.parametrize(
    "options, match",
    [
        ({"stride": 5}, "stride"),
        ({"threshold": 1.5}, "between 0 and 1"),
        ({"threshold": ()}, "between 0 and 1"),
        ({"density": 0.0}, "greater than 0"),
        ({"density": 0.1, "pool": "row"}, "keeps by threshold"),
        ({"min_share": 0.1, "pool": "max"}, "min_share goes with pool"),
        ({"min_share": 0.1, "density": 0.1}, "min_share goes with pool"),
        ({"min_share": 1.5}, "less than or equal to 1"),
        ({"refine_stride": 4, "pool": "max"}, "goes with pool"),
        ({"refine_stride": 4, "pool": "row", "threshold": 0.95, "coarse_threshold": 0.9}, "coarse_threshold must not lie below"),
        ({"refine_stride": 4, "threshold": (0.5, 0.6, 0.7), "windows": (8, 0, 0, 0)}, "3 thresholds for 4 windows"),
        ({"threshold": (0.5, 0.6), "windows": (8, 0, 0, 0)}, "2 thresholds for 4 windows"),
        ({"density": 0.1, "windows": (8, 0)}, "not with a density"),
        ({"estimate": ("half", "half")}, "twice"),
        ({"estimate": ("quarter",)}, "half"),
        ({"estimate": ("pair", "quad")}, "exclude"),
        ({"estimat": ()}, "estimat"),
    ],
)
def test_impossible_options_are_errors(options, match):
    with pytest.raises(ValidationError, match=match):
        XAttention(**options)


def test_options_survive_a_plan_file():
    method = XAttention(estimate=("int8",), threshold=(0.5, 0.9))
    assert XAttention.model_validate_json(method.model_dump_json()) == method
    assert method.keep_all().threshold == 1.0 and method.keep_all().estimate == ("int8",)


def rewritten(model, options, **inputs) -> fx.GraphModule:
    """The rewritten graph of one call under passes = ["xattention"]."""
    found = []

    def backend(gm, example):
        settings = config.load({"passes": ["xattention"], "min_length": 0, **options}, method_models=discover())
        found.append(pipeline.rewrite_graph(gm, settings, Trace(None))[1])
        return gm.forward

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(model, backend=backend, fullgraph=True)(**inputs, use_cache=False)
    torch._dynamo.reset()
    return found[0]


def region(gm: fx.GraphModule) -> str:
    """The ops emitted for the first layer, one line each; tensors by dtype and shape, and by the op they come from."""
    first = [next(node for node in gm.graph.nodes if node.target is op) for op in (SelectCall.op(), AttentionCall.op())]
    lines = []
    for node in first:
        operands = [f"{key}={operand(value)}" for key, value in node.kwargs.items() if value is not None]
        lines.append(f"{node.target}({len(node.args)} tensors, {', '.join(operands)})")
    return "\n".join(lines)


def operand(value) -> str:
    if not isinstance(value, fx.Node):
        return str(value)
    example = value.meta["example_value"]
    chosen = value.target is operator.getitem and value.args[0].target is SelectCall.op()
    return f"{str(example.dtype).removeprefix('torch.')}{list(example.shape)}" + (" of select_blocks" if chosen else "")


GOLDEN = """\
sparsify.select_blocks.default(2 tensors, key_flags=uint8[2, 70], scale=0.25, causal=True, estimate=half, \
block_size=64, threshold=[0.5, 0.6, 0.7, 0.8], version=4)
sparsify.attention.default(3 tensors, key_flags=uint8[2, 70], block_counts=int32[2, 4, 2] of select_blocks, \
block_indices=int16[2, 4, 2, 2] of select_blocks, scale=0.25, causal=True, block_size=64, seq_major=True, version=4)"""


def test_golden_of_the_rewritten_region():
    mask = torch.ones(2, 70, dtype=torch.long)
    mask[0, :9] = 0
    options = {"xattention": {"block": 64, "pool": "max", "estimate": ["half"], "threshold": [0.5, 0.6, 0.7, 0.8]}}
    found = rewritten(build("llama"), options, input_ids=prompt(2, 70), attention_mask=mask)
    assert region(found) == GOLDEN
    counts = [sum(node.target is op for node in found.graph.nodes) for op in (SelectCall.op(), AttentionCall.op())]
    assert counts == [2, 2]
    assert not any("scaled_dot_product" in str(node.target) for node in found.graph.nodes)


def test_large_lists_are_made_and_used_by_one_op(monkeypatch):
    options, inputs = {"xattention": {"block": 64, "stride": 8, "threshold": 0.5}}, {"input_ids": prompt(2, 200)}
    model = sharp("llama")
    apart = rewritten(model, options, **inputs)
    monkeypatch.setattr(scratch, "LIST_BYTES", 100)
    joined = rewritten(model, options, **inputs)
    targets = [node.target for node in joined.graph.nodes]
    assert targets.count(SparseAttentionCall.op()) == 2 and SelectCall.op() not in targets and AttentionCall.op() not in targets
    ops = AttentionCall.op(), SparseAttentionCall.op()
    one, other = (next(node for node in gm.graph.nodes if node.target is op) for gm, op in zip((apart, joined), ops, strict=True))
    assert one.kwargs["seq_major"] == other.kwargs["seq_major"]


@pytest.mark.parametrize("length, large", [(65536, False), (1 << 20, True), (None, True)])
def test_lists_are_large_by_the_limit_or_when_it_is_unknown(length, large):
    sizes = {} if length is None else {"query_len": length, "key_len": length}
    assert lists_are_large(site(**sizes), 128) == large


@pytest.mark.parametrize("limit", [100, 10**9])
@pytest.mark.samples(1)
def test_a_prompt_of_unknown_length_gives_the_same_logits(monkeypatch, limit):
    model, options = sharp("llama"), {"passes": ["xattention"], "min_length": 0, "lower": "eager", "strict": True}
    options["xattention"] = {"block": 64, "stride": 8, "threshold": 0.5}
    ids = prompt(2, 200)
    fixed, open_ended = (torch.compile(model, backend="sparsify", options=options, dynamic=dynamic) for dynamic in (False, True))
    with torch.no_grad():
        want = fixed(input_ids=ids, use_cache=False).logits
        torch._dynamo.reset()
        monkeypatch.setattr(sparse_attention.sparse_attention, "__kwdefaults__", {"limit": limit})
        torch.testing.assert_close(open_ended(input_ids=ids, use_cache=False).logits, want, atol=1e-5, rtol=1e-5)
        dense = model(input_ids=ids, use_cache=False).logits
    torch._dynamo.reset()
    assert not torch.allclose(want, dense, atol=1e-3)


def prompt(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def sharp(family: str = "llama", **overrides) -> torch.nn.Module:
    """A model whose attention is peaked, so that leaving blocks out shows."""
    model = build(family, **overrides)
    for name, weight in model.named_parameters():
        if "q_proj" in name or "k_proj" in name:
            weight.data *= 12
    return model


def compare(model, call, *, expect_sparse=True, attention_mask=None, **chosen):
    """Compiled against the masked reference with the same selection, and visibly unlike dense. Returns the block lists seen."""
    seen = []
    with observing(lambda call, counts, indices: seen.append((counts.clone(), indices.clone(), call.key_len))):
        got = run(model, call, strict(passes=["xattention"], xattention=chosen))
    method = XAttention(**{key: tuple(v) if isinstance(v, list) else v for key, v in chosen.items()})
    threshold = method.threshold if isinstance(method.threshold, tuple) else (method.threshold,)
    selection = {"pool": method.pool, "estimate": method.variants, "stride": method.stride, "block_size": method.block}
    selection |= {"refine_stride": method.refine_stride or 0, "coarse_threshold": method.coarse_threshold, "min_share": method.min_share}
    want = reference_run(model, call, **selection, threshold=threshold, density=method.density or 0.0)
    with torch.no_grad():
        dense = call(model)
    assert got.rewritten("xattention") > 0
    assert visible_error(got.value, want, attention_mask) < FP32
    assert (visible_error(got.value, dense, attention_mask) > 1e-3) == expect_sparse
    return seen


RULES = {"tau": {"threshold": 0.5}, "density": {"density": 0.4}, "per head": {"threshold": [0.2, 0.9, 0.5, 0.0]}}
RULES["row"] = {"pool": "row", "threshold": 0.3}
RULES["least share"] = {"pool": "row", "threshold": 0.2, "min_share": 0.1}
RULES["two stages"] = {"pool": "row", "threshold": 0.3, "stride": 16, "refine_stride": 4, "coarse_threshold": 0.6}


@pytest.mark.parametrize("rule, estimate", [*((rule, ()) for rule in RULES), *(("tau", estimate) for estimate in ESTIMATES[1:])])
@pytest.mark.samples(2)
def test_a_model_equals_the_masked_reference(rule, estimate):
    ids = prompt(1, 450)
    call = lambda m: m(input_ids=ids, use_cache=False).logits
    seen = compare(sharp(), call, **{"block": 64, "stride": 8, "estimate": list(estimate), **RULES[rule]})
    assert len(seen) == 2
    if rule == "per head":
        kept = seen[0][0].sum(-1)[0]
        assert kept[1] > kept[0] and kept[2] > kept[3]


@pytest.mark.slow
def test_variants_choose_other_blocks():
    ids = prompt(1, 450)
    call = lambda m: m(input_ids=ids, use_cache=False).logits
    found = {}
    for estimate in ESTIMATES:
        counts, indices, length = compare(sharp(), call, block=64, estimate=list(estimate), density=0.4)[0]
        found[estimate] = block_lists.to_dense(counts, indices, -(-length // 64))
    assert all(not torch.equal(found[()], found[estimate]) for estimate in (("half",), ("group",), ("pair",)))
    assert torch.equal(found[("group",)][:, 0], found[("group",)][:, 1]), "query heads of a group share one estimate"
    assert (found[()] ^ found[("int8",)]).float().mean() < 0.02, "8 bits change little"


@pytest.mark.parametrize("estimate", ESTIMATES, ids=names)
@pytest.mark.samples(3)
def test_rows_of_a_padded_batch_choose_for_themselves(estimate):
    ids, mask = prompt(2, 330), torch.ones(2, 330, dtype=torch.long)
    mask[0, :100] = 0
    call = lambda m: m(input_ids=ids, attention_mask=mask, use_cache=False).logits
    counts, indices, _ = compare(sharp(), call, attention_mask=mask, block=64, stride=8, threshold=0.3, estimate=list(estimate))[0]
    kept = block_lists.to_dense(counts, indices, 6)
    assert not torch.equal(kept[0], kept[1])
    assert not kept[0, :, 2:, 0].any(), "the first 64 keys of row 0 are padding"
    assert kept[1, :, :, 0].all()


@pytest.mark.slow
def test_chunks_start_where_the_cache_ends():
    ids = prompt(1, 420)

    def call(m):
        cache = DynamicCache(config=m.config)
        return torch.cat([m(input_ids=part, **holding(cache)).logits for part in ids.split([200, 130, 90], 1)], 1)

    seen = compare(sharp(), call, block=64, threshold=0.4)
    assert [length for _, _, length in seen] == [200, 200, 330, 330, 420, 420]
    counts = seen[-1][0]
    assert counts.shape[-1] == 2 and int(counts.max()) <= 7


@pytest.mark.parametrize("estimate", ESTIMATES, ids=names)
def test_a_key_that_is_not_a_number_keeps_all_that_see_it(estimate):
    torch.manual_seed(0)
    query, key = 6 * torch.randn(1, 4, 512, 16), torch.randn(1, 2, 512, 16)
    method = XAttention(block=64, estimate=estimate)
    call = SelectCall(query, key, scale=0.25, causal=True, estimate=method.variants, block_size=64, threshold=(0.2,))
    clean, _ = call.run()
    key[0, 1, 300] = torch.nan
    counts, _ = call.run()
    assert torch.equal(counts[0, 2:, 5:], torch.arange(6, 9, dtype=torch.int32).expand(2, 3)), "all that is causal"
    assert torch.equal(counts[0, :2], clean[0, :2]), "heads that read other keys"
    assert (counts[0, 2:, :4] <= clean[0, 2:, :4] + 1).all() and (counts[0, 2:, 3] < 4).any(), "rows before it choose"


def test_padding_and_a_start_at_run_time_are_no_obstacle():
    leaf = fx.Graph().placeholder("mask")
    mask = MaskPredicate(MaskKind.PROVED, causal=True, padding=Leaf(leaf), query_start=QueryStart(leaf=leaf))
    assert proposal(at=site(mask=mask)).density is None


@pytest.mark.parametrize("pads", [0, 5])
@pytest.mark.parametrize("together", [False, True])
@pytest.mark.samples(1)
def test_heads_with_sinks_and_a_window_beside_heads_with_blocks(pads, together, monkeypatch):
    """Those with a window are sink_window's, the others keep their blocks; also where one op makes and uses the lists."""
    if together:
        monkeypatch.setattr("sparsify.passes.xattention.lists_are_large", lambda site, block: True)
    model = build("llama", layers=1)
    ids = torch.randint(3, VOCAB, (2, 200), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, :pads] = 0
    outputs = []
    model.model.layers[0].self_attn.o_proj.register_forward_pre_hook(lambda _, args: outputs.append(args[0].unflatten(-1, (4, -1))))
    call = lambda m: m(input_ids=ids, attention_mask=mask, use_cache=False)
    shared = {"block": 64, "threshold": 0.5, "estimate": []}
    for options in (
        {"passes": ["xattention"], "xattention": shared | {"windows": [0, 8, 0, 70], "sinks": 3}},
        {"passes": ["sink_window"], "sink_window": {"window": [0, 8, 0, 70], "sinks": 3}},
        {"passes": ["xattention"], "xattention": shared},
    ):
        assert run(model, call, strict(**options)).rewritten() == 1
    mixed, windows, blocks = (output[mask.bool()] for output in outputs)
    torch.testing.assert_close(mixed[:, [1, 3]], windows[:, [1, 3]], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(mixed[:, [0, 2]], blocks[:, [0, 2]], atol=1e-5, rtol=1e-5)
    assert (mixed - blocks)[:, 1].abs().max() > 1e-3
    assert (mixed - windows)[:, 0].abs().max() > 1e-3


def test_windows_go_with_thresholds_and_with_every_head():
    with pytest.raises(ValidationError, match="not with a density"):
        XAttention(windows=(4,), density=0.5)
    refused = XAttention(windows=(4, 0)).propose(site(), CONTEXT)
    assert isinstance(refused, Refusal) and "2 windows for 32 query heads" in refused.reason
