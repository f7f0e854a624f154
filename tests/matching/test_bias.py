"""A bias by row and key is an operand of the attention op, however it is written; what hides is told apart from it."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F

import sparsify.backends  # noqa: F401  (registers kernels)
from sparsify import api
from tests.support.attention_functions import attend, lowest, repeat, scores, sdpa
from tests.support.harness import sink_window_mask, strict

BATCH, HEADS, KV_HEADS, KEYS, DIM = 2, 4, 2, 18, 16
BOUND = {torch.float32: 1e-5, torch.bfloat16: 4e-2}
SINKS, WINDOW = 2, 5
KEEP = torch.tensor([[0] * 4 + [1] * 14, [1] * 18])


def operands(rows: int = KEYS, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """Query, key, value, and a table of numbers by distance for each head."""
    draw = lambda *shape: torch.randn(shape, generator=generator).to(dtype)
    generator = torch.Generator().manual_seed(0)
    shapes = [(BATCH, HEADS, rows, DIM), (BATCH, KV_HEADS, KEYS, DIM), (BATCH, KV_HEADS, KEYS, DIM), (9, HEADS)]
    return [draw(*shape) for shape in shapes]


def ahead(query: torch.Tensor) -> torch.Tensor:
    rows = query.shape[2]
    return torch.arange(KEYS - rows, KEYS)[:, None] - torch.arange(KEYS)


# -- what gives the numbers ----------------------------------------------------------------------------------------------------------------


def buckets(query, table):
    """As in T5: [1, heads, rows, keys] from a table."""
    return F.embedding(ahead(query).clamp(-4, 4) + 4, table).permute(2, 0, 1)[None]


def by_state(query, table):
    """As in Inkling: numbers of each row's state by distance, 0 beyond."""
    at = ahead(query)
    found = (query[:, :, :, :8] @ table[:8, :1].expand(8, 9)).gather(-1, at.clamp(0, 8).expand(BATCH, HEADS, -1, -1))
    return found.masked_fill((at < 0) | (at > 8), 0.0)


def indexed(query, table):
    """A table that is indexed, the same for each row of the batch, without its dimension."""
    return table[ahead(query).clamp(-4, 4) + 4].permute(2, 0, 1)


def of_a_row(query, table):
    """From the first query's state; the same for all heads."""
    return (query[:, :1] @ query.new_ones(DIM, KEYS)) * torch.log(ahead(query).abs() + 2.0)


GIVEN = {"buckets": buckets, "by state": by_state, "indexed": indexed, "of a row": of_a_row}


# -- how it is added -----------------------------------------------------------------------------------------------------------------------


def seen(query):
    return (ahead(query) >= 0) & KEEP.bool()[:, None, None, :]


FORMS = {
    "written out": lambda q, k, v, bias: attend(scores(q, k) + bias, v),
    "written out, masked": lambda q, k, v, bias: attend((scores(q, k) + bias).masked_fill(~seen(q), lowest(q)), v),
    "written out, a mask is added": lambda q, k, v, bias: attend(scores(q, k) + bias + torch.where(seen(q), 0.0, lowest(q)).to(q.dtype), v),
    "written out, one sum": lambda q, k, v, bias: attend(scores(q, k) + (bias + torch.where(seen(q), 0.0, lowest(q)).to(q.dtype)), v),
    "written out, -inf": lambda q, k, v, bias: attend(torch.where(seen(q), scores(q, k) + bias, -torch.inf), v),
    "before the scale": lambda q, k, v, bias: attend((scores(q, k) + bias) * 0.5, v),
    "sdpa": sdpa,
    "sdpa, masked": lambda q, k, v, bias: sdpa(q, k, v, torch.where(seen(q), bias, lowest(q)).contiguous()),
    "sdpa, -inf": lambda q, k, v, bias: sdpa(q, k, v, bias.expand(BATCH, -1, -1, -1).masked_fill(~seen(q), -torch.inf)),
    "sdpa, a mask is added": lambda q, k, v, bias: sdpa(q, k, v, bias + torch.where(seen(q), 0.0, lowest(q)).to(q.dtype)),
}


@torch.no_grad()
def compiled(function, *inputs, **options):
    torch._dynamo.reset()
    with api.collect_plans() as plans:
        got = torch.compile(function, backend="sparsify", options=strict(**options), fullgraph=True)(*inputs)
    (plan,) = plans
    return got, plan.decisions


def check(function, inputs, passes: str = "dense"):
    want = function(*inputs)
    got, (decision,) = compiled(function, *inputs, passes=[passes])
    assert decision.method == passes, decision.reason
    torch.testing.assert_close(got, want, atol=BOUND[want.dtype], rtol=0, equal_nan=True)
    return decision


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("given", GIVEN)
@pytest.mark.samples(14)
def test_the_bias_is_an_operand(given, form):
    """Padded rows see no key: there each form leaves something else, which is compared too."""
    attention, bias = FORMS[form], GIVEN[given]
    attending = lambda q, k, v, table: attention(q, k, v, bias(q, table))
    without = lambda q, k, v, table: attention(q, k, v, 0 * bias(q, table))
    assert (attending(*operands()) - without(*operands())).abs().nan_to_num().max() > 0.1, "the bias shows"
    check(attending, operands())


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("form", ["written out, masked", "sdpa, masked"])
def test_a_chunk_and_one_row(form, rows):
    check(lambda q, k, v, table: FORMS[form](q, k, v, buckets(q, table)), operands(rows))


@pytest.mark.parametrize("form", ["written out, masked", "sdpa, a mask is added"])
def test_half_precision(form):
    check(lambda q, k, v, table: FORMS[form](q, k, v, by_state(q, table)), operands(dtype=torch.bfloat16))


def test_merged_batch_and_heads():
    """As in Bloom's fused products: [batch · heads, rows, keys]."""

    def function(q, k, v, table):
        k, v = (repeat(x, HEADS // KV_HEADS).flatten(0, 1) for x in (k, v))
        bias = by_state(q, table).reshape(BATCH * HEADS, KEYS, KEYS)
        x = torch.bmm(q.flatten(0, 1), k.mT) * 0.25 + bias
        x = x.masked_fill(ahead(q) < 0, lowest(q))
        return torch.bmm(x.softmax(-1), v).view(BATCH, HEADS, KEYS, DIM)

    check(function, operands())


def test_two_biases_and_one_per_key_are_summed():
    def function(q, k, v, table):
        return attend((scores(q, k) + buckets(q, table) + by_state(q, table) + q[:, :1, :, 0][..., None, :]).tril_(0), v)

    def masked(q, k, v, table):
        x = scores(q, k) + buckets(q, table) + q[:, :1, None, :, 0]
        return attend(x.masked_fill(~seen(q), lowest(q)), v)

    check(masked, operands())
    _, (decision,) = compiled(function, *operands(), passes=["dense"])
    assert decision.method is None and "tril_" in decision.reason


def test_symbolic_lengths():
    def function(q, k, v, table):
        at = torch.arange(q.shape[2])[:, None] - torch.arange(k.shape[2])
        bias = F.embedding(at.clamp(-4, 4) + 4, table).permute(2, 0, 1)[None]
        return attend((scores(q, k) + bias).masked_fill(at < 0, lowest(q)), v)

    torch._dynamo.reset()
    with torch.no_grad(), api.collect_plans() as plans:
        program = torch.compile(function, backend="sparsify", options=strict(passes=["dense"]), fullgraph=True, dynamic=True)
        for length in (18, 11):
            q, k, v, table = operands()
            q, k, v = (x[:, :, :length].clone() for x in (q, k, v))
            torch.testing.assert_close(program(q, k, v, table), function(q, k, v, table), atol=1e-5, rtol=0)
    assert len(plans) == 1 and [d.method for d in plans[0].decisions] == ["dense"]


@pytest.mark.parametrize("given", ["buckets", "by state"])
def test_sinks_and_a_window_beside_a_bias(given):
    def attending(q, k, v, table, mask=None):
        x = (scores(q, k) + GIVEN[given](q, table)).masked_fill(ahead(q) < 0 if mask is None else ~mask, lowest(q))
        return attend(x, v)

    q, k, v, table = operands()
    causal = (ahead(q) >= 0).expand(BATCH, HEADS, KEYS, KEYS)
    want = attending(q, k, v, table, causal & sink_window_mask(causal, SINKS, WINDOW))
    options = {"passes": ["sink_window"], "sink_window": {"sinks": SINKS, "window": WINDOW}}
    got, (decision,) = compiled(attending, q, k, v, table, **options)
    assert decision.method == "sink_window"
    torch.testing.assert_close(got, want, atol=1e-5, rtol=0)
    assert (want - attending(q, k, v, table)).abs().max() > 0.1


# -- rows that the bias hides --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [-torch.inf, torch.finfo(torch.float32).min])
@pytest.mark.parametrize("form", [name for name in FORMS if name != "before the scale"])
@pytest.mark.samples(8)
def test_a_bias_that_hides_every_key_of_a_row(form, number):
    """Numbers of a model are whatever they are: those of the fifth row hide what the mask shows."""

    def attending(q, k, v, table):
        return FORMS[form](q, k, v, table[ahead(q).clamp(-4, 4) + 4 + 9 * (torch.arange(KEYS) == 5).long()[:, None]].permute(2, 0, 1)[None])

    q, k, v, table = operands()
    check(attending, [q, k, v, torch.cat([table, torch.full_like(table, number)])])


# -- a sink of each row --------------------------------------------------------------------------------------------------------------------


def test_a_sink_of_zeros():
    def attending(q, k, v, table):
        x = torch.cat([scores(q, k).masked_fill(ahead(q) < 0, lowest(q)), q.new_zeros(BATCH, HEADS, KEYS, 1)], -1)
        return x.softmax(-1)[..., :-1] @ repeat(v, HEADS // KV_HEADS)

    check(attending, operands())


SINK_FORMS = {
    "causal": lambda q, k, x: x.masked_fill(ahead(q) < 0, lowest(q)),
    "padded": lambda q, k, x: x.masked_fill(~seen(q), -torch.inf),
    "padded, added": lambda q, k, x: x + torch.where(seen(q), 0.0, lowest(q)).to(q.dtype),
}


@pytest.mark.parametrize("dtype", BOUND)
@pytest.mark.parametrize("form", SINK_FORMS)
def test_a_sink_of_each_row(form, dtype):
    """As in Inkling 2: one more logit that is computed from the row's state."""

    def attending(q, k, v, table, sink=True):
        logits = 4 * q.float().mean(-1, keepdim=True).to(q.dtype) if sink else q.new_full((BATCH, HEADS, KEYS, 1), -torch.inf)
        x = torch.cat([SINK_FORMS[form](q, k, scores(q, k) + by_state(q, table)), logits], -1).float()
        return x.softmax(-1)[..., :-1].to(q.dtype) @ repeat(v, HEADS // KV_HEADS)

    inputs = operands(dtype=dtype)
    check(attending, inputs)
    assert (attending(*inputs) - attending(*inputs, sink=False)).abs().nan_to_num().max() > 0.1


def test_inputs_of_many_numbers_are_biases():
    check(lambda q, k, v, table: sdpa(q, k, v, q[:, :1, :, :1].expand(-1, -1, -1, KEYS)), operands())
    masked = lambda q, k, v, table: attend(scores(q, k) + q[..., :1].expand(-1, -1, -1, KEYS) + torch.where(seen(q), 0.0, lowest(q)), v)
    check(masked, operands())


# -- what is no bias -----------------------------------------------------------------------------------------------------------------------


def written_afterwards(q, k, v, table):
    bias = buckets(q, table)
    x = scores(q, k) + bias
    bias.mul_(2.0)
    return attend(x, v) + bias.sum()


NOT_A_BIAS = {
    "an input of the graph that holds two numbers": (
        lambda q, k, v, table: sdpa(q, k, v, q[:, :1, :1, :1].sign().expand(-1, -1, KEYS, KEYS)),
        "sign|adds",
    ),
    "hidden where chosen": (
        lambda q, k, v, table: attend(
            scores(q, k) + torch.full((BATCH, HEADS, KEYS, KEYS), -torch.inf).scatter(-1, scores(q, k).topk(3, -1).indices, 0.0), v
        ),
        "scatter",
    ),
    "a bias beside what hides and is not read": (
        lambda q, k, v, table: attend(scores(q, k) + buckets(q, table) + torch.where(ahead(q).pow(2) % 5 > 0, 0.0, lowest(q)), v),
        "could not be read|carry a bias",
    ),
    "written afterwards": (written_afterwards, "carry a bias|adds a bias|written"),
}


@pytest.mark.parametrize("name", NOT_A_BIAS)
def test_what_is_no_bias_is_refused(name):
    function, why = NOT_A_BIAS[name]
    inputs = operands()
    want = function(*[x.clone() for x in inputs])
    got, (decision,) = compiled(function, *inputs, passes=["dense"])
    assert decision.method is None and re.search(why, decision.reason), decision.reason
    torch.testing.assert_close(got, want, atol=1e-5, rtol=0)
