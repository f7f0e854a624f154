"""Every argument of a call that belongs to attention counts, and so does what feels a shortcut: a program is rewritten and gives eager's
numbers, or it is refused for a known reason while the attention beside it is rewritten."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F

from sparsify import api
from tests.support.harness import strict

BATCH, HEADS, LENGTH, DIM = 2, 3, 10, 8
LOWEST = torch.finfo(torch.float32).min


def operands(heads: int = HEADS) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(BATCH, heads, LENGTH, DIM, generator=generator) for _ in range(3)]


@torch.no_grad()
def check(function, inputs, expected: str) -> None:
    """The program's own attention is rewritten where `expected` is empty, else refused for that reason. The one beside it always is."""

    def beside(q, k, v, *more):
        return function(q, k, v, *more), F.scaled_dot_product_attention(q, k, v, is_causal=True)

    want = beside(*inputs)
    torch._dynamo.reset()
    with api.collect_plans() as plans:
        got = torch.compile(beside, backend="sparsify", options=strict(passes=["dense"]), fullgraph=True)(*inputs)
    (plan,) = plans
    *own, last = plan.decisions
    assert last.method == "dense" and len(own) == 1
    assert (own[0].method is None) == bool(expected), own[0]
    assert re.search(expected, own[0].reason)
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=2e-5)


def seen() -> torch.Tensor:
    return torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()


def hidden() -> torch.Tensor:
    return torch.where(seen(), 0.0, LOWEST)


def scores(q, k):
    return q @ k.transpose(-1, -2) * 0.3


def capped(x):
    return torch.tanh(x / 5) * 5


def with_sink(x, drop=True):
    sink = torch.arange(1.0, HEADS + 1)[None, :, None, None].expand(BATCH, HEADS, LENGTH, 1)
    return torch.cat([x, sink], -1)


def slopes():
    return torch.pow(torch.tensor(0.5), torch.arange(1, HEADS + 1))[None, :, None, None]


def distance():
    return torch.arange(LENGTH)[None] - torch.arange(LENGTH)[:, None]


def less_maximum(x):
    return x - x.amax(-1, keepdim=True)


FELT = {
    "a row's maximum, then softmax": (lambda q, k, v: less_maximum(scores(q, k)).softmax(-1) @ v, ""),
    "a row's maximum after the cap": (lambda q, k, v: less_maximum(capped(scores(q, k))).softmax(-1) @ v, ""),
    "a row's maximum before the cap": (lambda q, k, v: capped(less_maximum(scores(q, k))).softmax(-1) @ v, "before a softcap"),
    "a row's maximum after the sink": (lambda q, k, v: less_maximum(with_sink(scores(q, k))).softmax(-1)[..., :-1] @ v, ""),
    "a row's maximum before the sink": (
        lambda q, k, v: with_sink(less_maximum(scores(q, k))).softmax(-1)[..., :-1] @ v,
        "before a sink logit",
    ),
    "a bias by distance": (lambda q, k, v: (scores(q, k) + slopes() * distance()).softmax(-1) @ v, ""),
    "a bias by distance under a mask": (lambda q, k, v: (scores(q, k) + slopes() * distance() + hidden()).softmax(-1) @ v, ""),
    "a bias by position before the sink": (
        lambda q, k, v: with_sink(scores(q, k) + slopes() * torch.arange(LENGTH)).softmax(-1)[..., :-1] @ v,
        "",
    ),
    "a bias from the last position before the sink": (
        lambda q, k, v: with_sink(scores(q, k) + slopes() * (torch.arange(LENGTH) - 9)).softmax(-1)[..., :-1] @ v,
        "",
    ),
    "a bias by distance before the sink": (
        lambda q, k, v: with_sink(scores(q, k) + slopes() * distance()).softmax(-1)[..., :-1] @ v,
        "adds a bias|carry a bias",
    ),
    "a masked bias by distance before the sink": (
        lambda q, k, v: with_sink(scores(q, k) + (slopes() * distance()).masked_fill(~seen(), LOWEST)).softmax(-1)[..., :-1] @ v,
        "adds a bias|carry a bias",
    ),
    "a bias by distance before the cap": (
        lambda q, k, v: capped(scores(q, k) + slopes() * distance()).softmax(-1) @ v,
        "before the softcap",
    ),
}


@pytest.mark.parametrize("name", FELT)
def test_what_is_the_same_for_a_row_is_dropped_only_where_softmax_follows(name):
    function, expected = FELT[name]
    check(function, operands(), expected)


def grouped(q, k, v):
    return F.scaled_dot_product_attention(q, k[:, :1], v[:, :1], None, 0.0, True, scale=0.4, enable_gqa=True)


ARGUMENTS = {
    "keywords of the fused call": (
        lambda q, k, v: F.scaled_dot_product_attention(value=v, key=k, query=q, scale=0.4, attn_mask=seen()),
        "",
    ),
    "positions of the fused call": (grouped, ""),
    "keywords": (
        lambda q, k, v: torch.matmul(
            F.dropout(
                F.softmax(
                    torch.masked_fill(input=torch.mul(input=scores(q, k), other=2.0), value=LOWEST, mask=~seen()), dim=-1, _stacklevel=5
                ),
                0.5,
                training=False,
            ),
            other=v,
        ),
        "",
    ),
    "a softmax in another dtype": (lambda q, k, v: (scores(q, k) + hidden()).softmax(-1, torch.float64).to(torch.float32) @ v, ""),
    "a softmax into a buffer": (
        lambda q, k, v: torch.softmax(scores(q, k), -1, out=torch.empty(BATCH, HEADS, LENGTH, LENGTH)) @ v,
        "the argument out",
    ),
    "where by keywords": (
        lambda q, k, v: torch.where(condition=seen(), other=LOWEST, input=scores(q, k)).softmax(dim=-1) @ v,
        "",
    ),
    "where as a method": (lambda q, k, v: scores(q, k).where(seen(), LOWEST).softmax(-1) @ v, ""),
    "the mask scaled by alpha": (
        lambda q, k, v: torch.add(scores(q, k), v[:, :1, None, :, 0], alpha=3).softmax(-1) @ v,
        "alpha",
    ),
    "alpha of one": (lambda q, k, v: torch.add(scores(q, k), hidden(), alpha=1).softmax(-1) @ v, ""),
    "the scores scaled by alpha": (lambda q, k, v: torch.add(hidden(), scores(q, k), alpha=3).softmax(-1) @ v, "alpha"),
    "twice the row's maximum": (
        lambda q, k, v: torch.sub(scores(q, k), torch.amax(scores(q, k), -1, True), alpha=2).softmax(-1) @ v,
        "something is subtracted|used elsewhere",
    ),
    "the maximum of another dim": (
        lambda q, k, v: (lambda x: (x - x.amax(dim=(-2,), keepdim=True)).softmax(-1) @ v)(scores(q, k)),
        "something is subtracted",
    ),
    "the maximum of some dims": (
        lambda q, k, v: (lambda x: (x - x.amax(dim=[-1], keepdim=True)).softmax(-1) @ v)(scores(q, k)),
        "",
    ),
    "the larger of two": (
        lambda q, k, v: (lambda x: (x - torch.max(x, 0.5 * x)).softmax(-1) @ v)(scores(q, k)),
        "an argument dim|something is subtracted|no argument|used elsewhere",
    ),
    "a rounded quotient": (
        lambda q, k, v: torch.div(scores(q, k) * 5, 2.0, rounding_mode="floor").softmax(-1) @ v,
        "rounded",
    ),
    "a plain quotient": (lambda q, k, v: torch.div(scores(q, k), 2.0, rounding_mode=None).softmax(-1) @ v, ""),
    "a view of other bits": (
        lambda q, k, v: scores(q, k).softmax(-1).bfloat16().view(torch.float16).float() @ v,
        "another dtype",
    ),
    "eight bits": (lambda q, k, v: scores(q, k).softmax(-1).to(torch.float8_e4m3fn).float() @ v, "float8"),
    "scores in eight bits": (lambda q, k, v: scores(q, k).to(torch.float8_e4m3fn).float().softmax(-1) @ v, "float8"),
    "repeats and an output size": (
        lambda q, k, v: F.scaled_dot_product_attention(
            q, k[:, :1].repeat_interleave(HEADS, 1, output_size=HEADS), v[:, :1].repeat_interleave(dim=1, repeats=HEADS)
        ),
        "",
    ),
    "columns by numpy's name": (
        lambda q, k, v: torch.cat([scores(q, k), v[:, :, :, :1]], axis=-1).softmax(-1)[..., :-1] @ v,
        "",
    ),
    "rows that are concatenated": (
        lambda q, k, v: torch.cat([scores(q, k), scores(q, k)[:, :, :1]], 2).softmax(-1) @ v,
        "concatenated",
    ),
    "scores that a bias repeats": (
        lambda q, k, v: (scores(q[:1], k[:1]) + v[:, :1, None, :, 0]).softmax(-1) @ v,
        "broadcast",
    ),
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_every_argument_counts(name):
    function, expected = ARGUMENTS[name]
    check(function, operands(), expected)


@pytest.mark.parametrize(
    "mask",
    [
        lambda v: (torch.arange(LENGTH) != 3)[None],
        lambda v: v[:, :1, None, :, 0],
        lambda v: hidden(),
    ],
)
def test_a_mask_beside_is_causal(mask):
    """Some releases of torch take both, on some devices."""
    attend = lambda q, k, v: F.scaled_dot_product_attention(q, k, v, mask(v), 0.0, True)
    try:
        attend(*operands())
    except RuntimeError as error:
        pytest.skip(str(error))
    check(attend, operands(), "beside is_causal")


# -- batch and heads merged ----------------------------------------------------------------------------------------------------------------


def flat(x):
    return x.reshape(-1, x.shape[-2], x.shape[-1])


def merged(change, q, k, v):
    x = change(torch.bmm(flat(q), flat(k).transpose(1, 2)) * 0.3)
    return torch.bmm(x.softmax(-1), flat(v)).view(q.shape)


def added(bias):
    return lambda q, k, v: merged(lambda x: x + bias(q, k, v), q, k, v)


def filled(mask):
    return lambda q, k, v: merged(lambda x: x.masked_fill(~mask(q, k, v), LOWEST), q, k, v)


def with_bias(bias, beta=1):
    def attend(q, k, v):
        x = torch.baddbmm(bias(q, k, v), flat(q), flat(k).transpose(1, 2), alpha=0.3, beta=beta)
        return torch.bmm(x.softmax(-1), flat(v)).view(q.shape)

    return attend


def rows(q):
    """One number for each of the merged batch rows and heads."""
    return q[..., 0, 0].reshape(-1, 1, 1)


MERGED = {
    "a bias per key": (added(lambda q, k, v: flat(v)[..., :1].transpose(1, 2)), ""),
    "a bias per key for all": (added(lambda q, k, v: v[0, 0, :, 0]), ""),
    "a bias per key for all, of three dimensions": (added(lambda q, k, v: v[:1, 0, None, :, 0]), ""),
    "a bias per query": (added(lambda q, k, v: flat(v)[..., :1]), "carry a bias|adds a bias"),
    "a bias per row and key": (added(lambda q, k, v: flat(q @ v.mT)), ""),
    "causal for all": (filled(lambda q, k, v: seen().expand(q.shape[0] * q.shape[1], -1, -1)), ""),
    "causal as numbers": (added(lambda q, k, v: hidden().expand(q.shape[0] * q.shape[1], -1, -1)), ""),
    "keys by row": (filled(lambda q, k, v: (rows(q) > 0) | (torch.arange(LENGTH) < 6)), "merged batch and heads"),
    "keys by row as numbers": (
        added(lambda q, k, v: torch.where((rows(q) > 0) | (torch.arange(LENGTH) < 6), 0.0, LOWEST)),
        "",
    ),
    "padding": (filled(lambda q, k, v: flat(v)[:, None, :, 0] > -1), "merged batch and heads"),
    "padding of the first row": (filled(lambda q, k, v: (v[0, 0, :, 0] > -1)[None, None]), ""),
    "baddbmm": (with_bias(lambda q, k, v: flat(v)[..., :1].transpose(1, 2)), ""),
    "baddbmm, one for all": (with_bias(lambda q, k, v: v[0, 0, :, 0]), ""),
    "baddbmm, less of it": (with_bias(lambda q, k, v: v[0, 0, :, 0], beta=0.5), "another form"),
}


@pytest.mark.parametrize("heads", [1, HEADS])
@pytest.mark.parametrize("name", MERGED)
@pytest.mark.samples(10)
def test_merged_batch_and_heads(name, heads):
    """One head makes merged rows look like heads."""
    function, expected = MERGED[name]
    check(function, operands(heads), expected)


# -- forms of einsum -----------------------------------------------------------------------------------------------------------------------


def permuted(q, k, v):
    x = scores(q, k) - 1e30 * torch.einsum("qkbh->bhqk", v[0, 0, :, :1, None, None].expand(LENGTH, LENGTH, 1, 1).triu(1))
    return x.softmax(-1) @ v


EINSUM = {
    "one operand": (permuted, "pass through|other terms|subtracted|before the scale"),
    "subscripts as lists": (
        lambda q, k, v: (torch.einsum(q, [0, 1, 2, 4], k, [0, 1, 3, 4], [0, 1, 2, 3]) * 0.3 + scores(q, k)).softmax(-1) @ v,
        "",
    ),
    "operands as a list": (lambda q, k, v: (torch.einsum("bhid,bhjd->bhij", [q, k]) * 0.3).softmax(-1) @ v, ""),
}


@pytest.mark.parametrize("name", EINSUM)
def test_forms_of_einsum(name):
    function, expected = EINSUM[name]
    check(function, operands(), expected)
