"""No attention is passed over in silence: a softmax between two products is a site or a near miss with a true reason, in any words."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from sparsify.matching.attention import find_attention

BATCH, HEADS, LENGTH, DIM = 2, 4, 6, 6


def found(function):
    """What the matcher says of a function of query, key and value."""
    graphs = []

    def backend(gm, example_inputs):
        graphs.append(find_attention(gm))
        return gm.forward

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(function, backend=backend, fullgraph=True)(*torch.randn(3, BATCH, HEADS, LENGTH, DIM))
    return [site.near_miss or site.mask.reason for site in graphs[0]]


def weights(query, key, dim=-1):
    return (query @ key.mT).softmax(dim)


def products_of_five(query, key, value):
    query, key, value = (x.view(BATCH, 2, 2, LENGTH, DIM) for x in (query, key, value))
    return torch.einsum("bnhts,bnhsc->bnhtc", torch.einsum("bnhtc,bnhsc->bnhts", query, key).softmax(-1), value)


def whole_module(query, key, value):
    x, weight = query.flatten(0, 1), torch.ones(3 * DIM, DIM)
    return F.multi_head_attention_forward(
        x, x, x, DIM, 2, weight, None, None, None, False, 0.0, torch.ones(DIM, DIM), None, training=False, need_weights=False
    )[0]


def buckets():
    return (torch.arange(LENGTH)[:, None] + torch.arange(LENGTH)) % LENGTH


SAID = {
    "a word that is not known before": (lambda q, k, v: torch.asinh(q @ k.mT).softmax(-1) @ v, "pass through asinh"),
    "a word that is not known after": (lambda q, k, v: weights(q, k).nan_to_num() @ v, "the weights pass through nan_to_num"),
    "two words": (lambda q, k, v: torch.special.softmax(torch.sinc(q @ k.mT * 2), -1).sqrt() @ v, "the weights pass through sqrt"),
    "weights on the right": (lambda q, k, v: v.mT @ weights(q, k).mT, "the weights pass through|of another form"),
    "weights times weights": (lambda q, k, v: (weights(q, k) * weights(k, q)) @ v, "the weights pass through mul"),
    "the difference of two": (lambda q, k, v: (weights(q, k) - weights(k, q)) @ v, "the weights pass through sub"),
    "over the queries": (lambda q, k, v: weights(q, k, 2) @ v, "over dimension 2 of 4"),
    "over the heads": (lambda q, k, v: weights(q, k, 1) @ v, "over dimension 1 of 4"),
    "five dimensions": (products_of_five, "5 dimensions"),
    "two dimensions": (lambda q, k, v: weights(q[0, 0], k[0, 0]) @ v[0, 0], "2 dimensions"),
    "one head": (lambda q, k, v: weights(q[0], k[0]) @ v[0], "batch and heads are merged"),
    "an ellipsis": (lambda q, k, v: torch.einsum("...ij,...jd->...id", weights(q, k), v), "of another form"),
    "three factors": (lambda q, k, v: torch.einsum("bhid,bhjd,d->bhij", q, k, v[0, 0, 0]).softmax(-1) @ v, "pass through einsum"),
    "tensordot": (lambda q, k, v: torch.tensordot(weights(q, k)[0, 0], v[0, 0], 1), "of another form|part of the weights"),
    "rolled": (lambda q, k, v: (q @ k.mT).roll(1, -1).softmax(-1) @ v, "pass through roll"),
    "one call": (whole_module, "MultiheadAttention"),
}


@pytest.mark.parametrize("name", SAID)
def test_what_looks_like_attention_is_told(name):
    function, words = SAID[name]
    reasons = found(function)
    assert reasons and all(any(word in reason for word in words.split("|")) for reason in reasons), reasons


UNLIKE = {
    "logarithms": lambda q, k, v: F.log_softmax(q @ k.mT, -1) @ v,
    "a choice of experts": lambda q, k, v: (q[0, 0] @ k[0, 0].mT).softmax(-1).topk(2).values,
    "no product before": lambda q, k, v: (q + k).softmax(-1) @ v,
    "no product after": lambda q, k, v: torch.asinh(q @ k.mT).softmax(-1) + v,
    "a matrix of weights": lambda q, k, v: torch.asinh(q @ k[0, 0]).softmax(-1) @ v,
}


@pytest.mark.parametrize("name", UNLIKE)
def test_other_softmaxes_are_no_attention(name):
    assert not found(UNLIKE[name])
