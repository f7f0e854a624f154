"""knorm: tokens whose keys are short.

Devoto et al., "A Simple and Effective L2 Norm-Based Strategy for KV Cache Compression", arXiv 2406.11430.
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field
from torch import Tensor

from sparsify.policies.base import Candidates
from sparsify.policies.scored import ScoredPolicy


class Knorm(ScoredPolicy):
    """Tokens whose keys have the smallest L2 norm stay, chosen per KV head, and the last ones. Reads no queries.

    recent: last tokens that stay whatever their keys.
    """

    name: ClassVar[str] = "knorm"

    recent: int = Field(32, ge=1, le=1 << 20, description="last tokens that stay, in tokens")

    @property
    def newest(self) -> int:
        return self.recent

    def score(self, candidates: Candidates) -> Tensor:
        return -candidates.keys.float().norm(dim=-1)
