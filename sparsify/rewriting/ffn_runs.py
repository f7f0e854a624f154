"""Assigns the generated tokens that `ffn_skip` counts to one model in one thread.

A model is identified by a weight of its feed-forward blocks, which all of its graphs read. A model without such a weight (weights that are
computed anew in each call) starts a new run at every call, and stays dense for its warm-up.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from sparsify.matching.attention import find_attention
from sparsify.matching.feed_forward import find_feed_forward
from sparsify.ops import feed_forward as ffn_ops

_COUNTING = (ffn_ops.ffn_start, ffn_ops.ffn_prompt)


@dataclass(frozen=True)
class Owner:
    """How a graph's calls find the weight that identifies the model.

    index: of the weight among the graph's inputs; None when it is no input.
    constant: the weight, when it is an attribute of the graph; None otherwise.
    keys: device and number of each run that the graph reads.
    """

    index: int | None
    constant: Tensor | None
    keys: tuple[tuple[torch.device, int], ...]

    def counting(self, inputs: Sequence[Any]) -> contextlib.AbstractContextManager[None]:
        return ffn_ops.counting(inputs[self.index] if self.index is not None else self.constant, self.keys)


def owner(gm: fx.GraphModule, rewritten: fx.GraphModule) -> Owner | None:
    """The owner of the runs that a rewritten graph reads; None where it reads none.

    Args:
        gm: the graph before rewriting.
        rewritten: the graph after it.
    """
    asking = [node for node in rewritten.graph.nodes if node.op == "call_function" and node.target in _COUNTING]
    if not asking:
        return None
    sites = find_feed_forward(gm, find_attention(gm))
    weight = next((site.down for site in sites if site.down is not None), None)
    while weight is not None and weight.op not in ("placeholder", "get_attr"):
        weight = next(iter(weight.all_input_nodes), None)
    keys = dict.fromkeys((site.device, node.kwargs["key"]) for site in sites[:1] for node in asking)
    if weight is not None and weight.op == "placeholder":
        return Owner([n for n in gm.graph.nodes if n.op == "placeholder"].index(weight), None, tuple(keys))
    return Owner(None, getattr(gm, str(weight.target), None) if weight is not None else None, tuple(keys))
