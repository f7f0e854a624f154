"""Follows the gradient of a text's loss back to every attention's output, in a captured graph of a dense model.

The graph is cut behind each attention, and what lies between two cuts is computed again when the gradient arrives there: memory is
O(layers · tokens · hidden size) for values at the cuts, O(tokens · vocabulary) for logits and their gradient, and what one layer needs.
What an attention was computed from is handed over together with the gradient of its output, so that no gradient is kept either.
"""

from __future__ import annotations

import contextvars
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.split_module import split_module
from torch.utils.checkpoint import checkpoint

# called with query, key, value and the gradient of a loss with respect to the output, all [1, heads, tokens, head_dim]
Receiver = Callable[[Tensor, Tensor, Tensor, Tensor], None]
_CHUNK = 1 << 27  # logits whose probabilities are computed at once


class Watch(torch.autograd.Function):
    """An attention's output, unchanged; its operands and its gradient go to `receive` when the gradient is known.

    anchor: a scalar that requires a gradient, so that one is followed through models whose weights need none.
    """

    @staticmethod
    def forward(ctx: Any, output: Tensor, query: Tensor, key: Tensor, value: Tensor, anchor: Tensor, receive: Receiver) -> Tensor:
        ctx.save_for_backward(query, key, value)
        ctx.receive = receive
        ctx.context = contextvars.copy_context()  # of this thread: gradients of a GPU arrive in another
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (gradient,) = gradients
        with torch.no_grad():
            ctx.context.run(ctx.receive, *ctx.saved_tensors, gradient)
        return gradient, None, None, None, None, None


@dataclass(frozen=True)
class Predictions:
    """What a small change of a text's logits z does to its predictions p, as a gradient: KL(p ‖ p') ≈ ½ E[(v · Δz)²].

    v = (diag(√p) - p √pᵀ) ε with random signs ε has the covariance diag(p) - p pᵀ, the Fisher information of a softmax. Followed back to an
    attention's output it tells the divergence that a change there alone makes. Each row of logits draws its own signs, so that what a
    change does to several of them adds up in the mean.
    Source: Martens, "New Insights and Perspectives on the Natural Gradient Method", arXiv 1412.1193.

    last: rows at the end whose divergences weigh as much as those of all others together; 0: every row weighs the same.
    seed: of the signs, which are others for another text.
    """

    last: int = 0
    seed: int = 0

    def gradient(self, logits: Tensor, ids: Tensor) -> Tensor:
        """v of every row, times the root of its weight, which is 1 in the mean.

        Args:
            logits: [1, tokens, vocabulary]. ids: int64 [1, tokens].

        Returns:
            as the logits.
        """
        found, rows = logits.detach()[0], logits.shape[1]
        draw = torch.Generator(found.device).manual_seed((self.seed * 1_000_003 + int(ids.sum())) % (1 << 32))
        weights = torch.ones(rows, 1, device=found.device)
        if self.last:
            weights[: -self.last] = rows / (2 * (rows - self.last))
            weights[-self.last :] = rows / (2 * self.last)
        gradient, step = torch.empty_like(logits), max(1, _CHUNK // logits.shape[2])
        for part, weight, out in zip(found.split(step), weights.split(step), gradient[0].split(step), strict=True):
            p = part.float().softmax(-1)
            signed = p.sqrt() * (torch.randint(0, 2, p.shape, generator=draw, device=p.device, dtype=torch.int8) * 2 - 1)
            out.copy_((signed - p * signed.sum(-1, keepdim=True)) * weight.sqrt())
        return gradient


def in_parts(gm: fx.GraphModule, cuts: list[fx.Node]) -> fx.GraphModule:
    """The same graph, cut behind each of these nodes; every part is computed again in the backward pass. It was captured where no gradients
    are followed, and runs where they are.

    Args:
        gm: is consumed.
        cuts: in the graph's order.
    """
    for node in list(gm.graph.nodes):
        if node.target is torch._C._set_grad_enabled:
            gm.graph.erase_node(node)
    number, behind, part = {}, set(cuts), 0
    for node in gm.graph.nodes:
        number[node] = part
        part += node in behind
    parts = split_module(gm, gm, number.__getitem__)
    for name, one in list(parts.named_children()):
        setattr(parts, name, _Again(one))
    return parts


class _Again(nn.Module):
    """A part of a graph whose values are not kept: it runs once more when a gradient arrives."""

    def __init__(self, part: nn.Module):
        super().__init__()
        self.part = part

    def forward(self, *operands: Any) -> Any:
        return checkpoint(self.part, *operands, use_reentrant=False, preserve_rng_state=False)
