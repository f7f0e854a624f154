"""A sink that scales attention's output instead of joining its softmax.

With L the sum of a row's exp(logits) and t the sink logit, softmax over the logits and t gives each key exp(s) / (L + exp(t)): its weight
without the sink times L / (L + exp(t)) = 1 / (1 + exp(t - log L)) = sigmoid(log L - t), where log L = logsumexp(logits). That factor is the
same for all keys of a row and can be taken out of the product with the values.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass

import torch
from torch import fx

from sparsify.graph.aliasing import example_tensor, tensor_of
from sparsify.graph.calls import Unbound, bind
from sparsify.masks.symbolic import sizes
from sparsify.matching.eager_ops import CAST, MUL, SUB, NoMatch, bind_or_refuse
from sparsify.matching.scores import check_cast

LOG_SUMS = {torch.logsumexp, torch.special.logsumexp, "logsumexp"}
_SIGMOIDS = {torch.sigmoid, torch.special.expit, torch.nn.functional.sigmoid, "sigmoid"}


@dataclass(frozen=True)
class ScalingSink:
    """output: the scaled output. logits: the sink logits, broadcastable to the rows' log-sums of `rank` dimensions. nodes: what makes the
    factor of the scores."""

    output: fx.Node
    logits: fx.Node
    rank: int
    nodes: tuple[fx.Node, ...]


def scaling_sink(scores: fx.Node, output: fx.Node) -> ScalingSink | None:
    """The sink that scales attention's `output`, [batch, heads, query, dim], whose softmax is over `scores`; None without one."""
    users = list(output.users)
    if len(users) != 1 or users[0].target not in MUL:
        return None
    try:
        factors = bind(users[0], "input: tensor, other: tensor")
    except Unbound:
        return None
    factor = factors.other if factors.input is output else factors.input
    column = (*sizes(example_tensor(output))[:-1], 1)
    if len(column) != 4 or sizes(example_tensor(users[0])) != sizes(example_tensor(output)) or sizes(example_tensor(factor)) != column:
        return None
    found = _factor(factor, scores)
    return ScalingSink(users[0], *found) if found is not None else None


def _factor(factor: fx.Node, scores: fx.Node) -> tuple[fx.Node, int, tuple[fx.Node, ...]] | None:
    """(sink logits, rank, nodes) of sigmoid(logsumexp(scores) - logits), a column per row."""
    nodes: list[fx.Node] = []
    here, logits, rank, squashed = factor, None, 0, False
    while isinstance(here, fx.Node) and tensor_of(here) is not None and len(here.users) == 1:
        nodes.append(here)
        if here.target in LOG_SUMS:
            return (logits, rank, tuple(nodes)) if squashed and logits is not None and _of_rows(here, scores) else None
        if here.target in _SIGMOIDS and not squashed:
            squashed = True
        elif here.target in SUB and squashed and logits is None:
            try:
                call = bind(here, "input: tensor, other: tensor, *, alpha=1")
            except Unbound:
                return None
            # the difference has a number for each row, whatever the logits are broadcast from
            if call.alpha != 1 or example_tensor(call.input).shape != example_tensor(here).shape:
                return None
            logits, rank, here = call.other, example_tensor(here).dim(), call.input
            continue
        elif here.target in CAST:
            try:
                check_cast(here)
            except NoMatch:
                return None
        elif not _adds_column(here):
            return None
        here = here.args[0]
    return None


def _adds_column(node: fx.Node) -> bool:
    """Whether a node puts a dimension of size 1 behind the others."""
    if node.target in (torch.unsqueeze, "unsqueeze"):
        return bind_or_refuse(node, "input: tensor, dim: int").dim in (-1, example_tensor(node).dim() - 1)
    return node.target is operator.getitem and node.args[1] == (Ellipsis, None)


def _of_rows(node: fx.Node, scores: fx.Node) -> bool:
    try:
        call = bind(node, "input: tensor, dim, keepdim: bool = False")
    except Unbound:
        return False
    last = (-1, example_tensor(scores).dim() - 1)
    return call.input is scores and call.dim in (*last, *((d,) for d in last), *([d] for d in last))
