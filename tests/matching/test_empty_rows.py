"""Rows that see no key hold what eager PyTorch leaves in them, for every form of mask; or their site is refused with a reason."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from torch._dynamo.exc import BackendCompilerFailed

import sparsify.backends  # noqa: F401  (registers kernels)
from sparsify import api
from sparsify.errors import UnsupportedError
from sparsify.ops.attention import SUNK, AttentionCall
from sparsify.rewriting import editor
from tests.support.attention_functions import attend, lowest, operands, repeat, scores, sdpa
from tests.support.empty_rows_oracle import BIASED, CALLS, make
from tests.support.harness import strict
from tests.support.ir import rewritten_graph

LENGTH, HEADS, KV_HEADS, DIM = 12, 4, 2, 16
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
BOUND = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}

# the keys that may be seen, [batch, keys]: rows before the first of them see none
LEFT = torch.tensor([[0] * 4 + [1] * 8, [1] * 12])
HOLES = torch.tensor([[0] * 2 + [1, 0] * 5, [1] * 6 + [0] * 6])
ALL = torch.tensor([[0] * 12, [0] * 3 + [1] * 9])
PADDINGS = {"left": LEFT, "holes": HOLES, "a row of padding": ALL}


DOCUMENTS = torch.tensor([[0] * 6 + [1] * 6, [7] * 3 + [8] * 9])


def visible(keep: torch.Tensor, documents: torch.Tensor, clause: str) -> torch.Tensor:
    at = torch.arange(LENGTH)
    ahead = at[:, None] - at[None]
    seen = keep.bool()[:, None, None, :]
    if clause != "padding":
        seen = seen & (ahead >= 0)
    if clause == "window":
        seen = seen & (ahead < 3)
    if clause == "documents":
        seen = seen & (documents[:, None, None, :] == documents[:, None, :, None])
    return seen


def additive(seen: torch.Tensor, like: torch.Tensor, number: float) -> torch.Tensor:
    return torch.where(seen, torch.tensor(0.0, dtype=like.dtype), torch.tensor(number, dtype=like.dtype))


FORMS = {
    "added lowest": lambda q, k, v, seen: attend(scores(q, k) + additive(seen, q, lowest(q)), v),
    "added -inf": lambda q, k, v, seen: attend(scores(q, k) + additive(seen, q, -torch.inf), v),
    "added in float32": lambda q, k, v, seen: attend(scores(q, k).float() + additive(seen, q.float(), lowest(q.float())), v),
    "filled lowest": lambda q, k, v, seen: attend(scores(q, k).masked_fill(~seen, lowest(q)), v),
    "filled -inf": lambda q, k, v, seen: attend(torch.where(seen, scores(q, k), -torch.inf), v),
    "sdpa bool": sdpa,
    "sdpa lowest": lambda q, k, v, seen: sdpa(q, k, v, additive(seen, q, lowest(q))),
    "sdpa -inf": lambda q, k, v, seen: sdpa(q, k, v, additive(seen, q, -torch.inf)),
}
REFUSED = {("added lowest", "fp16"), ("sdpa lowest", "fp16")}


@torch.no_grad()
def compiled(function, *inputs, **options):
    torch._dynamo.reset()
    with api.collect_plans() as plans:
        got = torch.compile(function, backend="sparsify", options=strict(**{"exact": True, **options}), fullgraph=True)(*inputs)
    return got, [d for plan in plans for d in plan.decisions]


def check(function, *inputs, refused: bool = False, bound: float = 0.0):
    """Equal in every row, NaN where eager has NaN; and where refused, because of such rows."""
    want = function(*inputs)
    got, decisions = compiled(function, *inputs)
    torch.testing.assert_close(got, want, atol=bound or BOUND[want.dtype], rtol=0, equal_nan=True)
    assert [d.method is None for d in decisions] == [refused], [d.reason for d in decisions]
    if refused:
        assert "see no key" in decisions[0].reason or "hide every key" in decisions[0].reason
    return want


def cells():
    """Every form and dtype with every clause once and every padding once; the rest is slow."""
    clauses = ("causal", "window", "documents", "padding")
    for n, (form, dtype) in enumerate(itertools.product(FORMS, DTYPES)):
        for i, (clause, padding) in enumerate(itertools.product(clauses, PADDINGS)):
            if clause == "padding" and padding != "a row of padding":  # every row sees what is no padding
                continue
            quick = (i + n) % 5 == 0
            yield pytest.param(form, dtype, clause, padding, marks=() if quick else pytest.mark.slow)


@pytest.mark.parametrize(("form", "dtype", "clause", "padding"), list(cells()))
@pytest.mark.samples(16)
def test_every_form_of_mask(form, dtype, clause, padding):
    function = FORMS[form]
    inputs = operands(2, HEADS, KV_HEADS, LENGTH, dim=DIM, dtype=DTYPES[dtype])
    keep = PADDINGS[padding]
    want = check(
        lambda q, k, v, keep, ids: function(q, k, v, visible(keep, ids, clause)), *inputs, keep, DOCUMENTS, refused=(form, dtype) in REFUSED
    )
    empty = ~visible(keep, DOCUMENTS, clause).any(-1).expand(2, HEADS, LENGTH)
    assert empty.any()
    held = want[empty]
    expected = {"-inf": "nan", "bool": "zero"}.get(form.split()[-1], "mean")
    expected = "zero" if form == "sdpa -inf" else expected
    if (form, dtype) not in REFUSED:
        mean = repeat(inputs[2], 2).float().mean(2, keepdim=True).expand(2, HEADS, LENGTH, DIM)[empty]
        found = {"nan": held.isnan().all(), "zero": (held == 0).all(), "mean": (held - mean).abs().max() < 2e-2}[expected]
        assert found, "the test's own expectation"


# -- the op --------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["mean", "nan", "zero"])
@pytest.mark.parametrize("name", CALLS | BIASED)
def test_the_op_equals_written_out_attention(name, form):
    call = make(form, **(CALLS | BIASED)[name])
    output, lse = call.op.run()
    want = call.written_out()
    empty = lse < SUNK
    assert empty.any() and torch.equal(output.isnan(), want.isnan().to(output.device))
    if form == "zero":
        assert (output[lse == -torch.inf] == 0).all()
        want = torch.where(empty[..., None], output.float(), want)
    torch.testing.assert_close(output.float(), want, atol=BOUND[call.op.query.dtype], rtol=0, equal_nan=True)


@pytest.mark.parametrize("form", ["mean", "nan"])
@pytest.mark.parametrize("name", ["padding", "window", "documents", "documents, not causal", "before the first key"])
def test_rows_that_only_block_lists_leave_without_a_key_are_zero(name, form):
    call = make(form, **{**CALLS[name], "query_len": 40, "key_len": 40})
    batch, heads, query_len, _ = call.op.query.shape
    blocks = -(-query_len // 8)
    lists = {"block_counts": torch.ones(batch, heads, blocks, dtype=torch.int32)}
    lists["block_indices"] = torch.full((batch, heads, blocks, 1), 3, dtype=torch.int16)
    output, lse = dataclasses.replace(call.op, **lists, block_size=8).run()
    without, hidden = (lse == -torch.inf), ~call.seen.any(-1)
    assert (without & ~hidden).any() and hidden.any()
    assert (output[without & ~hidden] == 0).all()
    want = call.written_out()
    torch.testing.assert_close(output[hidden], want[hidden], atol=1e-5, rtol=0, equal_nan=True)


@pytest.mark.parametrize(("form", "lowest"), [("other", 0.0), ("mean", 0.0), ("mean", -torch.inf)])
def test_words_that_mean_nothing_are_refused(form, lowest):
    call = dataclasses.replace(make("nan").op, empty_rows=form, lowest=lowest)
    with pytest.raises(UnsupportedError, match="empty rows hold"):
        call.run()


# -- what stands beside the mask -----------------------------------------------------------------------------------------------------------

LOW = torch.finfo(torch.float32).min


def causal_and(keep):
    return visible(keep, DOCUMENTS, "causal")


def sinks(query, key, value, keep):
    x = torch.cat(
        [scores(query, key) + additive(causal_and(keep), query, LOW), query[0, :, 0, 0][None, :, None, None].expand(2, -1, LENGTH, 1)], -1
    )
    return (x - x.max(-1, keepdim=True).values).softmax(-1)[..., :-1] @ repeat(value, 2)


def alibi(query, key, value, keep):
    slopes = torch.pow(torch.tensor(0.5), torch.arange(1, HEADS + 1))[:, None, None]
    return attend(scores(query, key) + slopes * torch.arange(LENGTH) + additive(causal_and(keep), query, LOW), value)


def extended(keep):
    """How encoders wrote their masks: a number per key that is known at run time alone."""
    return (1.0 - keep[:, None, None, :].float()) * LOW


def runtime_bias(query):
    return query[:, :1, None, :, 0]


def added(query, key, value, keep):
    """Rows of padding see padding, as low as what is ahead; beyond it a key is hidden twice, by -inf then."""
    return attend(scores(query, key) + extended(keep) + additive(causal_and(torch.ones_like(keep)), query, LOW), value)


def cast_down(query, key, value, keep):
    return (scores(query, key) + additive(causal_and(keep), query, LOW)).bfloat16().softmax(-1).float() @ repeat(value, 2)


BESIDE = {
    "softcap": lambda q, k, v, keep: attend(torch.tanh(scores(q, k) / 5.0) * 5.0 + additive(causal_and(keep), q, LOW), v),
    "sinks": sinks,
    "alibi": alibi,
    "in place": lambda q, k, v, keep: attend(scores(q, k).masked_fill_(~causal_and(keep), LOW), v),
    "filled twice": lambda q, k, v, keep: attend(
        scores(q, k).masked_fill(~keep.bool()[:, None, None], LOW).masked_fill(~causal_and(torch.ones_like(keep)), LOW), v
    ),
    "added -inf twice": lambda q, k, v, keep: attend(
        scores(q, k) + additive(causal_and(torch.ones_like(keep)), q, -torch.inf) + additive(keep.bool()[:, None, None], q, -torch.inf), v
    ),
    "a bias that hides, beside what is added": added,
    "a bias that hides, beside -inf": lambda q, k, v, keep: attend(
        scores(q, k) + extended(keep) + additive(causal_and(torch.ones_like(keep)), q, -torch.inf), v
    ),
    "a bias that hides, then a fill": lambda q, k, v, keep: attend(
        (scores(q, k) + extended(keep)).masked_fill(~causal_and(torch.ones_like(keep)), LOW), v
    ),
    "a bias that hides, after a fill": lambda q, k, v, keep: attend(
        scores(q, k).masked_fill(~causal_and(torch.ones_like(keep)), LOW) + extended(keep), v
    ),
    "a bias that hides, alone": lambda q, k, v, keep: attend(scores(q, k) + extended(keep), v),
    "a bias of -inf, alone": lambda q, k, v, keep: attend(scores(q, k) + torch.log(keep[:, None, None, :].float()), v),
    "a bias of -inf, beside what is added": lambda q, k, v, keep: attend(
        scores(q, k) + torch.log(keep[:, None, None, :].float()) + additive(causal_and(torch.ones_like(keep)), q, LOW), v
    ),
    "sdpa, a bias of -inf": lambda q, k, v, keep: sdpa(q, k, v, torch.log(keep[:, None, None, :].float())),
    "sdpa, a bias that hides": lambda q, k, v, keep: sdpa(q, k, v, extended(keep)),
    "sdpa, a bias and what is added": lambda q, k, v, keep: sdpa(q, k, v, runtime_bias(q) + additive(causal_and(keep), q, LOW)),
    "sdpa, a bias, filled": lambda q, k, v, keep: sdpa(q, k, v, runtime_bias(q).masked_fill(~causal_and(keep), LOW)),
    "two biases, one filled": lambda q, k, v, keep: attend(
        scores(q, k) + runtime_bias(q) + extended(keep).masked_fill(~causal_and(torch.ones_like(keep)), LOW), v
    ),
    "one query": lambda q, k, v, keep: attend(scores(q[:, :, -1:], k) + additive(keep.bool()[:, None, None], q, LOW), v),
    "more queries than keys": lambda q, k, v, keep: attend(
        scores(q, k[:, :, :9]) + additive(torch.arange(9) <= torch.arange(LENGTH)[:, None] - 3, q, LOW), v[:, :, :9]
    ),
}
ZEROED = {
    "hidden by -inf": lambda q, k, v, keep: zeroed(q, k, v, causal_and(keep), -torch.inf, causal_and(keep)),
    "hidden by the lowest number": lambda q, k, v, keep: zeroed(q, k, v, causal_and(keep), LOW, causal_and(keep)),
    "in place": lambda q, k, v, keep: (
        scores(q, k).masked_fill(~causal_and(keep), LOW).softmax(-1).masked_fill_(causal_and(keep).logical_not(), 0.0) @ repeat(v, 2)
    ),
}
ZEROED_REFUSED = {
    "some of them": (lambda q, k, v, keep: zeroed(q, k, v, causal_and(keep), LOW, keep.bool()[:, None, None]), "some of their weights"),
    "visible ones": (
        lambda q, k, v, keep: zeroed(q, k, v, causal_and(torch.ones_like(keep)), LOW, causal_and(keep)),
        "set to 0 that no mask hides",
    ),
    "by a window": (lambda q, k, v, keep: zeroed(q, k, v, causal_and(keep), LOW, visible(keep, DOCUMENTS, "window")), "that no mask hides"),
    "another number": (lambda q, k, v, keep: zeroed(q, k, v, causal_and(keep), LOW, causal_and(keep), 0.5), "another number than 0"),
    "beside a bias": (
        lambda q, k, v, keep: (
            (scores(q, k) + extended(keep)).masked_fill(~causal_and(torch.ones_like(keep)), -torch.inf).softmax(-1)
            .masked_fill(~causal_and(torch.ones_like(keep)), 0.0) @ repeat(v, 2)
        ),
        "beside a sink or a bias",
    ),
}  # fmt: skip


def zeroed(query, key, value, seen, number, shown, weight=0.0):
    """As CPM-Ant writes it: what is hidden before the softmax is set to 0 behind it."""
    return scores(query, key).masked_fill(~seen, number).softmax(-1).masked_fill(~shown, weight) @ repeat(value, 2)


@pytest.mark.parametrize("name", ZEROED | ZEROED_REFUSED)
def test_weights_that_are_set_to_zero(name):
    inputs = operands(2, HEADS, KV_HEADS, LENGTH, dim=DIM)
    if name in ZEROED:
        want = check(ZEROED[name], *inputs, LEFT)
        assert (want[0, :, :4] == 0).all()
        return
    function, why = ZEROED_REFUSED[name]
    got, (decision,) = compiled(function, *inputs, LEFT)
    torch.testing.assert_close(got, function(*inputs, LEFT), equal_nan=True)
    assert decision.method is None and why in decision.reason, decision.reason


BESIDE_REFUSED = {
    "added lowest twice": lambda q, k, v, keep: attend(
        scores(q, k) + additive(causal_and(torch.ones_like(keep)), q, LOW) + additive(keep.bool()[:, None, None], q, LOW), v
    ),
    "added lowest and -inf": lambda q, k, v, keep: attend(
        scores(q, k) + additive(causal_and(torch.ones_like(keep)), q, LOW) + additive(keep.bool()[:, None, None], q, -torch.inf), v
    ),
    "filled, then added": lambda q, k, v, keep: attend(
        scores(q, k).masked_fill(~causal_and(torch.ones_like(keep)), LOW) + additive(keep.bool()[:, None, None], q, LOW), v
    ),
    "a bias between two fills": lambda q, k, v, keep: attend(
        (scores(q, k).masked_fill(~keep.bool()[:, None, None], LOW) + runtime_bias(q)).masked_fill(~causal_and(torch.ones_like(keep)), LOW),
        v,
    ),
}


@pytest.mark.parametrize("name", BESIDE | BESIDE_REFUSED)
@pytest.mark.parametrize("padding", ["left", pytest.param("holes", marks=pytest.mark.slow), "a row of padding"])
@pytest.mark.samples(16)
def test_what_stands_beside_the_mask(name, padding):
    inputs = operands(2, HEADS, KV_HEADS, LENGTH, dim=DIM)
    check((BESIDE | BESIDE_REFUSED)[name], *inputs, PADDINGS[padding], refused=name in BESIDE_REFUSED)


def test_a_number_that_the_softmax_rounds_to_infinity():
    inputs = operands(2, HEADS, KV_HEADS, LENGTH, dim=DIM)
    want = check(cast_down, *inputs, LEFT, bound=2e-2)
    assert want[0, :, :4].isnan().all()


def test_float16_keeps_scores_beside_a_bias_per_key():
    inputs = operands(2, HEADS, KV_HEADS, LENGTH, dim=DIM, dtype=torch.float16)
    bias = lambda q, k, v, keep: attend(scores(q, k) + torch.where(keep.bool(), 0.0, 1.0).half()[:, None, None] * lowest(q), v)
    check(bias, *inputs, ALL, refused=True)


# -- where no row can be empty -------------------------------------------------------------------------------------------------------------


def chunk(query, key, value):
    seen = torch.arange(key.shape[2]) <= torch.arange(query.shape[2])[:, None] + key.shape[2] - query.shape[2]
    return attend(scores(query, key) + additive(seen, query, lowest(query)), value)


NEVER = {
    "causal": lambda q, k, v, ids: attend(scores(q, k) + additive(visible(torch.ones_like(ids), ids, "causal"), q, lowest(q)), v),
    "window": lambda q, k, v, ids: attend(scores(q, k) + additive(visible(torch.ones_like(ids), ids, "window"), q, lowest(q)), v),
    "documents": lambda q, k, v, ids: attend(scores(q, k) + additive(visible(torch.ones_like(ids), ids, "documents"), q, lowest(q)), v),
    "a chunk": lambda q, k, v, ids: chunk(q[:, :, -4:], k, v),
    "one query": lambda q, k, v, ids: chunk(q[:, :, -1:], k, v),
    "two sums": lambda q, k, v, ids: attend(
        scores(q, k)
        + additive(visible(torch.ones_like(ids), ids, "causal"), q, lowest(q))
        + additive(torch.arange(LENGTH)[:, None] - torch.arange(LENGTH) < 3, q, lowest(q)),
        v,
    ),
}


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
@pytest.mark.parametrize("name", NEVER)
def test_nothing_is_paid_where_every_row_sees_a_key(name, dtype):
    """Forms that would be refused are taken, and the op is told nothing."""
    inputs = (*operands(2, HEADS, KV_HEADS, LENGTH, dim=DIM, dtype=DTYPES[dtype]), DOCUMENTS)
    torch._dynamo.reset()
    _, after, plan = rewritten_graph(NEVER[name], inputs, strict(exact=True, dense={"kernel": "attention"}))
    assert [d.method for d in plan.decisions] == ["dense"]
    calls = [node for node in after.graph.nodes if node.target is AttentionCall.op()]
    assert len(calls) == 1 and "empty_rows" not in calls[0].kwargs


# -- lossy methods -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["added lowest", "added -inf"])
@pytest.mark.parametrize("padding", ["left", "holes"])
def test_lossy_methods_leave_such_rows_as_eager_does(form, padding):
    """And give no average to rows that they alone leave without a key."""
    inputs, keep = operands(2, HEADS, KV_HEADS, LENGTH, dim=DIM), PADDINGS[padding]
    function = lambda q, k, v, keep: FORMS[form](q, k, v, causal_and(keep))
    want, empty = function(*inputs, keep), ~causal_and(keep).any(-1).expand(2, HEADS, LENGTH)
    for method, options in {
        "sink_window": {"sinks": 1, "window": 2},
        "xattention": {"density": 0.5, "block": 64, "stride": 4},
    }.items():
        got, decisions = compiled(function, *inputs, keep, exact=False, passes=[method], **{method: options})
        assert [d.method for d in decisions] == [method]
        torch.testing.assert_close(got[empty], want[empty], atol=1e-5, rtol=0, equal_nan=True)
        assert got[~empty].isfinite().all()
    _, decisions = compiled(function, *inputs, keep, exact=False, passes=["sink_window"], sink_window={"sinks": 0, "window": 2})
    assert [d.method for d in decisions] == [None] and "beyond every window" in decisions[0].reason


# -- models whose padded rows reach visible ones -------------------------------------------------------------------------------------------


def blt():
    """Bytes of padding are pooled into patches."""
    from transformers import BltConfig, BltForCausalLM

    part = {"vocab_size": 64, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64, "num_hidden_layers": 1}
    parts = {"patcher_config": part, "encoder_config": part, "decoder_config": part, "global_config": {**part, "hidden_size": 64}}
    parts |= {name: {**part, "hidden_size_global": 64} for name in ("encoder_config", "decoder_config")}
    hashes = {"encoder_hash_byte_group_size": [2, 3], "encoder_hash_byte_group_vocab": 64}
    config = BltConfig(vocab_size=64, pad_token_id=0, initializer_range=0.3, **hashes, **parts)
    config._attn_implementation = "eager"
    return BltForCausalLM(config)


def minimax_m3():
    """An indexer scores keys of padding."""
    from transformers.models.minimax_m3_vl import configuration_minimax_m3_vl, modeling_minimax_m3_vl

    config = configuration_minimax_m3_vl.MiniMaxM3VLTextConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, dense_intermediate_size=32, rotary_dim=4, index_n_heads=2, index_head_dim=8,
        index_block_size=4, index_topk_blocks=3, mlp_layer_types=["dense"] * 2, layer_types=["full_attention", "minimax_m3_sparse"],
        initializer_range=0.3,
    )  # fmt: skip
    config._attn_implementation = "eager"
    return modeling_minimax_m3_vl.MiniMaxM3VLTextModel(config)


MODELS = {"blt": (blt, 4), "minimax_m3": (minimax_m3, 1)}


@pytest.mark.slow
@pytest.mark.parametrize("name", [pytest.param("blt", marks=pytest.mark.slow), "minimax_m3"])
@pytest.mark.filterwarnings("ignore")
@torch.no_grad()
def test_left_padded_batches_of_models_that_read_padding(name, monkeypatch):
    pytest.importorskip("transformers.models." + {"blt": "blt", "minimax_m3": "minimax_m3_vl"}[name])
    make_model, rewritten = MODELS[name]
    torch.manual_seed(0)
    model = make_model().eval()
    ids, mask = torch.randint(3, 64, (2, 20)), torch.ones(2, 20, dtype=torch.long)
    mask[0, :7] = 0
    call = lambda: model(input_ids=ids * mask, attention_mask=mask, use_cache=False)[0]
    want = call()

    def error(**options) -> float:
        torch._dynamo.reset()
        model.compile(backend="sparsify", options=strict(exact=True, **options))
        with api.collect_plans() as plans:
            got = call()
        model._compiled_call_impl = None
        assert sum(d.method is not None for plan in plans for d in plan.decisions) == rewritten
        return float((got - want)[mask.bool()].abs().max())

    assert error() < 2e-5
    monkeypatch.setattr(editor, "empty_row_operands", lambda *_: {})
    with pytest.raises(BackendCompilerFailed, match="VerifyError"):  # validation sees that before anybody
        error()
    assert error(validation=False) > 1e-2, "the model does not feel what this test is about"
