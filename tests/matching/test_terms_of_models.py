"""Terms beside the scores as models of transformers write them: differences, zeros, what fills a bias, and inputs that are no masks."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import sparsify.backends  # noqa: F401  (registers kernels)
from sparsify import api
from tests.support.harness import strict

BATCH, HEADS, LENGTH, DIM = 2, 4, 24, 16
LOWEST = torch.finfo(torch.float32).min
KEEP = torch.tensor([[0] * 5 + [1] * (LENGTH - 5), [1] * LENGTH])


def operands() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(BATCH, HEADS, LENGTH, DIM, generator=generator) for _ in range(3)]


def scores(q, k):
    return q @ k.mT / 4


def relative(q):
    """As in Funnel and Parakeet: products with distances, shifted."""
    x = q @ torch.linspace(-1, 1, 2 * LENGTH * DIM).view(2 * LENGTH, DIM).mT
    x = F.pad(x.reshape(BATCH, HEADS, 2 * LENGTH, LENGTH)[:, :, 1:].reshape(BATCH, HEADS, LENGTH, 2 * LENGTH - 1), (1, 0))
    return x[..., :LENGTH]


def ones(keep):
    return keep.float()[:, None, None, :]


def subtracted(q, k, v, keep):
    """As in Funnel: so large a number that scores may reach it."""
    return (scores(q, k) + relative(q) - 1e6 * (1 - ones(keep))).softmax(-1) @ v


def scaled_in_place(q, k, v, keep):
    bias = torch.where(keep.bool()[:, None, None, :], *(q @ q.new_ones(DIM, 2)).split(1, -1))
    bias *= ones(keep)
    return (scores(q, k) + bias).softmax(-1) @ v


def zero_is_added(q, k, v, keep):
    return (scores(q, k) + 0 + (1 - ones(keep)) * LOWEST).softmax(-1) @ v


def filled_in_place(q, k, v, keep):
    """As in Parakeet: what hides is put into the bias."""
    bias = relative(q).masked_fill_((keep[:, None, :] * keep[:, :, None]).cumsum(-1)[:, None] < 1, LOWEST)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)


def filled_and_repeated(q, k, v, keep):
    """As in Doge: numbers of the values for each group of heads."""
    bias = torch.exp(F.softplus(v[:, ::2] @ v.new_ones(DIM, 1)) / 8).transpose(2, 3).expand(-1, -1, LENGTH, -1)
    bias = bias.masked_fill(torch.ones(LENGTH, LENGTH).tril() == 0, LOWEST)
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=bias[:, :, None].expand(-1, -1, 2, -1, -1).reshape(BATCH, HEADS, LENGTH, LENGTH)
    )


def a_number_that_scores_may_reach(q, k, v, keep):
    hidden = torch.arange(LENGTH)[:, None] < torch.arange(LENGTH)
    return (scores(q, k) + torch.where(hidden, -10.0, 0.0)).softmax(-1) @ v


def unread_weights(q, k, v, keep):
    weights = F.dropout(scores(q, k).masked_fill(~keep.bool()[:, None, None, :], LOWEST).softmax(-1), 0.1, False)
    out = weights @ v
    weights.view(BATCH, HEADS, LENGTH, -1).contiguous()
    return out


def padding_of_rows(q, k, v, keep):
    """As in DeBERTa: products of a mask of rows and one of keys."""
    extended = keep[:, None, None, :]
    mask = extended * extended.squeeze(-2).unsqueeze(-1)
    return scores(q, k).masked_fill(~mask.bool(), LOWEST).softmax(-1) @ v


def lengths(q, k, v, keep):
    """As in XLM: a number of keys for each row of the batch."""
    mask = torch.arange(LENGTH) < keep.sum(-1)[:, None]
    return scores(q, k).masked_fill(~mask[:, None, None, :], LOWEST).softmax(-1) @ v


def mask_of_zeros(q, k, v, keep):
    """As in T5 without padding: a bias, and a mask that hides nothing."""
    bias = relative(q)
    return (scores(q, k) + bias + torch.zeros(1, 1, LENGTH, LENGTH)).softmax(-1) @ v


FORMS = {
    "subtracted": (subtracted, "none"),
    "scaled in place": (scaled_in_place, "none"),
    "zero is added": (zero_is_added, "none"),
    "filled in place": (filled_in_place, "none"),
    "filled and repeated": (filled_and_repeated, "none"),
    "a number that scores may reach": (a_number_that_scores_may_reach, "none"),
    "unread weights": (unread_weights, "padding"),
    "padding of rows": (padding_of_rows, "padding of rows and keys"),
    "lengths": (lengths, "padding"),
    "a mask of zeros": (mask_of_zeros, "none"),
}


@torch.no_grad()
def compiled(function, *inputs):
    torch._dynamo.reset()
    with api.collect_plans() as plans:
        got = torch.compile(function, backend="sparsify", options=strict(passes=["dense"]), fullgraph=True)(*inputs)
    return got, [decision for plan in plans for decision in plan.decisions]


@pytest.mark.parametrize("name", FORMS)
def test_the_term_is_read(name):
    """Rows that see no key are compared too."""
    function, mask = FORMS[name]
    got, (decision,) = compiled(function, *operands(), KEEP)
    assert decision.method == "dense", decision.reason
    want = function(*operands(), KEEP)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=0)
    if mask != "none":
        assert decision.mask == mask


def beside_other_rows(q, k, v, keep):
    """Rows are hidden by another tensor than keys."""
    mask = keep.bool()[:, None, None, :] & keep.flip(0).bool()[:, None, :, None]
    return scores(q, k).masked_fill(~mask, LOWEST).softmax(-1) @ v


def two_products(q, k, v, keep):
    return (scores(q, k) - torch.maximum(scores(q, k), scores(k, q))).softmax(-1) @ v


def read_weights(q, k, v, keep):
    weights = scores(q, k).softmax(-1)
    return weights @ v, weights.view(BATCH, -1)


@pytest.mark.parametrize("function", [beside_other_rows, two_products, read_weights])
def test_what_is_something_else_stays(function):
    got, (decision,) = compiled(function, *operands(), KEEP)
    assert decision.method is None
    torch.testing.assert_close(got, function(*operands(), KEEP))


def test_an_input_of_many_numbers_is_a_bias():
    """As in T5 whose layers are graphs of their own. Later calls may bring any numbers, those of a mask too."""

    def function(q, k, v, bias):
        return (scores(q, k) + bias).softmax(-1) @ v

    q, k, v = operands()
    numbers = torch.randn(1, HEADS, LENGTH, LENGTH, generator=torch.Generator().manual_seed(1))
    causal = torch.full((LENGTH, LENGTH), LOWEST).triu(1).expand(1, HEADS, -1, -1).contiguous()
    torch._dynamo.reset()
    with torch.no_grad(), api.collect_plans() as plans:
        program = torch.compile(function, backend="sparsify", options=strict(passes=["dense"]), fullgraph=True)
        for bias in (numbers, causal, numbers + causal):
            torch.testing.assert_close(program(q, k, v, bias), function(q, k, v, bias), atol=1e-5, rtol=0)
    (plan,) = plans
    assert [decision.method for decision in plan.decisions] == ["dense"]


def test_a_bias_and_two_masks_that_are_inputs():
    """The masks are compared on every call, the bias is not."""

    def function(q, k, v, bias, mask, other):
        return (scores((scores(q, k) + bias + mask).softmax(-1) @ v, k) + other).softmax(-1) @ v

    q, k, v = operands()
    numbers = torch.randn(1, HEADS, LENGTH, LENGTH, generator=torch.Generator().manual_seed(1))
    causal = torch.full((1, 1, LENGTH, LENGTH), LOWEST).triu(1)
    nothing = torch.zeros(1, 1, LENGTH, LENGTH)
    got, decisions = compiled(function, q, k, v, numbers, causal, nothing)
    assert [decision.method for decision in decisions] == ["dense"] * 2, [decision.reason for decision in decisions]
    torch.testing.assert_close(got, function(q, k, v, numbers, causal, nothing), atol=1e-5, rtol=0)
