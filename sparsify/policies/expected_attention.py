"""expected_attention: what the queries to come will look at, as far as those so far tell.

Devoto et al., "Expected Attention: KV Cache Compression by Estimating Attention from Future Queries Distribution", arXiv 2510.00636; as
kvpress computes it (`ExpectedAttentionPress`, by default).
"""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from sparsify.policies.base import EVERY_QUERY, Candidates, LayerFacts, Numbers, Policy
from sparsify.policies.rotation import Rotation, angles_on
from sparsify.policies.scored import ScoredPolicy


class ExpectedAttention(ScoredPolicy):
    """Tokens stay to which queries drawn from a normal distribution would attend most, times the length of their values.

    The distribution has the mean and the covariance of the call's queries before rotation, rotated by the average over the next `future`
    positions; the expected weight is softmax(q·k + k·C·k / 2), both scaled as logits are, on the average of a KV head's query heads. A
    softcap does not enter.

    sinks: first tokens of each row that stay and whose queries do not count.
    future: positions over which the rotation is averaged.
    covariance: whether the covariance enters, or the mean alone.
    value_norm: whether weights are multiplied by the L2 norm of the values.
    frequencies: angle per position of each rotated pair; the cache says it.
    """

    name: ClassVar[str] = "expected_attention"

    sinks: int = Field(4, ge=0, le=1 << 20, description="first real tokens of each row that stay, in tokens")
    future: int = Field(512, ge=1, le=1 << 16, description="positions over which the rotation is averaged")
    covariance: bool = Field(True, description="whether the queries' covariance enters")
    value_norm: bool = Field(True, description="whether weights are multiplied by the norm of the values")
    frequencies: Numbers = Field((), description="of the rotary embedding; the cache says them")

    def bind(self, layer: LayerFacts) -> Policy:
        return self.model_copy(update={"frequencies": tuple(layer.inverse_frequencies().tolist())})

    @property
    def observed(self) -> int:
        return EVERY_QUERY

    @property
    def turns_back(self) -> bool:
        return True

    @property
    def newest(self) -> int:
        return 1

    def score(self, candidates: Candidates) -> Tensor:
        queries, at = candidates.queries, candidates.query_positions
        assert queries is not None and at is not None, "the policy reads queries"
        if not self.frequencies:
            raise self.refuse("the rotary embedding's frequencies are not known", "SparseCache binds its policy to the model")
        angles = angles_on(queries, self.frequencies)
        steps = candidates.newest[:, None] + torch.arange(1, self.future + 1, device=at.device)
        ahead = Rotation.by(steps, angles).mean()  # [batch, 1, pairs]
        back = Rotation.by(-at, angles)
        counted = (at >= self.sinks)[:, None, :, None]
        rows = counted.sum(2).clamp(min=1)[..., None]  # [batch, 1, 1, 1]
        kv_heads, group = candidates.keys.shape[1], queries.shape[1] // candidates.keys.shape[1]
        scores: list[Tensor] = []
        for head in range(kv_heads):  # one at a time bounds the memory
            # what is no token may hold anything
            nothing = candidates.positions[:, head, None] < 0
            keys = candidates.keys[:, head, None].float().masked_fill(nothing[..., None], 0)
            drawn = back.turn(queries[:, head * group : (head + 1) * group].float()).masked_fill(~counted, 0)
            mean = drawn.sum(2, keepdim=True) / rows
            logits = (candidates.scale * ahead.turn(mean) @ keys.transpose(-1, -2))[:, :, 0]
            if self.covariance:
                centred = (drawn - mean).masked_fill(~counted, 0)
                spread = ahead.turn(centred.transpose(-1, -2) @ centred / rows)
                spread = ahead.turn(spread.transpose(-1, -2))
                logits = logits + candidates.scale**2 / 2 * ((keys @ spread) * keys).sum(-1)
            sink = candidates.positions[:, head, None] < self.sinks
            weight = logits.masked_fill(sink | nothing, -torch.inf).softmax(-1).nan_to_num(0).mean(1)
            if self.value_norm:
                weight = weight * candidates.values[:, head].float().norm(dim=-1)
            scores.append(weight.masked_fill(sink[:, 0], torch.inf))
        return torch.stack(scores, 1)
