"""Attention as people write it, odd forms included: what is rewritten gives the right answer, keeping all and dropping a lot, and the
rest is refused for a known reason. The answer under sinks and a window comes from masking the program's own scores from outside."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F

from sparsify import api
from tests.models.matrix_reference import _SinkWindow
from tests.support.harness import strict

BATCH, HEADS, LENGTH, DIM = 2, 4, 24, 16
SINKS, WINDOW = 2, 3
KEEP_ALL = {
    "dense": {"passes": ["dense"]},
    "xattention": {"passes": ["xattention"], "xattention": {"threshold": 1.0, "block": 64}},
    "sink_window": {"passes": ["sink_window"], "sink_window": {"sinks": SINKS, "window": 1 << 20}},
}
SPARSE = {"passes": ["sink_window"], "sink_window": {"sinks": SINKS, "window": WINDOW}}


def operands(dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(BATCH, HEADS, LENGTH, DIM, generator=generator).to(dtype) for _ in range(3)]


def causal(query_len: int = LENGTH, key_len: int = LENGTH) -> torch.Tensor:
    return torch.arange(key_len)[None] <= torch.arange(query_len)[:, None] + key_len - query_len


@torch.no_grad()
def compiled(function, inputs, options):
    """Result and plan decisions."""
    torch._dynamo.reset()
    with api.collect_plans() as plans:
        result = torch.compile(function, backend="sparsify", options=strict(**options), fullgraph=True)(*(x.clone() for x in inputs))
    return result, [d for plan in plans for d in plan.decisions]


def close(got: torch.Tensor, want: torch.Tensor, tolerance: float = 2e-5) -> None:
    assert got.dtype is want.dtype and got.shape == want.shape
    assert ((got - want).abs().max() / want.abs().max()).item() < tolerance


# -- one attention behind another ------------------------------------------------------------------------------------------------------


def shared_keys(query, key, value):
    """Two layers over one cache, the second's query being the first's output itself."""
    first = F.scaled_dot_product_attention(query, key, value, is_causal=True)
    return F.scaled_dot_product_attention(first, key, value, is_causal=True)


def output_as_values(query, key, value):
    first = F.scaled_dot_product_attention(query, key, value, is_causal=True)
    return F.scaled_dot_product_attention(query, first, first, is_causal=True)


@pytest.mark.parametrize("function", [shared_keys, output_as_values])
def test_an_attention_over_anothers_output_reads_the_rewritten_one(function):
    inputs = operands()
    got, decisions = compiled(function, inputs, SPARSE)
    assert [d.method for d in decisions] == ["sink_window"] * 2
    with _SinkWindow(SINKS, WINDOW, [False], 0, False):
        want = function(*inputs)
    close(got, want)


# -- autocast --------------------------------------------------------------------------------------------------------------------------


def under_autocast(query, key, value):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return F.scaled_dot_product_attention(query, key, value, is_causal=True)


def partly_under_autocast(query, key, value):
    """As with rotary positions in float32: queries and keys are wide, values are not."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return F.scaled_dot_product_attention(query, key, value @ torch.eye(DIM), is_causal=True)


def written_out_under_autocast(query, key, value):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = (query @ key.transpose(-1, -2) * 0.25).masked_fill(~causal(), float("-inf"))
        return torch.softmax(scores, -1) @ value


@pytest.mark.parametrize("function", [under_autocast, partly_under_autocast, written_out_under_autocast])
@pytest.mark.parametrize("method", [*KEEP_ALL])
def test_autocast_converts_the_operands(function, method):
    inputs = operands()
    got, decisions = compiled(function, inputs, KEEP_ALL[method])
    assert [d.method for d in decisions] == [method]
    rounded = [x.bfloat16().double() for x in inputs]
    exact = F.scaled_dot_product_attention(*rounded, is_causal=True)
    close(got, exact.to(torch.bfloat16), 1e-2)


def test_products_within_an_op_are_not_autocast():
    """Large scores show it: rounded to bfloat16 they are off by whole units."""
    query, key, value = (x.bfloat16() for x in operands())
    query = 16 * query

    def attend(query, key, value):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return F.scaled_dot_product_attention(query, key, value, is_causal=True)

    exact = F.scaled_dot_product_attention(query.double(), key.double(), value.double(), is_causal=True).to(torch.bfloat16)
    for method in ("xattention", "sink_window"):
        close(compiled(attend, (query, key, value), KEEP_ALL[method])[0], exact, 1e-2)


def test_dtypes_that_differ_for_another_reason_are_refused():
    """Wide queries and keys without autocast: rounding them would be a loss."""

    def function(query, key, value):
        scores = (query @ key.transpose(-1, -2) * 0.25).masked_fill(~causal(), float("-inf"))
        return torch.softmax(scores, -1).to(value.dtype) @ value

    query, key, value = operands()
    _, decisions = compiled(function, (query, key, value.bfloat16()), KEEP_ALL["dense"])
    assert [d.method for d in decisions] == [None] and "differ in dtype" in decisions[0].reason


# -- forms ---------------------------------------------------------------------------------------------------------------------------------

LOWEST = torch.finfo(torch.float32).min


def ahead() -> torch.Tensor:
    """How far each query stands behind each key; made in the graph."""
    return torch.arange(LENGTH)[:, None] - torch.arange(LENGTH)[None]


def scores(query, key):
    return query @ key.mT / 4


def hidden(x, mask=None):
    return x.masked_fill(~(causal() if mask is None else mask), LOWEST)


def in_place_statements(query, key, value):
    x = query @ key.mT
    x.mul_(0.25)
    x.masked_fill_(~causal(), float("-inf"))
    return x.softmax(-1) @ value


def mask_shaped_like_the_scores(query, key, value):
    x = scores(query, key)
    return x.masked_fill(torch.ones_like(x, dtype=torch.bool).tril().logical_not(), LOWEST).softmax(-1) @ value


def two_masks(query, key, value):
    x = torch.where(causal(), scores(query, key), LOWEST)
    return (x + torch.where(ahead() < 9, 0.0, LOWEST)).softmax(-1) @ value


def position_bias(query, key, value):
    slopes = torch.pow(torch.tensor(0.5), torch.arange(1, HEADS + 1))
    return slopes[:, None, None] * -ahead()


def alibi_in_the_mask(query, key, value):
    mask = (position_bias(query, key, value) + torch.where(causal(), 0.0, float("-inf")))[None]
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)


def alibi_filled(query, key, value):
    mask = position_bias(query, key, value).masked_fill(~causal(), LOWEST)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)


def bias_per_key(query, key, value):
    """Numbers that are known at run time alone, the same for every row, beside a mask."""
    bias = query.mean((2, 3))[:, :, None, None] * value[:, :1, :, 0][:, :, None, :]
    return (scores(query, key) + bias + torch.where(causal(), 0.0, LOWEST)).softmax(-1) @ value


def bias_per_key_before_the_scale(query, key, value):
    return hidden((query @ key.mT + value[:, :1, None, :, 0]) * 0.25).softmax(-1) @ value


def two_biases_per_key(query, key, value):
    bias = value[:, :1, None, :, 0]
    combined = bias.masked_fill(~causal(), LOWEST)
    return ((query @ key.mT + key[..., 1][:, :, None]) * 0.25 + combined).softmax(-1) @ value


def documents_of_one_dimension(query, key, value):
    documents = (value[0, 0, :, 0] > 0).long().cumsum(0)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=(documents[:, None] == documents[None]) & causal())


def documents_both_ways(query, key, value):
    documents = (value[:, 0, :, 0] > 0).long().cumsum(-1)
    one, other = documents[:, None, :, None] == documents[:, None, None, :], documents[:, None, None, :] == documents[:, None, :, None]
    return F.scaled_dot_product_attention(query, key, value, attn_mask=torch.where(one, other, False) & causal())


def kept(form):
    def function(query, key, value):
        keep = (value[:, 0, :, 0] * 1.5).long()  # from about -4 to 4
        return F.scaled_dot_product_attention(query, key, value, attn_mask=causal() & form(keep[:, None, None, :]))

    return function


def merged(x):
    """Batch and heads as one dimension."""
    return x.reshape(BATCH * HEADS, *x.shape[2:])


def apart(x, *heads):
    return x.view(*(heads or (BATCH, HEADS)), *x.shape[1:])


def merged_scores(query, key):
    return torch.bmm(merged(query / 4), merged(key).transpose(1, 2))


def masked_apart(query, key, value):
    """As fairseq's descendants: products of three dimensions, the mask added to four."""
    x = merged(apart(merged_scores(query, key)) + torch.where(causal(), 0.0, LOWEST)).softmax(-1)
    return apart(torch.bmm(merged(apart(x)), merged(value)))


def no_view_apart(query, key, value):
    """Batch and heads are never apart but in the keys, nor in the result."""
    rows = query.permute(2, 0, 1, 3).reshape(LENGTH, BATCH * HEADS, DIM).transpose(0, 1)
    x = torch.bmm(hidden(torch.bmm(rows, merged(key).mT) / 4).softmax(-1), merged(value))
    return x.transpose(0, 1).reshape(LENGTH, BATCH, HEADS, DIM).permute(1, 2, 0, 3)


def tokens_in_front(query, key, value):
    """As XLNet: [length, batch, heads, dim]."""
    query, key, value = (x.permute(2, 0, 1, 3).contiguous() for x in (query, key, value))
    x = hidden(torch.einsum("ibnd,jbnd->bnij", query, key) * 0.25).softmax(dim=3)
    return torch.einsum("bnij,jbnd->ibnd", x, value).permute(1, 2, 0, 3)


def tokens_before_heads(query, key, value):
    """As Funnel, with the operands of the second product exchanged."""
    query, key, value = (x.transpose(1, 2).contiguous() for x in (query, key, value))
    x = hidden(torch.einsum("bjnd,bind->bnij", key, query) * 0.25).softmax(-1)
    return torch.einsum("bjnd,bnij->bind", value, x).transpose(1, 2)


def einsum_of_merged_heads(query, key, value):
    x = hidden(torch.einsum("nid,njd->nij", merged(query), merged(key)) / 4).softmax(-1)
    return apart(torch.einsum("nij,njd->nid", x, merged(value)))


def scaled_by_a_sink(of_lse=lambda lse, sink: (lse - sink[:, None]).sigmoid()[..., None], of_output=lambda out, factor: out * factor):
    """As GraniteSWA: the sink scales the output."""

    def function(query, key, value):
        x = scores(query, key) + torch.where(causal(), 0.0, LOWEST)
        factor = of_lse(torch.logsumexp(x, dim=-1), 3 * query[0, :, 0, 0])
        return of_output(x.softmax(-1) @ value, factor)

    return function


def times_ones(low=LOWEST, ones=None, dtype=torch.float32):
    """As OpenAI GPT: hidden scores times 0, and the number that hides added to them."""

    def function(query, key, value):
        b = torch.tril(torch.ones(LENGTH, LENGTH, dtype=dtype)).view(1, 1, LENGTH, LENGTH)
        x = scores(query, key) * (b if ones is None else ones(b)) + low * (1 - b)
        return x.softmax(-1) @ value

    return function


def bounded(form, low=LOWEST, hide=-torch.inf):
    def function(query, key, value):
        x = scores(query, key) + torch.where(causal(), 0.0, hide)
        return form(x, low).softmax(-1) @ value

    return function


def shaped_by_the_scores(query, key, value):
    x = query @ key.mT / 4
    x.masked_fill_((~causal()).view(1, 1, LENGTH, LENGTH).expand_as(x), LOWEST)
    return x.double().softmax(-1).type_as(x) @ value


def onto_zeros(query, key, value):
    zeros = torch.zeros(BATCH * HEADS, LENGTH, LENGTH)
    x = torch.baddbmm(zeros, merged(query), merged(key).mT, beta=1.0, alpha=0.25)
    return apart(torch.bmm(hidden(apart(x)).softmax(-1).view(-1, LENGTH, LENGTH), merged(value)))


# name: (program, what the plan says of the mask, whether sinks and a window act)
def relative_buckets(query, key, value):
    """As in T5: a number per head and distance."""
    bias = query[0, :, :8, 0][:, ahead().clamp(0, 7)]
    return hidden(scores(query, key) + bias).softmax(-1) @ value


def bias_per_row_and_key(query, key, value):
    return F.scaled_dot_product_attention(query, key, value, attn_mask=hidden(query @ key.mT))


REWRITTEN = {
    "in-place statements": (in_place_statements, "causal", True),
    "a mask shaped like the scores": (mask_shaped_like_the_scores, "causal", True),
    "minus": (lambda q, k, v: hidden(-(q @ k.mT) / 4).softmax(-1) @ v, "causal", True),
    "scaled twice": (lambda q, k, v: hidden((q / 2) @ k.mT / 4 * 0.5).softmax(-1) @ v, "causal", True),
    "einsum": (
        lambda q, k, v: torch.einsum("bhij,bhjd->bhid", hidden(torch.einsum("b h i d, b h j d -> b h i j", q, k) / 4).softmax(-1), v),
        "causal",
        True,
    ),
    "keywords": (
        lambda q, k, v: torch.matmul(hidden(torch.matmul(input=q, other=k.mT) / 4).softmax(-1), v),
        "causal",
        True,
    ),
    "two masks": (two_masks, "causal, window 9", False),
    "masked apart": (masked_apart, "causal", True),
    "the larger of scores and the lowest number": (bounded(lambda x, low: torch.max(x, torch.full((), low))), "causal", True),
    "the lowest number first": (bounded(lambda x, low: torch.maximum(torch.tensor(low), x)), "causal", True),
    "clamped to the lowest number": (bounded(lambda x, low: x.clamp(min=low)), "causal", True),
    "scaled when merged": (
        lambda q, k, v: apart(hidden(merged(q) / 4 @ merged(k).mT).softmax(-1) @ merged(v)),
        "causal",
        True,
    ),
    "no view apart": (no_view_apart, "causal", True),
    "keys twice transposed": (lambda q, k, v: hidden(torch.einsum("bhid,bhdj->bhij", q, k.mT) / 4).softmax(-1) @ v, "causal", True),
    "keys that are no transpose": (lambda q, k, v: hidden(q @ (k.mT / 4)).softmax(-1) @ v, "causal", True),
    "tokens in front": (tokens_in_front, "causal", True),
    "tokens before heads": (tokens_before_heads, "causal", True),
    "einsum of merged heads": (einsum_of_merged_heads, "causal", True),
    "scaled by a sink": (scaled_by_a_sink(), "causal", True),
    "scaled by a sink, kept apart": (
        scaled_by_a_sink(
            lambda lse, sink: torch.sigmoid(lse.unsqueeze(-1).float() - sink.view(1, -1, 1, 1)),
            lambda out, factor: factor.to(out.dtype) * out,
        ),
        "causal",
        True,
    ),
    "relative buckets": (relative_buckets, "causal", True),
    "a bias per row and key": (bias_per_row_and_key, "causal", True),
    "times ones": (times_ones(), "causal", True),
    "times more ones": (times_ones(ones=lambda b: torch.tril(torch.ones_like(b), 2)), "causal", True),
    "shaped by the scores": (shaped_by_the_scores, "causal", True),
    "onto zeros": (onto_zeros, "causal", True),
    "alibi in the mask": (alibi_in_the_mask, "causal", True),
    "alibi filled": (alibi_filled, "causal", True),
    "a bias per key": (bias_per_key, "causal", True),
    "a bias per key before the scale": (bias_per_key_before_the_scale, "causal", True),
    "two biases per key": (two_biases_per_key, "causal", True),
    "distance and order": (
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=(ahead().abs() < 4) & (ahead() >= 0)),
        "causal, window 4",
        False,
    ),
    "distance": (lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=ahead().abs() <= 4), "causal from 4, window 9", False),
    "an upper triangle turned": (lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=(ahead() <= 0).mT), "causal", True),
    "documents of one dimension": (documents_of_one_dimension, "causal, documents", False),
    "documents both ways": (documents_both_ways, "causal, documents", False),
    "kept where one": (kept(lambda keep: keep == 1), "causal, padding", True),
    "kept where positive": (kept(lambda keep: keep > 0), "causal, padding", True),
    "kept where at most minus one": (kept(lambda keep: keep <= -1), "causal, padding", True),
    "no order": (lambda q, k, v: F.scaled_dot_product_attention(q, k[:, :, :9], v[:, :, :9]), "none", False),
    "rows over the last keys": (
        lambda q, k, v: F.scaled_dot_product_attention(q[:, :, -6:], k, v, attn_mask=causal(6)),
        "causal",
        True,
    ),
}


@pytest.mark.parametrize("name", REWRITTEN)
@pytest.mark.samples(4)
def test_odd_forms_are_rewritten(name):
    """Keeping everything equals eager, and dropping a lot equals eager with its scores masked, on rows that see a key."""
    function, mask, ordered = REWRITTEN[name]
    inputs = operands()
    want = function(*inputs)
    for options in KEEP_ALL.values():
        got, decisions = compiled(function, inputs, {**options, "passes": [*options["passes"], "dense"]})
        assert [(d.mask, bool(d.method)) for d in decisions] == [(mask, True)]
        seen = got.abs().sum(-1, keepdim=True) > 0
        close(got, torch.where(seen, want, 0))
    got, decisions = compiled(function, inputs, SPARSE)
    assert [d.method for d in decisions] == ["sink_window" if ordered else None]
    if ordered:
        with _SinkWindow(SINKS, WINDOW, [False], 0, False):
            sparse = function(*inputs)
        close(got, torch.where(got.abs().sum(-1, keepdim=True) > 0, sparse, 0))
        assert (got - want).abs().max() > 1e-2


def edited_through_a_view(query, key, value):
    x = scores(query, key)
    x[:, :2].masked_fill_(~causal(), float("-inf"))
    return x.softmax(-1) @ value


def edited_after_reading(query, key, value):
    x = hidden(scores(query, key))
    weights = x.softmax(-1)
    x.mul_(2.0)
    return weights @ value, x


def edit_that_is_used(query, key, value):
    x = scores(query, key)
    y = x.mul_(2.0)
    return x.softmax(-1) @ value, y


def heads_first(query, key, value):
    """Merged batch and heads that are taken apart the other way round."""
    x = apart(merged_scores(query, key), HEADS, BATCH) + (value[:, 0, None, :, 0] > 0).float().sub(1).mul(-LOWEST)
    return apart(torch.bmm(merged(x).softmax(-1), merged(value)))


def split_within_a_head(query, key, value):
    x = hidden(merged_scores(query, key)).view(BATCH * HEADS, 2, LENGTH // 2, LENGTH).softmax(-1).view(-1, LENGTH, LENGTH)
    return apart(torch.bmm(x, merged(value)))


def prefix_lengths(query, key, value):
    length = (value[:, 0, 0, 0] > 0).long() + 3
    return F.scaled_dot_product_attention(query, key, value, attn_mask=causal() | (length[:, None] > torch.arange(LENGTH))[:, None, None])


def counted_positions(query, key, value):
    keep = (value[:, 0, :, 0] > -1).long()
    position = keep.cumsum(-1)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=position[:, None, None, :] <= position[:, None, :, None])


def differential(query, key, value):
    weights = hidden(scores(query[:, :2], key[:, :2])).softmax(-1) - 0.3 * hidden(scores(query[:, 2:], key[:, 2:])).softmax(-1)
    return weights @ value[:, :2]


def largest_only(query, key, value):
    x = hidden(scores(query, key))
    return x.masked_fill(x < x.topk(3, -1).values[..., -1:], LOWEST).softmax(-1) @ value


def sums(query, key, value):
    x = hidden(scores(query, key)).softmax(-1)
    return (x / (x.sum(-1, keepdim=True) + 1e-9)) @ value


REFUSED = {
    "heads first": (heads_first, "merged and taken apart in different ways"),
    "split within a head": (split_within_a_head, "reshaped"),
    "the larger of scores and another number": (bounded(lambda x, low: torch.max(x, torch.full((), -5.0))), "not the lowest"),
    "clamped from above": (bounded(lambda x, low: x.clamp(low, 5.0)), "clamp"),
    "clamped before the scale": (bounded(lambda x, low: x.clamp(min=low) * 0.5), "before the scale"),
    "the larger of two products": (lambda q, k, v: hidden(torch.max(scores(q, k), scores(k, q))).softmax(-1) @ v, "bounded|the scores"),
    "times ones and a number that scores may reach": (times_ones(-1e4), "adds -10000"),
    "times fewer ones": (times_ones(ones=lambda b: torch.tril(torch.ones_like(b), -1)), "set to 0 that no mask hides"),
    "times other numbers": (times_ones(ones=lambda b: b * 2 - 1), "scaled by a tensor"),
    "times numbers of rows": (times_ones(ones=lambda b: b.cumsum(-1)), "scaled by a tensor"),
    "scaled by one minus a sink": (scaled_by_a_sink(lambda lse, sink: (sink[:, None] - lse).sigmoid()[..., None]), "used elsewhere"),
    "scaled by a sink of each row": (
        scaled_by_a_sink(lambda lse, sink: (lse - lse.cumsum(-1)).sigmoid()[..., None]),
        "used elsewhere|no number per head",
    ),
    "scaled by half a sink": (scaled_by_a_sink(lambda lse, sink: (lse / 2 - sink[:, None]).sigmoid()[..., None]), "used elsewhere"),
    "a sink is added": (scaled_by_a_sink(of_output=lambda out, factor: out + factor), "used elsewhere"),
    "einsum over the queries": (
        lambda q, k, v: torch.einsum("bhij,bhid->bhjd", hidden(torch.einsum("bhid,bhjd->bhij", q, k) / 4).softmax(-1), v),
        "einsum of another form",
    ),
    "einsum of three": (
        lambda q, k, v: torch.einsum("bhij,bhjd,d->bhid", hidden(scores(q, k)).softmax(-1), v, v[0, 0, 0]),
        "a product of another form",
    ),
    "einsum over heads too": (
        lambda q, k, v: torch.einsum("bhij,bhjd->bid", hidden(scores(q, k)).softmax(-1), v),
        "a product of another form",
    ),
    "weights returned": (lambda q, k, v: ((w := hidden(scores(q, k)).softmax(-1)) @ v, w.mean(1)), "weights are used elsewhere"),
    "scores edited through a view": (edited_through_a_view, "scores are used elsewhere"),
    "scores edited after reading": (edited_after_reading, "scores are used elsewhere"),
    "an edit that is used": (edit_that_is_used, "scores are used elsewhere"),
    "an item set": (lambda q, k, v: (x := scores(q, k), x.__setitem__((..., 0), 1.0), x.softmax(-1) @ v)[2], "the scores"),
    "hidden by a large number": (lambda q, k, v: torch.where(causal(), scores(q, k), -1e9).softmax(-1) @ v, "not the lowest"),
    "hidden before the scale": (lambda q, k, v: (hidden(scores(q, k)) / 2).softmax(-1) @ v, "before the scale"),
    "a bounded score": (lambda q, k, v: hidden(scores(q, k).clamp(-2, 2)).softmax(-1) @ v, "clamp"),
    "a learned scale": (lambda q, k, v: hidden(q @ k.mT * q[0, 0, 0, 0]).softmax(-1) @ v, "scaled by a tensor"),
    "prefix lengths": (prefix_lengths, "disjunction"),
    "counted positions": (counted_positions, "cumulative sum of data"),
    "distance at least": (lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=ahead().abs() >= 4), "disjunction"),
    "every second": (lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=(ahead() >= 0) & (ahead() % 2 == 0)), "mod"),
    "differential": (differential, "the weights pass through (i?sub|mul)"),
    "largest only": (largest_only, "scores are used elsewhere"),
    "normalised again": (sums, "the weights pass through truediv"),
    "not a number to zero": (lambda q, k, v: hidden(scores(q, k)).softmax(-1).nan_to_num(0.0) @ v, "the weights pass through nan_to_num"),
    "dropout": (lambda q, k, v: F.dropout(hidden(scores(q, k)).softmax(-1), 0.5, True) @ v, "dropout"),
    "one sequence": (lambda q, k, v: F.scaled_dot_product_attention(q[0], k[0], v[0], is_causal=True), "3 dimensions"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_odd_forms_are_refused(name):
    function, why = REFUSED[name]
    inputs = operands()
    torch.manual_seed(0)
    want = torch.utils._pytree.tree_leaves(function(*[x.clone() for x in inputs]))
    torch.manual_seed(0)
    got, decisions = compiled(function, inputs, {**SPARSE, "passes": ["sink_window", "dense"]})
    assert decisions and not any(d.method for d in decisions)
    assert all(re.search(why, text) for d in decisions for text in d.refusals), decisions
    for one, other in zip(torch.utils._pytree.tree_leaves(got), want, strict=True):
        torch.testing.assert_close(one, other)


def test_attention_along_another_dimension_stays():
    for dim in (1, 2):
        function = lambda q, k, v, dim=dim: hidden(scores(q, k)).softmax(dim) @ v
        got, decisions = compiled(function, operands(), SPARSE)
        assert [d.method for d in decisions] == [None] and f"over dimension {dim}" in decisions[0].reason
        assert torch.equal(got, function(*operands()))
