"""chunkkv: another policy's scores, but whole runs of neighbouring tokens stay or go.

Liu et al., "ChunkKV: Semantic-Preserving KV Cache Compression for Efficient Long-Context LLM Inference", arXiv 2502.00299, algorithm 1.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from sparsify.policies.base import Candidates, LayerFacts, Layout, Policy
from sparsify.policies.wrapper import Wrapper


class ChunkKV(Wrapper):
    """Runs of `chunk` tokens stay or go by the mean of their scores under the policy `of`, which also says how the budget is laid out.

    of: name of the policy that scores.
    options: its options.
    chunk: tokens of a run, counted from each row's first real token.
    """

    name: ClassVar[str] = "chunkkv"

    of: str = Field("snapkv", description="the policy that scores")
    options: dict[str, Any] = Field(default_factory=dict, description="its options")
    chunk: int = Field(10, ge=2, le=4096, description="tokens of a run")

    def bind(self, layer: LayerFacts) -> Policy:
        return self._over(self.inner.bind(layer))

    @property
    def scorer(self) -> Policy:
        return self._over(self.inner.scorer)

    def _over(self, inner: Policy) -> Policy:
        return self if inner is self.inner else ChunkKV(of=inner.name, options=inner.model_dump(mode="json"), chunk=self.chunk)

    def layout(self, budget: int | None) -> Layout:
        return self.inner.layout(budget)

    def score(self, candidates: Candidates) -> Tensor:
        scores, at = self.inner.score(candidates).float(), candidates.positions
        real = at >= 0
        run = (at.clamp(min=0) // self.chunk).long()
        # after earlier evictions positions may be far above the number of candidates: runs are numbered by those that are there
        first = torch.cat((torch.ones_like(run[..., :1]), (run[..., 1:] != run[..., :-1]).long()), -1)
        run = first.cumsum(-1) - 1
        sums = torch.zeros_like(scores).scatter_add_(-1, run, scores.masked_fill(~real, 0))
        sizes = torch.zeros_like(scores).scatter_add_(-1, run, real.float())
        return (sums / sizes.clamp(min=1)).gather(-1, run)
